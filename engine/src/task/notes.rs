//! What the kernel has noted for a sleep that it would go on with, and tells nobody: the end of one that was
//! given no place for the time that is left.
//!
//! Source: linux include/linux/restart_block.h; kernel/time/hrtimer.c, hrtimer_nanosleep.

use firn_sys::{Pid, clock};

use crate::kernel::LazyKernel;

/// `enum timespec_type`: the caller has given no place.
const TT_NONE: u64 = 0;
const CLOCK_MONOTONIC: u64 = 1;
const NANOSECONDS: u64 = 1_000_000_000;

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
