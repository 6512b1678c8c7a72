//! The kernel calls that the device and its server need and that std and rustix lack.
//!
//! Everything unsafe of the crate stands here; each function is one call.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

const FIFREEZE: libc::Ioctl = 0xC004_5877;
const FITHAW: libc::Ioctl = 0xC004_5878;
const FITRIM: libc::Ioctl = 0xC018_5879;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKFLSBUF: libc::Ioctl = 0x1261;
const PR_SET_IO_FLUSHER: i32 = 57;

/// Stops all changes to the file system that a directory belongs to and writes out what is pending.
///
/// # Errors
/// `EBUSY` where it is frozen already, `EOPNOTSUPP` where it can't be.
///
/// Source: linux fs/ioctl.c, FIFREEZE
pub fn freeze_fs(dir: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: FIFREEZE takes no argument and touches no memory of ours.
    check(unsafe { libc::ioctl(dir.as_raw_fd(), FIFREEZE, 0) })
}

/// Lets a frozen file system go on.
///
/// # Errors
/// `EINVAL` where it is not frozen.
///
/// Source: linux fs/ioctl.c, FITHAW
pub fn thaw_fs(dir: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: FITHAW takes no argument and touches no memory of ours.
    check(unsafe { libc::ioctl(dir.as_raw_fd(), FITHAW, 0) })
}

/// Discards what a mounted file system does not use of a range; returns the bytes discarded.
///
/// # Errors
/// `EOPNOTSUPP` where the device below knows no discard.
///
/// Source: linux fs/ioctl.c, FITRIM
pub fn trim_fs(dir: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> io::Result<u64> {
    // struct fstrim_range: start, len, minlen; the kernel puts what it trimmed into len.
    let mut range = [offset, len_bytes, 0];
    // SAFETY: the kernel reads and writes the 24 bytes of `range`, which outlives the call.
    check(unsafe { libc::ioctl(dir.as_raw_fd(), FITRIM, range.as_mut_ptr()) })?;
    Ok(range[1])
}

/// Size of a block device in bytes.
///
/// # Errors
/// The file is no block device.
///
/// Source: linux block/ioctl.c, BLKGETSIZE64
pub fn block_device_size(device: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the kernel writes the 8 bytes of `size`, which outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Writes out and drops what the kernel caches of a block device.
///
/// # Errors
/// The file is no block device.
///
/// Source: linux block/ioctl.c, BLKFLSBUF
pub fn drop_block_cache(device: &File) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument and touches no memory of ours.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF, 0) })
}

/// Runs an ioctl whose argument is a plain number or a descriptor.
pub(crate) fn ioctl_number(fd: BorrowedFd<'_>, request: libc::Ioctl, arg: i64) -> io::Result<i32> {
    // SAFETY: the callers pass requests of the loop and nbd drivers that take their argument by
    // value, so no memory of ours is touched.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, arg) };
    check(answer)?;
    Ok(answer)
}

/// Runs an ioctl that reads or writes one plain structure.
///
/// # Safety
/// `T` is the structure that the request's definition names: same size, any bytes valid.
pub(crate) unsafe fn ioctl_struct<T>(
    fd: BorrowedFd<'_>,
    request: libc::Ioctl,
    arg: &mut T,
) -> io::Result<()> {
    // SAFETY: the caller vouches for the type; the reference keeps the memory valid during the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(arg)) })
}

/// Closes every descriptor from `first` on.
///
/// Source: man 2 close_range (linux 5.9)
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called at the start of a process of its own, before anything in it owns a descriptor
    // from `first` on.
    check(unsafe { libc::close_range(first, u32::MAX, 0) })
}

/// Tells memory reclaim that this process serves a disk, so that it never waits for itself.
///
/// Needs CAP_SYS_RESOURCE; without it the call changes nothing.
///
/// Source: man 2 PR_SET_IO_FLUSHER (linux 5.6)
pub(crate) fn become_io_flusher() {
    // SAFETY: PR_SET_IO_FLUSHER takes plain numbers only.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}

/// Goes on in a child process with a session of its own; true in the parent, which should end.
///
/// To be called by the only thread of a process.
///
/// Source: man 2 fork, man 2 setsid
pub(crate) fn fork_off() -> io::Result<bool> {
    // SAFETY: there is no other thread that could hold a lock in the child, and both sides go on
    // with whole copies of everything.
    let pid = unsafe { libc::fork() };
    check(pid)?;
    if pid == 0 {
        rustix::process::setsid()?;
    }
    Ok(pid != 0)
}

/// Blocks SIGTERM, SIGINT and SIGHUP in this thread and all that it will start; a signalfd takes them.
///
/// Source: man 2 signalfd
pub(crate) fn signals_as_fd() -> io::Result<File> {
    use std::os::fd::FromRawFd;
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set that the following calls read.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC)
    };
    check(fd)?;
    // SAFETY: signalfd returned a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn check(answer: i32) -> io::Result<()> {
    match answer {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Page-aligned memory, present from the start.
///
/// A request that the kernel copies into or out of absent pages fails when the process is killed in
/// the middle; with pages that are there the copy always completes.
#[derive(Debug)]
pub struct PageBuffer {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the buffer owns its mapping alone, like a Vec does.
unsafe impl Send for PageBuffer {}
// SAFETY: shared references give out shared slices only.
unsafe impl Sync for PageBuffer {}

impl PageBuffer {
    /// Maps `len_bytes` of zeroes, rounded up to whole pages.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(len_bytes: usize) -> io::Result<PageBuffer> {
        PageBuffer::map(len_bytes, MapFlags::POPULATE)
    }

    /// The same, whose pages come with their first use or with [`back`](PageBuffer::back).
    ///
    /// # Errors
    /// There is not enough memory.
    pub(crate) fn unbacked(len_bytes: usize) -> io::Result<PageBuffer> {
        PageBuffer::map(len_bytes, MapFlags::empty())
    }

    /// Gets all pages now: a block server must not wait for memory that is freed by writing to its disk.
    pub(crate) fn back(&mut self) {
        let advice = Advice::LinuxPopulateWrite;
        // SAFETY: the mapping is ours and of this length; the call changes none of its bytes. A kernel
        // before 5.14 has no such call; then the pages come one by one.
        let _ = unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.len_bytes, advice) };
    }

    fn map(len_bytes: usize, populate: MapFlags) -> io::Result<PageBuffer> {
        let len_bytes = len_bytes.next_multiple_of(4096).max(4096);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | populate;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice disturbs nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len_bytes, protection, flags)
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(PageBuffer { start, len_bytes })
    }
}

impl std::ops::Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has len_bytes readable bytes and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len_bytes) }
    }
}

impl std::ops::DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref, and the exclusive borrow of self is the only way to the bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len_bytes) }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and no slice of it outlives self.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// Lets this thread alone see the mounts of another namespace. It must be one that was started for
/// this and ends after it.
///
/// # Errors
/// Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT.
///
/// Source: man 2 setns, CLONE_NEWNS: refused where root and working directory are shared by threads
pub(crate) fn enter_mount_namespace(namespace: &File) -> io::Result<()> {
    // SAFETY: unshare with CLONE_FS takes a flag only; it gives this thread its own working directory.
    check(unsafe { libc::unshare(libc::CLONE_FS) })?;
    // SAFETY: setns takes a descriptor and a flag; the file keeps the descriptor open.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) })
}

/// Lets a descriptor survive the next exec.
pub(crate) fn keep_over_exec(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?)
}

/// Lets a descriptor end at the next exec.
pub(crate) fn close_on_exec(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?)
}

/// A second descriptor of what the caller of this program has open under a number.
///
/// # Errors
/// The number is not open.
pub fn duplicate(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor or fails; it touches no memory.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    check(copy)?;
    // SAFETY: fcntl returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Takes over a descriptor that the parent left open under this number.
///
/// # Errors
/// The number is not open.
pub(crate) fn adopt_fd(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: F_GETFD reads the descriptor's flags and touches no memory.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: the number is open, and the parent handed it to this process alone, once, in its
    // configuration; nothing else here owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    close_on_exec(&fd)?;
    Ok(fd)
}
