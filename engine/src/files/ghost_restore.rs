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
use firn_sys::{Errno, Pid, clone3, task, wait};

use super::error::FileRestoreError;
use super::{open, task_files};

const SIGKILL: i32 = 9;

/// Names that exist only while files are opened.
#[derive(Debug, Default)]
pub(super) struct StandIns {
    /// What to remove, in the order of making.
    made: Vec<(PathBuf, Made)>,
    /// Path to open, by number of the entry.
    paths: HashMap<u32, PathBuf>,
    /// Files that never had a name, by number of the entry that made them.
    nameless: HashMap<u32, OwnedFd>,
    /// Processes that stand for tasks which are gone, by their old number.
    helpers: HashMap<Pid, Pid>,
    /// Names made for files, by the file's path and the name that was wanted.
    names: HashMap<(PathBuf, PathBuf), PathBuf>,
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
            (None, Some(first)) if entry.mode & S_IFMT == S_IFDIR && self.has_made(&first.old) => {
                // Something below it was made before it.
                set_attributes(&first.old, &entry)?;
                first.old.clone()
            }
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
        let flags = open::harmless(maker.flags);
        let fd = match file::create_nameless(dir, flags, 0o600) {
            // A filesystem that can't, such as an image is restored to from another one.
            Err(Errno::EOPNOTSUPP) => return self.make_named(maker, entry, reader),
            fd => fd.map_err(refused_errno("create a nameless file in", dir))?,
        };
        let content = open::reopen(&fd, file::O_RDWR.cast_unsigned(), "a nameless file")?;
        fill(content, entry, reader, &maker.old)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        self.nameless.insert(maker.id, fd);
        Ok(path)
    }

    /// Makes a file that should never have had a name, with one for the time being.
    fn make_named(
        &mut self,
        maker: &GhostName,
        entry: &GhostFileEntry,
        reader: &mut ImageReader,
    ) -> Result<PathBuf, FileRestoreError> {
        let path = self.free_name(&maker.old)?;
        self.make(&path, entry, reader)?;
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

    /// Makes a process for the time being, whose file in /proc stands for that of a task which is gone.
    pub(super) fn stand_in_task(
        &mut self,
        id: u32,
        task: Pid,
        path: &[u8],
    ) -> Result<(), FileRestoreError> {
        let helper = match self.helpers.get(&task) {
            Some(helper) => *helper,
            None => {
                let made = clone3::spawn_paused(Some(task)).or_else(|errno| match errno {
                    // Somebody else has the number now: any other tells as little.
                    Errno::EEXIST | Errno::EPERM => clone3::spawn_paused(None),
                    errno => Err(errno),
                });
                let helper = made.map_err(FileRestoreError::refused(
                    "make",
                    format!("a process in the place of task {task}"),
                ))?;
                self.helpers.insert(task, helper);
                helper
            }
        };
        let standing = task_files::path_of_helper(path, helper).ok_or_else(|| {
            FileRestoreError::corrupt(id, "it has a task for a stand-in and is not in /proc")
        })?;
        self.paths.insert(id, standing);
        Ok(())
    }

    /// Gives a file another name; where its filesystem has no hard links, or not there, the first one does
    /// for all, and only /proc shows that.
    fn link(&mut self, path: &Path, wanted: &Path) -> Result<PathBuf, FileRestoreError> {
        let key = (path.to_owned(), wanted.to_owned());
        if let Some(known) = self.names.get(&key) {
            return Ok(known.clone());
        }
        let name = self.free_name(wanted)?;
        match fs::hard_link(path, &name).map_err(Errno::from) {
            Ok(()) => {
                self.made.push((name.clone(), Made::Other));
                self.names.insert(key, name.clone());
                Ok(name)
            }
            Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EMLINK) => {
                Ok(path.to_owned())
            }
            Err(errno) => Err(refused_errno("link", &name)(errno)),
        }
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

    fn has_made(&self, dir: &Path) -> bool {
        let mut made = self.made.iter();
        made.any(|(path, made)| *made == Made::Directory && path == dir)
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
        for helper in self.helpers.values() {
            let _ = task::kill(*helper, SIGKILL);
            let _ = wait::wait(*helper);
        }
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
