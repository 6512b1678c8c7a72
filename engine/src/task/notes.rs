//! What the kernel has noted for a call that it would go on with, and tells nobody: the end of a sleep that was
//! given no place for the time that is left, and of waits that are given a time.
//!
//! Source: linux include/linux/restart_block.h; kernel/time/hrtimer.c, hrtimer_nanosleep; fs/select.c, poll;
//! kernel/futex/waitwake.c, futex_wait.

use firn_sys::ptrace::GeneralRegs;
use firn_sys::{Pid, clock, procfs};

use crate::arch::Abi;
use crate::arch::waits::{self, TimedWait};
use crate::freeze;
use crate::kernel::LazyKernel;

/// `enum timespec_type`: the caller has given no place.
const TT_NONE: u64 = 0;
/// It has given one of 64-bit code.
const TT_NATIVE: u64 = 1;
const CLOCK_MONOTONIC: u64 = 1;
/// Clocks have smaller numbers, and no memory has such an address.
const NR_CLOCKS: u64 = 16;
const NANOSECONDS: u64 = 1_000_000_000;
/// Numbers of calls.
const NANOSLEEP: u64 = 35;
const RESTART_SYSCALL: u64 = 219;
const CLOCK_NANOSLEEP: u64 = 230;

/// Threads of a process that are asked whether they wait so; of more it shows when they have stopped.
const ASKED: usize = 16;

/// Whether a running process is likely to be stopped in a call of which only the kernel knows what is left.
pub(crate) fn are_wanted(pid: Pid) -> bool {
    let mut tids = freeze::threads(pid).into_iter().take(ASKED);
    tids.any(|tid| {
        let call = procfs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"));
        call.is_ok_and(|call| is_untold(&call))
    })
}

/// Whether this is how /proc/PID/syscall shows such a call of 64-bit code, or one that has been restarted.
fn is_untold(call: &str) -> bool {
    let mut words = call.split_ascii_whitespace();
    let nr = words.next();
    let argument = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let arguments: Vec<u64> = words.map_while(argument).collect();
    let (Some(nr), Some(arguments)) = (
        nr.and_then(|nr| nr.parse().ok()),
        arguments.first_chunk::<4>(),
    ) else {
        return false;
    };
    match (nr, arguments) {
        (RESTART_SYSCALL, _) | (NANOSLEEP, [_, 0, ..]) | (CLOCK_NANOSLEEP, [_, 0, _, 0]) => true,
        _ => waits::of_call(nr, arguments, Abi::Native).is_some(),
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
    Some(left_until(noted("expires")?))
}

/// The same of a wait.
pub(super) fn wait_left(kernel: &LazyKernel, tid: Pid, wait: TimedWait) -> Option<(u64, u64)> {
    let task = kernel.get()?.thread(tid)?;
    let noted = |what: &str| task.number(&format!("restart_block.{what}"));
    let (waits_for, wanted, end) = match wait {
        TimedWait::Poll { files } => {
            let sec = noted("poll.tv_sec")?.checked_mul(NANOSECONDS)?;
            let end = sec.checked_add(noted("poll.tv_nsec")?)?;
            (noted("poll.ufds")?, files, end)
        }
        TimedWait::Futex { word, .. } => (noted("futex.uaddr")?, word, noted("futex.time")?),
    };
    (waits_for == wanted).then(|| left_until(end))
}

/// The number of the call that a thread of 64-bit code made at first which is now in `restart_syscall`: the one whose
/// notes fit the arguments. None where that is not known.
pub(super) fn first_call(
    kernel: &LazyKernel,
    tid: Pid,
    regs: &GeneralRegs,
    abi: Abi,
) -> Option<u64> {
    let task = kernel.get()?.thread(tid)?;
    let [first, second, third, fourth] = waits::arguments(regs, abi);
    let half = |value: u64| value & u64::from(u32::MAX);
    let noted = |what: &str| task.number(&format!("restart_block.{what}"));
    let is = |what: &str, value: u64| noted(what).is_some_and(|noted| noted == value);
    let is_poll = is("poll.ufds", first) && is("poll.nfds", half(second));
    // Its flags tell at least of a time or of the word's size, and are not 1 alone, as poll's here.
    let has_time = is("poll.has_timeout", 1);
    let is_futex = is("futex.uaddr", first) && is("futex.val", half(third));
    let has_place = |place| is("nanosleep.type", TT_NATIVE) && is("nanosleep.rmtp", place);
    let is_clock = first < NR_CLOCKS;
    match abi {
        Abi::Ia32 => None,
        Abi::Native if is_poll && has_time => Some(waits::POLL),
        Abi::Native if is_futex && !has_time => Some(waits::FUTEX),
        Abi::Native if !is_clock && has_place(second) => Some(NANOSLEEP),
        Abi::Native if is_clock && has_place(fourth) => Some(CLOCK_NANOSLEEP),
        Abi::Native => None,
    }
}

/// Time until then on the monotonic clock; nothing when that is over.
fn left_until(end: u64) -> (u64, u64) {
    let (sec, nsec) = clock::monotonic();
    let left = end.saturating_sub(sec * NANOSECONDS + nsec);
    (left / NANOSECONDS, left % NANOSECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_which_only_the_kernel_knows_the_rest_are_seen() {
        assert!(is_untold("35 0x7f00 0x0 0x1 0x2 0x3 0x4 0x7f10 0x7f20\n"));
        assert!(is_untold("230 0x1 0x0 0x7f00 0x0 0x0 0x0 0x7f10 0x7f20\n"));
        assert!(is_untold("219 0x0 0x0 0x0 0x0 0x0 0x0 0x7f10 0x7f20\n"));
        assert!(is_untold("7 0x7f00 0x1 0x5 0x0 0x0 0x0 0x7f10 0x7f20\n"));
        assert!(is_untold(
            "202 0x7f00 0x80 0x5 0x7f08 0x0 0x0 0x7f10 0x7f20\n"
        ));
        for other in [
            "7 0x7f00 0x1 0xffffffff 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "202 0x7f00 0x80 0x5 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "35 0x7f00 0x7f08 0x0 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "230 0x1 0x1 0x7f00 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "230 0x1 0x0 0x7f00 0x7f08 0x0 0x0 0x7f10 0x7f20\n",
            "0 0x3 0x0 0x0 0x0 0x0 0x0 0x7f10 0x7f20\n",
            "running\n",
        ] {
            assert!(!is_untold(other), "{other}");
        }
    }
}
