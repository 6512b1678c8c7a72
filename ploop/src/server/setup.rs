//! From an answering worker to a device and a mounted file system.

use std::io;
use std::path::{Path, PathBuf};

use super::config::{MountConfig, ServeConfig};
use super::{Client, mounting};
use crate::device::{AttachOptions, Device, Held, View};
use crate::guest::{self, GuestError};

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
    /// The device, open, where nothing else holds it.
    held: Option<Held>,
    /// The block device's node.
    pub path: Option<PathBuf>,
    /// What kind of device it is.
    pub via: &'static str,
    /// Where its file system is mounted.
    pub mountpoint: Option<PathBuf>,
    /// Type of that.
    pub fs_type: Option<String>,
    /// First byte of the disk that the device shows.
    pub offset: u64,
}

impl SetUp {
    /// A disk without a device.
    pub const NONE: SetUp = SetUp {
        held: None,
        path: None,
        via: "none",
        mountpoint: None,
        fs_type: None,
        offset: 0,
    };
}

fn step(what: &str, code: u8) -> impl FnOnce(io::Error) -> SetUpError + '_ {
    move |source| SetUpError::Step {
        what: what.to_owned(),
        source,
        code,
    }
}

/// Makes the block device and mounts what is on it, where that is asked for. On an error nothing stays
/// open. `control` is the worker's socket.
///
/// # Errors
/// The kernel refused, or the disk holds no file system.
pub fn set_up(
    config: &ServeConfig,
    device: &dyn Device,
    view: View,
    control: &Path,
) -> Result<SetUp, SetUpError> {
    let label = config.source.path().display().to_string();
    let stat = Client::connect(control).and_then(|mut client| client.stat());
    let stat =
        stat.map_err(|error| step("asking for the disk's size", 12)(io::Error::other(error)))?;
    let options = AttachOptions {
        view,
        disk_bytes: stat.size_bytes,
        unit_bytes: stat.cluster_bytes,
        read_only: config.read_only && !config.has_scratch(),
        label: &label,
    };
    let what = format!("attaching a device ({})", device.name());
    let attached = device.attach(&options).map_err(step(&what, 2))?;
    let mut set_up = SetUp {
        held: Some(attached.held),
        path: Some(attached.path),
        via: device.name(),
        offset: view.offset,
        ..SetUp::NONE
    };
    if let (Some(path), Some(mount)) = (&set_up.path, &config.mount) {
        set_up.fs_type = Some(mount_device(path, mount, config.read_only)?);
        set_up.mountpoint = Some(mount.target.clone());
        // From here the mount holds the device: it goes when that goes, however that comes.
        set_up.held = None;
    }
    Ok(set_up)
}

fn mount_device(device: &Path, mount: &MountConfig, read_only: bool) -> Result<String, SetUpError> {
    let fs_type = match &mount.fs_type {
        Some(fs_type) => fs_type.clone(),
        None => guest::fs_type_of(device)?.name().to_owned(),
    };
    // Of a disk that is only read, the check's changes are as short-lived as the journal's.
    if mount.check {
        guest::check(device, &fs_type)?;
    }
    let what = format!("mounting {fs_type} at {}", mount.target.display());
    let options = mounting::with_defaults(&fs_type, &mount.options);
    mounting::mount(device, &mount.target, &fs_type, &options, read_only)
        .map_err(step(&what, 21))?;
    Ok(fs_type)
}
