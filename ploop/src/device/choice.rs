//! Which kind of device a disk gets: what the user wants, or the best that the kernel offers.

use std::io;

use serde::{Deserialize, Serialize};

use super::Device;
use super::fuse::FuseLoop;
use super::nbd::NbdDevice;
use super::ublk::UblkDevice;

/// What kind of device is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The best that works.
    Auto,
    /// The ublk driver.
    Ublk,
    /// The kernel's NBD client.
    Nbd,
    /// A file of a FUSE mount and a loop device on it.
    Fuse,
    /// None: the disk is served to other programs only.
    None,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.text())]
pub struct NoDevice {
    /// What was tried, in order, and what the kernel said.
    pub tried: Vec<(&'static str, io::Error)>,
}

impl NoDevice {
    /// Whether the last resort would do for somebody with more rights.
    pub fn is_denied(&self) -> bool {
        let last = self.tried.last().map(|(_, error)| error.kind());
        last == Some(io::ErrorKind::PermissionDenied)
    }

    fn text(&self) -> String {
        let tried = self.tried.iter();
        let tried = tried.map(|(name, error)| format!("{name}: {error}"));
        format!(
            "there is no device: {}",
            tried.collect::<Vec<_>>().join("; ")
        )
    }
}

/// Told whether the device has to be able to do everything, as others are there.
type Begin = fn(bool) -> io::Result<Box<dyn Device>>;

/// The kinds in the order in which they are tried.
const KINDS: [(Choice, &str, Begin); 3] = [
    (Choice::Ublk, "ublk", |all| {
        Ok(Box::new(UblkDevice::begin(all)?))
    }),
    (Choice::Nbd, "NBD", |_| Ok(Box::new(NbdDevice::begin()?))),
    (Choice::Fuse, "FUSE", |_| Ok(Box::new(FuseLoop::begin()?))),
];

/// Begins a device of the kind that is wanted; what the kernel can do is found out by doing it.
///
/// # Errors
/// Nothing that is wanted works.
pub fn choose(choice: Choice) -> Result<Option<Box<dyn Device>>, NoDevice> {
    if choice == Choice::None {
        return Ok(None);
    }
    let mut tried = Vec::new();
    for (kind, name, begin) in KINDS {
        if choice != Choice::Auto && choice != kind {
            continue;
        }
        match begin(choice == Choice::Auto) {
            Ok(device) => return Ok(Some(device)),
            Err(error) => tried.push((name, error)),
        }
    }
    Err(NoDevice { tried })
}
