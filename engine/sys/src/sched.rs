//! Scheduling attributes.
//!
//! Source: man 2 sched_setattr, sched_getaffinity, ioprio_get; linux include/uapi/linux/sched/types.h,
//! struct sched_attr.

use crate::{Errno, Pid, Result};

/// Scheduling attributes of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SchedAttr {
    /// Size of this structure.
    pub size: u32,
    /// SCHED_* policy.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value of the fair policies.
    pub nice: i32,
    /// Static priority of the real-time policies.
    pub priority: u32,
    /// Deadline policy: runtime in ns; fair policies: requested slice in ns.
    pub runtime: u64,
    /// Deadline policy: relative deadline in ns.
    pub deadline: u64,
    /// Deadline policy: period in ns.
    pub period: u64,
    /// Lower utilization clamp, 0 to 1024 (Linux 5.3).
    pub util_min: u32,
    /// Upper utilization clamp.
    pub util_max: u32,
}

const SIZE: u32 = 56;
const _: () = assert!(size_of::<SchedAttr>() == 56);

impl SchedAttr {
    /// The bytes that sched_setattr reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(56);
        out.extend(self.size.to_le_bytes());
        out.extend(self.policy.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out.extend(self.nice.to_le_bytes());
        out.extend(self.priority.to_le_bytes());
        out.extend(self.runtime.to_le_bytes());
        out.extend(self.deadline.to_le_bytes());
        out.extend(self.period.to_le_bytes());
        out.extend(self.util_min.to_le_bytes());
        out.extend(self.util_max.to_le_bytes());
        out
    }
}

/// Reads the attributes of a thread; pid 0 is the caller.
///
/// # Errors
/// ESRCH.
pub fn sched_getattr(tid: Pid) -> Result<SchedAttr> {
    let mut attr = SchedAttr {
        size: SIZE,
        policy: 0,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: 0,
        deadline: 0,
        period: 0,
        util_min: 0,
        util_max: 0,
    };
    // SAFETY: the structure has the size that is passed and outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_getattr, tid.raw(), &raw mut attr, SIZE, 0) };
    Errno::check(result)?;
    Ok(attr)
}

/// Reads which CPUs a thread may run on, 64 to a word, without trailing empty words; pid 0 is the caller.
///
/// # Errors
/// ESRCH.
pub fn sched_getaffinity(tid: Pid) -> Result<Vec<u64>> {
    const WORDS: usize = 128;
    let mut mask = [0u64; WORDS];
    let len = size_of_val(&mask);
    // SAFETY: the mask has the length that is passed and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid.raw(),
            len,
            mask.as_mut_ptr(),
        )
    };
    Errno::check(result)?;
    let used = mask
        .iter()
        .rposition(|word| *word != 0)
        .map_or(0, |last| last + 1);
    Ok(mask[..used].to_vec())
}

/// Sets which CPUs a thread may run on, 64 to a word; pid 0 is the caller.
///
/// # Errors
/// EINVAL where none of them is there or allowed; ESRCH, EPERM.
pub fn sched_setaffinity(tid: Pid, mask: &[u64]) -> Result<()> {
    // SAFETY: the mask has the length that is passed and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid.raw(),
            size_of_val(mask),
            mask.as_ptr(),
        )
    };
    Errno::check(result).map(drop)
}

/// The CPU that the caller runs on at this moment; None where the kernel does not say.
pub fn current_cpu() -> Option<i32> {
    // SAFETY: takes nothing and answers by a number.
    let cpu = unsafe { libc::sched_getcpu() };
    (cpu >= 0).then_some(cpu)
}

/// The mask without a CPU; None where no other is left.
fn without(mask: &[u64], cpu: i32) -> Option<Vec<u64>> {
    let (word, bit) = (usize::try_from(cpu / 64).ok()?, cpu % 64);
    let mut others = mask.to_vec();
    *others.get_mut(word)? &= !(1 << bit);
    others.iter().any(|word| *word != 0).then_some(others)
}

/// Does something, such as waking it, while a thread may not run on a CPU. Where that can't be had it is done all the
/// same: where a thread runs is no more than a matter of time.
pub fn kept_off<R>(tid: Pid, cpu: i32, work: impl FnOnce() -> R) -> R {
    let mask = sched_getaffinity(tid).ok();
    let others = mask.as_deref().and_then(|mask| without(mask, cpu));
    let moved = others.is_some_and(|others| sched_setaffinity(tid, &others).is_ok());
    let result = work();
    if let Some(mask) = mask.filter(|_| moved) {
        let _ = sched_setaffinity(tid, &mask);
    }
    result
}

/// Moves a thread that was started just now to another CPU than the caller's, if it has not begun to run elsewhere.
/// It may run everywhere afterwards.
pub(crate) fn start_apart(thread: libc::pthread_t) {
    let own = sched_getaffinity(Pid::from_raw(0)).ok();
    let others = own.as_deref().zip(current_cpu());
    let others = others.and_then(|(mask, cpu)| without(mask, cpu));
    let set = |mask: &[u64]| {
        // SAFETY: the mask has the length that is passed; the thread is one whose handle the caller still has, so it
        // was neither joined nor let go.
        unsafe { libc::pthread_setaffinity_np(thread, size_of_val(mask), mask.as_ptr().cast()) }
    };
    if let (Some(own), Some(others)) = (own, others)
        && set(&others) == 0
    {
        set(&own);
    }
}

/// Reads a thread's I/O priority, class << 13 | level; 0 where none was set; pid 0 is the caller.
///
/// # Errors
/// ESRCH, ENOSYS.
pub fn ioprio_get(tid: Pid) -> Result<u32> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: numbers only.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, tid.raw()) };
    Ok(u32::try_from(Errno::check(result)?).unwrap_or(0))
}
