//! Which pages of a process are there, through /proc/PID/pagemap.
//!
//! Source: linux Documentation/admin-guide/mm/pagemap.rst, PAGEMAP_SCAN (Linux 6.7).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, pm_scan_arg};

use crate::{Errno, Pid, Result};

/// Page categories, as bits.
pub mod category {
    use linux_raw_sys::general as raw;

    /// Under asynchronous write protection of a userfaultfd.
    pub const WPALLOWED: u64 = raw::PAGE_IS_WPALLOWED as u64;
    /// Written since it was armed.
    pub const WRITTEN: u64 = raw::PAGE_IS_WRITTEN as u64;
    /// Page of a file or of shared memory.
    pub const FILE: u64 = raw::PAGE_IS_FILE as u64;
    /// In memory.
    pub const PRESENT: u64 = raw::PAGE_IS_PRESENT as u64;
    /// Swapped out, or a marker.
    pub const SWAPPED: u64 = raw::PAGE_IS_SWAPPED as u64;
    /// The kernel's page of zeros.
    pub const PFNZERO: u64 = raw::PAGE_IS_PFNZERO as u64;
    /// Part of a huge page.
    pub const HUGE: u64 = raw::PAGE_IS_HUGE as u64;
    /// Guard region (Linux 6.15).
    pub const GUARD: u64 = raw::PAGE_IS_GUARD as u64;
}

/// A run of pages of the same categories, as the kernel fills it in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// Address after the last page.
    pub end: u64,
    /// Those of the asked-for categories that the pages have.
    pub categories: u64,
}

/// Which pages a scan reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageQuery {
    /// Categories that a page must have.
    pub all_of: u64,
    /// Categories that a page must not have.
    pub none_of: u64,
    /// Categories of which a page must have one at least; 0 asks for none.
    pub any_of: u64,
    /// Categories that are reported, and that separate regions.
    pub reported: u64,
}

/// The pagemap file of a process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the pagemap of `pid`.
    ///
    /// # Errors
    /// ENOENT or ESRCH when the process is gone, EACCES without ptrace rights.
    pub fn open(pid: Pid) -> Result<Pagemap> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Pagemap { file })
    }

    /// Scans `start..end`; fills `regions` and returns how many were filled and the address where the
    /// scan ended, which is below `end` when `regions` was too short.
    ///
    /// # Errors
    /// ENOTTY: the kernel has no PAGEMAP_SCAN. EINVAL: it does not know one of the categories.
    pub fn scan(
        &self,
        start: u64,
        end: u64,
        query: PageQuery,
        regions: &mut [PageRegion],
    ) -> Result<(usize, u64)> {
        self.ask(start, end, query, 0, regions)
    }

    /// Forgets, for all pages of `start..end` that are there, that they have been written to: from now on
    /// those of category WRITTEN are the ones written since. All of the range must be mapped and tracked.
    ///
    /// # Errors
    /// EPERM where not all of the range is tracked; those of [`Pagemap::scan`].
    pub fn forget_writes(&self, start: u64, end: u64) -> Result<()> {
        let query = PageQuery {
            all_of: category::WRITTEN,
            // Those that are not there would get a marker each, which takes page tables.
            any_of: category::PRESENT | category::SWAPPED,
            ..PageQuery::default()
        };
        let flags = u64::from(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC);
        self.ask(start, end, query, flags, &mut []).map(drop)
    }

    fn ask(
        &self,
        start: u64,
        end: u64,
        query: PageQuery,
        flags: u64,
        regions: &mut [PageRegion],
    ) -> Result<(usize, u64)> {
        /// `_IOWR('f', 16, struct pm_scan_arg)`.
        const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
        let vec = match regions.is_empty() {
            true => 0,
            false => u64::try_from(regions.as_mut_ptr().addr()).expect("addresses fit 64 bits"),
        };
        let mut arg = pm_scan_arg {
            size: u64::try_from(size_of::<pm_scan_arg>()).expect("a small structure"),
            flags,
            start,
            end,
            walk_end: 0,
            vec,
            vec_len: u64::try_from(regions.len()).expect("lengths fit 64 bits"),
            max_pages: 0,
            category_inverted: query.none_of,
            category_mask: query.all_of | query.none_of,
            category_anyof_mask: query.any_of,
            return_mask: query.reported,
        };
        // SAFETY: the argument and the vector it points to outlive the call and have the lengths given.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let filled = Errno::check(i64::from(result))?;
        let filled = usize::try_from(filled).expect("at most the vector's length");
        Ok((filled, arg.walk_end))
    }

    /// Reads the raw 64-bit entries of consecutive pages from the one at `address` on; returns how many.
    ///
    /// # Errors
    /// As man 2 pread.
    pub fn entries(&self, address: u64, entries: &mut [u64]) -> Result<usize> {
        let mut bytes = vec![0u8; 8 * entries.len()];
        let read = self.file.read_at(&mut bytes, address / 4096 * 8)?;
        for (entry, bytes) in entries.iter_mut().zip(bytes[..read].chunks_exact(8)) {
            *entry = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        }
        Ok(read / 8)
    }
}

/// Bits of a raw pagemap entry.
pub mod entry {
    /// In memory.
    pub const PRESENT: u64 = 1 << 63;
    /// Swapped out, or a marker.
    pub const SWAPPED: u64 = 1 << 62;
    /// Page of a file or of shared memory.
    pub const FILE: u64 = 1 << 61;
    /// Guard region.
    pub const GUARD: u64 = 1 << 58;
    /// Mapped here only.
    pub const EXCLUSIVE: u64 = 1 << 56;
}

const _: () = assert!(size_of::<pm_scan_arg>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_touched_pages_of_an_own_mapping() {
        let window = crate::window::Window::anonymous(16 * 4096).expect("mapping");
        window.fill(3 * 4096, b"x");
        window.fill(4 * 4096, b"y");
        let start = window.address();
        let query = PageQuery {
            none_of: category::FILE | category::PFNZERO,
            any_of: category::PRESENT | category::SWAPPED,
            reported: category::PRESENT,
            ..PageQuery::default()
        };
        let mut regions = [PageRegion::default(); 4];
        let pagemap = Pagemap::open(Pid::this()).expect("own pagemap");
        match pagemap.scan(start, start + 16 * 4096, query, &mut regions) {
            Ok((found, walk_end)) => {
                assert_eq!(found, 1);
                assert_eq!(
                    (regions[0].start, regions[0].end),
                    (start + 3 * 4096, start + 5 * 4096)
                );
                assert_eq!(walk_end, start + 16 * 4096);
            }
            Err(Errno::ENOTTY) => eprintln!("skipped: this kernel has no PAGEMAP_SCAN"),
            Err(error) => panic!("{error}"),
        }
        let mut entries = [0u64; 16];
        assert_eq!(pagemap.entries(start, &mut entries), Ok(16));
        let present: Vec<usize> = (0..16)
            .filter(|&i| entries[i] & entry::PRESENT != 0)
            .collect();
        assert_eq!(present, [3, 4]);
    }
}
