//! What can go wrong while bytes move between a disk and its files.

use std::io;

/// Why a disk or one of its images refused an operation.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host's file system said no.
    #[error("{object}: {action} at byte {offset} failed")]
    Io {
        /// File that it is about.
        object: String,
        /// What was tried, as a noun: `read`, `write`, `sync`.
        action: &'static str,
        /// Byte of the file where it began.
        offset: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The request reaches over the disk's end.
    #[error("bytes {offset} to {end} lie outside of a disk of {size} bytes")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Byte after its last.
        end: u64,
        /// Size of the disk.
        size: u64,
    },
    /// The disk or image is open for reading only.
    #[error("{object} is open for reading only")]
    ReadOnly {
        /// File that it is about.
        object: String,
    },
    /// The file's contents break a rule of its format.
    #[error("{object} is damaged: {what}")]
    Corrupt {
        /// File that it is about.
        object: String,
        /// The rule, and how it is broken.
        what: String,
    },
    /// The image was not closed, or another program has it open.
    #[error("{object} is in use: {what}")]
    InUse {
        /// File that it is about.
        object: String,
        /// How that shows.
        what: String,
    },
    /// The format or the state of the disk has no room for what was asked.
    #[error("{object}: {what}")]
    Refused {
        /// File or disk that it is about.
        object: String,
        /// Why, and what to do instead.
        what: String,
    },
    /// The caller took the permission back.
    #[error("{object}: the work was called off")]
    Cancelled {
        /// File or disk that it is about.
        object: String,
    },
}

impl DiskError {
    /// Checks that a range of bytes lies within a disk of that size.
    pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<(), DiskError> {
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            end => Err(DiskError::OutOfRange {
                offset,
                end: end.unwrap_or(u64::MAX),
                size,
            }),
        }
    }

    /// Wraps an answer of the host.
    pub fn io(object: &str, action: &'static str, offset: u64, source: io::Error) -> Self {
        DiskError::Io {
            object: object.to_owned(),
            action,
            offset,
            source,
        }
    }

    /// A writer's seat that was not free.
    pub(crate) fn claimed(object: &str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::WouldBlock => DiskError::InUse {
                object: object.to_owned(),
                what: "another program has it open for writing".to_owned(),
            },
            _ => DiskError::io(object, "open", 0, source),
        }
    }

    /// A broken rule of the format.
    pub fn corrupt(object: &str, what: impl Into<String>) -> Self {
        DiskError::Corrupt {
            object: object.to_owned(),
            what: what.into(),
        }
    }

    /// Something that the format or state has no room for.
    pub fn refused(object: &str, what: impl Into<String>) -> Self {
        DiskError::Refused {
            object: object.to_owned(),
            what: what.into(),
        }
    }

    /// The error number that a block device or a file system server should answer with.
    pub fn raw_os_error(&self) -> i32 {
        use rustix::io::Errno;
        match self {
            DiskError::Io { source, .. } => {
                source.raw_os_error().unwrap_or(Errno::IO.raw_os_error())
            }
            DiskError::OutOfRange { .. } => Errno::INVAL.raw_os_error(),
            DiskError::ReadOnly { .. } => Errno::ROFS.raw_os_error(),
            DiskError::Corrupt { .. } => Errno::IO.raw_os_error(),
            DiskError::InUse { .. } => Errno::BUSY.raw_os_error(),
            DiskError::Refused { .. } => Errno::OPNOTSUPP.raw_os_error(),
            DiskError::Cancelled { .. } => Errno::CANCELED.raw_os_error(),
        }
    }

    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            DiskError::Io { action: "read", .. } => 6,
            DiskError::Io { action: "open", .. } => 4,
            DiskError::Io { action: "sync", .. } => 16,
            DiskError::Io { action: "lock", .. } => 23,
            DiskError::Io { .. } => 7,
            DiskError::OutOfRange { .. } | DiskError::Refused { .. } => 38,
            DiskError::ReadOnly { .. } => 17,
            DiskError::Corrupt { .. } => 11,
            DiskError::InUse { .. } => 37,
            DiskError::Cancelled { .. } => 29,
        }
    }
}
