//! Memory files: shared memory objects that descriptors refer to.
//!
//! Source: man 2 memfd_create, man 2 fcntl (F_ADD_SEALS), man 2 lseek (SEEK_DATA).

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::{Errno, Result};

/// `MFD_*` flags of [`create`].
pub mod flag {
    /// Close on exec.
    pub const CLOEXEC: u32 = libc::MFD_CLOEXEC;
    /// Seals may be added later.
    pub const ALLOW_SEALING: u32 = libc::MFD_ALLOW_SEALING;
    /// Made of huge pages; bits 26 to 31 give the log2 of their size.
    pub const HUGETLB: u32 = libc::MFD_HUGETLB;
    /// Not executable, and sealed so (Linux 6.3).
    pub const NOEXEC_SEAL: u32 = 8;
    /// Executable (Linux 6.3).
    pub const EXEC: u32 = 16;
}

/// Seals of a memory file.
pub mod seal {
    /// No more seals.
    pub const SEAL: u32 = 1;
    /// May not shrink.
    pub const SHRINK: u32 = 2;
    /// May not grow.
    pub const GROW: u32 = 4;
    /// May not be written.
    pub const WRITE: u32 = 8;
    /// May not be written but through mappings made before.
    pub const FUTURE_WRITE: u32 = 16;
    /// The execute bits may not change.
    pub const EXEC: u32 = 32;
}

/// Creates a memory file.
///
/// # Errors
/// EINVAL: unknown flags, a page size that the machine lacks, or a name over 249 bytes.
pub fn create(name: &CStr, flags: u32) -> Result<File> {
    // SAFETY: the name is NUL-terminated.
    let fd = Errno::check(i64::from(unsafe {
        libc::memfd_create(name.as_ptr(), flags)
    }))?;
    let fd = i32::try_from(fd).expect("descriptors fit i32");
    // SAFETY: the call just returned this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// The seals of a memory file.
///
/// # Errors
/// EINVAL where the file takes no seals.
pub fn seals(file: impl AsFd) -> Result<u32> {
    // SAFETY: a descriptor and a command without argument.
    let seals = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
    let seals = Errno::check(i64::from(seals))?;
    Ok(u32::try_from(seals).expect("an int"))
}

/// Adds seals.
///
/// # Errors
/// EPERM: sealed against seals. EBUSY: `WRITE` while a writable mapping exists.
pub fn add_seals(file: impl AsFd, seals: u32) -> Result<()> {
    // SAFETY: a descriptor, a command and a number.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_ADD_SEALS, seals) };
    Errno::check(i64::from(result)).map(drop)
}

/// The next range of a file from `offset` on that has contents; None when only holes follow.
///
/// # Errors
/// As man 2 lseek. Where a file system does not tell holes, the rest of the file is one range.
pub fn next_data(file: impl AsFd, offset: u64) -> Result<Option<(u64, u64)>> {
    let fd = file.as_fd();
    let start = match rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(fd, rustix::fs::SeekFrom::Hole(start))?;
    Ok(Some((start, end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn tells_data_from_holes_and_takes_seals() {
        let flags = flag::CLOEXEC | flag::ALLOW_SEALING;
        let file = create(c"holes", flags).expect("memfd");
        file.set_len(64 * 4096).expect("size");
        file.write_all_at(b"x", 10 * 4096).expect("write");
        assert_eq!(next_data(&file, 0), Ok(Some((10 * 4096, 11 * 4096))));
        assert_eq!(next_data(&file, 11 * 4096), Ok(None));
        assert_eq!(seals(&file), Ok(0));
        add_seals(&file, seal::GROW).expect("seal");
        assert_eq!(seals(&file), Ok(seal::GROW));
        assert!(file.set_len(65 * 4096).is_err());
    }
}
