//! New disks: from nothing, upon a shared base, around an image that is there.

use std::path::{Path, PathBuf};

use super::images::{NewImage, make};
use super::{Folder, FolderError, OpenOptions, take_lock};
use crate::Disk;
use crate::descriptor::{Descriptor, FILE_NAME, Guid, ImageEntry, ImageType, Shot, Volume};
use crate::format::Format;
use crate::format::expanded::{DEFAULT_CLUSTER, Preallocation};
use crate::storage::Access;

/// A disk to be made.
#[derive(Debug, Clone)]
pub struct NewDisk {
    /// Size in bytes; rounded up to whole clusters.
    pub size_bytes: u64,
    /// Cluster in bytes.
    pub cluster_bytes: u32,
    /// How the base is arranged.
    pub format: Format,
    /// Whether all space is taken at once.
    pub preallocation: Preallocation,
    /// Name of the base in the directory.
    pub file: PathBuf,
}

impl NewDisk {
    /// A growing disk in the expanded format.
    pub fn new(size_bytes: u64) -> NewDisk {
        NewDisk {
            size_bytes,
            cluster_bytes: DEFAULT_CLUSTER,
            format: Format::Expanded,
            preallocation: Preallocation::None,
            file: PathBuf::from("root.hds"),
        }
    }
}

/// Makes a disk in a directory, which is made too where it is missing. A failure leaves nothing.
///
/// # Errors
/// There is a disk already, size or cluster can't be, or the host refused.
pub fn create(dir: &Path, new: &NewDisk) -> Result<Folder, FolderError> {
    if new.size_bytes == 0 {
        return Err(FolderError::refused(
            dir,
            "a disk without size holds nothing",
        ));
    }
    let made_dir = make_dir(dir)?;
    let unit = u64::from(new.cluster_bytes).max(1);
    let size_bytes = new.size_bytes.next_multiple_of(unit);
    let image = NewImage {
        format: new.format,
        size_bytes,
        cluster_bytes: new.cluster_bytes,
        preallocation: new.preallocation,
    };
    let path = dir.join(&new.file);
    let kind = match new.format {
        Format::Raw => ImageType::Plain,
        _ => ImageType::Compressed,
    };
    let mut descriptor =
        Descriptor::new(size_bytes / 512, new.cluster_bytes / 512, kind, &new.file);
    descriptor.preallocated = new.preallocation == Preallocation::Full;
    let made = no_disk_yet(dir)
        .and_then(|()| make(&path, &image))
        .and_then(|()| {
            let first = first_store(dir, descriptor);
            if first.is_err() {
                let _ = std::fs::remove_file(&path);
            }
            first
        });
    if made.is_err() && made_dir {
        // Only an empty one goes.
        let _ = std::fs::remove_dir(dir);
    }
    made
}

fn make_dir(dir: &Path) -> Result<bool, FolderError> {
    if dir.is_dir() {
        return Ok(false);
    }
    std::fs::create_dir_all(dir).map_err(FolderError::host(dir, "made"))?;
    Ok(true)
}

fn no_disk_yet(dir: &Path) -> Result<(), FolderError> {
    let xml = dir.join(FILE_NAME);
    match xml.exists() {
        true => Err(FolderError::refused(&xml, "there is a disk already")),
        false => Ok(()),
    }
}

/// Writes the first descriptor of a directory.
fn first_store(dir: &Path, descriptor: Descriptor) -> Result<Folder, FolderError> {
    let dir = dir
        .canonicalize()
        .map_err(FolderError::host(dir, "opened"))?;
    let xml = dir.join(FILE_NAME);
    let mut folder = Folder {
        lock: Some(take_lock(&xml)?),
        xml,
        dir,
        descriptor: descriptor.clone(),
    };
    // Another command may have been faster.
    no_disk_yet(&folder.dir)?;
    folder.store(descriptor)?;
    Ok(folder)
}

/// Makes a disk in `dir` whose base are the images of another disk, at a snapshot or as it is. The
/// other disk is sealed: it can only be read from then on, by any number of clones.
///
/// # Errors
/// The other disk is in use or not there, there is a disk in `dir` already, or the host refused.
pub fn clone_disk(
    golden: &Path,
    snapshot: Option<Guid>,
    dir: &Path,
) -> Result<Folder, FolderError> {
    let mut golden = Folder::open(golden)?;
    if golden.interrupted()?.is_some() {
        let what = "a merge in it was cut off; run 'firn ploop check --repair' on it first";
        return Err(golden.refused(what));
    }
    let guid = snapshot.unwrap_or(Guid::TOP);
    let chain = golden
        .descriptor()
        .chain(guid)
        .map_err(|source| golden.wrong(source))?;
    let chain: Vec<ImageEntry> = chain.into_iter().cloned().collect();
    golden.seal()?;
    let options = OpenOptions {
        snapshot: Some(guid),
        ..OpenOptions::new(Access::ReadOnly)
    };
    let size_bytes = golden.open_disk(&options)?.disk.size_bytes();
    let made_dir = make_dir(dir)?;
    let cloned =
        no_disk_yet(dir).and_then(|()| clone_files(&golden, &chain, size_bytes, guid, dir));
    if cloned.is_err() && made_dir {
        let _ = std::fs::remove_dir(dir);
    }
    cloned
}

fn clone_files(
    golden: &Folder,
    chain: &[ImageEntry],
    size_bytes: u64,
    guid: Guid,
    dir: &Path,
) -> Result<Folder, FolderError> {
    let mut descriptor = golden.descriptor().clone();
    descriptor.size_sectors = size_bytes / 512;
    descriptor.volume = Some(Volume {
        parent: Some(golden.xml().to_owned()),
        snapshot: Some(guid),
        read_only: false,
    });
    let mut parent = Guid::NIL;
    descriptor.images.clear();
    descriptor.shots.clear();
    for image in chain {
        // The other disk's top is one of many snapshots here.
        let name = match image.guid {
            Guid::TOP => random()?,
            other => other,
        };
        descriptor.images.push(ImageEntry {
            guid: name,
            kind: image.kind,
            file: golden.path_of(image),
        });
        descriptor.shots.push(Shot {
            guid: name,
            parent,
            temporary: None,
        });
        parent = name;
    }
    let file = PathBuf::from(format!("root.hds.{}", random()?));
    descriptor.images.push(ImageEntry {
        guid: Guid::TOP,
        kind: ImageType::Compressed,
        file: file.clone(),
    });
    descriptor.shots.push(Shot {
        guid: Guid::TOP,
        parent,
        temporary: None,
    });
    let format = chain
        .last()
        .map(|image| golden.format_of(image))
        .transpose()?;
    let new = NewImage {
        format: format
            .filter(|format| *format != Format::Raw)
            .unwrap_or(Format::Expanded),
        size_bytes,
        cluster_bytes: descriptor.cluster_bytes(),
        preallocation: Preallocation::None,
    };
    let path = dir.join(&file);
    make(&path, &new)?;
    let stored = first_store(dir, descriptor);
    if stored.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    stored
}

fn random() -> Result<Guid, FolderError> {
    Guid::random().map_err(FolderError::host(Path::new("/dev/urandom"), "read"))
}

impl Folder {
    /// Removes a new disk that could not be finished, and the directory that was made for it. What
    /// can't be removed stays; whoever calls this tells of another error.
    pub fn take_back(self, is_new_dir: bool) {
        let images = self.descriptor().images.iter();
        let own = images.filter(|image| self.owns(image));
        let mut files: Vec<PathBuf> = own.map(|image| self.path_of(image)).collect();
        files.extend([self.xml.clone(), self.beside(".lck")]);
        for file in files {
            let _ = std::fs::remove_file(file);
        }
        if is_new_dir {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }

    /// Lets the disk only be read from now on, so that others can build on it.
    ///
    /// # Errors
    /// It is open for writing, or the host refused.
    pub fn seal(&mut self) -> Result<(), FolderError> {
        if self.descriptor().is_sealed() {
            return Ok(());
        }
        // Whoever has it open for writing holds its seat.
        let writer = self.open_disk(&OpenOptions::new(Access::ReadWrite))?;
        let mut next = self.descriptor().clone();
        next.volume.get_or_insert_default().read_only = true;
        let stored = self.store(next);
        writer.disk.close()?;
        stored
    }
}

/// Writes a descriptor around one base image that is there. A raw image has to be a whole number of
/// clusters; one of another program that is not becomes so.
///
/// # Errors
/// There is a disk already, the file is no such image, or the host refused.
pub fn restore_descriptor(
    dir: &Path,
    file: &Path,
    format: Format,
    cluster_bytes: Option<u32>,
) -> Result<Folder, FolderError> {
    no_disk_yet(dir)?;
    let path = dir.join(file);
    let image = super::images::open_single(&path, format, cluster_bytes)?;
    let (size_bytes, cluster_bytes) = (image.size_bytes(), image.cluster_bytes());
    image.close()?;
    let kind = match format {
        Format::Raw => ImageType::Plain,
        _ => ImageType::Compressed,
    };
    let inside =
        path.parent().map(Path::canonicalize).and_then(Result::ok) == dir.canonicalize().ok();
    let named = match (inside, path.file_name()) {
        (true, Some(name)) => PathBuf::from(name),
        _ => path
            .canonicalize()
            .map_err(FolderError::host(&path, "opened"))?,
    };
    first_store(
        dir,
        Descriptor::new(size_bytes / 512, cluster_bytes / 512, kind, &named),
    )
}
