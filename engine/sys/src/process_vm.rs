//! Reading and writing another process's memory.
//!
//! Source: man 2 process_vm_readv.

use crate::{Errno, Pid, Result};

/// A range of another process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteRange {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub len: usize,
}

/// Most ranges one call takes (IOV_MAX).
pub const MAX_RANGES: usize = 1024;

/// Reads the ranges of `pid` one after the other into `buffer`; returns the number of bytes read, which
/// is less than asked where a range is not readable.
///
/// # Errors
/// EFAULT: the first byte is not readable. ESRCH, EPERM.
pub fn read(pid: Pid, ranges: &[RemoteRange], buffer: &mut [u8]) -> Result<usize> {
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    transfer(pid, local, ranges, Direction::FromRemote)
}

/// Writes `buffer` to the ranges of `pid` one after the other; returns the number of bytes written.
///
/// # Errors
/// EFAULT: the first byte is not writable. ESRCH, EPERM.
pub fn write(pid: Pid, ranges: &[RemoteRange], buffer: &[u8]) -> Result<usize> {
    let local = libc::iovec {
        iov_base: buffer.as_ptr().cast_mut().cast(),
        iov_len: buffer.len(),
    };
    transfer(pid, local, ranges, Direction::ToRemote)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    FromRemote,
    ToRemote,
}

/// One call over one local range, which the caller vouches for: memory of this process that is valid
/// for its length, and that no reference is held to while it is written.
pub(crate) fn transfer(
    pid: Pid,
    local: libc::iovec,
    ranges: &[RemoteRange],
    direction: Direction,
) -> Result<usize> {
    let remote = remote_iovecs(ranges);
    let nr_remote = u64::try_from(remote.len()).expect("few ranges");
    let call = match direction {
        Direction::FromRemote => libc::process_vm_readv,
        Direction::ToRemote => libc::process_vm_writev,
    };
    // SAFETY: the local range is valid by the caller's word; remote addresses are numbers.
    let result = unsafe {
        call(
            pid.raw(),
            &raw const local,
            1,
            remote.as_ptr(),
            nr_remote,
            0,
        )
    };
    Errno::check(i64::try_from(result).expect("ssize_t fits i64")).map(to_usize)
}

fn remote_iovecs(ranges: &[RemoteRange]) -> Vec<libc::iovec> {
    ranges
        .iter()
        .map(|range| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(
                usize::try_from(range.address).expect("addresses fit usize"),
            ),
            iov_len: range.len,
        })
        .collect()
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("byte counts fit usize")
}
