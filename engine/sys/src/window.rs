//! A stretch of this process's memory that the kernel fills and empties: buffers for copying pages.
//!
//! Buffers are mappings of their own rather than heap memory, so that they go back to the system when
//! they are dropped and can be kept out of forked children.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::process_vm::RemoteRange;
use crate::{Errno, Pid, Result};

/// A private or shared mapping used as a buffer.
#[derive(Debug)]
pub struct Window {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value; accesses are copies made by the kernel or by methods here.
unsafe impl Send for Window {}

impl Window {
    /// Maps `len` bytes of zeros that children forked later do not get.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn anonymous(len: usize) -> Result<Window> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }?;
        let window = Window {
            start: non_null(got),
            len,
        };
        // SAFETY: the range is the mapping just made. A refusal only costs fork time.
        let _ = unsafe { madvise(got, len, Advice::LinuxDontFork) };
        Ok(window)
    }

    /// Makes the pages of the first `len` bytes, so that nobody waits for them later.
    pub fn populate(&self, len: usize) {
        let len = len.min(self.len);
        // SAFETY: the range is part of the mapping. Where the kernel can't (before Linux 5.14), faults make the pages.
        let _ = unsafe { madvise(self.start.as_ptr().cast(), len, Advice::LinuxPopulateWrite) };
    }

    /// Maps `len` bytes of a file from `offset` on, shared, readable and writable.
    ///
    /// # Errors
    /// As man 2 mmap.
    pub fn of_file(file: impl AsFd, offset: u64, len: usize) -> Result<Window> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let fd = file.as_fd();
        let at = std::ptr::null_mut();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe { mmap(at, len, prot, MapFlags::SHARED, fd, offset) }?;
        Ok(Window {
            start: non_null(got),
            len,
        })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for an empty mapping, which the kernel never makes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address in this process.
    pub fn address(&self) -> u64 {
        u64::try_from(self.start.addr().get()).expect("addresses fit 64 bits")
    }

    /// Address of `len` bytes at `offset`, in this process.
    ///
    /// # Panics
    /// If they lie outside.
    pub fn address_of(&self, offset: usize, len: usize) -> u64 {
        u64::try_from(self.at(offset, len).addr()).expect("addresses fit 64 bits")
    }

    /// Copies bytes in at `offset`.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        let at = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; source and destination can't overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
    }

    /// Reads the ranges of `pid` one after the other into the window from `offset` on; returns the
    /// number of bytes read.
    ///
    /// # Errors
    /// As [`crate::process_vm::read`].
    ///
    /// # Panics
    /// If the ranges do not fit the window.
    pub fn read_process(&self, pid: Pid, ranges: &[RemoteRange], offset: usize) -> Result<usize> {
        let len = total(ranges);
        let local = self.iovec(offset, len);
        crate::process_vm::transfer(pid, local, ranges, crate::process_vm::Direction::FromRemote)
    }

    /// Writes `ranges` of `pid` one after the other from the window; returns the number of bytes
    /// written.
    ///
    /// # Errors
    /// As [`crate::process_vm::write`].
    ///
    /// # Panics
    /// If the ranges do not fit the window.
    pub fn write_process(&self, pid: Pid, ranges: &[RemoteRange], offset: usize) -> Result<usize> {
        let len = total(ranges);
        let local = self.iovec(offset, len);
        crate::process_vm::transfer(pid, local, ranges, crate::process_vm::Direction::ToRemote)
    }

    /// Reads bytes of a file at `file_offset` into the window; returns the number of bytes read.
    ///
    /// # Errors
    /// As man 2 pread.
    ///
    /// # Panics
    /// If the range lies outside the window.
    pub fn read_file(
        &self,
        file: &File,
        file_offset: u64,
        offset: usize,
        len: usize,
    ) -> Result<usize> {
        let at = self.at(offset, len);
        let file_offset = libc::off_t::try_from(file_offset).map_err(|_| Errno::EINVAL)?;
        // SAFETY: `at` checked that the kernel writes inside the mapping only.
        let result = unsafe { libc::pread(file.as_raw_fd(), at.cast(), len, file_offset) };
        byte_count(result)
    }

    /// Writes bytes of the window to a file at `file_offset`; returns the number of bytes written.
    ///
    /// # Errors
    /// As man 2 pwrite.
    ///
    /// # Panics
    /// If the range lies outside the window.
    pub fn write_file(
        &self,
        file: &File,
        file_offset: u64,
        offset: usize,
        len: usize,
    ) -> Result<usize> {
        let at = self.at(offset, len);
        let file_offset = libc::off_t::try_from(file_offset).map_err(|_| Errno::EINVAL)?;
        // SAFETY: `at` checked that the kernel reads inside the mapping only.
        let result = unsafe { libc::pwrite(file.as_raw_fd(), at.cast(), len, file_offset) };
        byte_count(result)
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) {
        let at = self.at(offset, out.len());
        // SAFETY: `at` checked the range; source and destination can't overlap.
        unsafe { std::ptr::copy_nonoverlapping(at, out.as_mut_ptr(), out.len()) };
    }

    /// Lets go of the pages of a part: those of a file stay in it, others are zeros again.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn discard(&self, offset: usize, len: usize) {
        let at = self.at(offset, len);
        // SAFETY: `at` checked the range, and nobody holds a reference into a window. A refusal only
        // leaves the pages counted.
        let _ = unsafe { madvise(at.cast(), len, Advice::LinuxDontNeed) };
    }

    fn iovec(&self, offset: usize, len: usize) -> libc::iovec {
        libc::iovec {
            iov_base: self.at(offset, len).cast(),
            iov_len: len,
        }
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "inside the window");
        // SAFETY: the offset was just checked to lie inside the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value and no reference outlives it.
        // An munmap of an own whole mapping does not fail.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A place where parts of files are mapped to be read, one after the other, so that huge pages of the
/// file stay whole.
///
/// The part before is unmapped by the next one: what is mapped counts as memory of this process.
#[derive(Debug)]
pub struct FileWindow {
    area: Window,
    /// Offset in the area of what is mapped, and its length.
    mapped: (usize, usize),
}

const HUGE_PAGE: usize = 2 << 20;

impl FileWindow {
    /// Reserves addresses for parts of at most `max_len` bytes.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn reserve(max_len: usize) -> Result<FileWindow> {
        let len = max_len + 2 * HUGE_PAGE;
        let (at, flags) = (
            std::ptr::null_mut(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        );
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        let area = Window {
            start: non_null(got),
            len,
        };
        Ok(FileWindow {
            area,
            mapped: (0, 0),
        })
    }

    /// Maps `len` bytes of `file` from `offset` on, which is a multiple of the page size.
    ///
    /// # Errors
    /// As man 2 mmap.
    ///
    /// # Panics
    /// If the part is longer than what was reserved.
    pub fn map(&mut self, file: &File, offset: u64, len: usize) -> Result<()> {
        self.unmap()?;
        let offset_in_huge_page = offset % u64::try_from(HUGE_PAGE).expect("small");
        let offset_in_huge_page = usize::try_from(offset_in_huge_page).expect("small");
        let to_boundary = self.area.start.addr().get().wrapping_neg() % HUGE_PAGE;
        let base = to_boundary + offset_in_huge_page;
        let at = self.area.at(base, len).cast();
        // One call instead of a fault for every few pages.
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::POPULATE;
        // SAFETY: the range lies inside the reserved area, to which nobody holds a reference.
        unsafe { mmap(at, len, ProtFlags::READ, flags, file.as_fd(), offset) }?;
        self.mapped = (base, len);
        Ok(())
    }

    /// The memory, and the offset in it at which the mapped part begins.
    pub fn window(&self) -> (&Window, usize) {
        (&self.area, self.mapped.0)
    }

    fn unmap(&mut self) -> Result<()> {
        let (base, len) = std::mem::take(&mut self.mapped);
        if len == 0 {
            return Ok(());
        }
        let at = self.area.at(base, len).cast();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range lies inside the reserved area, to which nobody holds a reference.
        unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        Ok(())
    }
}

/// Whether a file lies on a tmpfs.
///
/// Source: man 2 fstatfs.
pub fn is_on_tmpfs(file: &File) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC)
}

/// Shared anonymous memory, mapped here as long as the value lives.
///
/// The memory lives on in descriptors that were opened through /proc/self/map_files.
#[derive(Debug)]
pub struct SharedObject {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value, through which nobody reads or writes it.
unsafe impl Send for SharedObject {}
// SAFETY: as above.
unsafe impl Sync for SharedObject {}

impl SharedObject {
    /// Makes `len` bytes of zeros, mapped in this process only; `huge` is MAP_HUGETLB with a page size, or 0.
    ///
    /// # Errors
    /// ENOMEM: too large, or not enough huge pages.
    pub fn new(len: usize, huge: u32) -> Result<SharedObject> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::from_bits_retain(huge);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        // SAFETY: the range is the mapping just made. A refusal only costs forked children a mapping.
        let _ = unsafe { madvise(got, len, Advice::LinuxDontFork) };
        Ok(SharedObject {
            start: non_null(got),
            len,
        })
    }

    /// Keeps a file of shared memory by a mapping of its first page, which may be none of the file's. It is open for
    /// reading only, so that a seal against writing finds no mapping that could be written.
    ///
    /// # Errors
    /// ENOMEM: too many mappings. ENODEV: files of huge pages may not be mapped by their beginning.
    pub fn of_file(read_only: impl AsFd) -> Result<SharedObject> {
        const LEN: usize = 4096;
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice, which nobody reads.
        let got = unsafe { mmap(std::ptr::null_mut(), LEN, prot, flags, read_only, 0) }?;
        // SAFETY: the range is the mapping just made. A refusal only costs forked children a mapping.
        let _ = unsafe { madvise(got, LEN, Advice::LinuxDontFork) };
        Ok(SharedObject {
            start: non_null(got),
            len: LEN,
        })
    }

    /// First address and address after the last, as map_files names them.
    pub fn address_range(&self) -> (u64, u64) {
        let number = |value: usize| u64::try_from(value).expect("addresses fit 64 bits");
        let start = number(self.start.addr().get());
        (start, start + number(self.len.next_multiple_of(4096)))
    }
}

impl Drop for SharedObject {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, which hands out no references.
        // An munmap of an own whole mapping does not fail.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn total(ranges: &[RemoteRange]) -> usize {
    ranges.iter().map(|range| range.len).sum()
}

fn byte_count(result: libc::ssize_t) -> Result<usize> {
    let count = Errno::check(i64::try_from(result).expect("ssize_t fits i64"))?;
    Ok(usize::try_from(count).expect("byte counts fit usize"))
}

fn non_null(address: *mut std::ffi::c_void) -> NonNull<u8> {
    NonNull::new(address.cast()).expect("mmap never returns page zero without MAP_FIXED")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_between_two_windows_through_the_kernel() {
        let from = Window::anonymous(8192).expect("mapping");
        let to = Window::anonymous(8192).expect("mapping");
        from.fill(4090, b"across pages");
        let source = RemoteRange {
            address: from.address() + 4090,
            len: 12,
        };
        assert_eq!(to.read_process(Pid::this(), &[source], 100), Ok(12));
        let mut out = [0u8; 12];
        to.copy_out(100, &mut out);
        assert_eq!(&out, b"across pages");
    }

    #[test]
    fn parts_of_a_file_follow_each_other_in_a_file_window() {
        use std::os::unix::fs::FileExt;
        let file = crate::memfd::create(c"parts", 1).expect("memfd");
        file.set_len(4 << 20).expect("size");
        file.write_all_at(b"first", 8192).expect("write");
        file.write_all_at(b"second", 3 << 20).expect("write");
        let mut parts = FileWindow::reserve(1 << 20).expect("room");
        parts.map(&file, 4096, 8192).expect("map");
        let (window, base) = parts.window();
        let mut out = [0; 5];
        window.copy_out(base + 4096, &mut out);
        assert_eq!(&out, b"first");
        parts.map(&file, 3 << 20, 1 << 20).expect("map");
        let (window, base) = parts.window();
        let mut out = [0; 6];
        window.copy_out(base, &mut out);
        assert_eq!(&out, b"second");
    }

    #[test]
    #[should_panic(expected = "inside the window")]
    fn refuses_ranges_outside() {
        let window = Window::anonymous(4096).expect("mapping");
        window.fill(4095, b"ab");
    }
}
