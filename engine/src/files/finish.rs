//! What is done to files last, when the tree is complete: until then nothing may happen to them, and what
//! the restore does must not show in them.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use firn_images::ImageKind;
use firn_proto::{FdTypes, FileEntry, GhostFileEntry};

use super::error::FileRestoreError;
use super::store::FileStore;
use super::watched::{self, Finder, Watched};
use super::{fanotify, inotify, open, timerfd};

impl FileStore {
    /// Fills epoll sets, sets watches, starts timers.
    ///
    /// # Errors
    /// The kernel refuses one of them, or a watched file is not there.
    pub fn finish(&self) -> Result<(), FileRestoreError> {
        self.finish_epolls()?;
        self.finish_watches()?;
        for entry in self.opened_entries() {
            if let Some(timer) = &entry.tfd
                && let Some(fd) = self.opened(FdTypes::Timerfd, entry.id)?
            {
                timerfd::start(fd, timer)?;
            }
        }
        Ok(())
    }

    fn finish_watches(&self) -> Result<(), FileRestoreError> {
        let mut finder = Finder::default();
        let mut ghosts = None;
        for entry in self.opened_entries() {
            let kind = match entry {
                FileEntry { ify: Some(_), .. } => FdTypes::Inotify,
                FileEntry { ffy: Some(_), .. } => FdTypes::Fanotify,
                _ => continue,
            };
            let Some(fd) = self.opened(kind, entry.id)? else {
                continue;
            };
            let mut target = |watched: &Watched, path: Option<&str>| match path {
                Some(path) => {
                    let path = open::local_path(path.as_bytes(), &self.options);
                    let name = path.display().to_string();
                    watched::open_path(&path)
                        .map_err(FileRestoreError::refused("open the watched file", name))
                }
                None => {
                    if ghosts.is_none() {
                        ghosts = Some(self.ghost_inodes()?);
                    }
                    self.open_unnamed(watched, &mut finder, ghosts.as_ref().expect("just read"))
                }
            };
            if let Some(inotify) = &entry.ify {
                inotify::set_watches(&fd, inotify, &mut target)?;
            }
            if let Some(group) = &entry.ffy {
                let mount = |path: &[u8]| {
                    let path = [b"/", path].concat();
                    open::local_path(&path, &self.options)
                };
                fanotify::set_marks(&fd, group, &mut target, mount)?;
            }
        }
        Ok(())
    }

    fn open_unnamed(
        &self,
        watched: &Watched,
        finder: &mut Finder,
        ghosts: &HashMap<(u32, u64), u32>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let ghost = ghosts.get(&(watched.dev, watched.ino));
        let opened = ghost.map(|id| self.opened(FdTypes::Reg, *id)).transpose()?;
        if let Some(fd) = opened.flatten() {
            return fd
                .as_fd()
                .try_clone_to_owned()
                .map_err(|error| FileRestoreError::refused("duplicate", "a file")(error.into()));
        }
        finder
            .open(watched)
            .ok_or_else(|| FileRestoreError::Missing {
                role: "watched file",
                path: Path::new(&format!("inode {}", watched.ino)).to_owned(),
            })
    }

    /// Entries of files without a name, by the device and inode that these had.
    fn ghost_inodes(&self) -> Result<HashMap<(u32, u64), u32>, FileRestoreError> {
        let mut inodes = HashMap::new();
        for (ghost, id) in self.ghosts() {
            let mut reader = self.images.reader(ImageKind::GhostFile, u64::from(ghost))?;
            let entry: GhostFileEntry = reader.expect_entry()?;
            if let (Some(dev), Some(ino)) = (entry.dev, entry.ino) {
                inodes.insert((dev, ino), id);
            }
        }
        Ok(inodes)
    }
}
