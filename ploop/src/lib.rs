//! ploop: a container's disk in a file.
//!
//! Three layers, each behind a trait, so that another one joins without touching the rest:
//!
//! | layer | trait | what is there |
//! |---|---|---|
//! | device | [`Disk`] | [`ChainDisk`]: a base image and its deltas, seen as one disk |
//! | format | [`Image`] | [`ExpandedImage`]: ploop's own; [`format::qcow2`]; [`RawImage`]: one file whose bytes are the disk's |
//! | io | [`Storage`] | [`HostFile`]: a file of the host |
//!
//! A block server (FUSE, NBD, ublk) takes a `dyn Disk` and needs nothing below it.
//!
//! Around them: [`server`] keeps a disk's device alive, [`tracker`] knows what was written, [`copy`] moves a disk while it is written,
//! [`guest`] handles the file system on it.
#![deny(unsafe_code)]

mod aio;
mod bitmap;
mod chain;
pub mod copy;
pub mod descriptor;
pub mod device;
mod disk;
mod error;
mod extent;
pub mod folder;
pub mod format;
pub mod guest;
pub mod kernel;
pub mod ping;
#[doc(hidden)]
pub mod recorder;
pub mod server;
mod storage;
mod sys;
pub mod tracker;

pub use bitmap::{Bitmap, DirtyBitmap};
pub use chain::ChainDisk;
pub use disk::{BitmapChange, Commit, Counters, Disk, Merge, NewTop, Placed, Way};
pub use error::DiskError;
pub use extent::{Extent, ExtentKind};
pub use folder::{Folder, FolderError};
pub use format::expanded::{ExpandedImage, Unclosed};
pub use format::{Format, Image, Known, OpenImage, PendingLog, RawImage, Slot};
pub use storage::{Access, DirectFile, HostFile, Storage};
