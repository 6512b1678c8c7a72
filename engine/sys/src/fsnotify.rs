//! Watches of files: inotify and fanotify, and files by handle.
//!
//! Source: man 7 inotify, man 7 fanotify, man 2 open_by_handle_at.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Errno, Result, pidfd};

/// Longest handle that the kernel makes.
pub const MAX_HANDLE: usize = 128;

fn own(result: i64) -> Result<OwnedFd> {
    let fd = i32::try_from(Errno::check(result)?).map_err(|_| Errno::EINVAL)?;
    // SAFETY: only called with what a call has just returned to us alone.
    Ok(unsafe { pidfd::own(fd) })
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// Makes an inotify instance, close-on-exec.
///
/// # Errors
/// EMFILE: the user has too many.
pub fn inotify() -> Result<OwnedFd> {
    // SAFETY: a number only.
    own(i64::from(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) }))
}

/// Adds a watch that gets the number `wanted`.
///
/// # Errors
/// ENOTTY: the kernel can't choose the number (Linux 4.16 can); EINVAL: it gave another one.
pub fn add_watch(inotify: impl AsFd, path: &Path, mask: u32, wanted: i32) -> Result<()> {
    const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
    let fd = inotify.as_fd().as_raw_fd();
    let path = c_path(path)?;
    // SAFETY: the request takes a number.
    let result = unsafe { libc::ioctl(fd, INOTIFY_IOC_SETNEXTWD, wanted) };
    Errno::check(i64::from(result))?;
    // SAFETY: the path is a C string.
    let got = unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) };
    Errno::check(i64::from(got))?;
    if got == wanted {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

/// Makes a fanotify group.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, EINVAL for unknown flags, EMFILE.
pub fn fanotify(flags: u32, event_flags: u32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    own(i64::from(unsafe {
        libc::fanotify_init(flags, event_flags)
    }))
}

/// Adds a mark.
///
/// # Errors
/// As man 2 fanotify_mark.
pub fn add_mark(group: impl AsFd, flags: u32, mask: u64, path: &Path) -> Result<()> {
    let path = c_path(path)?;
    let fd = group.as_fd().as_raw_fd();
    // SAFETY: the path is a C string.
    let result = unsafe { libc::fanotify_mark(fd, flags, mask, libc::AT_FDCWD, path.as_ptr()) };
    Errno::check(i64::from(result)).map(drop)
}

/// Opens the file with that handle in the filesystem that `mount` is on, as with O_PATH.
///
/// # Errors
/// ESTALE: there is no such file any more. EPERM without CAP_DAC_READ_SEARCH. EOPNOTSUPP.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    #[repr(C)]
    struct FileHandle {
        len: u32,
        kind: i32,
        bytes: [u8; MAX_HANDLE],
    }
    let mut full = FileHandle {
        len: u32::try_from(handle.len()).map_err(|_| Errno::EINVAL)?,
        kind,
        bytes: [0; MAX_HANDLE],
    };
    full.bytes
        .get_mut(..handle.len())
        .ok_or(Errno::EINVAL)?
        .copy_from_slice(handle);
    let mount = mount.as_fd().as_raw_fd();
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle has as many bytes as it says and outlives the call.
    own(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount, &raw mut full, flags) })
}

/// Number of bytes of events that wait.
///
/// # Errors
/// ENOTTY.
pub fn waiting(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::io::ioctl_fionread(fd)?)
}
