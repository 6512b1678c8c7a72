//! From an answering worker to a device and a mounted file system.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::config::{MountConfig, ServeConfig};
use super::mounting;
use crate::device::fuse::Connection;
use crate::device::loopdev::{LoopDevice, LoopOptions};
use crate::guest::{self, GuestError, Partition};

/// Less than this behind a partition is the backup of the table.
const TAIL: u64 = 1 << 20;

/// Why there is no device or no mount.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// A step of the kernel's.
    #[error("{what} failed")]
    Step {
        /// The step.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
        /// Exit status that goes with it.
        code: u8,
    },
    /// The disk's contents.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

impl SetUpError {
    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            SetUpError::Step { code, .. } => *code,
            SetUpError::Guest(error) => error.exit_code(),
        }
    }
}

/// A device that is there.
#[derive(Debug)]
pub struct SetUp {
    /// Held where nothing else does; the path alone where a mount does.
    device: Option<LoopDevice>,
    path: Option<PathBuf>,
    /// Where its file system is mounted.
    pub mountpoint: Option<PathBuf>,
    /// Type of that.
    pub fs_type: Option<String>,
    /// First byte of the partition that the device shows.
    pub partition_offset: u64,
}

impl SetUp {
    /// The block device's node.
    pub fn device_path(&self) -> Option<PathBuf> {
        self.path.clone()
    }

    /// What kind of device it is.
    pub fn via(&self) -> &'static str {
        match self.path {
            Some(_) => "fuse+loop",
            None => "none",
        }
    }
}

fn step(what: &str, code: u8) -> impl FnOnce(io::Error) -> SetUpError + '_ {
    move |source| SetUpError::Step {
        what: what.to_owned(),
        source,
        code,
    }
}

/// Attaches a device to the disk's file and mounts what is on it, where that is asked for. On an
/// error nothing stays open.
///
/// # Errors
/// The kernel refused, or the disk holds no file system.
pub fn set_up(config: &ServeConfig, mount: Option<OwnedFd>) -> Result<SetUp, SetUpError> {
    let Some(mount) = mount else {
        return Ok(SetUp {
            device: None,
            path: None,
            mountpoint: None,
            fs_type: None,
            partition_offset: 0,
        });
    };
    let file = Connection::open_file(&mount, !config.read_only)
        .map_err(step("opening the disk's file", 4))?;
    // The loop device keeps the file open, and that the mount.
    drop(mount);
    let partition = match config.mount {
        Some(_) => guest::find_partition(&file)?,
        None => None,
    };
    // A partition that goes to the end gets no limit, so that it can grow with the disk.
    let size = file
        .metadata()
        .map_err(step("looking at the disk", 15))?
        .len();
    let limit = |found: &Partition| match size - (found.offset + found.len_bytes) < TAIL {
        true => 0,
        false => found.len_bytes,
    };
    let label = config.source.path().display().to_string();
    let options = LoopOptions {
        offset: partition.as_ref().map_or(0, |found| found.offset),
        len_bytes: partition.as_ref().map_or(0, limit),
        read_only: config.read_only,
        direct_io: true,
        label: &label,
    };
    let device = LoopDevice::attach(&file, &options).map_err(step("attaching a loop device", 2))?;
    let path = device.path().to_owned();
    let mut set_up = SetUp {
        device: Some(device),
        path: Some(path.clone()),
        mountpoint: None,
        fs_type: None,
        partition_offset: options.offset,
    };
    if let Some(mount) = &config.mount {
        set_up.fs_type = Some(mount_device(&path, mount, config.read_only)?);
        set_up.mountpoint = Some(mount.target.clone());
        // From here the mount holds the device: it goes when that goes, however that comes.
        set_up.device = None;
    }
    Ok(set_up)
}

fn mount_device(device: &Path, mount: &MountConfig, read_only: bool) -> Result<String, SetUpError> {
    let fs_type = match &mount.fs_type {
        Some(fs_type) => fs_type.clone(),
        None => guest::fs_type_of(device)?.name().to_owned(),
    };
    if mount.check && !read_only {
        guest::check(device, &fs_type)?;
    }
    let what = format!("mounting {fs_type} at {}", mount.target.display());
    mounting::mount(device, &mount.target, &fs_type, &mount.options, read_only)
        .map_err(step(&what, 21))?;
    Ok(fs_type)
}
