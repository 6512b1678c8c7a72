//! Why a restore failed.

use std::path::PathBuf;

use firn_images::{ImageReadError, ImageWriteError};
use firn_sys::{Errno, Pid};

use crate::arch::XsaveError;
use crate::class::{ErrorClass, hint_for};
use crate::files::FileRestoreError;
use crate::inject::InjectError;
use crate::memory::vdso::VdsoError;
use crate::memory::{
    MappingFdError, MemoryFillError, MemoryLoadError, MemoryPlanError, SharedRestoreError,
};
use crate::program::{ArenaError, ProgramFailure};
use crate::script::ScriptError;
use crate::task::lsm::LabelError;
use crate::task::posix_timers::TimerPlanError;
use crate::task::relations::RelationError;
use crate::task::seccomp::SeccompImageError;
use crate::task::semaphores::SemaphoreError;
use crate::task::status::StatusError;

/// Failure of a restore. Whatever had been made is gone again.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The directory is no finished checkpoint.
    #[error("{} has no inventory.img, so it is no finished checkpoint", .0.display())]
    Incomplete(PathBuf),
    /// The images are of an unknown version.
    #[error("the images have version {0}, which can't be restored")]
    Version(u32),
    /// Images that contradict themselves.
    #[error("{image}: {what}")]
    Corrupt {
        /// The image.
        image: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A core image that can't be used.
    #[error("core-{tid}.img has {what}")]
    CoreImage {
        /// The thread.
        tid: Pid,
        /// What is wrong.
        what: &'static str,
    },
    /// A task had a namespace of its own.
    #[error("task {pid} had a {name} namespace of its own, which can't be restored yet")]
    Namespace {
        /// The task.
        pid: Pid,
        /// Kind of namespace.
        name: &'static str,
    },
    /// Filters that make no sense.
    #[error(transparent)]
    Seccomp(#[from] SeccompImageError),
    /// Filters must not see the restore.
    #[error("can't suspend seccomp of thread {tid} while its filters are installed")]
    SuspendSeccomp {
        /// The thread.
        tid: Pid,
        /// Cause.
        source: Errno,
    },
    /// Security labels that can't be had here.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// Timers that this kernel can't make.
    #[error(transparent)]
    Timers(#[from] TimerPlanError),
    /// Rights that this process does not have itself.
    #[error("task {pid} had {capabilities}, which this process does not have")]
    Capabilities {
        /// The task.
        pid: Pid,
        /// Their names.
        capabilities: String,
    },
    /// System V semaphores that can't be had again.
    #[error(transparent)]
    Semaphores(#[from] SemaphoreError),
    /// What can't come back as it was, where nothing may be lost.
    #[error("{}", .0.join("; "))]
    Losses(Vec<String>),
    /// The CPU lacks something that a thread uses.
    #[error("thread {tid} can't go on here")]
    Cpu {
        /// The thread.
        tid: Pid,
        /// Cause.
        source: XsaveError,
    },
    /// A descriptor table is shared in a way that forks can't bring about.
    #[error(
        "task {pid} shares its descriptors with task {with}, which is not the one that makes it"
    )]
    SharedTable {
        /// The task.
        pid: Pid,
        /// The other.
        with: Pid,
    },
    /// A pid is in use.
    #[error("pid {pid} is in use by {by}")]
    PidTaken {
        /// The pid.
        pid: Pid,
        /// Who has it.
        by: String,
    },
    /// The kernel runs no 32-bit code.
    #[error("task {pid} runs a 32-bit program, which this kernel does not")]
    NoIa32 {
        /// The task.
        pid: Pid,
    },
    /// There are no shadow stacks here.
    #[error("thread {tid} uses a shadow stack, and {}", why_none(*source))]
    NoShadowStack {
        /// The thread.
        tid: Pid,
        /// What the kernel says to a new one.
        source: Errno,
    },
    /// No free place for the arena.
    #[error("there is no address range that is free in all tasks and in this process")]
    NoHole,
    /// The root task could not be made.
    #[error("can't make process {pid}")]
    Spawn {
        /// Its pid.
        pid: Pid,
        /// Cause.
        source: Errno,
    },
    /// The userfaultfd to fill a task's memory through could not be fetched.
    #[error("task {pid}: can't get the userfaultfd to fill its memory through")]
    Uffd {
        /// The task.
        pid: Pid,
        /// Cause.
        source: Errno,
    },
    /// A task died while it was rebuilt.
    #[error("task {0} died while it was rebuilt")]
    Died(Pid),
    /// Nothing moved for too long.
    #[error("the tasks did not finish rebuilding themselves: {0}")]
    Stuck(String),
    /// ptrace of a finished task failed.
    #[error("can't {what} of task {tid}")]
    Trace {
        /// The thread.
        tid: Pid,
        /// What was tried.
        what: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The image directory can't be opened.
    #[error("can't open the image directory {}", path.display())]
    ImagesDir {
        /// The directory.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The pid file can't be written.
    #[error("can't write the pid file {}", path.display())]
    PidFile {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Own state could not be read.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageReadError),
    /// The statistics could not be written.
    #[error(transparent)]
    Write(#[from] ImageWriteError),
    /// Memory images.
    #[error(transparent)]
    MemoryLoad(#[from] MemoryLoadError),
    /// Memory plans.
    #[error(transparent)]
    MemoryPlan(#[from] MemoryPlanError),
    /// Memory contents.
    #[error(transparent)]
    Fill(#[from] MemoryFillError),
    /// A mapping's file.
    #[error(transparent)]
    MappingFd(#[from] MappingFdError),
    /// Shared memory.
    #[error(transparent)]
    Shared(#[from] SharedRestoreError),
    /// The kernel's vdso.
    #[error(transparent)]
    Vdso(#[from] VdsoError),
    /// Open files.
    #[error(transparent)]
    Files(#[from] FileRestoreError),
    /// Sessions and groups.
    #[error(transparent)]
    Relations(#[from] RelationError),
    /// The arena.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A record of a program.
    #[error(transparent)]
    Program(#[from] ProgramFailure),
    /// The last calls in a task.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// An action script said no.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// The caller asked to stop.
    #[error("the restore was cancelled")]
    Cancelled,
}

impl RestoreError {
    /// Exit status of the script that failed.
    pub fn script_status(&self) -> Option<i32> {
        match self {
            RestoreError::Script(error) => Some(error.exit_code()),
            _ => None,
        }
    }

    /// Kind of the failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            RestoreError::Incomplete(_)
            | RestoreError::Seccomp(_)
            | RestoreError::Corrupt { .. }
            | RestoreError::CoreImage { .. }
            | RestoreError::Image(_)
            | RestoreError::Semaphores(SemaphoreError::Corrupt { .. })
            | RestoreError::MemoryLoad(_) => ErrorClass::Corrupt,
            RestoreError::Version(_)
            | RestoreError::Namespace { .. }
            | RestoreError::Timers(_)
            | RestoreError::Label(_)
            | RestoreError::SharedTable { .. }
            | RestoreError::NoIa32 { .. }
            | RestoreError::NoShadowStack { .. }
            | RestoreError::Cpu { .. } => ErrorClass::Unsupported,
            RestoreError::PidTaken { .. } | RestoreError::Died(_) => ErrorClass::Gone,
            RestoreError::Relations(_) => ErrorClass::Usage,
            RestoreError::Cancelled => ErrorClass::Cancelled,
            RestoreError::NoHole | RestoreError::Stuck(_) => ErrorClass::Bug,
            _ => ErrorClass::Refused,
        }
    }

    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            RestoreError::PidTaken { .. } => Some(
                "wait until that process is gone and reaped, or restore in a pid namespace of \
                 its own: unshare --pid --fork --mount-proc firn restore ..."
                    .to_owned(),
            ),
            RestoreError::Incomplete(_) => {
                Some("name the directory of a dump that succeeded with --images-dir".to_owned())
            }
            RestoreError::SuspendSeccomp { .. } => {
                Some("run firn with CAP_SYS_ADMIN and without seccomp filters".to_owned())
            }
            RestoreError::NoIa32 { .. } => Some(
                "boot a kernel with CONFIG_IA32_EMULATION, and with ia32_emulation=1".to_owned(),
            ),
            RestoreError::NoShadowStack { .. } => Some(
                "restore it where `firn check --feature shadow_stack` says yes; or start the program with \
                 GLIBC_TUNABLES=glibc.cpu.x86_shstk=off before the next dump"
                    .to_owned(),
            ),
            RestoreError::Label(LabelError::Module { .. }) => Some(
                "give the tasks a label that is in use here: --lsm-profile apparmor:PROFILE or \
                 --lsm-profile selinux:CONTEXT"
                    .to_owned(),
            ),
            RestoreError::Capabilities { .. } => {
                Some("run firn with all capabilities that the tasks had".to_owned())
            }
            RestoreError::Semaphores(SemaphoreError::Taken { .. }) => {
                Some("wait until that process gives it back".to_owned())
            }
            RestoreError::Semaphores(SemaphoreError::NoSet { .. }) => Some(
                "restore it where the set is: sets stay when their users end, and go with an ipc \
                 namespace or a reboot"
                    .to_owned(),
            ),
            RestoreError::Losses(_) => Some("leave out --strict to do without".to_owned()),
            other => hint_for(other),
        }
    }
}

fn why_none(source: Errno) -> &'static str {
    match source {
        Errno::ENOSYS => "this kernel has none",
        Errno::EOPNOTSUPP => "this CPU has none, or they are switched off here (nousershstk)",
        _ => "none can be made here",
    }
}
