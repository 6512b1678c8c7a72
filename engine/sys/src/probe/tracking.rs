//! Probes about finding out which pages exist and which were written.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use linux_raw_sys::general::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, UFFD_API, UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_UNPOPULATED, pm_scan_arg, uffdio_api, uffdio_register,
};

use super::memory::{Scratch, entry_of};
use crate::{Errno, Result};

/// `_IOWR('f', 16, struct pm_scan_arg)`, 96 bytes.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`, 24 bytes.
const UFFDIO_API: u64 = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`, 32 bytes.
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const PM_SOFT_DIRTY: u64 = 1 << 55;

/// One range that a scan found.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Scans a page of this process for these categories (PAGE_IS_*); tells whether the page has one.
///
/// # Errors
/// ENOTTY before Linux 6.7, EINVAL for a category that this kernel does not know.
pub fn pagemap_scan(categories: u64) -> Result<bool> {
    let page = Scratch::map(libc::PROT_READ | libc::PROT_WRITE)?;
    page.touch();
    scan(&File::open("/proc/self/pagemap")?, &page, categories, 0)
}

fn scan(pagemap: &File, page: &Scratch, categories: u64, flags: u32) -> Result<bool> {
    let mut region = Region::default();
    let vec = (&raw mut region).expose_provenance();
    let mut arg = pm_scan_arg {
        size: u64::try_from(size_of::<pm_scan_arg>()).expect("a small structure"),
        flags: u64::from(flags),
        start: page.address(),
        end: page.address() + 4096,
        walk_end: 0,
        vec: u64::try_from(vec).expect("addresses fit 64 bits"),
        vec_len: 1,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: categories,
        return_mask: categories,
    };
    // SAFETY: argument and region outlive the call, and their sizes stand in the argument.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    Ok(Errno::check(i64::from(found))? > 0)
}

/// Features of userfaultfd (UFFD_FEATURE_*).
///
/// # Errors
/// ENOSYS without CONFIG_USERFAULTFD, EPERM where it is reserved for others.
pub fn uffd_features() -> Result<u64> {
    open_uffd(0).map(|(_, features)| features)
}

fn open_uffd(features: u64) -> Result<(OwnedFd, u64)> {
    // SAFETY: the descriptor is used here only, on memory that this module owns.
    let uffd = unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC) }?;
    let mut api = uffdio_api {
        api: u64::from(UFFD_API),
        features,
        ioctls: 0,
    };
    // SAFETY: the structure outlives the call.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    Errno::check(i64::from(result))?;
    Ok((uffd, api.features))
}

/// Tracks writes to a page by userfaultfd and PAGEMAP_SCAN: unwritten before, written after a write.
///
/// # Errors
/// EINVAL before Linux 6.7, those of [`uffd_features`], EOPNOTSUPP when the answers are wrong.
pub fn write_tracking() -> Result<()> {
    let wanted = u64::from(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED);
    let (uffd, _) = open_uffd(wanted)?;
    let page = Scratch::map(libc::PROT_READ | libc::PROT_WRITE)?;
    page.touch();
    // SAFETY: the structure holds integers only, for which zero is a value.
    let mut register: uffdio_register = unsafe { std::mem::zeroed() };
    register.range.start = page.address();
    register.range.len = 4096;
    register.mode = UFFDIO_REGISTER_MODE_WP;
    // SAFETY: the structure outlives the call; the range is a mapping of ours.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    Errno::check(i64::from(result))?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let written = u64::from(PAGE_IS_WRITTEN);
    let arm = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
    scan(&pagemap, &page, written, arm)?;
    let before = scan(&pagemap, &page, written, 0)?;
    page.touch();
    let after = scan(&pagemap, &page, written, 0)?;
    if !before && after {
        Ok(())
    } else {
        Err(Errno::from_raw(libc::EOPNOTSUPP))
    }
}

/// Tracks writes to a page by the soft-dirty bit, by effect: kernels without it accept the calls.
///
/// # Errors
/// EOPNOTSUPP when the bit says nothing.
pub fn soft_dirty() -> Result<()> {
    let page = Scratch::map(libc::PROT_READ | libc::PROT_WRITE)?;
    page.touch();
    let pagemap = File::open("/proc/self/pagemap")?;
    // Clearing the bits of this process disturbs nobody: nothing tracks the prober.
    std::fs::write("/proc/self/clear_refs", "4")?;
    let before = entry_of(&pagemap, &page)? & PM_SOFT_DIRTY;
    page.touch();
    let after = entry_of(&pagemap, &page)? & PM_SOFT_DIRTY;
    let works = before == 0 && after != 0;
    if works {
        Ok(())
    } else {
        Err(Errno::from_raw(libc::EOPNOTSUPP))
    }
}

#[cfg(test)]
mod tests {
    use linux_raw_sys::general::{PAGE_IS_PRESENT, PAGE_IS_SWAPPED};

    use super::*;

    #[test]
    fn a_touched_page_is_found_or_the_scan_is_unknown() {
        match pagemap_scan(u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED)) {
            Ok(found) => assert!(found),
            Err(errno) => assert_eq!(errno, Errno::ENOTTY),
        }
    }
}
