//! What can be wrong with images.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Where in a file something is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryPlace {
    /// The file.
    pub path: PathBuf,
    /// Index of the entry, from 0.
    pub entry: u64,
    /// Offset in the file of what is wrong, in bytes.
    pub offset: u64,
}

impl fmt::Display for EntryPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, entry {}, byte {}",
            self.path.display(),
            self.entry,
            self.offset
        )
    }
}

/// Why an image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageReadError {
    /// The images directory cannot be used.
    #[error("cannot open images directory {}", path.display())]
    Directory {
        /// The directory as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file cannot be opened.
    #[error("cannot open image {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel failed to read the file.
    #[error("cannot read {place}")]
    Read {
        /// Where reading stopped.
        place: EntryPlace,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file ends inside its header.
    #[error("{} has {size} bytes, which is too short for an image header", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The file is of another kind, or no image.
    #[error("{} begins with {found:#010x} where a {tag} image has {expected:#010x}", path.display())]
    WrongMagic {
        /// The file.
        path: PathBuf,
        /// The magic found.
        found: u32,
        /// The magic that this kind has.
        expected: u32,
        /// CRIU's name of the kind.
        tag: &'static str,
    },
    /// The first magic is that of another class of images.
    #[error("{} has another first magic than {tag} images have", path.display())]
    WrongHeader {
        /// The file.
        path: PathBuf,
        /// CRIU's name of the kind.
        tag: &'static str,
    },
    /// Neither name nor magic of the file is known.
    #[error("{} is no image of a known kind", path.display())]
    UnknownKind {
        /// The file.
        path: PathBuf,
    },
    /// The file ends inside the length of an entry.
    #[error("{place}: {count} stray bytes at the end of the file")]
    StrayBytes {
        /// Where they begin.
        place: EntryPlace,
        /// How many.
        count: u64,
    },
    /// The file ends inside a message or its payload.
    #[error("{place}: {len} bytes announced and {left} left in the file")]
    Truncated {
        /// Where the bytes would begin.
        place: EntryPlace,
        /// Bytes announced.
        len: u64,
        /// Bytes there.
        left: u64,
    },
    /// More is announced than is ever read into memory.
    #[error("{place}: {len} bytes announced, more than the {limit} that are read at once")]
    TooLong {
        /// Where the bytes begin.
        place: EntryPlace,
        /// Bytes announced.
        len: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The bytes are not the message.
    #[error("{place}: not a valid {message}")]
    Decode {
        /// Where the message begins.
        place: EntryPlace,
        /// Name of the message.
        message: &'static str,
        /// What is wrong.
        source: prost::DecodeError,
    },
    /// The file ends where an entry has to be.
    #[error("{place}: the file ends where a {message} is expected")]
    NoEntry {
        /// End of the file.
        place: EntryPlace,
        /// Name of the message.
        message: &'static str,
    },
    /// There is more in the file than its kind has.
    #[error("{place}: {count} bytes more than a {tag} image has")]
    Trailing {
        /// Where they begin.
        place: EntryPlace,
        /// How many.
        count: u64,
        /// CRIU's name of the kind.
        tag: &'static str,
    },
}

impl ImageReadError {
    /// Says whether the file or directory is simply not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Directory { source, .. } | Self::Open { source, .. }
            if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Why an image set could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ImageWriteError {
    /// The images directory cannot be used.
    #[error("cannot use images directory {}", path.display())]
    Directory {
        /// The directory as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another dump writes into the directory.
    #[error("another dump is writing into {}; wait for it or choose another directory", path.display())]
    Busy {
        /// The images directory.
        path: PathBuf,
    },
    /// The kernel refused to make, write, sync or move a file.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file as it is named in the sealed set.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A message is longer than any reader accepts.
    #[error("{}: {message} of {len} bytes is longer than an image entry may be", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Name of the message.
        message: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// A source of payload ended early.
    #[error("{}: payload ended after {copied} of {len} bytes", path.display())]
    ShortPayload {
        /// The file.
        path: PathBuf,
        /// Bytes announced.
        len: u64,
        /// Bytes there were.
        copied: u64,
    },
    /// A writer was dropped before it had written everything.
    #[error("{} was begun and not finished", path.display())]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
    /// The previous images directory is not usable.
    #[error("cannot use previous images directory {}", path.display())]
    Parent {
        /// The directory as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A page run does not go after the one before it, or makes no sense by itself.
    #[error("{}: page run at {vaddr:#x} is out of order, empty, unaligned or of no clear kind", path.display())]
    PageOrder {
        /// The pagemap.
        path: PathBuf,
        /// Where the run begins.
        vaddr: u64,
    },
}
