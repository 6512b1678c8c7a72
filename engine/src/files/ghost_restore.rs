//! Bringing files back that had no name: made under a name for a moment, opened, removed again.
//!
//! A ghost gets its old name where that is free, so that /proc shows what it showed before, else one
//! beside it. Missing directories are made and removed as well. Whatever happens, dropping
//! [`StandIns`] leaves nothing behind.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use firn_images::{ImageDir, ImageKind, ImageReader};
use firn_proto::{GhostChunkEntry, GhostFileEntry, Timeval};
use firn_sys::file::{self, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use firn_sys::{Errno, Pid};

use super::error::FileRestoreError;
use super::open;

/// Names that exist only while files are opened.
#[derive(Debug, Default)]
pub(super) struct StandIns {
    /// What to remove, in the order of making.
    made: Vec<(PathBuf, Made)>,
    /// Path to open, by number of the entry.
    paths: HashMap<u32, PathBuf>,
    /// Files that never had a name, by number of the entry that made them.
    nameless: HashMap<u32, OwnedFd>,
    nr_spare_names: u32,
}

/// An entry that leads to a ghost.
#[derive(Debug)]
pub(super) struct GhostName {
    /// Its number.
    pub(super) id: u32,
    /// Its path on this machine.
    pub(super) old: PathBuf,
    /// Its flags.
    pub(super) flags: u32,
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

    /// The open file of an entry that made a file without name.
    pub(super) fn take_nameless(&mut self, id: u32) -> Option<OwnedFd> {
        self.nameless.remove(&id)
    }

    /// Makes a ghost with all its entries.
    pub(super) fn make_ghost(
        &mut self,
        images: &ImageDir,
        ghost_id: u32,
        names: &[GhostName],
    ) -> Result<(), FileRestoreError> {
        let mut reader = images.reader(ImageKind::GhostFile, u64::from(ghost_id))?;
        let entry: GhostFileEntry = reader.expect_entry()?;
        let is_file = entry.mode & S_IFMT == S_IFREG;
        let maker = names
            .iter()
            .find(|name| is_file && open::is_nameless(name.flags));
        let path = match (maker, names.first()) {
            (Some(maker), _) => self.make_nameless(maker, &entry, &mut reader)?,
            (None, Some(first)) => {
                let path = self.free_name(&first.old)?;
                self.make(&path, &entry, &mut reader)?;
                path
            }
            (None, None) => return Ok(()),
        };
        for name in names {
            let one_name = maker.is_some() || entry.mode & S_IFMT == S_IFDIR;
            let standing = if one_name || name.old == names[0].old {
                path.clone()
            } else {
                self.link(&path, &name.old)?
            };
            self.paths.insert(name.id, standing);
        }
        Ok(())
    }

    /// Makes a file that may be given a name later, which a removed one may not. Returns a path to it.
    fn make_nameless(
        &mut self,
        maker: &GhostName,
        entry: &GhostFileEntry,
        reader: &mut ImageReader,
    ) -> Result<PathBuf, FileRestoreError> {
        let dir = maker.old.parent().unwrap_or(Path::new("/"));
        self.make_directories(dir)?;
        let fd = file::create_nameless(dir, open::harmless(maker.flags), 0o600);
        let fd = fd.map_err(refused_errno("create a nameless file in", dir))?;
        let content = open::reopen(&fd, file::O_RDWR.cast_unsigned(), "a nameless file")?;
        fill(content, entry, reader, &maker.old)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        self.nameless.insert(maker.id, fd);
        Ok(path)
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
                return fill(content, entry, reader, path);
            }
            S_IFDIR => {
                fs::create_dir(path).map_err(refused("create directory", path))?;
                Made::Directory
            }
            S_IFLNK => {
                let target = entry.symlnk_target.clone().unwrap_or_default();
                let target = std::ffi::OsStr::from_bytes(&target);
                std::os::unix::fs::symlink(target, path).map_err(refused("create link", path))?;
                Made::Other
            }
            _ => {
                let device = u64::from(entry.rdev.unwrap_or(0));
                file::make_node(path, entry.mode, device)
                    .map_err(refused_errno("create node", path))?;
                Made::Other
            }
        };
        self.made.push((path.to_owned(), made));
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
    if let Some(size) = entry.size {
        content
            .set_len(size)
            .map_err(refused("set the size of", path))?;
    }
    set_attributes_of(&content, entry).map_err(refused("set the attributes of", path))
}

/// Sets owner, mode and times of a regular file, in the order in which none changes another.
fn set_attributes_of(content: &File, entry: &GhostFileEntry) -> std::io::Result<()> {
    std::os::unix::fs::fchown(content, Some(entry.uid), Some(entry.gid))?;
    content.set_permissions(Permissions::from_mode(entry.mode & 0o7777))?;
    match (&entry.atim, &entry.mtim) {
        (Some(atim), Some(mtim)) => content.set_times(
            FileTimes::new()
                .set_accessed(system_time(atim))
                .set_modified(system_time(mtim)),
        ),
        _ => Ok(()),
    }
}

fn system_time(time: &Timeval) -> SystemTime {
    let (_, nanos) = timespec(time);
    let since = Duration::new(time.tv_sec, nanos);
    UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
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
