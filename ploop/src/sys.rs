//! The few kernel calls on files that std lacks.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// Makes a range read as zeroes and gives its space back. The file keeps its length.
///
/// Source: man 2 fallocate, FALLOC_FL_PUNCH_HOLE
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    retry(|| rustix::fs::fallocate(file, flags, offset, len))
}

/// Makes a range read as zeroes; it keeps its space. The file grows where the range reaches over its end.
///
/// Source: man 2 fallocate, FALLOC_FL_ZERO_RANGE
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    retry(|| rustix::fs::fallocate(file, FallocateFlags::ZERO_RANGE, offset, len))
}

/// Reserves space for a range. The file grows where the range reaches over its end.
///
/// Source: man 2 fallocate
pub(crate) fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    retry(|| rustix::fs::fallocate(file, FallocateFlags::empty(), offset, len))
}

/// The first byte at or after `offset` that is not in a hole, or None where only holes follow.
///
/// Source: man 2 lseek, SEEK_DATA
pub(crate) fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The first byte at or after `offset` that is in a hole; the end of the file counts as one.
///
/// Source: man 2 lseek, SEEK_HOLE
pub(crate) fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::Hole(offset))?)
}

/// Whether the file system lacks the call, so that plain writes have to do it.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::OPNOTSUPP | Errno::NOSYS)
    )
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}
