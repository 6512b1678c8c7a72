//! Why a disk's directory could not be worked on.

use std::io;
use std::path::{Path, PathBuf};

use crate::DiskError;
use crate::descriptor::{DescriptorError, Guid};

/// Why an operation on a disk's directory failed.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// An image refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The descriptor breaks a rule, or has no room.
    #[error("{} can't be used", path.display())]
    Descriptor {
        /// The descriptor.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: DescriptorError,
    },
    /// The host refused something about a file.
    #[error("{} can't be {action}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// What was tried: `opened`, `written`, `removed`, `locked`.
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Another command holds the descriptor for too long.
    #[error("{} is locked by another command", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// The state of the disk, or what was asked, forbids it.
    #[error("{}: {what}", path.display())]
    Refused {
        /// The descriptor or file.
        path: PathBuf,
        /// Why, and what to do instead.
        what: String,
    },
}

impl FolderError {
    pub(super) fn host(
        path: &Path,
        action: &'static str,
    ) -> impl Fn(io::Error) -> FolderError + use<> {
        let path = path.to_owned();
        move |source| FolderError::Host {
            path: path.clone(),
            action,
            source,
        }
    }

    pub(super) fn refused(path: &Path, what: impl Into<String>) -> FolderError {
        FolderError::Refused {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            FolderError::Disk(error) => error.exit_code(),
            FolderError::Descriptor { source, .. } => match source {
                DescriptorError::NoSnapshot(_) => 43,
                DescriptorError::Guid(_) => 38,
                _ => 39,
            },
            FolderError::Host { action, .. } => match *action {
                "opened" | "read" => 4,
                "removed" => 35,
                "renamed" => 28,
                "locked" => 23,
                _ => 7,
            },
            FolderError::Locked { .. } => 23,
            FolderError::Refused { .. } => 38,
        }
    }

    /// The snapshot that does not exist, where that is the reason.
    pub fn missing_snapshot(&self) -> Option<Guid> {
        match self {
            FolderError::Descriptor {
                source: DescriptorError::NoSnapshot(guid),
                ..
            } => Some(*guid),
            _ => None,
        }
    }
}
