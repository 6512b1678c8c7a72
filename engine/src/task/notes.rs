//! What the kernel has noted for a sleep that it would go on with, and tells nobody: the end of one that was
//! given no place for the time that is left.
//!
//! Source: linux include/linux/restart_block.h; kernel/time/hrtimer.c, hrtimer_nanosleep.

use firn_sys::{Pid, clock, procfs};

use crate::freeze;
use crate::kernel::LazyKernel;

/// `enum timespec_type`: the caller has given no place.
const TT_NONE: u64 = 0;
const CLOCK_MONOTONIC: u64 = 1;
const NANOSECONDS: u64 = 1_000_000_000;

/// Threads of a process that are asked whether they sleep so; of more it shows when they have stopped.
const ASKED: usize = 16;

/// Whether a running process is likely to be stopped in a sleep of which only the kernel knows what is left.
pub(crate) fn are_wanted(pid: Pid) -> bool {
    let mut tids = freeze::threads(pid).into_iter().take(ASKED);
    tids.any(|tid| {
        let call = procfs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"));
        call.is_ok_and(|call| is_untold_sleep(&call))
    })
}

/// Whether this is how /proc/PID/syscall shows such a sleep, or one that has been restarted.
fn is_untold_sleep(call: &str) -> bool {
    let mut words = call.split_ascii_whitespace();
    match words.next() {
        Some("35") => words.nth(1) == Some("0x0"),
        Some("230") => words.nth(1) == Some("0x0") && words.nth(1) == Some("0x0"),
        Some("219") => true,
        _ => false,
    }
}

/// Seconds and nanoseconds that are left of the sleep that a stopped thread is in. None where the kernel's
/// structures can't be read, or the notes are not those of such a sleep.
///
/// A relative sleep on the realtime clock is one on the monotonic clock inside the kernel.
pub(super) fn sleep_left(kernel: &LazyKernel, tid: Pid) -> Option<(u64, u64)> {
    let task = kernel.get()?.thread(tid)?;
    let noted = |what: &str| task.number(&format!("restart_block.nanosleep.{what}"));
    if noted("type")? != TT_NONE || noted("clockid")? != CLOCK_MONOTONIC {
        return None;
    }
    let (sec, nsec) = clock::monotonic();
    let left = noted("expires")?.saturating_sub(sec * NANOSECONDS + nsec);
    Some((left / NANOSECONDS, left % NANOSECONDS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_without_a_place_for_the_rest_are_seen() {
        assert!(is_untold_sleep(
            "35 0x7f00 0x0 0x1 0x2 0x3 0x4 0x7f10 0x7f20\n"
        ));
        assert!(is_untold_sleep(
            "230 0x1 0x0 0x7f00 0x0 0x0 0x0 0x7f10 0x7f20\n"
        ));
        assert!(is_untold_sleep(
            "219 0x0 0x0 0x0 0x0 0x0 0x0 0x7f10 0x7f20\n"
        ));
        for other in [
            "35 0x7f00 0x7f08 0x0 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "230 0x1 0x1 0x7f00 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "230 0x1 0x0 0x7f00 0x7f08 0x0 0x0 0x7f10 0x7f20\n",
            "0 0x3 0x0 0x0 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "running\n",
        ] {
            assert!(!is_untold_sleep(other), "{other}");
        }
    }
}
