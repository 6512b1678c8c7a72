//! Requests of userfaultfd, as bytes for programs, and a probe.
//!
//! Source: man 2 userfaultfd, man 2 ioctl_userfaultfd, UFFDIO_MOVE (Linux 6.8).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::window::Window;
use crate::{Errno, Result};

/// Only faults of user space are handled, which any user may ask for.
pub const USER_MODE_ONLY: u64 = 1;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
pub const API: u64 = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
pub const REGISTER: u64 = 0xc020_aa00;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`.
pub const UNREGISTER: u64 = 0x8010_aa01;
/// `_IOWR(0xAA, 0x05, struct uffdio_move)`.
pub const MOVE: u64 = 0xc028_aa05;

const FEATURE_MOVE: u64 = 1 << 16;

/// `struct uffdio_api` that asks for moving pages.
pub const API_ARG: [u64; 3] = [0xaa, FEATURE_MOVE, 0];

/// `struct uffdio_register` for missing pages of a range.
pub fn register_arg(start: u64, len: u64) -> [u64; 4] {
    [start, len, 1, 0]
}

/// `struct uffdio_range`.
pub fn range_arg(start: u64, len: u64) -> [u64; 2] {
    [start, len]
}

/// `struct uffdio_move`; the kernel puts the number of bytes moved into the last word. Holes of the
/// source stay holes.
pub fn move_arg(to: u64, from: u64, len: u64) -> [u64; 5] {
    const ALLOW_SRC_HOLES: u64 = 2;
    [to, from, len, ALLOW_SRC_HOLES, 0]
}

/// Index in [`move_arg`] of the number of bytes moved.
pub const MOVED: usize = 4;

/// Tries whether this kernel moves pages within an address space.
///
/// # Errors
/// EPERM without the right to use userfaultfd, ENOSYS, EINVAL on kernels that cannot move.
pub fn probe_move() -> Result<()> {
    let from = Window::anonymous(4096)?;
    let to = Window::anonymous(4096)?;
    from.fill(0, b"moved");
    let uffd = open()?;
    let call = |request: u64, arg: &mut [u64]| -> Result<()> {
        // SAFETY: every request reads and writes no more than the words of its own structure.
        let result = unsafe { libc::ioctl(uffd.as_raw_fd(), request, arg.as_mut_ptr()) };
        Errno::check(i64::from(result)).map(drop)
    };
    call(API, &mut API_ARG.clone())?;
    call(REGISTER, &mut register_arg(to.address(), 4096))?;
    call(MOVE, &mut move_arg(to.address(), from.address(), 4096))?;
    let mut seen = [0u8; 5];
    to.copy_out(0, &mut seen);
    if &seen == b"moved" {
        Ok(())
    } else {
        Err(Errno::EIO)
    }
}

fn open() -> Result<OwnedFd> {
    let flags = i64::from(libc::O_CLOEXEC) | i64::try_from(USER_MODE_ONLY).expect("one");
    // SAFETY: the call takes flags only.
    let fd = Errno::check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    let fd = i32::try_from(fd).expect("descriptors fit i32");
    // SAFETY: the call just returned this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_a_page_where_the_kernel_can() {
        match probe_move() {
            Ok(()) => {}
            Err(error @ (Errno::EPERM | Errno::ENOSYS | Errno::EINVAL)) => {
                eprintln!("skipped: userfaultfd cannot move pages here: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
