//! Bringing files back that had no name: made under a name for a moment, opened, removed again.
//!
//! A ghost gets its old name where that is free, so that /proc shows what it showed before, else one
//! beside it. Missing directories are made and removed as well. Whatever happens, dropping
//! [`StandIns`] leaves nothing behind.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use firn_images::{ImageDir, ImageKind, ImageReader};
use firn_proto::{GhostChunkEntry, GhostFileEntry, Timeval};
use firn_sys::file::{self, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use firn_sys::{Errno, Pid};

use super::error::FileRestoreError;

/// Names that exist only while files are opened.
#[derive(Debug, Default)]
pub(super) struct StandIns {
    /// What to remove, in the order of making.
    made: Vec<(PathBuf, Made)>,
    /// Path to open, by number of the entry.
    paths: HashMap<u32, PathBuf>,
    nr_spare_names: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Made {
    Directory,
    Other,
}

impl StandIns {
    /// The path to open for an entry that has a stand-in.
    pub(super) fn path(&self, id: u32) -> Option<&Path> {
        self.paths.get(&id).map(PathBuf::as_path)
    }

    /// Makes a ghost; `names` are its entries with their old paths on this machine.
    pub(super) fn make_ghost(
        &mut self,
        images: &ImageDir,
        ghost_id: u32,
        names: &[(u32, PathBuf)],
    ) -> Result<(), FileRestoreError> {
        let mut reader = images.reader(ImageKind::GhostFile, u64::from(ghost_id))?;
        let entry: GhostFileEntry = reader.expect_entry()?;
        let Some((id, old)) = names.first() else {
            return Ok(());
        };
        let path = self.free_name(old)?;
        self.make(&path, &entry, &mut reader)?;
        self.paths.insert(*id, path.clone());
        for (id, other) in &names[1..] {
            let standing = if other == old || entry.mode & S_IFMT == S_IFDIR {
                path.clone()
            } else {
                self.link(&path, other)?
            };
            self.paths.insert(*id, standing);
        }
        Ok(())
    }

    /// Gives the file at `path` its old name for the time being, for the entry `id`.
    pub(super) fn stand_in(
        &mut self,
        id: u32,
        path: &Path,
        old: &Path,
    ) -> Result<(), FileRestoreError> {
        let standing = self.link(path, old)?;
        self.paths.insert(id, standing);
        Ok(())
    }

    fn link(&mut self, path: &Path, wanted: &Path) -> Result<PathBuf, FileRestoreError> {
        let name = self.free_name(wanted)?;
        fs::hard_link(path, &name).map_err(refused("link", &name))?;
        self.made.push((name.clone(), Made::Other));
        Ok(name)
    }

    fn make(
        &mut self,
        path: &Path,
        entry: &GhostFileEntry,
        reader: &mut ImageReader,
    ) -> Result<(), FileRestoreError> {
        let made = match entry.mode & S_IFMT {
            S_IFREG => {
                let content = file::create(path, 0o600);
                let content = content.map_err(refused_errno("create", path))?;
                self.made.push((path.to_owned(), Made::Other));
                fill(content, entry, reader, path)?;
                None
            }
            S_IFDIR => {
                fs::create_dir(path).map_err(refused("create directory", path))?;
                Some(Made::Directory)
            }
            S_IFLNK => {
                let target = entry.symlnk_target.clone().unwrap_or_default();
                let target = std::ffi::OsStr::from_bytes(&target);
                std::os::unix::fs::symlink(target, path).map_err(refused("create link", path))?;
                Some(Made::Other)
            }
            _ => {
                let device = u64::from(entry.rdev.unwrap_or(0));
                file::make_node(path, entry.mode, device)
                    .map_err(refused_errno("create node", path))?;
                Some(Made::Other)
            }
        };
        self.made.extend(made.map(|made| (path.to_owned(), made)));
        set_attributes(path, entry)
    }

    /// The path itself where it is free, else one beside it; its directory exists afterwards.
    fn free_name(&mut self, wanted: &Path) -> Result<PathBuf, FileRestoreError> {
        if let Some(dir) = wanted.parent() {
            self.make_directories(dir)?;
        }
        let mut path = wanted.to_owned();
        while path.symlink_metadata().is_ok() {
            let name = format!(".firn-ghost-{}-{}", Pid::this(), self.nr_spare_names);
            self.nr_spare_names += 1;
            path = wanted.with_file_name(name);
        }
        Ok(path)
    }

    fn make_directories(&mut self, dir: &Path) -> Result<(), FileRestoreError> {
        let mut missing: Vec<&Path> = dir
            .ancestors()
            .take_while(|dir| dir.symlink_metadata().is_err())
            .collect();
        while let Some(dir) = missing.pop() {
            fs::create_dir(dir).map_err(refused("create directory", dir))?;
            self.made.push((dir.to_owned(), Made::Directory));
        }
        Ok(())
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        for (path, made) in self.made.iter().rev() {
            let removed = match made {
                Made::Directory => fs::remove_dir(path),
                Made::Other => fs::remove_file(path),
            };
            if let Err(error) = removed {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

fn fill(
    content: OwnedFd,
    entry: &GhostFileEntry,
    reader: &mut ImageReader,
    path: &Path,
) -> Result<(), FileRestoreError> {
    let mut content = File::from(content);
    if entry.chunks == Some(true) {
        while let Some(chunk) = reader.next_entry::<GhostChunkEntry>()? {
            content
                .seek(SeekFrom::Start(chunk.off))
                .map_err(refused("write", path))?;
            reader
                .copy_payload(chunk.len, &mut content)?
                .map_err(refused("write", path))?;
        }
    } else {
        let rest = reader.remaining();
        reader
            .copy_payload(rest, &mut content)?
            .map_err(refused("write", path))?;
    }
    match entry.size {
        Some(size) => content
            .set_len(size)
            .map_err(refused("set the size of", path)),
        None => Ok(()),
    }
}

fn set_attributes(path: &Path, entry: &GhostFileEntry) -> Result<(), FileRestoreError> {
    file::chown(path, entry.uid, entry.gid).map_err(refused_errno("set the owner of", path))?;
    if entry.mode & S_IFMT != S_IFLNK {
        // After the owner, whose change takes set-id bits away.
        let mode = Permissions::from_mode(entry.mode & 0o7777);
        fs::set_permissions(path, mode).map_err(refused("set the mode of", path))?;
    }
    if let (Some(atim), Some(mtim)) = (&entry.atim, &entry.mtim) {
        file::set_times(path, timespec(atim), timespec(mtim))
            .map_err(refused_errno("set the times of", path))?;
    }
    Ok(())
}

fn timespec(time: &Timeval) -> (i64, u32) {
    let seconds = i64::try_from(time.tv_sec).unwrap_or(i64::MAX);
    let micros = u32::try_from(time.tv_usec.min(999_999)).expect("below a million");
    (seconds, micros * 1000)
}

fn refused(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FileRestoreError {
    let make = refused_errno(action, path);
    |error| make(Errno::from(error))
}

fn refused_errno(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> FileRestoreError {
    FileRestoreError::refused(action, path.display().to_string())
}
