//! What the mappings of restored tasks are of: descriptors of the coordinator, or paths that it keeps alive.

use firn_sys::{Pid, file, nr};

use super::error::SourceError;
use super::vma::Vma;
use crate::program::{Program, Rule, Slot};

const AT_FDCWD: i32 = -100;

/// What a task maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MappingSource {
    /// A descriptor that is open in the coordinator, and so in every task it forks.
    Fd(i32),
    /// A path that leads to it as long as the coordinator lives, to be opened with these flags.
    Path(String, i32),
}

/// What mappings are of.
pub trait MappingFds {
    /// The file, memory file or shared memory object of a mapping.
    ///
    /// # Errors
    /// There is none.
    fn mapping_source(&mut self, vma: &Vma) -> Result<MappingSource, SourceError>;

    /// A descriptor of the io_uring ring of a mapping.
    ///
    /// # Errors
    /// There is none.
    fn ring_fd(&mut self, vma: &Vma) -> Result<i32, SourceError>;

    /// For a part of an io_uring ring that its process makes last: its descriptor there.
    fn own_ring_fd(&self, pid: Pid, vma: &Vma) -> Option<i32>;

    /// A descriptor of the executable, not opened with O_PATH.
    ///
    /// # Errors
    /// There is none.
    fn exe_fd(&mut self, file_id: u32) -> Result<i32, SourceError>;

    /// A descriptor of /dev/null, open for writing.
    ///
    /// # Errors
    /// There is none.
    fn null_fd(&mut self) -> Result<i32, SourceError>;
}

/// A mapping for which there is no descriptor.
#[derive(Debug, thiserror::Error)]
#[error("task {pid}: no file for {mapping}")]
pub struct MappingFdError {
    /// The task.
    pub pid: Pid,
    /// The mapping.
    pub mapping: String,
    /// Cause.
    pub source: SourceError,
}

/// Opens what a mapping is of, for the one call.
pub(super) fn open(p: &mut Program, path: &str, flags: i32, vma: &Vma) -> Slot {
    let flags = flags | file::O_CLOEXEC;
    let text = p.string(path.as_bytes());
    let args = [AT_FDCWD.into(), text.into(), flags.into()];
    let why = format!("opening {path} for {}", vma.title());
    p.call_to_slot(nr::OPENAT, &args, Rule::Ok, why)
}
