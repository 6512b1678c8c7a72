//! Mounts that an automounter serves, and the pipes through which the kernel tells it what to mount.
//!
//! Source: linux Documentation/filesystems/autofs-mount-control.rst; include/uapi/linux/auto_dev-ioctl.h (Linux
//! 2.6.28).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::file;
use crate::{Errno, Result};

/// Length of `struct autofs_dev_ioctl` without a path.
const HEADER: usize = 24;
/// Offset of the descriptor of the mount in it.
const MOUNT_AT: usize = 12;
const OPEN_MOUNT: u32 = command(0x74);
const TIMEOUT: u32 = command(0x7a);
/// The command that gives a silent mount a new pipe; the caller's process group becomes the automounter's.
pub const SET_PIPE: u32 = command(0x78);
/// The command that silences a mount: its pipe is closed, and whoever waits for something to be mounted gets ENOENT.
pub const CATATONIC: u32 = command(0x79);

const fn command(number: u32) -> u32 {
    const IN_AND_OUT: u32 = 3;
    IN_AND_OUT << 30 | 24 << 16 | 0x93 << 8 | number
}

/// The device through which mounts are controlled.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    /// Opens the device.
    ///
    /// # Errors
    /// ENOENT without CONFIG_AUTOFS_FS; EACCES without root's rights.
    pub fn open() -> Result<Control> {
        file::open("/dev/autofs".as_ref(), file::O_RDONLY.cast_unsigned()).map(Control)
    }

    /// Opens the mount of that device number at a path, even where another one covers it.
    ///
    /// # Errors
    /// ENOENT where it is not mounted.
    pub fn open_mount(&self, path: &CStr, (major, minor): (u32, u32)) -> Result<OwnedFd> {
        let device = minor & 0xff | major << 8 | (minor & !0xff) << 12;
        let mut request = request(-1, u64::from(device)).to_vec();
        request.extend(path.to_bytes_with_nul());
        let len = u32::try_from(request.len()).map_err(|_| Errno::EINVAL)?;
        request[8..12].copy_from_slice(&len.to_ne_bytes());
        self.ask(OPEN_MOUNT, &mut request)?;
        let fd = request[MOUNT_AT..MOUNT_AT + 4].try_into();
        let fd = i32::from_ne_bytes(fd.expect("four bytes"));
        // SAFETY: the kernel has just opened it for this process.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Sets how many seconds a mount may be unused before it may go.
    ///
    /// # Errors
    /// EPERM.
    pub fn set_timeout(&self, mount: impl AsFd, seconds: u64) -> Result<()> {
        let mut request = request(mount.as_fd().as_raw_fd(), seconds);
        self.ask(TIMEOUT, &mut request)
    }

    fn ask(&self, command: u32, request: &mut [u8]) -> Result<()> {
        let command = libc::Ioctl::from(command);
        // SAFETY: the kernel reads and writes as much of the request as it says that it is long.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), command, request.as_mut_ptr()) };
        Errno::check(i64::from(result)).map(drop)
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The argument of a command about an open mount: `struct autofs_dev_ioctl`, with what the command wants.
///
/// ```text
/// 0 major version   4 minor version   8 length   12 the mount's descriptor   16 number, of 4 or 8 bytes
/// ```
pub fn request(mount: RawFd, value: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&1u32.to_ne_bytes());
    bytes[8..12].copy_from_slice(&24u32.to_ne_bytes());
    bytes[MOUNT_AT..MOUNT_AT + 4].copy_from_slice(&mount.to_ne_bytes());
    bytes[16..].copy_from_slice(&value.to_ne_bytes());
    bytes
}

/// Mounts a filesystem of type autofs.
///
/// # Errors
/// EINVAL for options that the kernel does not know; EPERM; ENOENT.
///
/// Source: man 2 mount.
pub fn mount(source: &CStr, target: &CStr, options: &CStr) -> Result<()> {
    // SAFETY: all arguments are strings that live across the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            c"autofs".as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    Errno::check(i64::from(result)).map(drop)
}

/// Takes a mount away from its place, at once.
///
/// # Errors
/// EINVAL where nothing is mounted.
pub fn unmount(target: &CStr) -> Result<()> {
    // SAFETY: the path is a string that lives across the call.
    let result = unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    Errno::check(i64::from(result)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_the_header_s() {
        // AUTOFS_DEV_IOCTL_SETPIPEFD and _CATATONIC.
        assert_eq!((SET_PIPE, CATATONIC), (0xc018_9378, 0xc018_9379));
    }

    #[test]
    fn a_request_names_the_mount() {
        let bytes = request(7, 9);
        assert_eq!(bytes[MOUNT_AT], 7);
        assert_eq!((bytes[0], bytes[8], bytes[16]), (1, 24, 9));
    }
}
