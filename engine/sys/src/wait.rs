//! Waiting for children and tracees.
//!
//! Source: man 2 waitpid, `__WALL`.

use std::time::Duration;

use crate::lookout::Lookout;
use crate::{Errno, Pid, Result};

/// As long as a change is looked out for that comes soon.
const SOON: Duration = Duration::from_micros(100);

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

/// Like [`wait`], for a change that comes within microseconds.
///
/// # Errors
/// As [`wait`].
pub fn wait_soon(tid: Pid) -> Result<Status> {
    static LOOKOUT: Lookout = Lookout::new();
    match LOOKOUT.watch(SOON, || try_wait(tid).transpose()) {
        Some(Ok(status)) => Ok(status),
        // Interrupted, or not one that can be waited for: the other way finds out.
        Some(Err(_)) | None => wait(tid),
    }
}

/// Like [`wait`], but returns None at once when nothing has changed.
///
/// # Errors
/// As [`wait`].
pub fn try_wait(tid: Pid) -> Result<Option<Status>> {
    wait_with(tid, libc::__WALL | libc::WNOHANG)
}

/// Reaps exactly this task if it has ended, and leaves all other changes of its state to be waited for.
/// Any thread of the tracer or parent may do so.
///
/// # Errors
/// ECHILD when it is neither child nor tracee.
pub fn try_reap(tid: Pid) -> Result<()> {
    let options = libc::WEXITED | libc::WNOHANG | libc::__WALL;
    let id = libc::id_t::try_from(tid.raw()).map_err(|_| Errno::ECHILD)?;
    // SAFETY: a structure of numbers, for which zeros are a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // The kernel reports stops of tracees whatever it is asked for, so it must not take them away.
    let peek = options | libc::WNOWAIT;
    // SAFETY: the structure is the one that the call fills.
    let got = unsafe { libc::waitid(libc::P_PID, id, &raw mut info, peek) };
    Errno::check(i64::from(got))?;
    let is_dead = [libc::CLD_EXITED, libc::CLD_KILLED, libc::CLD_DUMPED].contains(&info.si_code);
    if is_dead {
        // SAFETY: the kernel takes a null pointer for nobody who wants to know.
        let got = unsafe { libc::waitid(libc::P_PID, id, std::ptr::null_mut(), options) };
        Errno::check(i64::from(got))?;
    }
    Ok(())
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
