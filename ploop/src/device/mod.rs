//! The disk as a block device.
//!
//! | device | needs | when its server dies |
//! |---|---|---|
//! | [`ublk`] | the ublk driver, io_uring | requests wait; the next server gets the unanswered ones at once |
//! | [`fuse`] + [`loopdev`] | FUSE, loop | requests wait; the next server gets the unanswered ones at once (Linux 6.9) |
//! | [`nbd`] | the kernel's NBD client, in the first network namespace | requests wait; the unanswered ones are sent again after a while |
//!
//! Each is a [`Device`] in the supervisor, which outlives the workers, and a [`Channel`] in the worker.
//! [`nbd`] also serves other programs over a Unix socket, and then needs nothing of the kernel's.

mod choice;
mod export;
pub mod fuse;
pub mod loopdev;
pub mod nbd;
pub mod ublk;
pub mod users;
mod view;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use choice::{Choice, NoDevice, choose};
pub use export::Export;
pub use view::View;

use crate::kernel;

/// A kind of device, on its way from the kernel's channel to a block device. It belongs to the supervisor;
/// workers come and go.
pub trait Device: Send + Sync {
    /// What the kind is called.
    fn name(&self) -> &'static str;
    /// Readies the channel for the next worker. Called before each start of one, when the last is no more.
    ///
    /// # Errors
    /// The kernel refused.
    fn lend(&self) -> io::Result<Lent>;
    /// The worker runs, as this process.
    fn lent(&self, _worker: u32) {}
    /// Makes the block device. A worker answers.
    ///
    /// # Errors
    /// The kernel refused. The worker has then been told to end.
    fn attach(&self, how: &AttachOptions<'_>) -> io::Result<Attached>;
}

/// What a device gives the next worker.
#[derive(Debug)]
pub enum Lent {
    /// A channel, and the descriptors that it names, which the worker inherits.
    Channel(Channel, Vec<OwnedFd>),
    /// The last user has left while there was no worker.
    Released,
}

/// How a block device is to be.
#[derive(Debug, Clone, Copy)]
pub struct AttachOptions<'a> {
    /// What it shows.
    pub view: View,
    /// Size of the whole disk.
    pub disk_bytes: u64,
    /// The unit in which space is given back.
    pub unit_bytes: u32,
    /// No writes.
    pub read_only: bool,
    /// What the system's tools call it.
    pub label: &'a str,
}

/// A block device that is there.
#[derive(Debug)]
pub struct Attached {
    /// Its node.
    pub path: PathBuf,
    /// The device, open: it goes with its last user.
    pub held: Held,
}

/// A block device that is held open.
#[derive(Debug)]
pub struct Held {
    #[expect(dead_code, reason = "closed with it")]
    file: File,
    /// Ends when the device is let go.
    #[expect(dead_code, reason = "dropped with it")]
    told: Option<Sender<()>>,
}

impl From<File> for Held {
    fn from(file: File) -> Held {
        Held { file, told: None }
    }
}

/// Opens a new device, whose node may take a moment.
fn open_node(path: &Path, writable: bool, patience: Duration) -> io::Result<File> {
    let begun = Instant::now();
    loop {
        match File::options().read(true).write(writable).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && begun.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Where a worker's requests come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// The FUSE channel.
    Fuse {
        /// Its number.
        fd: i32,
        /// The requests that the last worker did not answer have to be asked for.
        resend: bool,
    },
    /// A device of the ublk driver's.
    Ublk {
        /// Its number.
        device: u32,
        /// It can get another size while it runs.
        grows: bool,
    },
    /// The server's end of a connection to the kernel's NBD client.
    Nbd {
        /// Its number.
        fd: i32,
    },
}

/// Why the service ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The last user has left.
    Released,
    /// The way to the device is gone, and its users with it.
    Unmounted,
    /// The channel broke.
    Failed,
}

impl Channel {
    /// Whether the device needs nothing of its worker's when the image is closed, not even the worker's death.
    pub fn is_left_behind(&self) -> bool {
        matches!(self, Channel::Fuse { .. })
    }

    /// Whether the device can take over the size of a disk that has grown.
    pub fn grows(&self) -> bool {
        !matches!(self, Channel::Ublk { grows: false, .. })
    }

    /// Starts the threads that answer requests. The first cause of an end is sent; the threads go on until
    /// the process ends.
    ///
    /// # Errors
    /// No thread, no memory, or no such descriptor.
    pub fn serve(
        &self,
        export: &Arc<Export>,
        view: View,
        threads: usize,
        ended: &Sender<Ended>,
    ) -> io::Result<()> {
        match *self {
            Channel::Fuse { fd, resend } => {
                let channel = Arc::new(kernel::adopt_fd(fd)?);
                fuse::start(Arc::clone(&channel), Arc::clone(export), threads, ended)?;
                match resend {
                    true => fuse::resend(&*channel),
                    false => Ok(()),
                }
            }
            Channel::Ublk { device, .. } => ublk::start(device, export, view, threads, ended),
            Channel::Nbd { fd } => {
                let connection = kernel::adopt_fd(fd)?.into();
                nbd::start(connection, export, view, threads, ended)
            }
        }
    }
}

/// Lets a device take over the size of a disk that has grown.
///
/// # Errors
/// It is no device of ours, or the kernel refused.
pub fn resize(device: &Path, view: View, disk_bytes: u64) -> io::Result<()> {
    let size_bytes = view.len_bytes(disk_bytes);
    match (nbd::index_of(device), ublk::number_of(device)) {
        (Some(index), _) => nbd::resize(index, size_bytes),
        (_, Some(number)) => ublk::resize(number, size_bytes),
        _ => loopdev::refresh_size(&File::open(device)?),
    }
}
