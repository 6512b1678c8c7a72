//! `DiskDescriptor.xml`: which files make a disk, and how snapshots descend from one another.
//!
//! Every image has a shot of the same GUID, and every shot a parent; the base's is all zeroes. The
//! delta that is written always has the GUID [`Guid::TOP`]: a snapshot renames the old top and puts a
//! new file in its place. The file's name says nothing about its GUID.

mod guid;
mod rules;
mod xml;

pub use guid::{Guid, GuidError};

use std::path::{Path, PathBuf};

use self::xml::{Element, Writer};

/// Name of the file in a disk's directory.
pub const FILE_NAME: &str = "DiskDescriptor.xml";
/// A base and 126 snapshots.
pub const MAX_IMAGES: usize = 127;
/// A longer file is no descriptor.
pub const MAX_BYTES: u64 = 1 << 20;

/// How an image's file is arranged, as the descriptor says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageType {
    /// Not raw: the file's first bytes say which format.
    Compressed,
    /// Raw.
    Plain,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageEntry {
    /// Its name, shared with a shot.
    pub guid: Guid,
    /// How it is arranged.
    pub kind: ImageType,
    /// Its file, absolute or relative to the descriptor's directory.
    pub file: PathBuf,
}

/// A shot made by a program that shall go away by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Temporary {
    /// A snapshot that is merged when whoever made it is gone.
    Snapshot,
    /// A step of a merge by the original.
    Zero,
    /// A step of a merge by the original.
    ZeroSwap,
}

/// Where a snapshot stands in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shot {
    /// Its name, shared with an image.
    pub guid: Guid,
    /// The shot that it descends from.
    pub parent: Guid,
    /// Whether it goes away by itself.
    pub temporary: Option<Temporary>,
}

/// What a disk with a shared base says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volume {
    /// Descriptor of the disk that the base belongs to.
    pub parent: Option<PathBuf>,
    /// The parent's snapshot that this disk begins with.
    pub snapshot: Option<Guid>,
    /// Others build on this disk: it is not changed.
    pub read_only: bool,
}

/// A descriptor that keeps the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Size of the disk in sectors.
    pub size_sectors: u64,
    /// Cluster in sectors.
    pub blocksize_sectors: u32,
    /// Geometry, which nobody uses.
    pub cylinders: u64,
    /// Geometry, which nobody uses.
    pub heads: u32,
    /// Every cluster has its place from the beginning.
    pub preallocated: bool,
    /// Key that the contents are encrypted with.
    pub key_id: Option<String>,
    /// A shared base, or being one.
    pub volume: Option<Volume>,
    /// The files.
    pub images: Vec<ImageEntry>,
    /// The tree.
    pub shots: Vec<Shot>,
}

/// Why a file is no descriptor, or asks for what can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// It is no XML.
    #[error("it is no XML: {0}")]
    Xml(String),
    /// Something is missing or no number.
    #[error("its {element} is missing or wrong")]
    Element {
        /// Name of the element.
        element: &'static str,
    },
    /// A GUID that is none.
    #[error(transparent)]
    Guid(#[from] GuidError),
    /// Images and shots don't form a tree.
    #[error("{0}")]
    Tree(String),
    /// No shot of this GUID.
    #[error("there is no snapshot {0}")]
    NoSnapshot(Guid),
    /// All places are taken.
    #[error("it has {MAX_IMAGES} images already; delete or merge a snapshot first")]
    Full,
}

impl Descriptor {
    /// A disk of one image.
    pub fn new(size_sectors: u64, blocksize_sectors: u32, kind: ImageType, file: &Path) -> Self {
        Descriptor {
            size_sectors,
            blocksize_sectors,
            cylinders: size_sectors / (16 * 32),
            heads: 16,
            preallocated: false,
            key_id: None,
            volume: None,
            images: vec![ImageEntry {
                guid: Guid::TOP,
                kind,
                file: file.to_owned(),
            }],
            shots: vec![Shot {
                guid: Guid::TOP,
                parent: Guid::NIL,
                temporary: None,
            }],
        }
    }

    /// Reads a descriptor and holds it against the rules. A top of another GUID becomes [`Guid::TOP`].
    ///
    /// # Errors
    /// It is no XML, lacks an element, or breaks a rule.
    pub fn parse(text: &str) -> Result<Descriptor, DescriptorError> {
        let root = xml::parse(text).map_err(DescriptorError::Xml)?;
        let mut descriptor = from_xml(&root)?;
        let top = root
            .child("Snapshots")
            .and_then(|list| list.text_of("TopGUID"));
        let top = top.ok_or(DescriptorError::Element { element: "TopGUID" })?;
        descriptor.settle(top.parse()?)?;
        Ok(descriptor)
    }

    /// The document.
    pub fn to_xml(&self) -> String {
        let mut writer = Writer::new();
        writer.group("Parallels_disk_image Version=\"1.0\"", |writer| {
            writer.group("Disk_Parameters", |writer| self.write_parameters(writer));
            writer.group("StorageData", |writer| self.write_storage(writer));
            writer.group("Snapshots", |writer| {
                writer.leaf("TopGUID", Guid::TOP);
                for shot in &self.shots {
                    writer.group("Shot", |writer| {
                        writer.leaf("GUID", shot.guid);
                        writer.leaf("ParentGUID", shot.parent);
                        if let Some(temporary) = shot.temporary {
                            writer.empty(temporary.element());
                        }
                    });
                }
            });
        });
        writer.finish()
    }

    fn write_parameters(&self, writer: &mut Writer) {
        writer.leaf("Disk_size", self.size_sectors);
        writer.leaf("Cylinders", self.cylinders);
        writer.leaf("Heads", self.heads);
        let per_track = self.cylinders.checked_mul(self.heads.into());
        let per_track = per_track.filter(|tracks| *tracks > 0);
        writer.leaf(
            "Sectors",
            per_track.map_or(32, |tracks| self.size_sectors / tracks),
        );
        writer.leaf("Padding", 0);
        if let Some(key) = &self.key_id {
            writer.group("Encryption", |writer| writer.leaf("KeyId", key));
        }
    }

    fn write_storage(&self, writer: &mut Writer) {
        if let Some(volume) = &self.volume {
            writer.group("Volume", |writer| {
                if let Some(parent) = &volume.parent {
                    writer.leaf("Parent", parent.display());
                }
                if let Some(snapshot) = volume.snapshot {
                    writer.leaf("SnapshotGUID", snapshot);
                }
                writer.leaf("ReadOnly", u8::from(volume.read_only));
            });
        }
        writer.group("Storage", |writer| {
            writer.leaf("Start", 0);
            writer.leaf("End", self.size_sectors);
            writer.leaf("Blocksize", self.blocksize_sectors);
            if self.preallocated {
                writer.leaf("Preallocated", 1);
            }
            for image in &self.images {
                writer.group("Image", |writer| {
                    writer.leaf("GUID", image.guid);
                    writer.leaf("Type", image.kind.word());
                    writer.leaf("File", image.file.display());
                });
            }
        });
    }

    /// Whether others build on it.
    pub fn is_sealed(&self) -> bool {
        self.volume.as_ref().is_some_and(|volume| volume.read_only)
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_sectors.saturating_mul(512)
    }

    /// Size of a cluster in bytes.
    pub fn cluster_bytes(&self) -> u32 {
        self.blocksize_sectors.saturating_mul(512)
    }
}

impl ImageType {
    fn word(self) -> &'static str {
        match self {
            ImageType::Compressed => "Compressed",
            ImageType::Plain => "Plain",
        }
    }
}

impl Temporary {
    fn element(self) -> &'static str {
        match self {
            Temporary::Snapshot => "Temporary",
            Temporary::Zero => "TemporaryZero",
            Temporary::ZeroSwap => "TemporaryZeroSwap",
        }
    }
}

fn number<T: std::str::FromStr>(
    parent: &Element,
    element: &'static str,
) -> Result<T, DescriptorError> {
    let text = parent.text_of(element);
    text.and_then(|text| text.parse().ok())
        .ok_or(DescriptorError::Element { element })
}

fn group<'a>(parent: &'a Element, element: &'static str) -> Result<&'a Element, DescriptorError> {
    parent
        .child(element)
        .ok_or(DescriptorError::Element { element })
}

fn guid(parent: &Element, element: &'static str) -> Result<Guid, DescriptorError> {
    let text = parent.text_of(element);
    Ok(text.ok_or(DescriptorError::Element { element })?.parse()?)
}

fn from_xml(root: &Element) -> Result<Descriptor, DescriptorError> {
    let parameters = group(root, "Disk_Parameters")?;
    let data = group(root, "StorageData")?;
    let snapshots = group(root, "Snapshots")?;
    if data.all("Storage").count() != 1 {
        return Err(DescriptorError::Element { element: "Storage" });
    }
    let storage = group(data, "Storage")?;
    let images = storage.all("Image").map(image).collect::<Result<_, _>>()?;
    let shots = snapshots.all("Shot").map(shot).collect::<Result<_, _>>()?;
    let encryption = parameters.child("Encryption");
    Ok(Descriptor {
        size_sectors: number(parameters, "Disk_size")?,
        blocksize_sectors: number(storage, "Blocksize")?,
        cylinders: number(parameters, "Cylinders").unwrap_or(0),
        heads: number(parameters, "Heads").unwrap_or(0),
        preallocated: storage
            .text_of("Preallocated")
            .is_some_and(|text| text == "1"),
        key_id: encryption
            .and_then(|e| e.text_of("KeyId"))
            .map(str::to_owned),
        volume: data.child("Volume").map(volume).transpose()?,
        images,
        shots,
    })
}

fn volume(element: &Element) -> Result<Volume, DescriptorError> {
    let snapshot = element
        .text_of("SnapshotGUID")
        .filter(|text| !text.is_empty());
    Ok(Volume {
        parent: element
            .text_of("Parent")
            .filter(|t| !t.is_empty())
            .map(PathBuf::from),
        snapshot: snapshot.map(str::parse).transpose()?,
        read_only: element
            .text_of("ReadOnly")
            .is_some_and(|text| matches!(text, "1" | "yes" | "")),
    })
}

fn image(element: &Element) -> Result<ImageEntry, DescriptorError> {
    let kind = match element.text_of("Type") {
        Some("Compressed") => ImageType::Compressed,
        Some("Plain") => ImageType::Plain,
        _ => return Err(DescriptorError::Element { element: "Type" }),
    };
    let file = element.text_of("File").filter(|file| !file.is_empty());
    Ok(ImageEntry {
        guid: guid(element, "GUID")?,
        kind,
        file: PathBuf::from(file.ok_or(DescriptorError::Element { element: "File" })?),
    })
}

fn shot(element: &Element) -> Result<Shot, DescriptorError> {
    let all = [Temporary::Snapshot, Temporary::Zero, Temporary::ZeroSwap];
    let temporary = all
        .into_iter()
        .find(|t| element.child(t.element()).is_some());
    Ok(Shot {
        guid: guid(element, "GUID")?,
        parent: guid(element, "ParentGUID")?,
        temporary,
    })
}
