//! Pipes.
//!
//! Source: man 2 pipe, tee; man 7 pipe.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pipe::{PipeFlags, SpliceFlags};

use crate::Result;

/// Makes a pipe; both ends are close-on-exec. Returns the reading and the writing end.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn create() -> Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}

/// Device of the filesystem that all pipes without a name are on.
///
/// # Errors
/// Those of [`create`].
pub fn filesystem() -> Result<u64> {
    let (reader, _writer) = create()?;
    Ok(crate::file::stat(reader)?.dev)
}

/// Capacity in bytes.
///
/// # Errors
/// EBADF for something that is no pipe.
pub fn capacity(fd: impl AsFd) -> Result<usize> {
    Ok(rustix::pipe::fcntl_getpipe_size(fd)?)
}

/// Sets the capacity; the kernel rounds up. Returns what it became.
///
/// # Errors
/// EPERM above /proc/sys/fs/pipe-max-size without CAP_SYS_RESOURCE, EBUSY when more is in the pipe.
pub fn set_capacity(fd: impl AsFd, size: usize) -> Result<usize> {
    Ok(rustix::pipe::fcntl_setpipe_size(fd, size)?)
}

/// Number of bytes that wait in the pipe.
///
/// # Errors
/// EBADF.
pub fn waiting(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::io::ioctl_fionread(fd)?)
}

/// Lets the pipe `to` hold the next bytes of `from` as well, without taking them out; never sleeps.
/// Returns their number.
///
/// # Errors
/// EAGAIN when `from` is empty or `to` is full.
pub fn tee(from: impl AsFd, to: impl AsFd, len: usize) -> Result<usize> {
    Ok(rustix::pipe::tee(from, to, len, SpliceFlags::NONBLOCK)?)
}

/// Whether somebody holds the other end of the pipe or fifo.
///
/// # Errors
/// EBADF.
/// Source: man 2 poll: POLLHUP on a reading end, POLLERR on a writing end.
pub fn other_end_open(fd: impl AsFd) -> Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::empty())];
    rustix::event::poll(&mut fds, Some(&Timespec::default()))?;
    Ok(!fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// Writes bytes; returns how many.
///
/// # Errors
/// EAGAIN when a non-blocking pipe is full, EPIPE without reader.
/// Source: man 2 write.
pub fn write(fd: impl AsFd, bytes: &[u8]) -> Result<usize> {
    Ok(rustix::io::write(fd, bytes)?)
}
