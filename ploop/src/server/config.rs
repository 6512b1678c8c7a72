//! What a supervisor and its workers are told.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::registry;
use crate::device::{Channel, Choice};

/// Threads of a worker unless told otherwise.
pub const THREADS: usize = 8;

/// Which disk is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A descriptor: its top, or one of its snapshots.
    Descriptor {
        /// The DiskDescriptor.xml.
        path: PathBuf,
        /// Snapshot to be shown, read-only; None is the top.
        snapshot: Option<String>,
    },
    /// A single image without a descriptor.
    File {
        /// The file.
        path: PathBuf,
        /// Bytes of a cluster, where the image is a raw one.
        cluster_bytes: u32,
    },
}

impl Source {
    /// The file that names the disk.
    pub fn path(&self) -> &PathBuf {
        match self {
            Source::Descriptor { path, .. } | Source::File { path, .. } => path,
        }
    }

    /// The snapshot shown, or None for the disk itself.
    pub fn snapshot(&self) -> Option<&str> {
        match self {
            Source::Descriptor { snapshot, .. } => snapshot.as_deref(),
            Source::File { .. } => None,
        }
    }
}

/// Where the file system of the disk is to be mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountConfig {
    /// The directory.
    pub target: PathBuf,
    /// The file system's type; None looks at the disk.
    pub fs_type: Option<String>,
    /// Options as in fstab, passed on to the file system.
    pub options: String,
    /// Check the file system first.
    pub check: bool,
}

/// Everything a supervisor is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeConfig {
    /// The disk.
    pub source: Source,
    /// No writes.
    pub read_only: bool,
    /// Go on with what is durable of an image that was not closed.
    pub recover: bool,
    /// Threads that answer requests.
    pub threads: usize,
    /// Past the page cache of the image's files.
    pub direct_io: bool,
    /// Directory of sockets and records.
    pub run_dir: PathBuf,
    /// The file system to mount; None leaves a bare device.
    pub mount: Option<MountConfig>,
    /// The kind of device.
    pub device: Choice,
}

impl ServeConfig {
    /// Whether its file system may play its journal back, though nothing of the disk changes.
    pub(super) fn has_scratch(&self) -> bool {
        self.read_only && self.mount.is_some()
    }
}

/// What a worker is told besides: numbers of the descriptors that it inherits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// What the supervisor was told.
    pub serve: ServeConfig,
    /// Where requests come from; None where there is no device.
    pub channel: Option<Channel>,
    /// The listening control socket.
    pub control: i32,
    /// The state that outlives a worker.
    pub state: i32,
    /// Changes of the image's table that outlive a worker.
    pub pending: i32,
    /// What a file system that is mounted read-only writes.
    pub scratch: Option<i32>,
    /// Told when requests are answered, or why not.
    pub ready: i32,
    /// The disk's lock, held with the supervisor: the disk counts as served as long as a worker has it.
    pub held: i32,
    /// Told when the image is closed and nothing is left to be done.
    pub closed: i32,
    /// Not the first worker of this disk.
    pub restarted: bool,
}

/// What the launcher is told when the disk is there, or why it is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Launched {
    /// It is.
    Ready(registry::Record),
    /// It is not.
    Failed(NotServed),
}

/// Why there is no disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct NotServed {
    /// Chain of causes.
    pub message: String,
    /// Exit status of the command.
    pub code: u8,
    /// What the user has no right to, where that is the reason.
    pub denied: Option<Denied>,
}

/// What somebody may have no right to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Denied {
    /// The directory of served disks.
    Registry,
    /// Making a block device, or mounting it.
    Device,
    /// The disk's files.
    Disk,
}

impl From<String> for NotServed {
    fn from(message: String) -> NotServed {
        NotServed {
            message,
            code: 2,
            denied: None,
        }
    }
}
