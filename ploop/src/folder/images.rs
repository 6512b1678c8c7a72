//! Opening the images that a descriptor names, and making new ones.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Folder, FolderError};
use crate::descriptor::{Guid, ImageEntry, ImageType};
use crate::format::expanded::{self, Preallocation, Unclosed};
use crate::format::{self, Format, Image, OpenImage, PendingLog, qcow2};
use crate::storage::{Access, HostFile, Storage};
use crate::{ChainDisk, Disk, DiskError};

/// Opens a file for an image.
pub type Opener = dyn Fn(&Path, Access) -> io::Result<Box<dyn Storage>> + Send + Sync;

/// Opens files of the host through its page cache.
pub fn host_opener() -> Arc<Opener> {
    Arc::new(|path, access| Ok(Box::new(HostFile::open(path, access)?)))
}

/// How a disk is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// For reading, or also for writing.
    pub access: Access,
    /// The state to open, for reading only; None is the current one.
    pub snapshot: Option<Guid>,
    /// What becomes of a disk that was not closed.
    pub unclosed: Unclosed,
    /// How files are opened.
    pub opener: Arc<Opener>,
    /// Where changed entries are kept that are not in the file yet.
    pub pending: Option<Arc<dyn PendingLog>>,
}

impl OpenOptions {
    /// The current state, through the page cache, provided that it was closed.
    pub fn new(access: Access) -> OpenOptions {
        OpenOptions {
            access,
            snapshot: None,
            unclosed: Unclosed::Refuse,
            opener: host_opener(),
            pending: None,
        }
    }
}

/// A disk that was opened.
pub struct Opened {
    /// The disk.
    pub disk: ChainDisk,
    /// What was found that is worth telling.
    pub notes: Vec<String>,
}

impl Folder {
    /// Opens the disk, or a snapshot of it.
    ///
    /// # Errors
    /// There is no such snapshot, an image can't be opened, sizes don't fit, or the disk would be
    /// written and is sealed.
    pub fn open_disk(&self, options: &OpenOptions) -> Result<Opened, FolderError> {
        let guid = options.snapshot.unwrap_or(Guid::TOP);
        let writes = options.access == Access::ReadWrite && options.snapshot.is_none();
        let mut options = options.clone();
        if writes && self.interrupted()?.is_some_and(|merge| merge.was_closed) {
            options.unclosed = Unclosed::Recover;
        }
        let options = &options;
        if writes && self.descriptor().is_sealed() {
            return Err(self.refused("other disks build on it; it is opened for reading only"));
        }
        if options.snapshot.is_some() && self.interrupted()?.is_some_and(|merge| merge.id == guid) {
            return Err(self.refused(format!(
                "snapshot {guid} is being deleted; 'firn ploop snapshot-delete -u {guid}' finishes that"
            )));
        }
        let chain = self
            .descriptor()
            .chain(guid)
            .map_err(|source| self.wrong(source))?;
        let mut layers: Vec<Arc<dyn Image>> = Vec::new();
        let mut notes = Vec::new();
        for (at, entry) in chain.iter().enumerate() {
            let access = match writes && at + 1 == chain.len() {
                true => Access::ReadWrite,
                false => Access::ReadOnly,
            };
            let image = self.open_entry(entry, access, options)?;
            self.must_fit(layers.last(), &image)?;
            let named = |note: String| format!("{}: {note}", image.name());
            notes.extend(image.notes().into_iter().map(named));
            layers.push(image);
        }
        let disk = ChainDisk::new(layers)?;
        let wanted = self.descriptor().size_bytes();
        if guid == Guid::TOP && disk.size_bytes() < wanted {
            let what = format!(
                "it says {wanted} bytes, the image has {}",
                disk.size_bytes()
            );
            return Err(self.refused(what));
        }
        Ok(Opened { disk, notes })
    }

    /// Refuses a disk that a program writes at this moment: what is read of it would be of no one moment.
    ///
    /// # Errors
    /// It is written, or an image can't be opened.
    pub fn must_be_unwritten(&self) -> Result<(), FolderError> {
        let chain = self.descriptor().chain(Guid::TOP);
        for entry in chain.map_err(|source| self.wrong(source))? {
            let path = self.path_of(entry);
            let failed = |error| unopened(&path, error);
            let file = HostFile::open(&path, Access::ReadOnly).map_err(failed)?;
            if file.has_writer().map_err(failed)? {
                return Err(failed(io::ErrorKind::WouldBlock.into()));
            }
        }
        Ok(())
    }

    /// Opens one image.
    pub(super) fn open_entry(
        &self,
        entry: &ImageEntry,
        access: Access,
        options: &OpenOptions,
    ) -> Result<Arc<dyn Image>, FolderError> {
        let path = self.path_of(entry);
        let storage = (options.opener)(&path, access).map_err(|error| unopened(&path, error))?;
        let format = match entry.kind {
            ImageType::Plain => Format::Raw,
            ImageType::Compressed => match Format::detect(storage.as_ref())? {
                Format::Raw => {
                    let what = "it begins like no image, and the descriptor says that it is one";
                    return Err(DiskError::corrupt(storage.name(), what).into());
                }
                known => known,
            },
        };
        let how = OpenImage {
            access,
            unclosed: options.unclosed,
            raw_cluster_bytes: self.descriptor().cluster_bytes(),
            pending: options
                .pending
                .clone()
                .filter(|_| access == Access::ReadWrite),
        };
        Ok(format::open(storage, format, &how)?)
    }

    fn must_fit(
        &self,
        below: Option<&Arc<dyn Image>>,
        image: &Arc<dyn Image>,
    ) -> Result<(), FolderError> {
        match below {
            Some(below) if below.size_bytes() > image.size_bytes() => {
                let what = format!("it is smaller than {}, which lies below it", below.name());
                Err(DiskError::corrupt(image.name(), what).into())
            }
            _ => Ok(()),
        }
    }

    /// The format of an image's file.
    pub fn format_of(&self, entry: &ImageEntry) -> Result<Format, FolderError> {
        if entry.kind == ImageType::Plain {
            return Ok(Format::Raw);
        }
        let path = self.path_of(entry);
        let file = HostFile::open(&path, Access::ReadOnly).map_err(|e| unopened(&path, e))?;
        Ok(Format::detect(&file)?)
    }

    /// Makes an empty image in the directory, synced and closed, and gives its file.
    pub(super) fn new_image(&self, new: &NewImage) -> Result<PathBuf, FolderError> {
        let file = self.new_file()?;
        make(&self.dir.join(&file), new)?;
        Ok(file)
    }
}

/// An image to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewImage {
    pub format: Format,
    pub size_bytes: u64,
    pub cluster_bytes: u32,
    pub preallocation: Preallocation,
}

/// Makes an empty image; a failure leaves no file.
pub(super) fn make(path: &Path, new: &NewImage) -> Result<(), FolderError> {
    let file = HostFile::create(path).map_err(FolderError::host(path, "made"))?;
    let made = match new.format {
        Format::Raw => make_raw(&file, new),
        Format::Expanded => {
            expanded::create(&file, new.size_bytes, new.cluster_bytes, new.preallocation)
        }
        Format::Qcow2 => qcow2::create(&file, new.size_bytes, new.cluster_bytes),
    };
    let synced = made.map_err(FolderError::from).and_then(|()| {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        super::sync_dir(dir).map_err(FolderError::host(dir, "written"))
    });
    if synced.is_err() {
        let _ = std::fs::remove_file(path);
    }
    synced
}

fn make_raw(file: &HostFile, new: &NewImage) -> Result<(), DiskError> {
    let sized = match new.preallocation {
        Preallocation::Full => file.allocate(0..new.size_bytes),
        Preallocation::None => file.set_len(new.size_bytes),
    };
    sized
        .and_then(|()| file.sync())
        .map_err(|error| DiskError::io(file.name(), "write", 0, error))
}

pub(super) fn unopened(path: &Path, error: io::Error) -> FolderError {
    match error.kind() {
        io::ErrorKind::WouldBlock => DiskError::claimed(&path.display().to_string(), error).into(),
        _ => FolderError::host(path, "opened")(error),
    }
}

/// Opens one image for writing, to make it what a disk's base has to be.
pub(super) fn open_single(
    path: &Path,
    format: Format,
    cluster_bytes: Option<u32>,
) -> Result<Arc<dyn Image>, FolderError> {
    let file = HostFile::open(path, Access::ReadWrite).map_err(|error| unopened(path, error))?;
    let found = Format::detect(&file)?;
    if found != format && format != Format::Raw {
        let what = format!("it is {}, not {}", found.name(), format.name());
        return Err(FolderError::refused(path, what));
    }
    let len = file.len_bytes().map_err(FolderError::host(path, "read"))?;
    let guesses = [1 << 20, 512 << 10, 256 << 10, 128 << 10, 64 << 10, 32 << 10];
    let fits = |cluster: &u32| len.is_multiple_of((*cluster).into());
    let raw_cluster_bytes = match cluster_bytes {
        Some(cluster) => Some(cluster).filter(fits),
        None => guesses.into_iter().find(fits),
    };
    let raw_cluster_bytes = match (raw_cluster_bytes, format) {
        (None, Format::Raw) => {
            let what = format!("its length of {len} bytes is no number of clusters");
            return Err(FolderError::refused(path, what));
        }
        (cluster, _) => cluster.unwrap_or(expanded::DEFAULT_CLUSTER),
    };
    // What is only read needs no rounding: it is converted before anything else.
    let access = match format == Format::Expanded && !expanded::is_writable(&file)? {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    };
    let how = OpenImage {
        raw_cluster_bytes,
        ..OpenImage::plain(access)
    };
    let image = format::open(Box::new(file), format, &how)?;
    match cluster_bytes {
        Some(wanted) if wanted != image.cluster_bytes() => {
            let what = format!(
                "its clusters have {} bytes, not {wanted}",
                image.cluster_bytes()
            );
            image.close()?;
            Err(FolderError::refused(path, what))
        }
        _ => Ok(image),
    }
}
