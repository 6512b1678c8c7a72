//! Fanotify groups with their marks on inodes, mounts and filesystems.
//!
//! Events that wait are lost with a warning, as with inotify. Marks are set when everything else is
//! done. A mark on a whole filesystem has no place in CRIU's images: it is written as one on the mount
//! that shows it, with a field of ours that says more.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use firn_proto::{
    FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry, FdTypes,
    FileEntry, FirnFanotifyMarkEntry, MarkType,
};
use firn_sys::file::O_NONBLOCK;
use firn_sys::fsnotify;

use super::anonymous::Anonymous;
use super::dump::{Collected, DumpState};
use super::error::{FileDumpError, FileRestoreError};
use super::inotify::warn_of_events;
use super::kind::Dumping;
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};
use super::watched::{self, Watched, hex, path_to, words};

const FAN_CLOEXEC: u32 = 1;
const FAN_NONBLOCK: u32 = 2;
const FAN_MARK_ADD: u32 = 1;
const FAN_MARK_MOUNT: u32 = 0x10;
const FAN_MARK_IGNORED_MASK: u32 = 0x20;
const FAN_MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
const FAN_MARK_FILESYSTEM: u32 = 0x100;
const FAN_MARK_EVICTABLE: u32 = 0x200;
const FAN_MARK_IGNORE: u32 = 0x400;

/// Marks on files, mounts and filesystems.
pub(super) struct Fanotify;

impl Anonymous for Fanotify {
    type Record = FanotifyFileEntry;
    const FD_TYPE: FdTypes = FdTypes::Fanotify;
    const LINK: &'static str = "[fanotify]";
    const NAME: &'static str = "a fanotify group";

    fn describe(
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FanotifyFileEntry, FileDumpError> {
        let file = dumping.file;
        let collected = &mut *state.collected;
        warn_of_events(dumping, collected);
        let mut entry = FanotifyFileEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            ..FanotifyFileEntry::default()
        };
        for line in &file.info.lines {
            let Some(line) = line.strip_prefix("fanotify ") else {
                continue;
            };
            let words = words(line);
            let number = |key| hex(&words, key).and_then(|value| u32::try_from(value).ok());
            match (number("flags"), number("event-flags")) {
                (Some(flags), Some(event_flags)) => {
                    (entry.faflags, entry.evflags) = (flags, event_flags);
                }
                _ => entry.mark.push(mark(file, line, dumping.id, collected)?),
            }
        }
        Ok(entry)
    }

    fn make(group: &FanotifyFileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let mut flags = group.faflags & !FAN_NONBLOCK | FAN_CLOEXEC;
        if group.flags & O_NONBLOCK.cast_unsigned() != 0 {
            flags |= FAN_NONBLOCK;
        }
        fsnotify::fanotify(flags, group.evflags)
            .map_err(FileRestoreError::refused("create", "a fanotify group"))
    }

    fn record(entry: &FileEntry) -> Option<&FanotifyFileEntry> {
        entry.ffy.as_deref()
    }

    fn put(record: FanotifyFileEntry, entry: &mut FileEntry) {
        entry.ffy = Some(Box::new(record));
    }
}

fn mark(
    file: &OpenFile,
    line: &str,
    id: u32,
    collected: &mut Collected,
) -> Result<FanotifyMarkEntry, FileDumpError> {
    let words = words(line);
    let number = |key| hex(&words, key).and_then(|value| u32::try_from(value).ok());
    let unexpected = || file.unexpected("fanotify");
    let mut mark = FanotifyMarkEntry {
        id,
        mflags: number("mflags").ok_or_else(unexpected)?,
        mask: number("mask").ok_or_else(unexpected)?,
        ignored_mask: number("ignored_mask").ok_or_else(unexpected)?,
        s_dev: number("sdev").unwrap_or(0),
        ..FanotifyMarkEntry::default()
    };
    if let Some(watched) = Watched::parse(&words) {
        mark.r#type = MarkType::Inode.into();
        mark.ie = Some(FanotifyInodeMarkEntry {
            i_ino: watched.ino,
            f_handle: collected.locate_watched(file, &watched)?,
        });
        return Ok(mark);
    }
    let mount = match number("mnt_id") {
        Some(mnt_id) => watched::mount_by_id(mnt_id),
        None => watched::mount_by_device(mark.s_dev),
    };
    let Some(mount) = mount else {
        return Err(FileDumpError::Obstacles(vec![file.obstacle(Trouble::new(
            "it has a mark on a mount that the dump does not see",
            "dump in the mount namespace of the task, or let the task remove the mark",
        ))]));
    };
    let is_filesystem = !words.contains_key("mnt_id");
    mark.r#type = MarkType::Mount.into();
    mark.s_dev = mount.dev;
    mark.me = Some(FanotifyMountMarkEntry {
        mnt_id: mount.id,
        // Relative to the root directory, as CRIU has it.
        path: Some(mount.relative()),
    });
    mark.firn = is_filesystem.then_some(FirnFanotifyMarkEntry {
        filesystem: Some(true),
    });
    Ok(mark)
}

/// Sets the marks of a group. `target` opens a marked file.
pub(super) fn set_marks(
    fd: impl AsFd,
    group: &FanotifyFileEntry,
    mut target: impl FnMut(&Watched, Option<&str>) -> Result<OwnedFd, FileRestoreError>,
    mount: impl Fn(&[u8]) -> std::path::PathBuf,
) -> Result<(), FileRestoreError> {
    for mark in &group.mark {
        let (mut flags, fd_of_mark);
        match (&mark.ie, &mark.me) {
            (Some(inode), _) => {
                let handle = &inode.f_handle;
                let watched = Watched::from_image(mark.s_dev, inode.i_ino, handle);
                fd_of_mark = target(&watched, handle.path.as_deref())?;
                flags = FAN_MARK_ADD;
            }
            (None, Some(on_mount)) => {
                let path = mount(on_mount.path.as_deref().unwrap_or_default());
                let name = path.display().to_string();
                fd_of_mark = watched::open_path(&path)
                    .map_err(FileRestoreError::refused("open the mount", name))?;
                flags = FAN_MARK_ADD | FAN_MARK_MOUNT;
                if mark.firn.as_ref().and_then(|firn| firn.filesystem) == Some(true) {
                    flags = FAN_MARK_ADD | FAN_MARK_FILESYSTEM;
                }
            }
            (None, None) => {
                return Err(FileRestoreError::corrupt(group.id, "a mark is on nothing"));
            }
        }
        flags |= mark.mflags & FAN_MARK_EVICTABLE;
        add(&fd, mark, flags, &path_to(&fd_of_mark))?;
    }
    Ok(())
}

fn add(
    fd: impl AsFd,
    mark: &FanotifyMarkEntry,
    flags: u32,
    path: &Path,
) -> Result<(), FileRestoreError> {
    let refused = || FileRestoreError::refused("set a mark of", format!("fanotify {}", mark.id));
    if mark.mask != 0 {
        fsnotify::add_mark(&fd, flags, u64::from(mark.mask), path).map_err(refused())?;
    }
    if mark.ignored_mask != 0 {
        let ignore = match mark.mflags & FAN_MARK_IGNORE {
            0 => FAN_MARK_IGNORED_MASK,
            newer => newer,
        };
        let flags = flags | ignore | mark.mflags & FAN_MARK_IGNORED_SURV_MODIFY;
        fsnotify::add_mark(&fd, flags, u64::from(mark.ignored_mask), path).map_err(refused())?;
    }
    Ok(())
}
