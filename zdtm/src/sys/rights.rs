//! Credentials, limits and scheduling by the raw system calls, which act on one thread only.

use std::io;

use super::{call_plain, check_long};

/// `struct sched_attr` as far as 56 bytes.
pub type SchedAttr = [u8; 56];

/// Reads this thread's scheduling attributes.
pub fn sched_attr() -> io::Result<SchedAttr> {
    let mut attr = [0u8; 56];
    let nr = libc::SYS_sched_getattr;
    // SAFETY: the structure has the size that is passed and lives through the call.
    check_long(unsafe { libc::syscall(nr, 0, attr.as_mut_ptr(), 56, 0) })?;
    Ok(attr)
}

/// Sets this thread's scheduling: policy, `SCHED_FLAG_*`, nice value, priority, and runtime, deadline,
/// period.
pub fn set_sched(
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    times: [u64; 3],
) -> io::Result<()> {
    let mut attr = 48u32.to_le_bytes().to_vec();
    attr.extend(policy.to_le_bytes());
    attr.extend(flags.to_le_bytes());
    attr.extend(nice.to_le_bytes());
    attr.extend(priority.to_le_bytes());
    attr.extend(times.into_iter().flat_map(u64::to_le_bytes));
    let nr = libc::SYS_sched_setattr;
    // SAFETY: the structure has the size it tells and lives through the call.
    check_long(unsafe { libc::syscall(nr, 0, attr.as_ptr(), 0) }).map(drop)
}

/// Sets this thread's utilization clamps; the policy stays.
pub fn set_clamps(min: u32, max: u32) -> io::Result<()> {
    const KEEP_ALL: u64 = 0x18;
    const CLAMPS: u64 = 0x60;
    let mut attr = [0u8; 56];
    attr[..4].copy_from_slice(&56u32.to_le_bytes());
    attr[8..16].copy_from_slice(&(KEEP_ALL | CLAMPS).to_le_bytes());
    attr[48..52].copy_from_slice(&min.to_le_bytes());
    attr[52..].copy_from_slice(&max.to_le_bytes());
    let nr = libc::SYS_sched_setattr;
    // SAFETY: the structure has the size it tells and lives through the call.
    check_long(unsafe { libc::syscall(nr, 0, attr.as_ptr(), 0) }).map(drop)
}

/// Reads this thread's I/O priority.
pub fn io_priority() -> io::Result<u64> {
    call_plain(libc::SYS_ioprio_get, [1, 0, 0, 0, 0, 0])
}

/// Sets this thread's I/O priority, class << 13 | level.
pub fn set_io_priority(priority: i64) -> io::Result<()> {
    call_plain(libc::SYS_ioprio_set, [1, 0, priority, 0, 0, 0]).map(drop)
}

/// Sets this thread's supplementary groups.
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    let nr = libc::SYS_setgroups;
    // SAFETY: the list has the length that is passed.
    check_long(unsafe { libc::syscall(nr, groups.len(), groups.as_ptr()) }).map(drop)
}

/// Sets this thread's real, effective and saved ids by `SYS_setresuid` or `SYS_setresgid`.
pub fn set_ids(call: i64, ids: [i64; 3]) -> io::Result<()> {
    call_plain(call, [ids[0], ids[1], ids[2], 0, 0, 0]).map(drop)
}

/// Sets this thread's effective, permitted and inheritable capabilities.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = [0x2008_0522u32, 0];
    let half = |set: u64, upper: bool| {
        let half = if upper { set >> 32 } else { set & 0xffff_ffff };
        u32::try_from(half).unwrap_or(0)
    };
    let sets = [effective, permitted, inheritable];
    let data: Vec<u32> = [false, true]
        .into_iter()
        .flat_map(|upper| sets.map(|set| half(set, upper)))
        .collect();
    let nr = libc::SYS_capset;
    // SAFETY: header and both elements have the kernel's layout and live through the call.
    check_long(unsafe { libc::syscall(nr, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// Calls `prctl` with three numbers and returns its result.
pub fn prctl_with(option: i64, arguments: [i64; 3]) -> io::Result<u64> {
    let [a, b, c] = arguments;
    call_plain(libc::SYS_prctl, [option, a, b, c, 0, 0])
}

/// Reads whether this thread may use the time stamp counter (`PR_GET_TSC`).
pub fn tsc_mode() -> io::Result<u32> {
    let mut mode = 0u32;
    let nr = libc::SYS_prctl;
    // SAFETY: the mode lives through the call.
    check_long(unsafe { libc::syscall(nr, libc::PR_GET_TSC, &raw mut mode, 0, 0, 0) })?;
    Ok(mode)
}

/// Reads a limit: soft and hard.
pub fn limit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = [0u64; 2];
    let none = std::ptr::null::<u64>();
    let nr = libc::SYS_prlimit64;
    // SAFETY: both values live through the call.
    check_long(unsafe { libc::syscall(nr, 0, resource, none, limit.as_mut_ptr()) })?;
    Ok((limit[0], limit[1]))
}

/// Sets a limit.
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = [soft, hard];
    let none = std::ptr::null_mut::<u64>();
    let nr = libc::SYS_prlimit64;
    // SAFETY: both values live through the call.
    check_long(unsafe { libc::syscall(nr, 0, resource, limit.as_ptr(), none) }).map(drop)
}

/// Sends this thread's system calls to SIGSYS while the byte at `selector` is 1.
pub fn dispatch_calls(selector: usize) -> io::Result<()> {
    dispatch_calls_outside(0, 0, selector)
}

/// As [`dispatch_calls`], but for calls of the code in a range.
pub fn dispatch_calls_outside(start: i64, len: i64, selector: usize) -> io::Result<()> {
    const PR_SET_SYSCALL_USER_DISPATCH: i64 = 59;
    const ON: i64 = 1;
    let selector = i64::try_from(selector).map_err(io::Error::other)?;
    call_plain(
        libc::SYS_prctl,
        [PR_SET_SYSCALL_USER_DISPATCH, ON, start, len, selector, 0],
    )
    .map(drop)
}

/// Reads the time stamp counter.
pub fn read_tsc() -> u64 {
    // SAFETY: an instruction that only reads a counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}
