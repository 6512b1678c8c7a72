//! Descriptors with their exact flags.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{check, check_long};

/// A path as the kernel takes it.
pub fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn own(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: a call has just returned this descriptor to us alone, or -1.
    check(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a file with exactly these flags; a new one gets mode 0600.
pub fn open(path: impl AsRef<Path>, flags: i32) -> io::Result<OwnedFd> {
    let path = c_path(path.as_ref())?;
    // SAFETY: the path is a C string.
    own(unsafe { libc::open(path.as_ptr(), flags, 0o600) })
}

/// Makes a pipe: read end, write end.
pub fn pipe(flags: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), flags) })?;
    Ok((own(ends[0])?, own(ends[1])?))
}

/// Makes a named fifo.
pub fn mkfifo(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path is a C string.
    check(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }).map(drop)
}

/// Duplicates a descriptor; both share one open file.
pub fn dup(fd: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    own(unsafe { libc::dup(fd.as_fd().as_raw_fd()) })
}

/// Duplicates a descriptor to an exact number, closing what was there.
pub fn dup_to(fd: impl AsFd, number: RawFd, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: the workload owns the number it asks for.
    own(unsafe { libc::dup3(fd.as_fd().as_raw_fd(), number, flags) })
}

/// Calls `fcntl` with a number.
pub fn fcntl(fd: impl AsFd, command: i32, argument: i64) -> io::Result<i32> {
    // SAFETY: only used for commands that take numbers.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, argument) })
}

/// Calls `fcntl` with a range lock; returns what the kernel made of it.
pub fn lock_range(
    fd: impl AsFd,
    command: i32,
    kind: i16,
    start: i64,
    len: i64,
) -> io::Result<libc::flock> {
    let mut range = libc::flock {
        l_type: kind,
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the range lives through the call.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, &raw mut range) })?;
    Ok(range)
}

/// Locks, or unlocks, a whole file.
pub fn flock(fd: impl AsFd, operation: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::flock(fd.as_fd().as_raw_fd(), operation) }).map(drop)
}

/// Reads who owns a descriptor's signals: kind (`F_OWNER_*`) and id.
pub fn owner(fd: impl AsFd) -> io::Result<(i32, i32)> {
    let mut owner = [0i32; 2];
    const F_GETOWN_EX: i32 = 16;
    // SAFETY: two ints are the kernel's struct f_owner_ex.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) })?;
    Ok((owner[0], owner[1]))
}

/// Sets who owns a descriptor's signals: kind (`F_OWNER_*`) and id.
pub fn set_owner(fd: impl AsFd, kind: i32, id: i32) -> io::Result<()> {
    const F_SETOWN_EX: i32 = 15;
    let owner = [kind, id];
    // SAFETY: two ints are the kernel's struct f_owner_ex.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) }).map(drop)
}

/// Reads into a buffer.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is as long as said.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes a buffer.
pub fn write(fd: impl AsFd, buffer: &[u8]) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is as long as said.
    let count = unsafe { libc::write(fd, buffer.as_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes at a place, without moving.
pub fn write_at(fd: impl AsFd, buffer: &[u8], place: u64) -> io::Result<usize> {
    let place = i64::try_from(place).map_err(io::Error::other)?;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is as long as said.
    let count = unsafe { libc::pwrite(fd, buffer.as_ptr().cast(), buffer.len(), place) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Makes the node of a character device.
pub fn make_device(path: &Path, device: u64) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path is a C string.
    check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, device) }).map(drop)
}

/// Reads exactly `len` bytes.
pub fn read_exact(fd: impl AsFd, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match read(fd.as_fd(), &mut bytes[done..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(bytes)
}

/// Moves the position of a descriptor and returns the new one.
pub fn seek(fd: impl AsFd, offset: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: numbers only.
    check_long(unsafe { libc::lseek(fd.as_fd().as_raw_fd(), offset, whence) })
}

/// Waits until something may be done with a descriptor; returns the events, 0 after the time.
pub fn poll(fd: impl AsFd, events: i16, millis: i32) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry lives through the call.
    check(unsafe { libc::poll(&raw mut entry, 1, millis) })?;
    Ok(entry.revents)
}

/// As [`poll`], by the instruction itself: returns the kernel's result, and what the register of the third
/// argument holds afterwards, which no call changes.
pub fn poll_and_third_argument(fd: impl AsFd, events: i16, millis: i32) -> (i64, i64) {
    let mut entry = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    let (mut result, mut third) = (libc::SYS_poll, i64::from(millis));
    // SAFETY: one entry lives through the call, which changes no other memory.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") &raw mut entry,
            in("rsi") 1,
            inlateout("rdx") third,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    (result, third)
}

/// Tells whether two descriptors of two processes are one open file.
pub fn same_open_file(pid1: i32, fd1: RawFd, pid2: i32, fd2: RawFd) -> io::Result<bool> {
    const KCMP_FILE: i32 = 0;
    let arguments = [pid1, pid2, KCMP_FILE, fd1, fd2, 0].map(i64::from);
    super::call_plain(libc::SYS_kcmp, arguments).map(|order| order == 0)
}

/// Takes a descriptor by number, for descriptors that stay open to the end.
pub fn borrow(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the workload keeps the number open for as long as it uses it.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Owns a descriptor that a forked child has from its parent, whose value for it is not used there.
pub fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: each process closes its own number once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Lets every descriptor from `first` on be closed by an exec.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    let arguments = [first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC, 0, 0, 0].map(i64::from);
    super::call_plain(libc::SYS_close_range, arguments).map(drop)
}

/// Waits without a time until something may be done with a descriptor, by the raw `ppoll`.
pub fn ppoll(fd: impl AsFd, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    let (no_time, no_mask) = (std::ptr::null::<u8>(), std::ptr::null::<u8>());
    // SAFETY: one entry lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_ppoll, &raw mut entry, 1, no_time, no_mask, 0) };
    check_long(result).map(|_| entry.revents)
}

/// Waits by the raw `select` until a descriptor can be read.
pub fn select_readable(fd: impl AsFd, seconds: i64) -> io::Result<u64> {
    let number = fd.as_fd().as_raw_fd();
    // SAFETY: an all-zero fd_set is an empty one.
    let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
    // SAFETY: the number is an open descriptor, far below 1024.
    unsafe { libc::FD_SET(number, &raw mut set) };
    let mut time = libc::timeval {
        tv_sec: seconds,
        tv_usec: 0,
    };
    let (set, none) = (&raw mut set, std::ptr::null_mut::<libc::fd_set>());
    // SAFETY: set and time live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_select, number + 1, set, none, none, &raw mut time) };
    check_long(result)
}

/// Reads names of a directory from its position on, as many as fit into `len` bytes of entries.
pub fn read_names(fd: impl AsFd, len: usize) -> io::Result<Vec<String>> {
    let mut entries = vec![0u8; len];
    let number = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is as long as said.
    let count = check_long(unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            number,
            entries.as_mut_ptr(),
            entries.len(),
        )
    })?;
    entries.truncate(usize::try_from(count).map_err(io::Error::other)?);
    let mut names = Vec::new();
    // An entry is inode (8), offset (8), length (2), type (1), name ended by a zero.
    while let Some(length) = entries.get(16..18) {
        let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
        let name = entries[19..length]
            .split(|&byte| byte == 0)
            .next()
            .unwrap_or_default();
        names.push(String::from_utf8_lossy(name).into_owned());
        entries.drain(..length);
    }
    Ok(names)
}

/// Closes a descriptor by number.
pub fn close(number: RawFd) -> io::Result<()> {
    // SAFETY: used for numbers that no value of ours owns.
    check(unsafe { libc::close(number) }).map(drop)
}

/// Runs a program in place of this one.
pub fn exec(program: &Path, arguments: &[&str]) -> io::Error {
    use std::os::unix::process::CommandExt;
    std::process::Command::new(program).args(arguments).exec()
}

/// Tells whether two processes have one descriptor table.
pub fn same_table(pid1: i32, pid2: i32) -> io::Result<bool> {
    const KCMP_FILES: i32 = 2;
    let arguments = [pid1, pid2, KCMP_FILES, 0, 0, 0].map(i64::from);
    super::call_plain(libc::SYS_kcmp, arguments).map(|order| order == 0)
}
