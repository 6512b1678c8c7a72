//! A disk's directory: the descriptor, its lock, the images, and what is done with them.
//!
//! Every change follows one order: new files first, synced; then a new descriptor beside the old one,
//! synced; then whatever happens to the images; then the rename that makes the new descriptor count;
//! then old files go. A crash leaves the old or the new state, and at worst a file that nobody names.

mod backup;
mod check;
mod convert;
mod create;
mod error;
mod images;
mod merge;
mod partial;
mod resize;
mod restore;
mod snapshot;
#[cfg(test)]
mod tests;

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use backup::{Backup, BackupReport};
pub use check::{FolderCheck, ImageCheck};
pub use convert::{Conversion, Target, export};
pub use create::{NewDisk, clone_disk, create, restore_descriptor};
pub use error::FolderError;
pub use images::{OpenOptions, Opened, Opener, host_opener};
pub use partial::PartialFile;
pub use restore::restore_backup;
pub use snapshot::NewSnapshot;

use crate::descriptor::{self, Descriptor, DescriptorError, Guid, ImageEntry};
use crate::storage::open_bytes;

/// Told the parts done and to do; false calls the work off.
pub type OnProgress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// So long a command waits for another one.
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk's directory, whose descriptor was read.
#[derive(Debug)]
pub struct Folder {
    xml: PathBuf,
    dir: PathBuf,
    descriptor: Descriptor,
    lock: Option<File>,
}

impl Folder {
    /// Reads a descriptor and keeps other commands from changing it. `path` may also be the directory.
    ///
    /// # Errors
    /// It is not there, breaks a rule, or another command holds it for half a minute.
    pub fn open(path: &Path) -> Result<Folder, FolderError> {
        let xml = find_xml(path)?;
        let lock = take_lock(&xml)?;
        Ok(Folder {
            lock: Some(lock),
            ..Folder::load(xml)?
        })
    }

    /// Reads a descriptor for looking only.
    ///
    /// # Errors
    /// It is not there or breaks a rule.
    pub fn view(path: &Path) -> Result<Folder, FolderError> {
        Folder::load(find_xml(path)?)
    }

    fn load(xml: PathBuf) -> Result<Folder, FolderError> {
        let mut text = Vec::new();
        open_bytes(&xml, false)
            .and_then(|file| file.take(descriptor::MAX_BYTES).read_to_end(&mut text))
            .map_err(FolderError::host(&xml, "read"))?;
        let text = String::from_utf8(text).map_err(|_| FolderError::Descriptor {
            path: xml.clone(),
            source: DescriptorError::Xml("it is no text; name its DiskDescriptor.xml".to_owned()),
        })?;
        let descriptor = Descriptor::parse(&text).map_err(|source| FolderError::Descriptor {
            path: xml.clone(),
            source,
        })?;
        let dir = xml.parent().map(Path::to_owned).unwrap_or_default();
        Ok(Folder {
            xml,
            dir,
            descriptor,
            lock: None,
        })
    }

    /// The descriptor's path.
    pub fn xml(&self) -> &Path {
        &self.xml
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the descriptor says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Where an image's file lies.
    pub fn path_of(&self, image: &ImageEntry) -> PathBuf {
        self.dir.join(&image.file)
    }

    /// Whether an image belongs to this disk alone: it lies in the directory.
    pub fn owns(&self, image: &ImageEntry) -> bool {
        self.path_of(image).parent() == Some(&self.dir)
    }

    fn wrong(&self, source: DescriptorError) -> FolderError {
        FolderError::Descriptor {
            path: self.xml.clone(),
            source,
        }
    }

    fn refused(&self, what: impl Into<String>) -> FolderError {
        FolderError::refused(&self.xml, what)
    }

    fn must_be_mine(&self) -> Result<(), FolderError> {
        if self.lock.is_none() {
            return Err(self.refused("it was opened for looking only"));
        }
        match self.descriptor.is_sealed() {
            true => Err(self.refused("other disks build on it; 'firn ploop clone' makes one more")),
            false => Ok(()),
        }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.xml.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    }

    /// Writes a descriptor beside the one that counts.
    fn prepare(&self, next: &Descriptor) -> Result<(), FolderError> {
        next.check().map_err(|source| self.wrong(source))?;
        let tmp = self.beside(".tmp");
        let written = File::create(&tmp).and_then(|mut file| {
            file.write_all(next.to_xml().as_bytes())?;
            file.sync_all()
        });
        written.map_err(|error| {
            // On a full file system it would be in the way of nobody, and still be a stranger.
            self.abandon();
            FolderError::host(&tmp, "written")(error)
        })
    }

    /// Makes the prepared descriptor count.
    fn commit(&self) -> std::io::Result<()> {
        std::fs::rename(self.beside(".tmp"), &self.xml)?;
        sync_dir(&self.dir)
    }

    fn abandon(&self) {
        // It never counted; the next one overwrites it.
        let _ = std::fs::remove_file(self.beside(".tmp"));
    }

    fn store(&mut self, next: Descriptor) -> Result<(), FolderError> {
        self.prepare(&next)?;
        self.commit()
            .map_err(FolderError::host(&self.xml, "renamed"))?;
        self.descriptor = next;
        Ok(())
    }

    /// A name for a new image, in the original's manner.
    fn new_file(&self) -> Result<PathBuf, FolderError> {
        let base = self
            .descriptor
            .base()
            .map_err(|source| self.wrong(source))?;
        let name = base.file.file_name().unwrap_or_default().to_string_lossy();
        let guid = Guid::random().map_err(FolderError::host(Path::new("/dev/urandom"), "read"))?;
        Ok(PathBuf::from(format!("{}.{guid}", without_guid(&name))))
    }

    fn remove(&self, image: &ImageEntry) -> Result<(), FolderError> {
        if !self.owns(image) {
            return Ok(());
        }
        let path = self.path_of(image);
        std::fs::remove_file(&path).map_err(FolderError::host(&path, "removed"))?;
        sync_dir(&self.dir).map_err(FolderError::host(&self.dir, "written"))
    }
}

/// The name that a base had at first. A conversion gives it a new one, which must not grow each time.
fn without_guid(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, guid)) if guid.parse::<Guid>().is_ok() => without_guid(stem),
        _ => name,
    }
}

fn find_xml(path: &Path) -> Result<PathBuf, FolderError> {
    let xml = match path.is_dir() {
        true => path.join(descriptor::FILE_NAME),
        false => path.to_owned(),
    };
    // Names of images are compared: they have to be the same from wherever a command is called.
    xml.canonicalize()
        .map_err(FolderError::host(&xml, "opened"))
}

fn take_lock(xml: &Path) -> Result<File, FolderError> {
    let mut name = xml.as_os_str().to_owned();
    name.push(".lck");
    let path = PathBuf::from(name);
    let opened = File::options().create(true).append(true).open(&path);
    let file = opened.map_err(FolderError::host(&path, "opened"))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => {
                return Err(FolderError::host(&path, "locked")(error));
            }
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => return Err(FolderError::Locked { path }),
        }
    }
}

/// Makes new names in a directory durable.
fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}
