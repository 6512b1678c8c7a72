//! Inotify instances with their watches.
//!
//! Watches keep their numbers. Events that wait cannot be read without taking them out, so they are
//! counted in a warning and lost to a restored task; a task that goes on keeps them. Watches are set
//! when everything else is done, so that they do not tell of the restore itself.

use std::os::fd::{AsFd, OwnedFd};

use firn_proto::{FdTypes, FileEntry, InotifyFileEntry, InotifyWdEntry};
use firn_sys::fsnotify;

use super::anonymous::Anonymous;
use super::dump::{Collected, DumpState};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};
use super::watched::{self, Watched, hex, path_to, words};

/// Events, and the flags that fdinfo shows as well.
const SETTABLE: u32 = 0xfff | 0x0400_0000 | 0x8000_0000;

/// Watches of files.
pub(super) struct Inotify;

impl Anonymous for Inotify {
    type Record = InotifyFileEntry;
    const FD_TYPE: FdTypes = FdTypes::Inotify;
    const LINK: &'static str = "inotify";
    const NAME: &'static str = "an inotify instance";

    fn describe(
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<InotifyFileEntry, FileDumpError> {
        let file = dumping.file;
        let collected = &mut *state.collected;
        warn_of_events(dumping, collected);
        let mut wd = Vec::new();
        for line in &file.info.lines {
            if let Some(line) = line.strip_prefix("inotify ") {
                wd.push(watch(file, line, dumping.id, collected)?);
            }
        }
        Ok(InotifyFileEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            wd,
        })
    }

    fn make(inotify: &InotifyFileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let fd = fsnotify::inotify()
            .map_err(FileRestoreError::refused("create", "an inotify instance"))?;
        open::set_flags(&fd, inotify.flags, "an inotify instance")?;
        Ok(fd)
    }

    fn record(entry: &FileEntry) -> Option<&InotifyFileEntry> {
        entry.ify.as_deref()
    }

    fn put(record: InotifyFileEntry, entry: &mut FileEntry) {
        entry.ify = Some(Box::new(record));
    }
}

fn watch(
    file: &OpenFile,
    line: &str,
    id: u32,
    collected: &mut Collected,
) -> Result<InotifyWdEntry, FileDumpError> {
    let words = words(line);
    let number = |key| hex(&words, key).and_then(|value| u32::try_from(value).ok());
    let (Some(wd), Some(mask), Some(watched)) =
        (number("wd"), number("mask"), Watched::parse(&words))
    else {
        return Err(file.unexpected("inotify"));
    };
    Ok(InotifyWdEntry {
        id,
        i_ino: watched.ino,
        mask,
        ignored_mask: number("ignored_mask").unwrap_or(0),
        s_dev: watched.dev,
        wd,
        f_handle: collected.locate_watched(file, &watched)?,
    })
}

/// Says how many bytes of events wait; they can't be saved.
pub(super) fn warn_of_events(dumping: &Dumping<'_>, collected: &mut Collected) {
    let waiting = dumping.duplicate.map(fsnotify::waiting);
    if let Some(Ok(bytes @ 1..)) = waiting {
        let file = dumping.file;
        collected.warnings.push(format!(
            "task {}: {} ({}): {bytes} bytes of events wait in it and are not saved",
            file.pid,
            file.place,
            String::from_utf8_lossy(&file.link)
        ));
    }
}

/// Sets the watches of an instance, in the order in which they were made. `target` opens a watched file.
pub(super) fn set_watches(
    fd: impl AsFd,
    inotify: &InotifyFileEntry,
    mut target: impl FnMut(&Watched, Option<&str>) -> Result<OwnedFd, FileRestoreError>,
) -> Result<(), FileRestoreError> {
    let mut watches: Vec<&InotifyWdEntry> = inotify.wd.iter().collect();
    watches.sort_by_key(|watch| watch.wd);
    for watch in watches {
        let watched = Watched::from_image(watch.s_dev, watch.i_ino, &watch.f_handle);
        let file = target(&watched, watch.f_handle.path.as_deref())?;
        let mask = watch.mask & SETTABLE;
        fsnotify::add_watch(&fd, &path_to(&file), mask, watch.wd.cast_signed()).map_err(
            FileRestoreError::refused(
                "set",
                format!("watch {} of inotify {}", watch.wd, inotify.id),
            ),
        )?;
    }
    Ok(())
}

impl Collected {
    /// Finds a watched file and returns what the image says about it.
    pub(super) fn locate_watched(
        &mut self,
        file: &OpenFile,
        watched: &Watched,
    ) -> Result<firn_proto::FhEntry, FileDumpError> {
        match self.finder.find(watched) {
            Some(found) => {
                if let watched::Found::Nameless(old) = &found {
                    self.nameless_watches
                        .push((watched.clone(), old.clone(), file.clone()));
                }
                Ok(watched.to_image(&found))
            }
            None => {
                let (major, minor) = (watched.dev >> 20, watched.dev & 0xf_ffff);
                Err(FileDumpError::Obstacles(vec![file.obstacle(Trouble::new(
                    format!(
                        "it watches inode {} of device {major}:{minor}, which no path was found for",
                        watched.ino
                    ),
                    "mount that filesystem where the dump runs, or let the task remove the watch",
                ))]))
            }
        }
    }
}
