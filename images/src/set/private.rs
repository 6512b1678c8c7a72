//! The private subdirectory of a set being written.
//!
//! Its owner holds a lock on it, which the kernel drops when the owner dies, however it dies. A
//! later writer removes subdirectories whose lock it can take. The lock is taken after the
//! directory is made, so a sweeping writer may come in between and take it away: the new owner
//! sees that its name leads elsewhere or that the lock is taken, and begins again.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// What names of private subdirectories begin with.
const PREFIX: &str = ".firn-";
/// Sweepers that may come in between before something else must be wrong.
const MAX_ATTEMPTS: usize = 100;

/// Distinguishes the sets of one process.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A private subdirectory, locked, removed with all its files when dropped.
#[derive(Debug)]
pub(super) struct PrivateDir {
    path: PathBuf,
    dir: OwnedFd,
}

impl PrivateDir {
    pub(super) fn create(parent: &Path) -> io::Result<Self> {
        for _ in 0..MAX_ATTEMPTS {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)) {
                Err(Errno::EXIST) => continue,
                made => made?,
            }
            if let Some(dir) = lock_new(&path)? {
                return Ok(Self { path, dir });
            }
        }
        Err(io::Error::other(
            "private subdirectories keep being removed",
        ))
    }

    pub(super) fn create_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, name, flags, Mode::from_raw_mode(0o644))?;
        Ok(File::from(file))
    }

    pub(super) fn symlink(&self, name: &str, target: &Path) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.dir, name)?)
    }

    /// Opens a file of the directory for syncing.
    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(
            &self.dir,
            name,
            flags,
            Mode::empty(),
        )?))
    }

    /// Moves a file of the directory to the directory above.
    pub(super) fn publish(&self, name: &str, above: &OwnedFd) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.dir, name, above, name)?)
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.dir
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        // Nobody is left to tell; the next writer tries again.
        let _ = remove(&self.path);
    }
}

pub(super) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

/// Locks a directory just made; `None` where a sweeper got hold of it first.
fn lock_new(path: &Path) -> io::Result<Option<OwnedFd>> {
    let dir = match open_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        dir => dir?,
    };
    // Any other error means a file system without such locks: no sweeper can take one either.
    if rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        return Ok(None);
    }
    let opened = rustix::fs::fstat(&dir)?;
    match std::fs::symlink_metadata(path) {
        Ok(named) if named.ino() == opened.st_ino => Ok(Some(dir)),
        _ => Ok(None),
    }
}

/// Removes what dead writers left; says whether there is a living one beside `own`.
///
/// Each writer looks after it has made its own directory, so that of two that begin at the same
/// time at least one sees the other.
pub(super) fn sweep(parent: &Path, own: &PrivateDir) -> io::Result<bool> {
    let mut busy = false;
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        let candidate = is_private(&entry.file_name()) && entry.path() != own.path;
        if candidate && entry.file_type()?.is_dir() {
            busy |= !sweep_one(&entry.path())?;
        }
    }
    Ok(busy)
}

/// Says whether the name is one that [`PrivateDir::create`] gives.
fn is_private(name: &OsStr) -> bool {
    let numbers = name
        .to_str()
        .and_then(|n| n.strip_prefix(PREFIX))
        .and_then(|n| n.split_once('-'));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.is_some_and(|(pid, number)| digits(pid) && digits(number))
}

/// Removes a directory if its owner is dead.
fn sweep_one(path: &Path) -> io::Result<bool> {
    let dir = match open_dir(path) {
        // Swept by somebody else, or another user's: not ours to judge.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            return Ok(true);
        }
        dir => dir?,
    };
    match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        // Whose it is cannot be known here, so it stays.
        Err(_) => Ok(true),
        Ok(()) => match remove(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(true),
        },
    }
}

/// Removes a private subdirectory, which holds nothing but files and links.
fn remove(path: &Path) -> io::Result<()> {
    let dir = open_dir(path)?;
    for entry in std::fs::read_dir(path)? {
        rustix::fs::unlinkat(&dir, entry?.file_name(), AtFlags::empty())?;
    }
    std::fs::remove_dir(path)
}
