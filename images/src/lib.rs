//! Checkpoint image directories: CRIU's files, read and written.
//!
//! * [`ImageKind`] says what files there are and what each one looks like.
//! * [`ImageSetWriter`] writes a set: private until sealed, the inventory last.
//! * [`PagemapWriter`] writes which pages a pages file holds; [`PageSource`] finds the contents of
//!   pages, through the chain of parents where the set is an increment.
//! * [`ImageDir`] and [`ImageReader`] read one, believing nothing before it is checked.
//!
//! ```
//! use firn_images::{ImageDir, ImageKind, ImageSetWriter};
//! use firn_proto::{FsEntry, InventoryEntry};
//!
//! let dir = tempfile::tempdir()?;
//! let set = ImageSetWriter::create(dir.path())?;
//! set.write_one(ImageKind::Fs, 12, &FsEntry { cwd_id: 1, root_id: 2, umask: Some(0o22) })?;
//! set.seal(&InventoryEntry { img_version: firn_images::IMG_VERSION, ..Default::default() })?;
//!
//! let images = ImageDir::open(dir.path())?;
//! assert!(images.is_complete());
//! let fs: FsEntry = images.read_one(ImageKind::Fs, 12)?;
//! assert_eq!(fs.umask, Some(0o22));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod date;
mod dir;
mod error;
mod framing;
mod kind;
mod pages;
mod reader;
mod set;
pub mod tools;
mod writer;

pub use date::utc_date;
pub use dir::{ImageDir, ImageFile};
pub use error::{EntryPlace, ImageReadError, ImageWriteError};
pub use framing::{IMG_COMMON, IMG_SERVICE, IMG_VERSION, MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES};
pub use kind::{Entries, Header, ImageKind, KindInfo, Number, Payload, Presence};
pub use pages::{
    LentFile, PAGE_SIZE, PageFlags, PagePlace, PageRun, PageSource, PageSourceError, Pagemap,
    PagemapRun, PagemapWriter, PagesFile,
};
pub use reader::ImageReader;
pub use set::{ImageSetWriter, PARENT_LINK, Sealed, write_single};
pub use writer::EntryWriter;
