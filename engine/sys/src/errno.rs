//! The error of a system call.

use std::fmt;

/// A kernel error number, shown as its name and meaning.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

/// Result of a system call.
pub type Result<T> = std::result::Result<T, Errno>;

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Errno = Errno(libc::EPERM);
    /// No such file or directory.
    pub const ENOENT: Errno = Errno(libc::ENOENT);
    /// No such process.
    pub const ESRCH: Errno = Errno(libc::ESRCH);
    /// Interrupted system call.
    pub const EINTR: Errno = Errno(libc::EINTR);
    /// I/O error.
    pub const EIO: Errno = Errno(libc::EIO);
    /// Bad file descriptor.
    pub const EBADF: Errno = Errno(libc::EBADF);
    /// No child processes.
    pub const ECHILD: Errno = Errno(libc::ECHILD);
    /// Try again.
    pub const EAGAIN: Errno = Errno(libc::EAGAIN);
    /// Out of memory.
    pub const ENOMEM: Errno = Errno(libc::ENOMEM);
    /// Permission denied.
    pub const EACCES: Errno = Errno(libc::EACCES);
    /// Bad address.
    pub const EFAULT: Errno = Errno(libc::EFAULT);
    /// A part of the path is no directory.
    pub const ENOTDIR: Errno = Errno(libc::ENOTDIR);
    /// Busy.
    pub const EBUSY: Errno = Errno(libc::EBUSY);
    /// Already there.
    pub const EEXIST: Errno = Errno(libc::EEXIST);
    /// On another filesystem.
    pub const EXDEV: Errno = Errno(libc::EXDEV);
    /// Too many names.
    pub const EMLINK: Errno = Errno(libc::EMLINK);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// No space left.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// Unknown system call.
    pub const ENOSYS: Errno = Errno(libc::ENOSYS);
    /// Unknown request of a driver.
    pub const ENOTTY: Errno = Errno(libc::ENOTTY);
    /// Timed out.
    pub const ETIMEDOUT: Errno = Errno(libc::ETIMEDOUT);
    /// Socket operation on something that has no connection.
    pub const ENOTCONN: Errno = Errno(libc::ENOTCONN);
    /// The protocol has no such option.
    pub const ENOPROTOOPT: Errno = Errno(libc::ENOPROTOOPT);
    /// Not supported by the object.
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// The address is taken.
    pub const EADDRINUSE: Errno = Errno(libc::EADDRINUSE);
    /// The address is not one of ours.
    pub const EADDRNOTAVAIL: Errno = Errno(libc::EADDRNOTAVAIL);
    /// The connection is on its way.
    pub const EINPROGRESS: Errno = Errno(libc::EINPROGRESS);
    /// The message is too long.
    pub const EMSGSIZE: Errno = Errno(libc::EMSGSIZE);
    /// No data.
    pub const ENODATA: Errno = Errno(libc::ENODATA);
    /// The identifier has been removed.
    pub const EIDRM: Errno = Errno(libc::EIDRM);

    /// Wraps a raw number.
    pub fn from_raw(raw: i32) -> Errno {
        Errno(raw)
    }

    /// The raw number.
    pub fn raw(self) -> i32 {
        self.0
    }

    /// The error of the last failed libc call of this thread.
    pub fn last() -> Errno {
        Errno(
            std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    }

    /// Turns libc's convention (negative: look at errno) into a result.
    pub(crate) fn check(result: i64) -> Result<u64> {
        u64::try_from(result).map_err(|_| Errno::last())
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&nix::errno::Errno::from_raw(self.0), f)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errno = nix::errno::Errno::from_raw(self.0);
        write!(f, "{errno:?} ({})", errno.desc())
    }
}

impl std::error::Error for Errno {}

impl From<nix::errno::Errno> for Errno {
    fn from(errno: nix::errno::Errno) -> Errno {
        Errno(errno as i32)
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Errno {
        Errno(errno.raw_os_error())
    }
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> std::io::Error {
        std::io::Error::from_raw_os_error(errno.0)
    }
}
