//! Scheduling attributes.
//!
//! Source: man 2 sched_setattr; linux include/uapi/linux/sched/types.h, struct sched_attr.

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
}

const SIZE: u32 = 48;
const _: () = assert!(size_of::<SchedAttr>() == 48);

impl SchedAttr {
    /// The bytes that sched_setattr reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        out.extend(self.size.to_le_bytes());
        out.extend(self.policy.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out.extend(self.nice.to_le_bytes());
        out.extend(self.priority.to_le_bytes());
        out.extend(self.runtime.to_le_bytes());
        out.extend(self.deadline.to_le_bytes());
        out.extend(self.period.to_le_bytes());
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
    };
    // SAFETY: the structure has the size that is passed and outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_getattr, tid.raw(), &raw mut attr, SIZE, 0) };
    Errno::check(result)?;
    Ok(attr)
}
