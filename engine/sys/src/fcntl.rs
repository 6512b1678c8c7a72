//! Properties of open files that fcntl reads and sets.
//!
//! Source: man 2 fcntl.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::{Errno, Result};

/// `FD_CLOEXEC`, the one descriptor flag.
pub const FD_CLOEXEC: u32 = 1;
/// `F_SETFD`, for records.
pub const F_SETFD: i32 = libc::F_SETFD;
/// `F_SETFL`, for records.
pub const F_SETFL: i32 = libc::F_SETFL;
/// `F_SETSIG`, for records.
pub const F_SETSIG: i32 = 10;
/// `F_SETOWN_EX`, for records; its argument is two ints: kind and id.
pub const F_SETOWN_EX: i32 = 15;

/// `F_SETLK`, for records; its argument is a struct flock.
pub const F_SETLK: i32 = libc::F_SETLK;
/// `F_OFD_SETLK`, for records; its argument is a struct flock.
pub const F_OFD_SETLK: i32 = libc::F_OFD_SETLK;

const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;

/// Who gets the signal of a descriptor that became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Owner {
    /// 0 a thread, 1 a process, 2 a process group.
    pub kind: i32,
    /// Its id; 0 is nobody.
    pub id: i32,
}

/// Open flags (access mode and `O_*`), as F_GETFL gives them.
///
/// # Errors
/// EBADF.
pub fn flags(fd: impl AsFd) -> Result<u32> {
    Ok(rustix::fs::fcntl_getfl(fd)?.bits())
}

/// Sets those of the open flags that can change: O_APPEND, O_ASYNC, O_DIRECT, O_NOATIME, O_NONBLOCK.
///
/// # Errors
/// EPERM, EINVAL.
pub fn set_flags(fd: impl AsFd, flags: u32) -> Result<()> {
    let flags = rustix::fs::OFlags::from_bits_retain(flags);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

/// Duplicates a descriptor to the lowest free number from `first` on, close-on-exec.
///
/// # Errors
/// EMFILE, EINVAL for a number above the limit.
pub fn duplicate_from(fd: impl AsFd, first: i32) -> Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, first)?)
}

/// Makes the descriptor table of this process large enough for so many descriptors.
///
/// Later, when the process has threads, the kernel would wait for a grace period of RCU for it, 8 to 16 ms. Source: linux
/// fs/file.c, expand_fdtable.
///
/// # Errors
/// EINVAL above the limit; EMFILE.
pub fn make_room(descriptors: i32) -> Result<()> {
    let any = crate::file::open("/".as_ref(), libc::O_PATH.cast_unsigned())?;
    duplicate_from(any, descriptors.saturating_sub(1)).map(drop)
}

/// The owner that F_SETOWN or F_SETOWN_EX has set.
///
/// # Errors
/// EBADF, also for an O_PATH descriptor.
pub fn owner(fd: impl AsFd) -> Result<Owner> {
    let mut owner = Owner::default();
    // SAFETY: F_GETOWN_EX fills a struct of two ints, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    Errno::check(i64::from(result))?;
    Ok(owner)
}

/// Real and effective user id that the owner was set with.
///
/// # Errors
/// EBADF; EINVAL without CONFIG_CHECKPOINT_RESTORE.
pub fn owner_uids(fd: impl AsFd) -> Result<(u32, u32)> {
    let mut uids = [0u32; 2];
    // SAFETY: F_GETOWNER_UIDS fills two uids, which outlive the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    Errno::check(i64::from(result))?;
    Ok((uids[0], uids[1]))
}

/// The signal that F_SETSIG has set; 0 stands for SIGIO.
///
/// # Errors
/// EBADF.
pub fn signal(fd: impl AsFd) -> Result<u32> {
    // SAFETY: F_GETSIG takes no argument.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETSIG) };
    let signal = Errno::check(i64::from(result))?;
    u32::try_from(signal).map_err(|_| Errno::EINVAL)
}

/// Kind of the lease that this open file holds, or of what is to be left of it while it is being broken:
/// 0 read, 1 write, 2 none.
///
/// # Errors
/// EBADF. Source: man 2 fcntl, F_GETLEASE.
pub fn lease(fd: impl AsFd) -> Result<u32> {
    // SAFETY: the command takes no argument.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETLEASE) };
    let kind = Errno::check(i64::from(result))?;
    u32::try_from(kind).map_err(|_| Errno::EINVAL)
}

/// Takes a lease.
///
/// # Errors
/// EAGAIN: the file is open in a way that does not go with it. EACCES.
pub fn set_lease(fd: impl AsFd, kind: i32) -> Result<()> {
    // SAFETY: the command takes a number.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, kind) };
    Errno::check(i64::from(result)).map(drop)
}

/// Sets the owner.
///
/// # Errors
/// ESRCH when there is no such task.
pub fn set_owner(fd: impl AsFd, owner: Owner) -> Result<()> {
    // SAFETY: F_SETOWN_EX reads a struct of two ints, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX, &raw const owner) };
    Errno::check(i64::from(result)).map(drop)
}

/// Sets the signal; 0 stands for SIGIO.
///
/// # Errors
/// EINVAL.
pub fn set_signal(fd: impl AsFd, signal: i32) -> Result<()> {
    // SAFETY: F_SETSIG takes a number.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETSIG, signal) };
    Errno::check(i64::from(result)).map(drop)
}
