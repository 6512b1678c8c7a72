//! What is on a disk: its partition and file system, through the host's own tools.

pub mod gpt;
mod tools;
mod trim;

use std::fs::File;
use std::io;
use std::path::Path;

pub use gpt::Partition;
pub use tools::{FormatOptions, check, format, grow_fs, grow_unmounted_fs, shrink_fs};
pub use trim::trim;

/// A file system that disks are made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// ext2, ext3 or ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
}

impl FsType {
    /// All of them.
    pub const ALL: [FsType; 3] = [FsType::Ext4, FsType::Xfs, FsType::Btrfs];

    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            FsType::Ext4 => "ext4",
            FsType::Xfs => "xfs",
            FsType::Btrfs => "btrfs",
        }
    }

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<FsType> {
        FsType::ALL.into_iter().find(|fs| fs.name() == name)
    }
}

/// Why a disk's contents can't be used.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A read or write of the device.
    #[error("{what} failed")]
    Device {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// There is nothing that could be mounted.
    #[error("{device} holds no file system that is known; name its type with -t")]
    NoFileSystem {
        /// The device.
        device: String,
    },
    /// A program of the host's is missing.
    #[error("{program} can't be run; install {package}")]
    NoTool {
        /// The program.
        program: String,
        /// The package that has it in Debian.
        package: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It was run and failed.
    #[error("{program} ended with {status}: {message}")]
    Tool {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The last lines of what it said.
        message: String,
        /// Exit status of the command that goes with it.
        code: u8,
    },
    /// The file system can't do it.
    #[error("{fs} {what}")]
    Refused {
        /// The file system's type.
        fs: String,
        /// Why.
        what: &'static str,
    },
}

impl GuestError {
    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            GuestError::Device { .. } => 6,
            GuestError::NoFileSystem { .. } => 21,
            GuestError::NoTool { .. } => 12,
            GuestError::Tool { code, .. } => *code,
            GuestError::Refused { .. } => 26,
        }
    }
}

/// Looks at the marks of the known file systems.
///
/// # Errors
/// The device can't be read, or none of them is there.
pub fn fs_type_of(device: &Path) -> Result<FsType, GuestError> {
    let look = || fs_type_in(&File::open(device)?, 0);
    let found = look().map_err(|source| GuestError::Device {
        what: "looking for a file system",
        source,
    })?;
    found.ok_or_else(|| GuestError::NoFileSystem {
        device: device.display().to_string(),
    })
}

/// Looks at the marks of the known file systems behind byte `start`. None where there is none of them.
///
/// # Errors
/// The place can't be read.
pub fn fs_type_in(place: &dyn gpt::Place, start: u64) -> io::Result<Option<FsType>> {
    for (at, mark, fs) in MARKS {
        let mut bytes = vec![0; mark.len()];
        match place.read(&mut bytes, start + at) {
            Ok(()) if bytes == *mark => return Ok(Some(*fs)),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

const MARKS: &[(u64, &[u8], FsType)] = &[
    (0x438, &[0x53, 0xef], FsType::Ext4),
    (0, b"XFSB", FsType::Xfs),
    (0x1_0040, b"_BHRfS_M", FsType::Btrfs),
];
