//! Counters as descriptors.
//!
//! Source: man 2 eventfd.

use std::os::fd::{AsFd, OwnedFd};

use crate::{Errno, Result, pidfd};

/// Makes an eventfd with that count, close-on-exec.
///
/// # Errors
/// EMFILE, ENFILE; EINVAL for a count that no eventfd can have, which is 2^64 - 1.
pub fn create(count: u64, semaphore: bool) -> Result<OwnedFd> {
    let mode = if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: numbers only.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | mode) };
    let fd = Errno::check(i64::from(fd))?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the call has just returned it to us alone.
    let fd = unsafe { pidfd::own(fd) };
    if count > 0 {
        add(&fd, count)?;
    }
    crate::fcntl::set_flags(&fd, 0)?;
    Ok(fd)
}

/// Adds to the count.
///
/// # Errors
/// EINVAL for 2^64 - 1; EAGAIN when it is non-blocking and the sum would be above 2^64 - 2.
pub fn add(fd: impl AsFd, value: u64) -> Result<()> {
    rustix::io::write(fd, &value.to_ne_bytes())?;
    Ok(())
}
