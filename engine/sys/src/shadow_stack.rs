//! Shadow stacks: return addresses that the CPU keeps a second time, where it and the kernel do that (CET).
//!
//! Each thread has its own switches, and a pointer into memory of a kind that only calls, returns and the
//! kernel write. A tracer reads and sets the pointer and takes locks off the switches; it writes the memory
//! through /proc/PID/mem. /proc/PID/status tells switches and locks.
//!
//! Source: linux Documentation/arch/x86/shstk.rst; arch/x86/kernel/shstk.c, fpu/regset.c (Linux 6.6).

use std::ptr::without_provenance_mut;

use crate::{Errno, Pid, Result, nr, ptrace};

/// Code of arch_prctl: switches one feature on.
pub const ENABLE: u32 = 0x5001;
/// Code of arch_prctl: switches one feature off.
pub const DISABLE: u32 = 0x5002;
/// Code of arch_prctl: the thread may not switch these features any more.
pub const LOCK: u32 = 0x5003;
/// Code of arch_prctl, for tracers only: it may again.
const UNLOCK: usize = 0x5004;

/// Feature: calls and returns use the shadow stack.
pub const SHADOW_STACK: u64 = 1;
/// Feature: the program may write to it by an instruction.
pub const WRITES: u64 = 2;

/// Tries whether CPU and kernel have shadow stacks, by mapping one.
///
/// # Errors
/// ENOSYS: the kernel has none. EOPNOTSUPP: the CPU has none, or they are switched off (`nousershstk`).
pub fn probe() -> Result<()> {
    const LEN: usize = 4096;
    // SAFETY: a new mapping, somewhere free.
    let at = Errno::check(unsafe { libc::syscall(nr::MAP_SHADOW_STACK, 0, LEN, 0) })?;
    let at = usize::try_from(at).expect("addresses fit usize");
    // SAFETY: the mapping was made right above and nothing uses it.
    let result = unsafe { libc::munmap(without_provenance_mut(at), LEN) };
    Errno::check(i64::from(result)).map(drop)
}

/// Reads the shadow stack pointer of a stopped thread that uses one.
///
/// # Errors
/// ESRCH; ENODEV for a thread without.
pub fn pointer(tid: Pid) -> Result<u64> {
    ptrace::shadow_stack_pointer(tid)
}

/// Sets the shadow stack pointer of a stopped thread that uses one.
///
/// # Errors
/// ESRCH; ENODEV for a thread without; EINVAL for one that is not a multiple of 8.
pub fn set_pointer(tid: Pid, pointer: u64) -> Result<()> {
    ptrace::set_shadow_stack_pointer(tid, pointer)
}

/// Lets a stopped thread switch all features again.
///
/// # Errors
/// ESRCH; EINVAL where the kernel has no shadow stacks.
pub fn unlock(tid: Pid) -> Result<()> {
    ptrace::arch_prctl(tid, UNLOCK, SHADOW_STACK | WRITES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::IdleChild;
    use crate::wait;

    #[test]
    fn a_child_that_uses_none_has_no_pointer() {
        let child = IdleChild::spawn().unwrap();
        ptrace::seize(child.pid(), 0).unwrap();
        ptrace::interrupt(child.pid()).unwrap();
        wait::wait(child.pid()).unwrap();
        assert!(pointer(child.pid()).is_err());
        assert!(set_pointer(child.pid(), 8).is_err());
        match probe() {
            Ok(()) => unlock(child.pid()).unwrap(),
            Err(errno) => {
                eprintln!("no shadow stacks here: {errno}");
                assert!(
                    matches!(errno, Errno::ENOSYS | Errno::EOPNOTSUPP),
                    "{errno}"
                );
            }
        }
    }
}
