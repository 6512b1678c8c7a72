//! Probes about mappings and the fields of an address space.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::{null_mut, without_provenance_mut};

use linux_raw_sys::prctl::prctl_mm_map;

use super::in_child;
use crate::{Errno, Result};

const PAGE: usize = 4096;
const ARCH_MAP_VDSO_64: i32 = 0x2003;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;
const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: u64 = 14;

/// A private anonymous page of this process.
#[derive(Debug)]
pub(super) struct Scratch {
    at: *mut u8,
    len: usize,
}

impl Scratch {
    /// Maps one page.
    pub(super) fn map(protection: i32) -> Result<Scratch> {
        Scratch::map_len(PAGE, protection)
    }

    fn map_len(len: usize, protection: i32) -> Result<Scratch> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe { libc::mmap(null_mut(), len, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Scratch { at: at.cast(), len })
    }

    /// Its address.
    pub(super) fn address(&self) -> u64 {
        u64::try_from(self.at.addr()).expect("addresses fit 64 bits")
    }

    /// Writes a byte to its first page.
    pub(super) fn touch(&self) {
        // SAFETY: the mapping lives as long as self and was made writable by whoever calls this.
        unsafe { self.at.write_volatile(1) };
    }

    fn advise(&self, advice: i32) -> Result<()> {
        // SAFETY: the range is this mapping.
        let result = unsafe { libc::madvise(self.at.cast(), self.len, advice) };
        Errno::check(i64::from(result)).map(drop)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing points into it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// Fields of this process's address space, as /proc/self/stat has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Start and end of the program's text.
    pub code: (u64, u64),
    /// Start and end of its data.
    pub data: (u64, u64),
    /// Start of the heap.
    pub start_brk: u64,
    /// Start of the stack.
    pub start_stack: u64,
    /// Start and end of the arguments.
    pub args: (u64, u64),
    /// Start and end of the environment.
    pub env: (u64, u64),
}

/// Lets a child set the fields of its address space to what they are, in one call.
///
/// # Errors
/// EINVAL without CONFIG_CHECKPOINT_RESTORE, EPERM where rights are missing.
pub fn set_mm_map(layout: &Layout) -> Result<()> {
    // SAFETY: sbrk(0) only asks.
    let brk = unsafe { libc::sbrk(0) }.addr();
    let map = prctl_mm_map {
        start_code: layout.code.0,
        end_code: layout.code.1,
        start_data: layout.data.0,
        end_data: layout.data.1,
        start_brk: layout.start_brk,
        brk: u64::try_from(brk).expect("addresses fit 64 bits"),
        start_stack: layout.start_stack,
        arg_start: layout.args.0,
        arg_end: layout.args.1,
        env_start: layout.env.0,
        env_end: layout.env.1,
        auxv: null_mut(),
        auxv_size: 0,
        exe_fd: u32::MAX,
    };
    // SAFETY: one system call; map outlives it.
    unsafe {
        in_child(|| {
            let len = size_of::<prctl_mm_map>();
            let result = libc::prctl(PR_SET_MM, PR_SET_MM_MAP, &raw const map, len, 0);
            Errno::check(i64::from(result)).map(drop)
        })
    }
}

/// Asks a child's kernel to map a vdso; the one that is there already is the expected answer.
///
/// # Errors
/// EINVAL before Linux 4.8.
pub fn map_vdso() -> Result<()> {
    // SAFETY: one system call in a child.
    let asked = unsafe {
        in_child(|| {
            let result = libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0);
            Errno::check(result).map(drop)
        })
    };
    if asked == Err(Errno::EEXIST) {
        Ok(())
    } else {
        asked
    }
}

/// Lets a child move areas `(start, length)` of its address space to other places.
///
/// # Errors
/// EINVAL, EFAULT: the kernel does not let them go.
pub fn move_areas(areas: &[(u64, u64)]) -> Result<()> {
    let to_usize = |value: u64| usize::try_from(value).map_err(|_| Errno::EINVAL);
    let mut list = [(0usize, 0usize); 8];
    let count = areas.len().min(list.len());
    for (slot, area) in list.iter_mut().zip(areas) {
        *slot = (to_usize(area.0)?, to_usize(area.1)?);
    }
    // SAFETY: the child makes system calls only and uses the vdso no more.
    unsafe {
        in_child(|| {
            for &(start, len) in &list[..count] {
                let from = without_provenance_mut(start);
                let moved = libc::mremap(from, len, len, libc::MREMAP_MAYMOVE);
                // Without a wanted place the kernel may leave it where it is: name one.
                if moved == libc::MAP_FAILED {
                    return Err(Errno::last());
                }
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let place = libc::mmap(null_mut(), len, libc::PROT_NONE, flags, -1, 0);
                let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                if libc::mremap(moved, len, len, how, place) == libc::MAP_FAILED {
                    return Err(Errno::last());
                }
            }
            Ok(())
        })
    }
}

/// The pagemap entry of a page of this process that has just been written.
///
/// # Errors
/// Those of opening and reading /proc/self/pagemap.
pub fn pagemap_entry() -> Result<u64> {
    let page = Scratch::map(libc::PROT_READ | libc::PROT_WRITE)?;
    page.touch();
    entry_of(&File::open("/proc/self/pagemap")?, &page)
}

pub(super) fn entry_of(pagemap: &File, page: &Scratch) -> Result<u64> {
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, page.address() / 4096 * 8)?;
    Ok(u64::from_le_bytes(entry))
}

/// Makes guard regions in a scratch mapping.
///
/// # Errors
/// EINVAL before Linux 6.13.
pub fn guard_regions() -> Result<()> {
    Scratch::map(libc::PROT_READ | libc::PROT_WRITE)?.advise(MADV_GUARD_INSTALL)
}

/// Makes a huge page of small ones.
///
/// # Errors
/// EINVAL before Linux 6.1 or without huge pages; ENOMEM, EAGAIN when there is none free just now.
pub fn collapse() -> Result<()> {
    const HUGE: usize = 2 << 20;
    let area = Scratch::map_len(2 * HUGE, libc::PROT_READ | libc::PROT_WRITE)?;
    let skip = area.at.align_offset(HUGE);
    let at = area.at.wrapping_add(skip);
    // SAFETY: one aligned huge page lies inside two huge pages of mapping, which is writable.
    unsafe { at.write_volatile(1) };
    // SAFETY: the range lies inside the mapping.
    let result = unsafe { libc::madvise(at.cast(), HUGE, MADV_COLLAPSE) };
    Errno::check(i64::from(result)).map(drop)
}

/// Makes an anonymous file.
///
/// # Errors
/// ENOSYS.
pub fn memfd() -> Result<()> {
    rustix::fs::memfd_create(c"probe", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(())
}

/// Makes an anonymous file of huge pages.
///
/// # Errors
/// EINVAL before Linux 4.14 or without hugetlbfs.
pub fn memfd_hugetlb() -> Result<()> {
    use rustix::fs::MemfdFlags;
    rustix::fs::memfd_create(c"probe", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)?;
    Ok(())
}
