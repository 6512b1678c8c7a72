//! What an automounter tells the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// AUTOFS_IOC_READY.
const READY: libc::Ioctl = 0x9360;
/// AUTOFS_DEV_IOCTL_VERSION.
const VERSION: libc::Ioctl = 0xc018_9371;

/// Answers a request: what was asked for is mounted.
pub fn autofs_ready(mount: impl AsFd, token: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::ioctl(mount.as_fd().as_raw_fd(), READY, libc::c_ulong::from(token)) })
        .map(drop)
}

/// The major version of the control device's commands.
pub fn autofs_version(control: impl AsFd) -> io::Result<u32> {
    // struct autofs_dev_ioctl: version, length, descriptor, argument.
    let mut request: [u32; 6] = [1, 0, 24, u32::MAX, 0, 0];
    // SAFETY: the request is as long as it says.
    check(unsafe { libc::ioctl(control.as_fd().as_raw_fd(), VERSION, request.as_mut_ptr()) })?;
    Ok(request[0])
}
