//! Small calls about single tasks: signals, robust lists, limits of this process.

use crate::{Errno, Pid, Result};

/// Sends a signal to a process.
///
/// # Errors
/// ESRCH, EPERM. Source: man 2 kill.
pub fn kill(pid: Pid, signal: i32) -> Result<()> {
    // SAFETY: kill takes numbers only.
    Errno::check(i64::from(unsafe { libc::kill(pid.raw(), signal) })).map(drop)
}

/// Ends this process at once: nothing is dropped and nothing is flushed.
pub fn exit(status: u8) -> ! {
    // SAFETY: it takes a number only, and does not return.
    unsafe { libc::_exit(status.into()) }
}

/// Sends a signal to one thread.
///
/// # Errors
/// ESRCH, EPERM. Source: man 2 tgkill.
pub fn tgkill(pid: Pid, tid: Pid, signal: i32) -> Result<()> {
    // SAFETY: tgkill takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid.raw(), tid.raw(), signal) };
    Errno::check(result).map(drop)
}

/// Head and length of a thread's robust futex list.
///
/// # Errors
/// EPERM without ptrace rights, ESRCH. Source: man 2 get_robust_list.
pub fn robust_list(tid: Pid) -> Result<(u64, u64)> {
    let mut head = 0u64;
    let mut len = 0u64;
    // SAFETY: both out-parameters outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid.raw(),
            &raw mut head,
            &raw mut len,
        )
    };
    Errno::check(result)?;
    Ok((head, len))
}

/// The calling thread's id.
pub fn gettid() -> Pid {
    Pid::from_raw(nix::unistd::gettid().as_raw())
}

/// Secure bits of the calling thread.
///
/// Source: man 2 PR_GET_SECUREBITS.
pub fn securebits() -> u32 {
    // SAFETY: PR_GET_SECUREBITS takes no pointer.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    u32::try_from(bits).unwrap_or(0)
}

/// Reads a mode of the calling thread that prctl returns as its result.
///
/// # Errors
/// EINVAL, ENODEV: this kernel or CPU has no such mode.
pub fn prctl_get(option: u32, which: u32) -> Result<u64> {
    let option = i64::from(option);
    // SAFETY: used for options that take and return numbers only.
    Errno::check(unsafe { libc::syscall(libc::SYS_prctl, option, u64::from(which), 0, 0, 0) })
}

/// Reads whether the calling thread may read the time stamp counter: 1 it may, 2 it gets SIGSEGV.
///
/// # Errors
/// EINVAL: not on this architecture. Source: man 2 PR_GET_TSC.
pub fn tsc_mode() -> Result<u32> {
    let mut mode = 0u32;
    // SAFETY: the mode outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_prctl, libc::PR_GET_TSC, &raw mut mode, 0, 0, 0) };
    Errno::check(result)?;
    Ok(mode)
}

/// Reads a mode of the calling thread that arch_prctl returns as its result.
///
/// # Errors
/// ENODEV, EINVAL: this CPU or kernel has no such mode.
pub fn arch_prctl_get(what: u32) -> Result<u64> {
    // SAFETY: used for codes that take and return numbers only.
    Errno::check(unsafe { libc::syscall(libc::SYS_arch_prctl, i64::from(what), 0) })
}

/// Whether a process may choose the ids of its POSIX timers.
///
/// Source: linux include/uapi/linux/prctl.h, PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15).
pub fn can_choose_timer_ids() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: i32 = 2;
    // SAFETY: the option takes numbers only.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) >= 0 }
}

/// Address, length and signature of the rseq area that libc registered for the calling thread, or None.
///
/// Source: glibc 2.35 manual, `__rseq_offset`.
pub fn own_rseq() -> Option<(u64, u32, u32)> {
    /// glibc's RSEQ_SIG on x86.
    const SIGNATURE: u32 = 0x5305_3053;
    let (offset, size) = rseq_symbols();
    if offset.is_null() || size.is_null() {
        return None;
    }
    // SAFETY: glibc documents the symbol as a ptrdiff_t constant.
    let offset = unsafe { offset.read() };
    // SAFETY: glibc documents the symbol as an unsigned int constant; 0 means not registered.
    let size = unsafe { size.read() };
    if size == 0 {
        return None;
    }
    let address = thread_pointer().wrapping_add_signed(i64::try_from(offset).ok()?);
    // glibc registers 32 bytes, the original structure, unless the kernel asked for more.
    Some((address, size.max(32), SIGNATURE))
}

/// Where libc tells of its rseq areas; null where it does not. Asked of the linker, as nothing can be looked up by name
/// in a program that is linked statically.
#[cfg(target_arch = "x86_64")]
fn rseq_symbols() -> (*const isize, *const u32) {
    let (offset, size);
    // SAFETY: loads two addresses from where the linker has put them, 0 for a symbol that is missing.
    unsafe {
        std::arch::asm!(
            ".weak __rseq_offset",
            ".weak __rseq_size",
            "mov {}, qword ptr [rip + __rseq_offset@GOTPCREL]",
            "mov {}, qword ptr [rip + __rseq_size@GOTPCREL]",
            out(reg) offset,
            out(reg) size,
            options(nostack, readonly),
        );
    }
    (offset, size)
}

#[cfg(target_arch = "x86_64")]
fn thread_pointer() -> u64 {
    let tp: u64;
    // SAFETY: reads the thread control block's self pointer at fs:0, as the ABI defines it.
    unsafe { std::arch::asm!("mov {}, fs:[0]", out(reg) tp, options(nostack, readonly)) };
    tp
}

/// The user as whom this process acts.
pub fn effective_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}
