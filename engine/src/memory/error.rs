//! What goes wrong while memory is dumped.

use firn_images::ImageWriteError;
use firn_sys::{Errno, Pid};

use super::range::AddressRange;
use super::smaps::SmapsParseError;
use crate::inject::InjectError;
use crate::obstacle::Obstacle;

/// An error of whoever keeps files and descriptors.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Failure to dump the memory of a task.
#[derive(Debug, thiserror::Error)]
pub enum MemoryDumpError {
    /// A file of /proc could not be read.
    #[error("can't read {what} of task {pid}")]
    Read {
        /// The task.
        pid: Pid,
        /// The file.
        what: &'static str,
        /// Cause.
        source: Errno,
    },
    /// A file of /proc does not look as expected.
    #[error("can't understand {what} of task {pid}")]
    Format {
        /// The task.
        pid: Pid,
        /// The file.
        what: &'static str,
    },
    /// The memory map does not look as expected.
    #[error("task {pid}")]
    Map {
        /// The task.
        pid: Pid,
        /// Cause.
        source: SmapsParseError,
    },
    /// Mappings that can't be dumped; all of them.
    #[error("{}", list(.0))]
    Obstacles(Vec<Obstacle>),
    /// A task could not be asked about its memory.
    #[error(transparent)]
    Ask(#[from] InjectError),
    /// Pages could not be read.
    #[error("can't read memory {range} of task {pid}")]
    Pages {
        /// The task.
        pid: Pid,
        /// The first range that failed.
        range: AddressRange,
        /// Cause.
        source: Errno,
    },
    /// The contents of a shared memory object could not be read.
    #[error("can't read shared memory `{name}`")]
    Shared {
        /// Its name.
        name: String,
        /// Cause.
        source: Errno,
    },
    /// The file of a mapping could not be dumped.
    #[error("task {pid}: {mapping}")]
    File {
        /// The task.
        pid: Pid,
        /// The mapping.
        mapping: String,
        /// Cause.
        source: SourceError,
    },
    /// Pages could not be written.
    #[error("can't write {path}")]
    Write {
        /// The pages file.
        path: String,
        /// Cause.
        source: Errno,
    },
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageWriteError),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

fn list(obstacles: &[Obstacle]) -> String {
    let lines: Vec<String> = obstacles.iter().map(Obstacle::to_string).collect();
    lines.join("; ")
}
