//! Memory shared with other processes.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::Result;

/// A shared mapping of this process that other processes read and write at the same time.
///
/// Its memory is therefore never handed out as a reference to bytes: reads and writes copy, words are
/// atomics.
#[derive(Debug)]
pub struct SharedMapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value; every access goes through copies or atomics.
unsafe impl Send for SharedMapping {}
// SAFETY: see Send.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps fresh shared memory at exactly `address`, which must be free here.
    ///
    /// # Errors
    /// EEXIST when something is mapped there, ENOMEM.
    /// Source: man 2 mmap, MAP_FIXED_NOREPLACE.
    pub fn anonymous_at(address: u64, len: usize) -> Result<SharedMapping> {
        let wanted = usize::try_from(address).expect("addresses fit usize");
        let hint = std::ptr::without_provenance_mut(wanted);
        let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE;
        // SAFETY: FIXED_NOREPLACE never touches an existing mapping.
        let got = unsafe { mmap_anonymous(hint, len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Ok(SharedMapping {
            start: non_null(got),
            len,
        })
    }

    /// Maps fresh shared memory somewhere, which costs nothing before it is written to.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn sparse(len: usize) -> Result<SharedMapping> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        Ok(SharedMapping {
            start: non_null(got),
            len,
        })
    }

    /// Maps the first `len` bytes of `fd` shared, readable and writable, with all their pages at once.
    ///
    /// # Errors
    /// As man 2 mmap.
    pub fn of_file(fd: BorrowedFd<'_>, len: usize) -> Result<SharedMapping> {
        SharedMapping::map(fd, 0, len, MapFlags::POPULATE)
    }

    /// Maps `len` bytes of `fd` from `offset` on shared, readable and writable.
    ///
    /// # Errors
    /// As man 2 mmap.
    pub fn of_part(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<SharedMapping> {
        SharedMapping::map(fd, offset, len, MapFlags::empty())
    }

    fn map(fd: BorrowedFd<'_>, offset: u64, len: usize, how: MapFlags) -> Result<SharedMapping> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                prot,
                MapFlags::SHARED | how,
                fd,
                offset,
            )
        }?;
        Ok(SharedMapping {
            start: non_null(got),
            len,
        })
    }

    /// Maps `len` bytes of `rest` shared and replaces the first `head_len` of them by the start of `head`.
    ///
    /// # Errors
    /// As man 2 mmap.
    pub fn of_two_files(
        head: BorrowedFd<'_>,
        head_len: usize,
        rest: BorrowedFd<'_>,
        len: usize,
    ) -> Result<SharedMapping> {
        assert!(head_len <= len, "the head is part of the whole");
        let whole = SharedMapping::of_file(rest, len)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces pages of a mapping that this function has just made and owns.
        unsafe { mmap(whole.start.as_ptr().cast(), head_len, prot, flags, head, 0) }?;
        Ok(whole)
    }

    /// Makes the first `len` bytes executable and read-only.
    ///
    /// # Errors
    /// EACCES where a security module forbids it.
    pub fn make_executable(&mut self, len: usize) -> Result<()> {
        assert!(len <= self.len, "inside the mapping");
        let prot = MprotectFlags::READ | MprotectFlags::EXEC;
        // SAFETY: the range belongs to this mapping; nobody holds a reference into it.
        unsafe { mprotect(self.start.as_ptr().cast(), len, prot) }?;
        Ok(())
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for an empty mapping, which the kernel never makes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the mapping in this process.
    pub fn address(&self) -> u64 {
        u64::try_from(self.start.addr().get()).expect("addresses fit 64 bits")
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(
            offset
                .checked_add(bytes.len())
                .is_some_and(|end| end <= self.len),
            "inside"
        );
        // SAFETY: the offset was checked to lie inside the mapping.
        let at = unsafe { self.start.as_ptr().add(offset) };
        // SAFETY: source and destination are valid for the length and can't overlap; nobody holds a
        // reference to bytes of the mapping, and words are atomics.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "inside"
        );
        let mut out = vec![0u8; len];
        // SAFETY: the offset was checked to lie inside the mapping.
        let at = unsafe { self.start.as_ptr().add(offset) };
        // SAFETY: as in write; others may write at the same time, which gives torn bytes, not UB for
        // the kernel-shared memory that this is.
        unsafe { std::ptr::copy_nonoverlapping(at, out.as_mut_ptr(), len) };
        out
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Panics
    /// If the offset is not a multiple of 4 or lies outside.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(
            offset.is_multiple_of(4) && offset + 4 <= self.len,
            "an aligned word inside"
        );
        // SAFETY: the offset was checked to lie inside the mapping.
        let at = unsafe { self.start.as_ptr().add(offset) };
        // SAFETY: aligned, inside, and lives as long as self; all accesses to words are atomic.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// If the offset is not a multiple of 8 or lies outside.
    pub fn long_word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= self.len,
            "an aligned word inside"
        );
        // SAFETY: the offset was checked to lie inside the mapping.
        let at = unsafe { self.start.as_ptr().add(offset) };
        // SAFETY: aligned, inside, and lives as long as self; all accesses to words are atomic.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value and no reference outlives it.
        // An munmap of an own whole mapping does not fail.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn non_null(address: *mut std::ffi::c_void) -> NonNull<u8> {
    NonNull::new(address.cast()).expect("mmap never returns page zero without MAP_FIXED")
}
