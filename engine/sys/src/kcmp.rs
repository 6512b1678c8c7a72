//! Comparing kernel objects of two tasks.
//!
//! Source: man 2 kcmp; needs CONFIG_KCMP or CONFIG_CHECKPOINT_RESTORE.

use std::cmp::Ordering;

use crate::{Errno, Pid, Result};

/// Which object of the tasks is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Open file descriptions of two descriptors.
    File {
        /// Descriptor of the first task.
        fd1: i32,
        /// Descriptor of the second task.
        fd2: i32,
    },
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// Working directory, root and umask.
    Fs,
    /// Signal handlers.
    Sighand,
    /// I/O contexts.
    Io,
    /// System V semaphore undo lists.
    Sysvsem,
}

/// Orders the two tasks' objects; equal means that they share one.
///
/// The order is consistent while the objects live, so it can sort them.
///
/// # Errors
/// EPERM without ptrace rights, ESRCH, EBADF.
pub fn kcmp(pid1: Pid, pid2: Pid, resource: Resource) -> Result<Ordering> {
    let (kind, idx1, idx2) = match resource {
        Resource::File { fd1, fd2 } => (0, fd1, fd2),
        Resource::Vm => (1, 0, 0),
        Resource::Files => (2, 0, 0),
        Resource::Fs => (3, 0, 0),
        Resource::Sighand => (4, 0, 0),
        Resource::Io => (5, 0, 0),
        Resource::Sysvsem => (6, 0, 0),
    };
    // SAFETY: kcmp takes numbers only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid1.raw(),
            pid2.raw(),
            kind,
            i64::from(idx1),
            i64::from(idx2),
        )
    };
    match Errno::check(result)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // "not equal, no order": the kernel never says so today.
        _ => Ok(Ordering::Less),
    }
}
