//! Why a dump failed.

use std::path::PathBuf;

use firn_images::ImageWriteError;
use firn_sys::{Errno, Pid};

use crate::class::{ErrorClass, hint_for};
use crate::files::FileDumpError;
use crate::freeze::FreezeError;
use crate::inject::InjectError;
use crate::memory::MemoryDumpError;
use crate::obstacle::Obstacle;
use crate::script::ScriptError;
use crate::task::core_image::CoreDumpError;
use crate::task::questions::AskError;
use crate::task::relations::RelationError;

/// Failure of a dump. The tree goes on as it was, and what was written is gone.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Objects that can't be dumped; all that were found.
    #[error("{} object{} can't be dumped", .0.len(), if .0.len() == 1 { "" } else { "s" })]
    Obstacles(Vec<Obstacle>),
    /// The tree is part of a shell's session.
    #[error("process {pid} belongs to session {sid}, whose leader is not in its tree")]
    OuterSession {
        /// Root of the tree.
        pid: Pid,
        /// Its session.
        sid: Pid,
    },
    /// No restore could make the tree again.
    #[error("the tree could not be restored")]
    Relation(#[from] RelationError),
    /// The directory for the images can't be used.
    #[error("can't open the image directory {}", path.display())]
    ImagesDir {
        /// The directory.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The tree could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// A task could not be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Per-task state.
    #[error(transparent)]
    Core(#[from] CoreDumpError),
    /// Memory.
    #[error(transparent)]
    Memory(MemoryDumpError),
    /// Open files.
    #[error(transparent)]
    Files(FileDumpError),
    /// Images.
    #[error(transparent)]
    Images(#[from] ImageWriteError),
    /// Nothing here tells which pages are written to.
    #[error("this kernel can't track writes to memory")]
    NoTracking(#[source] Errno),
    /// Who keeps track of an earlier dump can't be told that it has ended.
    #[error("can't end the tracking of memory of the tree below task {root} since an earlier dump")]
    Tracker {
        /// Root of the tree.
        root: Pid,
        /// Cause.
        source: std::io::Error,
    },
    /// A task could not be made to track writes.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// An action script said no.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// The caller asked to stop.
    #[error("the dump was cancelled")]
    Cancelled,
}

impl From<MemoryDumpError> for DumpError {
    fn from(error: MemoryDumpError) -> DumpError {
        match error {
            MemoryDumpError::Obstacles(found) => DumpError::Obstacles(found),
            MemoryDumpError::Cancelled => DumpError::Cancelled,
            other => DumpError::Memory(other),
        }
    }
}

impl From<FileDumpError> for DumpError {
    fn from(error: FileDumpError) -> DumpError {
        match error {
            FileDumpError::Obstacles(found) => DumpError::Obstacles(found),
            other => DumpError::Files(other),
        }
    }
}

impl DumpError {
    /// Everything that stands in the way, where that is the failure.
    pub fn obstacles(&self) -> &[Obstacle] {
        match self {
            DumpError::Obstacles(found) => found,
            _ => &[],
        }
    }

    /// Exit status of the script that failed.
    pub fn script_status(&self) -> Option<i32> {
        match self {
            DumpError::Script(error) => Some(error.exit_code()),
            _ => None,
        }
    }

    /// Kind of the failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            DumpError::Obstacles(_) | DumpError::Relation(_) => ErrorClass::Unsupported,
            DumpError::OuterSession { .. } => ErrorClass::Usage,
            DumpError::Freeze(FreezeError::Gone(_) | FreezeError::RootIsZombie(_))
            | DumpError::Ask(AskError::Inject(InjectError::Died(_))) => ErrorClass::Gone,
            DumpError::Cancelled => ErrorClass::Cancelled,
            _ => ErrorClass::Refused,
        }
    }

    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            DumpError::OuterSession { .. } => Some(
                "add --shell-job to restore it into the session of another shell, \
                 or start it with setsid"
                    .to_owned(),
            ),
            DumpError::Relation(_) => Some("dump it when that task has ended".to_owned()),
            DumpError::NoTracking(_) => Some(
                "leave --track-mem out: every dump is a full one then; Linux 6.7 tracks writes"
                    .to_owned(),
            ),
            DumpError::Tracker { .. } => Some(
                "end the process `firn hold-tracker` that keeps track of it; the next dump is a full one"
                    .to_owned(),
            ),
            other => hint_for(other),
        }
    }
}
