//! The format layer: how one file holds the clusters of a disk, or those of one delta of it.

pub mod expanded;
mod file;
mod pending;
pub mod qcow2;
mod raw;

pub use file::ImageFile;
pub use pending::PendingLog;
pub use raw::RawImage;

use std::fs::File;
use std::sync::Arc;

use self::expanded::{ExpandedImage, Unclosed};
use self::qcow2::Qcow2Image;
use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::storage::{Access, Storage};

/// How the bytes of a file are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// ploop's own.
    Expanded,
    /// QEMU's.
    Qcow2,
}

impl Format {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Expanded => "expanded",
            Format::Qcow2 => "qcow2",
        }
    }

    /// Looks at a file's first bytes: what begins like no other format is raw.
    ///
    /// # Errors
    /// The host refused.
    pub fn detect(storage: &dyn Storage) -> Result<Format, DiskError> {
        let failed = |error| DiskError::io(storage.name(), "read", 0, error);
        let mut magic = [0; 16];
        if storage.len_bytes().map_err(failed)? < 16 {
            return Ok(Format::Raw);
        }
        storage.read_at(&mut magic, 0).map_err(failed)?;
        Ok(match &magic {
            b"WithoutFreeSpace" | b"WithouFreSpacExt" => Format::Expanded,
            [b'Q', b'F', b'I', 0xfb, ..] => Format::Qcow2,
            _ => Format::Raw,
        })
    }
}

/// How an image of any format is opened.
#[derive(Clone)]
pub struct OpenImage {
    /// For reading, or also for writing.
    pub access: Access,
    /// What becomes of one that was not closed.
    pub unclosed: Unclosed,
    /// The unit that a raw image is handled in.
    pub raw_cluster_bytes: u32,
    /// Where changes of tables are kept that are not in the file yet.
    pub pending: Option<Arc<dyn PendingLog>>,
}

impl OpenImage {
    /// Opens a closed image.
    pub fn plain(access: Access) -> OpenImage {
        OpenImage {
            access,
            unclosed: Unclosed::Refuse,
            raw_cluster_bytes: expanded::DEFAULT_CLUSTER,
            pending: None,
        }
    }
}

/// Opens a file as an image of a format.
///
/// # Errors
/// It is none, breaks the format's rules, was not closed, or the host refused.
pub fn open(
    storage: Box<dyn Storage>,
    format: Format,
    how: &OpenImage,
) -> Result<Arc<dyn Image>, DiskError> {
    Ok(match format {
        Format::Qcow2 => Arc::new(Qcow2Image::open(storage, how.access, how.unclosed)?),
        Format::Raw => Arc::new(RawImage::open(storage, how.access, how.raw_cluster_bytes)?),
        Format::Expanded => {
            let pending = how.pending.clone();
            let image = ExpandedImage::open_logged(storage, how.access, how.unclosed, pending)?;
            Arc::new(image)
        }
    })
}

/// What an image knows of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Nothing: the layer below is asked, and under the base there are zeroes.
    Absent,
    /// Zeroes, whatever the layers below hold.
    Zero,
    /// Its bytes.
    Data,
}

/// What an image can say of a cluster at once, without a look into its file.
#[derive(Debug)]
pub enum Known {
    /// Nothing: ask for its slot.
    Nothing,
    /// It is absent.
    Absent,
    /// Its bytes lie in this file, which is open for direct I/O, at this byte.
    At(Arc<File>, u64),
}

/// One file of a chain.
///
/// Clusters are counted from 0; `skip` counts bytes inside of a cluster, and no call reaches over a
/// cluster's end. All calls may come from several threads at once, with one promise of the caller:
/// for one cluster, [`read`](Image::read) and [`overwrite`](Image::overwrite) may run side by side, and
/// [`store`](Image::store), [`zero`](Image::zero), [`mark_zero`](Image::mark_zero) and
/// [`unmap`](Image::unmap) run alone.
///
/// What was written is safe when a later [`flush`](Image::flush) has returned. A crash at any moment
/// leaves an image in which every cluster holds its last flushed bytes or newer ones.
pub trait Image: Send + Sync {
    /// Its file.
    fn file(&self) -> &ImageFile;
    /// What it is called in messages: the path of its file.
    fn name(&self) -> &str {
        self.file().name()
    }
    /// The format's name: `expanded`, `raw`, `qcow2`.
    fn format(&self) -> &'static str;
    /// What opening it found worth telling, in whole clauses.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
    /// Whether nobody had it open for writing when this opened it for reading.
    fn was_closed(&self) -> bool {
        true
    }
    /// Whether it may be changed.
    fn access(&self) -> Access {
        self.file().access()
    }
    /// Size of the disk that it was made for, in bytes.
    fn size_bytes(&self) -> u64;
    /// Size of a cluster in bytes.
    fn cluster_bytes(&self) -> u32;
    /// What it knows of a cluster; `Absent` for those past its end.
    ///
    /// # Errors
    /// A table could not be read or is damaged.
    fn slot(&self, cluster: u32) -> Result<Slot, DiskError>;
    /// Like [`slot`](Image::slot), and tells holes of the host's file apart where that costs a call.
    ///
    /// # Errors
    /// As `slot`.
    fn probe(&self, cluster: u32) -> Result<Slot, DiskError> {
        self.slot(cluster)
    }
    /// Whether [`known`](Image::known) ever says more than nothing.
    fn knows_places(&self) -> bool {
        false
    }
    /// Where the bytes of a cluster lie from `skip` on, if that takes no time. They stay there under the
    /// same promise as for [`read`](Image::read).
    fn known(&self, _cluster: u32, _skip: u32) -> Known {
        Known::Nothing
    }
    /// Reads from a cluster that is `Data`.
    ///
    /// # Errors
    /// The host refused.
    fn read(&self, cluster: u32, skip: u32, buf: &mut [u8]) -> Result<(), DiskError>;
    /// Writes into a cluster that is `Data`.
    ///
    /// # Errors
    /// The host refused, or the image is read-only.
    fn overwrite(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError>;
    /// Makes a cluster that is not `Data` so; what `buf` does not cover becomes zeroes.
    ///
    /// # Errors
    /// The host refused, or the image is read-only or full.
    fn store(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError>;
    /// Makes a part of a cluster that is `Data` read as zeroes; a whole one gives its space back.
    ///
    /// # Errors
    /// The host refused, or the image is read-only.
    fn zero(&self, cluster: u32, skip: u32, len: u32) -> Result<(), DiskError>;
    /// Makes a cluster `Zero` and answers true, or answers false where the format has no such mark.
    ///
    /// # Errors
    /// The host refused, or the image is read-only.
    fn mark_zero(&self, cluster: u32) -> Result<bool, DiskError>;
    /// Makes a cluster `Absent` and gives its space back, at the latest when the image is closed.
    ///
    /// # Errors
    /// The host refused, or the image is read-only.
    fn unmap(&self, cluster: u32) -> Result<(), DiskError>;
    /// Returns when everything that was written before the call outlives a crash.
    ///
    /// # Errors
    /// The host refused; what was written since the last flush may be lost.
    fn flush(&self) -> Result<(), DiskError>;
    /// The clusters that have to [`move`](Image::move_away) before the disk can grow to this size: those
    /// that lie where tables will be. While they do, other calls go on, and nothing new is put there.
    ///
    /// # Errors
    /// As `grow`.
    fn clusters_in_the_way(&self, _size_bytes: u64) -> Result<Vec<u32>, DiskError> {
        Ok(Vec::new())
    }
    /// Moves a cluster to another place in the file. It runs alone, like [`store`](Image::store).
    ///
    /// # Errors
    /// As `grow`.
    fn move_away(&self, _cluster: u32) -> Result<(), DiskError> {
        Ok(())
    }
    /// Enlarges the disk. The caller lets no other call in meanwhile.
    ///
    /// # Errors
    /// The host refused, the format can't hold so much, or it would shrink.
    fn grow(&self, size_bytes: u64) -> Result<(), DiskError>;
    /// The dirty bitmap that the file brought along; a second call gives None.
    fn take_bitmap(&self) -> Option<DirtyBitmap> {
        None
    }
    /// Lets [`close`](Image::close) write a dirty bitmap into the file; false says that the format
    /// has no place for one.
    fn keep_bitmap(&self, _bitmap: DirtyBitmap) -> bool {
        false
    }
    /// Gives the log of pending changes to another image; done when nothing is pending.
    fn take_log(&self) -> Option<Arc<dyn PendingLog>> {
        None
    }
    /// Takes a log of pending changes over.
    fn set_log(&self, _log: Option<Arc<dyn PendingLog>>) {}
    /// Makes the disk smaller; clusters behind the new end are lost. Nobody else has it open.
    ///
    /// # Errors
    /// The host refused, or the format does not shrink.
    fn shrink(&self, size_bytes: u64) -> Result<(), DiskError> {
        let what = format!("the format does not shrink to {size_bytes} bytes");
        Err(DiskError::refused(self.name(), what))
    }
    /// Number of bytes of the file that hold data or tables.
    ///
    /// # Errors
    /// The host refused.
    fn used_bytes(&self) -> Result<u64, DiskError>;
    /// Flushes, takes the mark of an open image off, and is read-only from then on. Does nothing
    /// for one that is.
    ///
    /// # Errors
    /// The host refused; the image keeps its mark.
    fn close(&self) -> Result<(), DiskError>;
    /// Takes a [`close`](Image::close) back.
    ///
    /// # Errors
    /// The image was opened for reading only, another program has it by now, or the host refused.
    fn reopen(&self) -> Result<(), DiskError>;
}
