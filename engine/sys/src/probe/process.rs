//! Probes about tasks: ids, tracing, rights.

use std::os::unix::fs::FileExt;

use linux_raw_sys::general::clone_args;

use super::{IdleChild, clone_child, end_of, in_child};
use crate::clone3::no_args;
use crate::{Errno, Pid, Result, ptrace, wait};

/// PR_GET_TID_ADDRESS.
const PR_GET_TID_ADDRESS: i32 = 40;
/// PR_TIMER_CREATE_RESTORE_IDS and its question (Linux 6.15).
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const PR_TIMER_CREATE_RESTORE_IDS_GET: u64 = 2;

/// Makes a child with a pid of our choice.
///
/// # Errors
/// EPERM: neither CAP_CHECKPOINT_RESTORE nor CAP_SYS_ADMIN. ENOSYS, EINVAL: before Linux 5.5.
pub fn set_tid() -> Result<()> {
    let mut result = Err(Errno::EEXIST);
    // A pid that was just given back is free unless somebody takes it at this moment.
    for _ in 0..16 {
        // SAFETY: the child ends at once.
        let pid = unsafe { clone_child(|| 0) }?;
        end_of(pid)?;
        result = clone_as(pid);
        if result != Err(Errno::EEXIST) {
            break;
        }
    }
    result
}

fn clone_as(wanted: Pid) -> Result<()> {
    let tid = wanted.raw();
    let mut args = no_args();
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    args.set_tid = u64::try_from((&raw const tid).addr()).expect("addresses fit 64 bits");
    args.set_tid_size = 1;
    // SAFETY: a plain fork with an id; args and tid outlive the call.
    let got = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<clone_args>()) };
    if got == 0 {
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    let got = Errno::check(got)?;
    let got = Pid::from_raw(i32::try_from(got).expect("pids fit i32"));
    end_of(got)?;
    if got == wanted {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

/// Asks for the address that is cleared when this thread ends.
///
/// # Errors
/// EINVAL without CONFIG_CHECKPOINT_RESTORE.
pub fn tid_address() -> Result<u64> {
    let mut address = 0u64;
    // SAFETY: the out-parameter outlives the call.
    let result = unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut address) };
    Errno::check(i64::from(result))?;
    Ok(address)
}

/// Asks whether timers are made with ids of our choice.
///
/// # Errors
/// EINVAL before Linux 6.15.
pub fn timer_restore_ids() -> Result<()> {
    // SAFETY: prctl takes numbers only here.
    let result = unsafe {
        libc::prctl(
            PR_TIMER_CREATE_RESTORE_IDS,
            PR_TIMER_CREATE_RESTORE_IDS_GET,
            0,
            0,
            0,
        )
    };
    Errno::check(i64::from(result)).map(drop)
}

/// Seizes a child with its seccomp filters suspended.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, EINVAL without CONFIG_SECCOMP_FILTER and CONFIG_CHECKPOINT_RESTORE.
pub fn suspend_seccomp() -> Result<()> {
    let child = IdleChild::spawn()?;
    ptrace::seize(child.pid(), ptrace::O_SUSPEND_SECCOMP)?;
    ptrace::interrupt(child.pid())?;
    wait::wait(child.pid())?;
    ptrace::detach(child.pid(), 0)
}

/// Reads a page of a stopped child that the child itself may not read, through /proc/PID/mem.
///
/// # Errors
/// EIO, EACCES: the kernel was told not to allow it (proc_mem.force_override).
pub fn foreign_read() -> Result<()> {
    let page = super::memory::Scratch::map(libc::PROT_NONE)?;
    let child = IdleChild::spawn()?;
    ptrace::seize(child.pid(), 0)?;
    ptrace::interrupt(child.pid())?;
    wait::wait(child.pid())?;
    let file = std::fs::File::open(format!("/proc/{}/mem", child.pid()))?;
    file.read_exact_at(&mut [0; 8], page.address())?;
    ptrace::detach(child.pid(), 0)
}

/// The effective capabilities of this thread, bit n for capability n.
///
/// # Errors
/// Those of capget(2), which has none for the caller itself.
pub fn capabilities() -> Result<u64> {
    let sets = rustix::thread::capabilities(None)?;
    Ok(sets.effective.bits())
}

/// Runs a probe in a network namespace of its own.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, or what the probe says.
///
/// # Safety
/// As for [`in_child`].
pub(super) unsafe fn in_own_network(work: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: unshare takes numbers only; the caller's promise covers the work.
    unsafe {
        in_child(|| {
            Errno::check(i64::from(libc::unshare(libc::CLONE_NEWNET)))?;
            work()
        })
    }
}
