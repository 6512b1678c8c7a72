//! Trying kernel facilities out, without leaving a trace.
//!
//! Calls that change the process they are made in are made in a child of our own. Such a child is a
//! bare clone of this process: it makes system calls and ends, and no library code runs in it, so the
//! caller may be multi-threaded.

mod ia32;
mod memory;
mod network;
mod process;
mod tracking;

use std::time::{Duration, Instant};

use crate::wait::Status;
use crate::{Errno, Pid, Result, signal, task, wait};

pub use ia32::{ia32_calls, with_ia32_vdso};
pub use memory::{
    Layout, collapse, guard_regions, map_vdso, memfd, memfd_hugetlb, move_areas, pagemap_entry,
    set_mm_map,
};
pub use network::{nft_generation, tcp_repair};
pub use process::{
    capabilities, foreign_read, set_tid, suspend_seccomp, tid_address, timer_restore_ids,
};
pub use tracking::{pagemap_scan, soft_dirty, uffd_features, write_tracking};

/// How long a child of ours may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A child that sleeps until it is dropped.
#[derive(Debug)]
pub struct IdleChild {
    pid: Pid,
}

impl IdleChild {
    /// Makes one.
    ///
    /// # Errors
    /// Those of fork(2).
    pub fn spawn() -> Result<IdleChild> {
        // SAFETY: the child only sleeps.
        let pid = unsafe {
            clone_child(|| {
                loop {
                    libc::pause();
                }
            })
        }?;
        Ok(IdleChild { pid })
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }
}

impl Drop for IdleChild {
    fn drop(&mut self) {
        let _ = task::kill(self.pid, libc::SIGKILL);
        while let Ok(status) = wait::wait(self.pid) {
            if matches!(status, Status::Ended(_)) {
                break;
            }
        }
    }
}

/// Runs `work` in a child and gives its result; the child dies with it.
///
/// # Errors
/// What `work` returns, or ETIMEDOUT when it does not return.
///
/// # Safety
/// `work` must make system calls only: no allocation, no locks, no panics.
unsafe fn in_child(work: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: the caller's promise; a result is turned into an exit status.
    let pid = unsafe {
        clone_child(|| match work() {
            Ok(()) => 0,
            Err(errno) => errno.raw(),
        })
    }?;
    let raw = end_of(pid)?;
    match libc::WIFEXITED(raw).then(|| libc::WEXITSTATUS(raw)) {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw(errno)),
        // Killed by the call it tried: the kernel does not bear it.
        None => Err(Errno::EFAULT),
    }
}

fn end_of(pid: Pid) -> Result<i32> {
    let start = Instant::now();
    loop {
        if let Some(Status::Ended(raw)) = wait::try_wait(pid)? {
            return Ok(raw);
        }
        if start.elapsed() > PATIENCE {
            drop(IdleChild { pid });
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Clones this process without running anything that is registered for forks.
///
/// # Safety
/// `body` must make system calls only, as for [`in_child`].
unsafe fn clone_child(body: impl FnOnce() -> i32) -> Result<Pid> {
    // A signal handler of this program has no business in the child.
    let blocked = signal::block_all();
    // SAFETY: a plain fork; the child stays in this function until it exits.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid == 0 {
        // SAFETY: takes numbers only; without its parent the child would sleep for ever.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let code = body();
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(code) };
    }
    drop(blocked);
    let pid = Errno::check(pid)?;
    Ok(Pid::from_raw(i32::try_from(pid).expect("pids fit i32")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_reports_its_result() {
        // SAFETY: the closures only build a value.
        let (good, bad) = unsafe { (in_child(|| Ok(())), in_child(|| Err(Errno::ENOSYS))) };
        assert_eq!((good, bad), (Ok(()), Err(Errno::ENOSYS)));
    }

    #[test]
    fn an_idle_child_lives_until_it_is_dropped() {
        let child = IdleChild::spawn().unwrap();
        let pid = child.pid();
        assert_eq!(task::kill(pid, 0), Ok(()));
        drop(child);
        assert_eq!(wait::try_wait(pid), Err(Errno::ECHILD));
    }
}
