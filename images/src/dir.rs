//! An images directory being read.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use firn_proto::{InventoryEntry, Message, Name};

use crate::error::ImageReadError;
use crate::kind::ImageKind;
use crate::reader::ImageReader;
use crate::set::PARENT_LINK;

/// A directory with images.
#[derive(Debug, Clone)]
pub struct ImageDir {
    path: PathBuf,
}

/// A file of an images directory that is an image by its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageFile {
    /// What it is.
    pub kind: ImageKind,
    /// The number in its name, or 0.
    pub id: u64,
    /// Its name.
    pub name: String,
}

impl ImageDir {
    /// Opens a directory, whatever is in it.
    pub fn open(path: &Path) -> Result<Self, ImageReadError> {
        let opened = path
            .canonicalize()
            .and_then(|path| match path.metadata()?.is_dir() {
                true => Ok(Self { path }),
                false => Err(io::ErrorKind::NotADirectory.into()),
            });
        opened.map_err(|source| ImageReadError::Directory {
            path: path.into(),
            source,
        })
    }

    /// Tells the directory, as an absolute path without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells the path of an image, there or not.
    pub fn path_of(&self, kind: ImageKind, id: u64) -> PathBuf {
        self.path.join(kind.file_name(id))
    }

    /// Says whether the set is complete: whether it has an inventory, which is written last.
    pub fn is_complete(&self) -> bool {
        self.has(ImageKind::Inventory, 0)
    }

    /// Says whether an image is there.
    pub fn has(&self, kind: ImageKind, id: u64) -> bool {
        self.path_of(kind, id).is_file()
    }

    /// Reads the inventory.
    pub fn inventory(&self) -> Result<InventoryEntry, ImageReadError> {
        self.read_one(ImageKind::Inventory, 0)
    }

    /// Begins to read an image that has to be there.
    pub fn reader(&self, kind: ImageKind, id: u64) -> Result<ImageReader, ImageReadError> {
        ImageReader::open(&self.path_of(kind, id), kind)
    }

    /// Begins to read an image that may be missing.
    pub fn reader_if_there(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<ImageReader>, ImageReadError> {
        match self.reader(kind, id) {
            Err(error) if error.is_missing() => Ok(None),
            reader => reader.map(Some),
        }
    }

    /// Reads an image of one entry that has to be there.
    pub fn read_one<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<M, ImageReadError> {
        self.reader(kind, id)?.one()
    }

    /// Reads an image of one entry that may be missing.
    pub fn read_one_if_there<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<M>, ImageReadError> {
        self.reader_if_there(kind, id)?
            .map(ImageReader::one)
            .transpose()
    }

    /// Reads an image of many entries; a missing one has none.
    pub fn read_all<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Vec<M>, ImageReadError> {
        let reader = self.reader_if_there(kind, id)?;
        reader.map_or(Ok(Vec::new()), ImageReader::rest)
    }

    /// Opens a file without header.
    pub fn raw_file(&self, kind: ImageKind, id: u64) -> Result<File, ImageReadError> {
        let path = self.path_of(kind, id);
        File::open(&path).map_err(|source| ImageReadError::Open { path, source })
    }

    /// Lists the images in the directory, by kind and number.
    pub fn files(&self) -> Result<Vec<ImageFile>, ImageReadError> {
        let unlistable = |source| ImageReadError::Directory {
            path: self.path.clone(),
            source,
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(unlistable)? {
            let Ok(name) = entry.map_err(unlistable)?.file_name().into_string() else {
                continue;
            };
            if let Some((kind, id)) = ImageKind::of_file_name(&name) {
                files.push(ImageFile { kind, id, name });
            }
        }
        files.sort();
        Ok(files)
    }

    /// Opens the directory that this one is an increment to, if it is one.
    pub fn parent(&self) -> Result<Option<ImageDir>, ImageReadError> {
        let link = self.path.join(PARENT_LINK);
        match link.symlink_metadata() {
            Ok(metadata) if metadata.is_symlink() => Self::open(&link).map(Some),
            _ => Ok(None),
        }
    }
}
