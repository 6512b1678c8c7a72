//! The ways in which an images directory can be less than whole.

use crate::tools::decode::DecodeError;
use crate::{ImageReadError, PageSourceError};

/// What is wrong with an image, or between images.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file is not what its name says.
    #[error("{}", chain(.0))]
    Decode(#[source] DecodeError),
    /// The file, or the directory, cannot be read.
    #[error("{}", chain(.0))]
    Read(#[source] ImageReadError),
    /// Pages cannot be found.
    #[error("{}", chain(.0))]
    Pages(#[source] PageSourceError),
    /// A required field is absent.
    #[error("{message} has no {field}, which is required")]
    Required {
        /// Name of the message.
        message: String,
        /// Name of the field.
        field: String,
    },
    /// The image has the wrong number of entries.
    #[error("{found} entries where this kind has {expected}")]
    Entries {
        /// Entries there are.
        found: u64,
        /// What there should be.
        expected: &'static str,
    },
    /// A file that has to be there is not.
    #[error("missing, and needed by {0}")]
    Missing(String),
    /// The inventory is missing, so the dump was never finished.
    #[error("missing: the dump that wrote the directory did not finish")]
    NoInventory,
    /// The images are of another version.
    #[error("image version {0}, where 1 and 2 are known")]
    Version(u32),
    /// The directory is a pre-dump.
    #[error("this is a pre-dump, which can only be a parent of a dump")]
    PreDump,
    /// The set has no process.
    #[error("no process in the tree")]
    NoTask,
    /// More or fewer than one process without parent.
    #[error("{0} processes without parent, where a tree has one, the first")]
    Roots(usize),
    /// A number occurs twice.
    #[error("{what} {id} occurs a second time")]
    Twice {
        /// What the number is.
        what: &'static str,
        /// The number.
        id: u64,
    },
    /// A parent is missing or comes later.
    #[error("process {pid} comes before its parent {ppid}, or the parent is missing")]
    Parent {
        /// The process.
        pid: u32,
        /// Its parent.
        ppid: u32,
    },
    /// The first thread is not the leader.
    #[error("the first thread of process {0} is not its leader")]
    Leader(u32),
    /// A group or session has no leader in the tree.
    #[error("no process of the tree leads {what} {id}; a restore needs --shell-job")]
    Led {
        /// Group or session.
        what: &'static str,
        /// Its number.
        id: u32,
    },
    /// A list has the wrong length.
    #[error("{field} has {found} elements where {expected} are expected")]
    Count {
        /// Name of the field.
        field: &'static str,
        /// Elements there are.
        found: usize,
        /// Elements there should be.
        expected: usize,
    },
    /// A part of a core image is missing.
    #[error("a {role} without {part}")]
    Part {
        /// Process, thread or zombie.
        role: &'static str,
        /// The part.
        part: &'static str,
    },
    /// A value cannot be.
    #[error("{field} is {value}, which cannot be")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A number leads to nothing.
    #[error("{from} refers to {what} {id}, which is not there")]
    Dangling {
        /// What refers.
        from: String,
        /// What it refers to.
        what: &'static str,
        /// By which number.
        id: u64,
    },
    /// A file entry does not hold what its type says.
    #[error("file {id} of type {kind} has no such part, or one with another id")]
    FileType {
        /// Number of the file.
        id: u32,
        /// Its type.
        kind: String,
    },
    /// A mapping is empty, not of whole pages, or before the end of the one before it.
    #[error("mapping {start:#x}-{end:#x} {what}")]
    Mapping {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A page run is outside of every mapping, or beyond the end of its object.
    #[error("page run {start:#x}-{end:#x} is outside of every mapping at {at:#x}")]
    Outside {
        /// First address of the run.
        start: u64,
        /// Address after its last.
        end: u64,
        /// First address outside.
        at: u64,
    },
    /// A pages file has another size than its pagemap says.
    #[error("{found} bytes where the pagemap says {expected}")]
    PagesSize {
        /// Size of the file.
        found: u64,
        /// Size by the pagemap.
        expected: u64,
    },
    /// A file that nothing refers to.
    #[error("nothing refers to it")]
    Orphan,
}

/// Writes an error with everything that it comes from.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}
