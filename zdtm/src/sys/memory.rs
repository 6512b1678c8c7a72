//! Mappings of this process, as addresses and bytes.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;

use anyhow::{Result, bail, ensure};

use super::{PAGE, check, check_long};

/// `madvise` advice that makes pages fault like unmapped ones (Linux 6.13).
pub const MADV_GUARD_INSTALL: i32 = 102;

/// Readable and writable.
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A range of mapped memory. It stays mapped when the value goes: workloads end with their process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub addr: usize,
    /// Length in bytes.
    pub len: usize,
}

impl Region {
    /// Maps memory; `at` is an exact place that must be free.
    pub fn map(
        at: Option<usize>,
        len: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: i64,
    ) -> io::Result<Region> {
        let fixed = if at.is_some() {
            libc::MAP_FIXED_NOREPLACE
        } else {
            0
        };
        let hint = std::ptr::without_provenance_mut(at.unwrap_or(0));
        let fd = fd.map_or(-1, |fd| fd.as_raw_fd());
        // SAFETY: a new mapping at a place that is free or chosen by the kernel aliases nothing.
        let addr = unsafe { libc::mmap(hint, len, prot, flags | fixed, fd, offset) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region {
            addr: addr.addr(),
            len,
        })
    }

    /// Maps private anonymous memory.
    pub fn anon(len: usize) -> io::Result<Region> {
        Region::map(
            None,
            len,
            RW,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None,
            0,
        )
    }

    /// Maps shared anonymous memory.
    pub fn shared(len: usize) -> io::Result<Region> {
        Region::map(
            None,
            len,
            RW,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            None,
            0,
        )
    }

    /// Maps `len` bytes of a file from its start.
    pub fn file(fd: BorrowedFd<'_>, len: usize, prot: i32, flags: i32) -> io::Result<Region> {
        Region::map(None, len, prot, flags, Some(fd), 0)
    }

    /// A part of the region.
    pub fn part(&self, offset: usize, len: usize) -> Region {
        assert!(offset + len <= self.len, "a part lies inside its region");
        Region {
            addr: self.addr + offset,
            len,
        }
    }

    /// The pages of the region, one by one.
    pub fn pages(&self) -> impl Iterator<Item = Region> + use<> {
        let whole = *self;
        (0..self.len / PAGE).map(move |index| whole.part(index * PAGE, PAGE))
    }

    /// One past the last address.
    pub fn end(&self) -> usize {
        self.addr + self.len
    }

    fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.addr)
    }

    /// Writes bytes at an offset.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        let at = self.part(offset, bytes.len());
        // SAFETY: the range lies in the mapping, and no Rust object lives there.
        unsafe {
            at.pointer()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        }
    }

    /// Reads bytes at an offset.
    pub fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let at = self.part(offset, len);
        let mut bytes = vec![0; len];
        // SAFETY: the range lies in the mapping; the copy goes into memory of our own.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(at.pointer(), len)
        }
        bytes
    }

    /// A word in the region that several tasks may use.
    pub fn word(&self, offset: usize) -> &'static AtomicU32 {
        let at = self.part(offset, 4);
        // SAFETY: the mapping stays for the life of the process, and offsets are aligned to words.
        unsafe { AtomicU32::from_ptr(at.pointer().cast()) }
    }

    /// Fills every page with a pattern of its own.
    pub fn fill(&self, seed: u64) {
        let mut pattern = Pattern::new(seed);
        for (index, page) in self.pages().enumerate() {
            page.put(0, pattern.page(index));
        }
    }

    /// Checks the pattern of [`Region::fill`].
    pub fn check(&self, seed: u64) -> Result<()> {
        let mut pattern = Pattern::new(seed);
        for (index, page) in self.pages().enumerate() {
            let (seen, wanted) = (page.get(0, PAGE), pattern.page(index));
            if seen == wanted {
                continue;
            }
            let at = (0..PAGE).find(|&at| seen[at] != wanted[at]).unwrap_or(0);
            let (seen, wanted) = (seen[at], wanted[at]);
            bail!("byte {:#x} is {seen:#x}, was {wanted:#x}", page.addr + at);
        }
        Ok(())
    }

    /// Checks that every byte is zero.
    pub fn check_zero(&self) -> Result<()> {
        for page in self.pages() {
            let bytes = page.get(0, PAGE);
            ensure!(
                bytes.iter().all(|&b| b == 0),
                "page {:#x} is not zero",
                page.addr
            );
        }
        Ok(())
    }

    /// Changes the protection.
    pub fn protect(&self, prot: i32) -> io::Result<()> {
        // SAFETY: the mapping is ours and holds no Rust object.
        check(unsafe { libc::mprotect(self.pointer().cast(), self.len, prot) }).map(drop)
    }

    /// Gives the kernel advice.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the mapping is ours and holds no Rust object, so pages may be dropped.
        check(unsafe { libc::madvise(self.pointer().cast(), self.len, advice) }).map(drop)
    }

    /// Seals it against changes of the mapping.
    pub fn seal(&self) -> io::Result<()> {
        // SAFETY: sealing changes no contents.
        let got = unsafe { libc::syscall(libc::SYS_mseal, self.addr, self.len, 0) };
        check_long(got).map(drop)
    }

    /// Unmaps it.
    pub fn unmap(&self) -> io::Result<()> {
        // SAFETY: the mapping is ours and holds no Rust object.
        check(unsafe { libc::munmap(self.pointer().cast(), self.len) }).map(drop)
    }

    /// Locks it into memory; `flags` as for `mlock2`.
    pub fn lock(&self, flags: u32) -> io::Result<()> {
        // SAFETY: locking changes no contents.
        check(unsafe { libc::mlock2(self.pointer().cast(), self.len, flags) }).map(drop)
    }

    /// Moves the mapping to an exact place, replacing what is there.
    pub fn move_to(&self, addr: usize) -> io::Result<Region> {
        let (old, flags) = (
            self.pointer().cast(),
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
        );
        let target: *mut libc::c_void = std::ptr::without_provenance_mut(addr);
        // SAFETY: both places are ours and hold no Rust object.
        let new = unsafe { libc::mremap(old, self.len, self.len, flags, target) };
        if new == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region {
            addr: new.addr(),
            len: self.len,
        })
    }
}

/// The contents of a region filled with a seed: no two pages are alike, none is zero.
#[derive(Debug)]
pub struct Pattern {
    seed: u64,
    page: Vec<u8>,
}

impl Pattern {
    /// Makes the pattern of a seed.
    pub fn new(seed: u64) -> Pattern {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut page = Vec::with_capacity(PAGE);
        while page.len() < PAGE {
            state = state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            page.extend_from_slice(&(state ^ (state >> 33)).to_le_bytes());
        }
        Pattern { seed, page }
    }

    /// The contents of one page; only its first and last words differ from the others.
    pub fn page(&mut self, index: usize) -> &[u8] {
        let stamp = (index as u64 + 1) ^ self.seed.rotate_left(32);
        self.page[..8].copy_from_slice(&stamp.to_le_bytes());
        self.page[PAGE - 8..].copy_from_slice(&stamp.wrapping_mul(31).to_le_bytes());
        &self.page
    }
}

/// Makes a memory file.
pub fn memfd(name: &CStr, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string; the new descriptor is ours alone.
    unsafe { check(libc::memfd_create(name.as_ptr(), flags)).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Moves the end of the heap and returns the new end; 0 asks where it is.
pub fn brk(end: usize) -> usize {
    // SAFETY: the workloads that call this move only past what malloc has taken.
    let now = unsafe { libc::syscall(libc::SYS_brk, end) };
    usize::try_from(now).unwrap_or(0)
}

/// Gives anonymous memory a name.
///
/// # Errors
/// EINVAL without CONFIG_ANON_VMA_NAME.
pub fn name_memory(region: Region, name: &CStr) -> io::Result<()> {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    const PR_SET_VMA_ANON_NAME: usize = 0;
    let (addr, len) = (region.addr, region.len);
    // SAFETY: the name is a string that lives through the call; the memory itself stays as it is.
    let result = unsafe { libc::prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, addr, len, name.as_ptr()) };
    check_long(i64::from(result)).map(drop)
}

/// Whether the kernel keeps names of mappings.
pub fn has_vma_names() -> bool {
    Region::anon(PAGE).is_ok_and(|page| name_memory(page, c"probe").is_ok() & page.unmap().is_ok())
}
