//! Process descriptors.
//!
//! Source: man 2 pidfd_open, pidfd_getfd, pidfd_send_signal.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::{Errno, Pid, Result};

/// The descriptor is one of a thread; O_EXCL.
const PIDFD_THREAD: u32 = 0o200;

/// Opens a descriptor of the process `pid`.
///
/// # Errors
/// ESRCH when it is gone.
pub fn open(pid: Pid) -> Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid.raw()).ok_or(Errno::ESRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Opens a descriptor of the process that the thread `tid` belongs to, by which that thread's files can be
/// fetched also when the leader is dead.
///
/// # Errors
/// ESRCH when it is gone; EINVAL for another thread than the leader before Linux 6.9.
pub fn open_by_thread(tid: Pid) -> Result<OwnedFd> {
    // Of a thread that is no leader: EINVAL, or ENOENT as of Linux 6.16.
    match open(tid) {
        Err(Errno::EINVAL | Errno::ENOENT) => open_with(tid, PIDFD_THREAD),
        result => result,
    }
}

/// Opens a descriptor of a process, or of a thread with the flag `PIDFD_THREAD`, which is O_EXCL.
///
/// # Errors
/// ESRCH when it is gone; EINVAL for unknown flags.
pub fn open_with(pid: Pid, flags: u32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = Errno::check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.raw(), flags) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the call has just returned it to us alone.
    Ok(unsafe { own(fd) })
}

/// Duplicates descriptor number `fd` of the process into this one, close-on-exec.
///
/// # Errors
/// EBADF when the number is not open there, EPERM without ptrace rights, ESRCH.
pub fn getfd(pidfd: impl AsFd, fd: i32) -> Result<OwnedFd> {
    Ok(rustix::process::pidfd_getfd(
        pidfd,
        fd,
        PidfdGetfdFlags::empty(),
    )?)
}

/// Sends a signal to the process; `signal` 0 only checks that it lives.
///
/// # Errors
/// ESRCH when it is gone, EPERM.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> Result<()> {
    use std::os::fd::AsRawFd;
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: a descriptor, a number, no siginfo.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            signal,
            std::ptr::null::<u8>(),
            0,
        )
    };
    Errno::check(result).map(drop)
}

/// Takes ownership of a raw descriptor that a call returned.
///
/// # Safety
/// The descriptor must be open and owned by nobody else.
pub unsafe fn own(fd: i32) -> OwnedFd {
    // SAFETY: the caller's promise.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
