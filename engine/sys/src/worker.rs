//! A process of its own for work that must not end half done when the process that was called is killed.
//!
//! ```text
//! front   was called: passes termination signals on, waits, ends with the worker's status
//!  └─ worker   a session of its own, so that signals for the front's group or terminal do not reach it;
//!              gets SIGTERM when the front dies, and takes back what it did as after any other SIGTERM
//! ```
//!
//! Source: man 2 fork, PR_SET_PDEATHSIG, sigwaitinfo.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask,
};
use nix::unistd::{ForkResult, fork, getpid, getppid};

use crate::wait::{Status, try_wait};
use crate::{Errno, Pid, Result, procfs, session, signal, task};

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Side {
    /// The process that was called, with the one to wait for.
    Front(Worker),
    /// The process that does the work.
    Worker,
}

/// The other process, seen from the front.
#[derive(Debug)]
pub struct Worker {
    pid: Pid,
    signals: SigSet,
}

/// Splits the calling process in two.
///
/// # Errors
/// EBUSY when the process has more than one thread: the others would be missing in the worker, with the
/// locks they hold. EAGAIN, ENOMEM of fork(2).
pub fn split() -> Result<Side> {
    if nr_threads() != Some(1) {
        return Err(Errno::EBUSY);
    }
    let signals = passed_on()?;
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), Some(&mut before))?;
    let front = getpid();
    // SAFETY: there is no other thread, so everything in this process is whole in the child too.
    let forked = unsafe { fork() };
    match forked {
        Ok(ForkResult::Parent { child }) => {
            let pid = Pid::from_raw(child.as_raw());
            Ok(Side::Front(Worker { pid, signals }))
        }
        Ok(ForkResult::Child) => {
            end_with_parent()?;
            hear_of_ends_only()?;
            session::start()?;
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
            if getppid() != front {
                // It died before it could be watched.
                task::kill(Pid::this(), libc::SIGTERM)?;
            }
            Ok(Side::Worker)
        }
        Err(errno) => {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
            Err(errno.into())
        }
    }
}

/// Threads of this process.
pub(crate) fn nr_threads() -> Option<usize> {
    let stat = procfs::read_to_string("/proc/self/stat").ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(17)?.parse().ok()
}

/// Termination signals, except those that are ignored, as SIGHUP under nohup, and the one that says that
/// a child has ended, which must not be ignored or the child's status would be lost.
fn passed_on() -> Result<SigSet> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    let mut signals = SigSet::from(Signal::SIGCHLD);
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGCHLD, &default) }?;
    for raw in signal::TERMINATION {
        let signal = Signal::try_from(raw)?;
        // SAFETY: the default action, for a moment only, while nothing else runs in this process.
        let old = unsafe { sigaction(signal, &default) }?;
        if !matches!(old.handler(), SigHandler::SigIgn) {
            signals.add(signal);
        }
        // SAFETY: puts the action back that was there.
        unsafe { sigaction(signal, &old) }?;
    }
    Ok(signals)
}

/// Lets the death of the front end this process, unless it has learned to handle SIGTERM by then.
fn end_with_parent() -> Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGTERM, &default) }?;
    // SAFETY: takes numbers only.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
    Errno::check(i64::from(result)).map(drop)
}

/// Keeps the kernel from sending a signal for every stop of a traced task, which would wake a thread of the worker
/// each time while others wait for that very stop.
fn hear_of_ends_only() -> Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDSTOP, SigSet::empty());
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGCHLD, &action) }?;
    Ok(())
}

impl Worker {
    /// Waits for the end of the worker, and passes termination signals on to it meanwhile.
    ///
    /// # Errors
    /// Those of waitpid(2), when somebody else has reaped it.
    pub fn wait(self) -> Result<ExitStatus> {
        loop {
            match try_wait(self.pid)? {
                Some(Status::Ended(raw)) => return Ok(ExitStatus::from_raw(raw)),
                Some(_) => {}
                None => match self.signals.wait()? {
                    Signal::SIGCHLD => {}
                    // It may have ended at this moment.
                    signal => drop(task::kill(self.pid, signal as i32)),
                },
            }
        }
    }
}
