//! Which disks are served: a directory with a socket, a record and a log for each.
//!
//! A disk's key comes from the directory it lies in and its name there, so that it is found under any
//! path, and stays the same when the descriptor is replaced. The supervisor holds a lock on `KEY.lock` as
//! long as it lives; a record without one is a leftover.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::config::Source;
use crate::storage::is_named;

/// Environment variable that names another directory.
pub const RUN_DIR_VARIABLE: &str = "FIRN_PLOOP_RUN";
/// The directory unless told otherwise.
pub const RUN_DIR: &str = "/run/firn/ploop";

/// A served disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The disk.
    pub source: Source,
    /// No writes.
    pub read_only: bool,
    /// The supervisor.
    pub supervisor: i32,
    /// The block device, where there is one.
    pub device: Option<PathBuf>,
    /// Which kind of device: `fuse+loop`, `nbd` or `none`.
    pub via: String,
    /// Where its file system was mounted by us.
    pub mountpoint: Option<PathBuf>,
    /// Type of the file system mounted by us.
    pub fs_type: Option<String>,
    /// First byte of the partition that the device shows.
    pub partition_offset: u64,
    /// The control socket.
    pub control: PathBuf,
}

/// The directory of served disks.
#[derive(Debug, Clone)]
pub struct Registry {
    dir: PathBuf,
}

/// The files of one disk.
#[derive(Debug)]
pub struct Place {
    /// The control socket.
    pub control: PathBuf,
    /// The record.
    pub record: PathBuf,
    /// What the server had to say.
    pub log: PathBuf,
    lock: PathBuf,
}

/// A disk's lock, held.
#[derive(Debug)]
pub struct Held {
    file: File,
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Registry {
    /// The directory that the environment names, or the usual one.
    pub fn from_environment() -> Registry {
        let dir = std::env::var_os(RUN_DIR_VARIABLE).filter(|dir| !dir.is_empty());
        let dir = dir.map_or_else(|| PathBuf::from(RUN_DIR), PathBuf::from);
        // Servers work in another directory.
        Registry::at(std::path::absolute(&dir).unwrap_or(dir))
    }

    /// Some directory.
    pub fn at(dir: impl Into<PathBuf>) -> Registry {
        Registry { dir: dir.into() }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files of a disk.
    ///
    /// # Errors
    /// The directory that it lies in can't be looked at.
    pub fn place(&self, source: &Source) -> io::Result<Place> {
        let key = key(source)?;
        let file = |suffix: &str| self.dir.join(format!("{key}.{suffix}"));
        Ok(Place {
            control: file("sock"),
            record: file("json"),
            log: file("log"),
            lock: file("lock"),
        })
    }

    /// The record of a disk that is served now, or None.
    ///
    /// # Errors
    /// The record can't be read.
    pub fn find(&self, source: &Source) -> io::Result<Option<Record>> {
        let place = self.place(source)?;
        Ok(read(&place.record)?.filter(|_| is_held(&place.lock)))
    }

    /// All disks that are served now. Leftovers of dead servers are removed.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn list(&self) -> io::Result<Vec<Record>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            if !is_held(&path.with_extension("lock")) {
                forget(&path);
            } else if let Some(record) = read(&path)? {
                records.push(record);
            }
        }
        records.sort_by(|a, b| a.device.cmp(&b.device).then(a.control.cmp(&b.control)));
        Ok(records)
    }
}

impl Place {
    /// Takes the disk for this process and those that inherit it.
    ///
    /// # Errors
    /// Another server has it (`WouldBlock`), or the directory can't be written.
    pub fn hold(&self) -> io::Result<Held> {
        if let Some(dir) = self.lock.parent() {
            // Others could hold the locks, and so keep disks from being mounted.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)?;
        }
        loop {
            let file = open_lock(&self.lock)?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            // The last holder removes the file: a lock on a file without a name is worth nothing.
            if is_named(&file, &self.lock) {
                return Ok(Held { file });
            }
        }
    }

    /// Writes the record down.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let text = serde_json::to_vec(record).map_err(io::Error::other)?;
        let new = self.record.with_extension("json.new");
        std::fs::write(&new, text)?;
        std::fs::rename(&new, &self.record)
    }

    /// Removes the files. Called by the holder, last of all.
    pub fn remove(&self) {
        forget(&self.record);
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

/// Removes a disk's files; that one of them is not there is what is wanted.
fn forget(record: &Path) {
    for suffix in ["json", "sock", "log", "lock"] {
        let _ = std::fs::remove_file(record.with_extension(suffix));
    }
}

fn is_held(lock: &Path) -> bool {
    let Ok(file) = File::open(lock) else {
        return false;
    };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

fn read(path: &Path) -> io::Result<Option<Record>> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn key(source: &Source) -> io::Result<String> {
    let path = std::path::absolute(source.path())?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let meta = std::fs::metadata(dir)?;
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let name = name.iter().chain(b"/");
    let whole: Vec<u8> = name
        .chain(source.snapshot().unwrap_or("").as_bytes())
        .copied()
        .collect();
    let hash = xxhash_rust::xxh3::xxh3_64(&whole);
    Ok(format!("{:x}-{:x}-{hash:016x}", meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &Path, snapshot: Option<&str>) -> Source {
        Source::Descriptor {
            path: path.to_owned(),
            snapshot: snapshot.map(str::to_owned),
        }
    }

    #[test]
    fn a_disk_has_one_key_under_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::fs::create_dir(dir.path().join("disk")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("disk"), &link).unwrap();
        let straight = source(&dir.path().join("disk/D.xml"), None);
        let linked = source(&link.join("D.xml"), None);
        let snapshot = source(&link.join("D.xml"), Some("{x}"));
        assert_eq!(key(&straight).unwrap(), key(&linked).unwrap());
        assert_ne!(key(&straight).unwrap(), key(&snapshot).unwrap());
    }

    #[test]
    fn a_record_lives_as_long_as_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().join("run"));
        let source = source(&dir.path().join("D.xml"), None);
        let place = registry.place(&source).unwrap();
        let held = place.hold().unwrap();
        let again = place.hold().unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
        let record = Record {
            source: source.clone(),
            read_only: false,
            supervisor: 1,
            device: None,
            via: "none".to_owned(),
            mountpoint: None,
            fs_type: None,
            partition_offset: 0,
            control: place.control.clone(),
        };
        place.write(&record).unwrap();
        assert_eq!(registry.find(&source).unwrap(), Some(record.clone()));
        assert_eq!(registry.list().unwrap(), [record]);
        drop(held);
        assert_eq!(registry.find(&source).unwrap(), None);
        assert_eq!(registry.list().unwrap(), []);
        assert!(!place.record.exists());
    }
}
