//! Signals as a descriptor.
//!
//! Source: man 2 signalfd.

use std::os::fd::OwnedFd;

use crate::{Errno, Result, pidfd};

/// Makes a signalfd for the signals of a mask (bit 0 is signal 1), close-on-exec.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn create(mask: u64) -> Result<OwnedFd> {
    let flags = libc::O_CLOEXEC;
    // SAFETY: the mask outlives the call and has the size that the kernel is told.
    let result = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags) };
    let fd = i32::try_from(Errno::check(result)?).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the call has just returned it to us alone.
    Ok(unsafe { pidfd::own(fd) })
}
