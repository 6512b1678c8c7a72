//! Waiting for children and tracees.
//!
//! Source: man 2 waitpid, `__WALL`.

use crate::{Errno, Pid, Result};

/// What a wait reports about a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It stopped with this signal; `event` is the PTRACE_EVENT number or 0.
    Stopped {
        /// Stop signal, with 0x80 set for syscall stops.
        signal: i32,
        /// PTRACE_EVENT_* or 0.
        event: i32,
    },
    /// It ended; the raw wait status.
    Ended(i32),
    /// It was continued by SIGCONT.
    Continued,
}

/// Waits for a state change of exactly this task, thread or process, traced or child.
///
/// # Errors
/// ECHILD when it is neither child nor tracee.
pub fn wait(tid: Pid) -> Result<Status> {
    loop {
        match wait_with(tid, libc::__WALL) {
            Ok(Some(status)) => return Ok(status),
            Ok(None) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Like [`wait`], but returns None at once when nothing has changed.
///
/// # Errors
/// As [`wait`].
pub fn try_wait(tid: Pid) -> Result<Option<Status>> {
    wait_with(tid, libc::__WALL | libc::WNOHANG)
}

fn wait_with(tid: Pid, options: i32) -> Result<Option<Status>> {
    let mut raw = 0;
    // SAFETY: the status outlives the call.
    let got = unsafe { libc::waitpid(tid.raw(), &raw mut raw, options) };
    let got = Errno::check(i64::from(got))?;
    Ok((got != 0).then(|| decode(raw)))
}

fn decode(raw: i32) -> Status {
    if libc::WIFSTOPPED(raw) {
        Status::Stopped {
            signal: libc::WSTOPSIG(raw),
            event: raw >> 16,
        }
    } else if libc::WIFCONTINUED(raw) {
        Status::Continued
    } else {
        Status::Ended(raw)
    }
}
