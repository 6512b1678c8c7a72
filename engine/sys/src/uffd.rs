//! userfaultfd: its requests as bytes for programs, and pages copied into another task's memory.
//!
//! Source: man 2 userfaultfd, man 2 ioctl_userfaultfd.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::window::Window;
use crate::{Errno, Pid, Result, pidfd};

/// Only faults of user space are handled, which any user may ask for.
pub const USER_MODE_ONLY: u64 = 1;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
pub const API: u64 = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
pub const REGISTER: u64 = 0xc020_aa00;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const COPY: u64 = 0xc028_aa03;
/// `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`.
const WRITEPROTECT: u64 = 0xc018_aa06;
/// UFFD_FEATURE_WP_UNPOPULATED and UFFD_FEATURE_WP_ASYNC: pages that are not there can be written for the
/// first time, and nobody waits for a written page (Linux 6.7).
const TRACKING: u64 = 1 << 13 | 1 << 15;
/// Flags of a userfaultfd that tracks writes.
pub const TRACKER_FLAGS: u64 = USER_MODE_ONLY | (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

/// `struct uffdio_api` that asks for nothing special.
pub const API_ARG: [u64; 3] = [0xaa, 0, 0];

/// `struct uffdio_register` for missing pages of a range.
pub fn register_arg(start: u64, len: u64) -> [u64; 4] {
    [start, len, 1, 0]
}

/// A userfaultfd of some task.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Duplicates the descriptor `fd` of a task.
    ///
    /// # Errors
    /// As man 2 pidfd_getfd.
    pub fn of_task(pid: Pid, fd: i32) -> Result<Uffd> {
        pidfd::getfd(pidfd::open(pid)?, fd).map(Uffd)
    }

    /// Takes a descriptor for what it is.
    pub fn from_fd(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }

    /// A second descriptor of the same userfaultfd.
    ///
    /// # Errors
    /// EMFILE.
    pub fn try_clone(&self) -> Result<Uffd> {
        Ok(Uffd(self.0.try_clone()?))
    }

    /// Lends the descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Makes a new userfaultfd one that tracks writes without holding anybody up.
    ///
    /// # Errors
    /// EINVAL before Linux 6.7, and for one that has been made something already.
    pub fn begin_tracking(&self) -> Result<()> {
        ioctl(&self.0, API, &mut [0xaa, TRACKING, 0])
    }

    /// Tracks writes to a range of mappings. What was written is told by [`crate::pagemap`], which also
    /// forgets it.
    ///
    /// # Errors
    /// EINVAL for mappings that can't be tracked, EBUSY for those of another userfaultfd, ENOMEM when the
    /// process has other memory now.
    pub fn track(&self, start: u64, len: u64) -> Result<()> {
        const WRITES: u64 = 2;
        ioctl(&self.0, REGISTER, &mut [start, len, WRITES, 0])
    }

    /// Whether there still is the memory that it was made for: its process lives and runs the same program.
    pub fn has_memory(&self) -> bool {
        // Nothing is mapped there, which is noticed only where there is memory at all.
        let answer = ioctl(&self.0, WRITEPROTECT, &mut [0x1000, 0x1000, 0]);
        answer != Err(Errno::ESRCH)
    }

    /// Makes the pages at `address` of the userfaultfd's task out of `len` bytes at `offset` of the window.
    ///
    /// # Errors
    /// EEXIST where there is a page, ENOENT where no registered mapping is, ENOMEM, ESRCH.
    ///
    /// # Panics
    /// If the bytes lie outside of the window.
    pub fn copy(&self, window: &Window, offset: usize, len: usize, address: u64) -> Result<()> {
        /// Nobody waits for these pages.
        const DONTWAKE: u64 = 1;
        let number = |value: usize| u64::try_from(value).expect("lengths fit 64 bits");
        let (source, len) = (window.address_of(offset, len), number(len));
        let mut done = 0;
        while done < len {
            let mut arg = [address + done, source + done, len - done, DONTWAKE, 0];
            let result = ioctl(&self.0, COPY, &mut arg);
            // Negative where nothing was copied, and then `result` says why.
            done += u64::try_from(arg[4].cast_signed()).unwrap_or(0);
            match result {
                Ok(()) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A file on a tmpfs of which pages are made together with their contents, by several threads at a time.
///
/// A write holds the lock of the file while it makes pages, which is most of its time; UFFDIO_COPY into a
/// mapping makes them without. Only a tmpfs lets itself be filled like this.
#[derive(Debug)]
pub struct FilePages {
    mapping: Window,
    uffd: Uffd,
}

// SAFETY: the mapping's memory is touched by the kernel alone, which orders what several threads ask for.
unsafe impl Sync for FilePages {}

impl FilePages {
    /// Gives `file`, which is open for reading and writing, `len` bytes of nothing and gets ready to fill
    /// them.
    ///
    /// # Errors
    /// EINVAL for a file elsewhere; EPERM, ENOSYS without userfaultfd; ENOMEM. The file may have got its
    /// length.
    pub fn new(file: &File, len: usize) -> Result<FilePages> {
        let number = |value: usize| u64::try_from(value).expect("lengths fit 64 bits");
        file.set_len(number(len))?;
        let mapping = Window::of_file(file, 0, len)?;
        let uffd = open()?;
        ioctl(&uffd, API, &mut API_ARG.clone())?;
        let whole = number(len.next_multiple_of(4096));
        ioctl(&uffd, REGISTER, &mut register_arg(mapping.address(), whole))?;
        Ok(FilePages {
            mapping,
            uffd: Uffd(uffd),
        })
    }

    /// Makes the pages at `offset` of the file out of the first `len` bytes of the window; whole pages.
    ///
    /// # Errors
    /// As of [`Uffd::copy`]; ENOMEM also for a full file system. Some of the pages may be there then.
    ///
    /// # Panics
    /// If the bytes lie outside of the window or the file.
    pub fn put(&self, window: &Window, len: usize, offset: usize) -> Result<()> {
        let to = self.mapping.address_of(offset, len);
        self.uffd.copy(window, 0, len, to)
    }

    /// Takes pages out of the memory of this process; they stay in the file.
    ///
    /// # Panics
    /// If they lie outside of the file.
    pub fn leave(&self, offset: usize, len: usize) {
        self.mapping.discard(offset, len);
    }
}

/// Tries whether pages can be copied into place.
///
/// # Errors
/// EPERM without the right to use userfaultfd, ENOSYS on kernels without it.
pub fn probe_copy() -> Result<()> {
    let from = Window::anonymous(4096)?;
    let to = Window::anonymous(4096)?;
    from.fill(0, b"copied");
    let uffd = open()?;
    ioctl(&uffd, API, &mut API_ARG.clone())?;
    ioctl(&uffd, REGISTER, &mut register_arg(to.address(), 4096))?;
    Uffd(uffd).copy(&from, 0, 4096, to.address())?;
    let mut seen = [0u8; 6];
    to.copy_out(0, &mut seen);
    match &seen == b"copied" {
        true => Ok(()),
        false => Err(Errno::EIO),
    }
}

fn ioctl(uffd: &OwnedFd, request: u64, arg: &mut [u64]) -> Result<()> {
    // SAFETY: every request reads and writes no more than the words of its own structure, and copying
    // reads from memory that its caller owns.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), request, arg.as_mut_ptr()) };
    Errno::check(i64::from(result)).map(drop)
}

fn open() -> Result<OwnedFd> {
    let flags = i64::from(libc::O_CLOEXEC) | i64::try_from(USER_MODE_ONLY).expect("one");
    // SAFETY: the call takes flags only.
    let fd = Errno::check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    let fd = i32::try_from(fd).expect("descriptors fit i32");
    // SAFETY: the call just returned this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_a_page_where_the_kernel_can() {
        match probe_copy() {
            Ok(()) => {}
            Err(error @ (Errno::EPERM | Errno::ENOSYS | Errno::EINVAL)) => {
                eprintln!("skipped: userfaultfd cannot copy pages here: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_file_on_a_tmpfs_is_filled_without_being_written_to() {
        use std::os::unix::fs::FileExt;
        let file = crate::memfd::create(c"filled", 1).expect("memfd");
        let pages = match FilePages::new(&file, 4 * 4096) {
            Ok(pages) => pages,
            Err(error) => {
                eprintln!("skipped: userfaultfd cannot fill files here: {error}");
                return;
            }
        };
        let from = Window::anonymous(8192).expect("memory");
        from.fill(4096, b"second page");
        pages.put(&from, 8192, 4096).expect("nothing was there");
        pages.leave(4096, 8192);
        assert_eq!(pages.put(&from, 4096, 8192), Err(Errno::EEXIST));
        drop(pages);
        let mut seen = [0; 11];
        file.read_exact_at(&mut seen, 8192).expect("in the file");
        assert_eq!(&seen, b"second page");
        assert_eq!(file.metadata().expect("stat").len(), 4 * 4096);
    }

    #[test]
    fn a_page_that_is_there_is_not_overwritten() {
        let Ok(uffd) = open() else {
            eprintln!("skipped: no userfaultfd here");
            return;
        };
        let from = Window::anonymous(8192).expect("memory");
        let to = Window::anonymous(8192).expect("memory");
        ioctl(&uffd, API, &mut API_ARG.clone()).expect("api");
        ioctl(&uffd, REGISTER, &mut register_arg(to.address(), 8192)).expect("register");
        let uffd = Uffd(uffd);
        uffd.copy(&from, 0, 8192, to.address()).expect("fresh");
        let again = uffd.copy(&from, 4096, 4096, to.address());
        assert_eq!(again, Err(Errno::EEXIST));
    }
}
