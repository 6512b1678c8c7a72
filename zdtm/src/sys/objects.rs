//! Kernel objects of the kinds that a dump does not take yet, and other obstacles.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::check;

/// Makes a pair of connected unix sockets.
pub fn socket_pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    // SAFETY: the call has just returned both to us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Makes a socket.
pub fn socket(family: i32, kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only; the new descriptor is ours alone.
    unsafe { check(libc::socket(family, kind, 0)).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Makes a descriptor by a call whose arguments are numbers.
pub fn descriptor_by(nr: i64, arguments: [i64; 4]) -> io::Result<OwnedFd> {
    let [a, b, c, d] = arguments;
    let number = super::call_plain(nr, [a, b, c, d, 0, 0])?;
    let number = i32::try_from(number).map_err(io::Error::other)?;
    // SAFETY: the call has just returned the descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A POSIX message queue that has lost its name.
pub fn nameless_queue() -> io::Result<OwnedFd> {
    let name = format!("/firn-{}", std::process::id());
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    let none = std::ptr::null::<libc::mq_attr>();
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    // SAFETY: the name is a string, and no attributes are given.
    let number = check(unsafe { libc::mq_open(name.as_ptr(), flags, 0o600, none) })?;
    // SAFETY: the call has just returned the descriptor to us alone.
    let queue = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: the name is a string.
    check(unsafe { libc::mq_unlink(name.as_ptr()) })?;
    Ok(queue)
}

/// Traces another task without stopping it.
pub fn seize(pid: i32) -> io::Result<()> {
    let arguments = [i64::from(libc::PTRACE_SEIZE), i64::from(pid), 0, 0, 0, 0];
    super::call_plain(libc::SYS_ptrace, arguments).map(drop)
}

/// Hands a traced task its signals, until it has ended.
pub fn let_signals_through(pid: i32) -> io::Result<()> {
    loop {
        let (_, status) = super::wait_status(pid, libc::__WALL)?;
        if !libc::WIFSTOPPED(status) {
            return Ok(());
        }
        let signal = i64::from(libc::WSTOPSIG(status));
        let arguments = [
            i64::from(libc::PTRACE_CONT),
            i64::from(pid),
            0,
            signal,
            0,
            0,
        ];
        super::call_plain(libc::SYS_ptrace, arguments)?;
    }
}

/// Makes a child by vfork that opens a fifo for reading, which lets it wait, and then ends; returns
/// the exit code to end with.
pub fn vfork_reading(path: &CStr) -> i32 {
    vfork_calling(libc::SYS_open, path.as_ptr().expose_provenance())
}

/// Makes a child by vfork that sleeps that long, and then ends; returns the exit code to end with.
pub fn vfork_sleeping(time: Duration) -> i32 {
    let time = super::timespec(time);
    vfork_calling(
        libc::SYS_nanosleep,
        std::ptr::from_ref(&time).expose_provenance(),
    )
}

/// Makes a child by vfork that makes one call with an address and a zero, and then ends with code 0.
fn vfork_calling(number: i64, address: usize) -> i32 {
    let failed: i64;
    // The child runs on this stack, so it must not return from any function: it makes its two calls
    // right here. SAFETY: registers it changes are named, memory is only read.
    unsafe {
        std::arch::asm!(
            "mov eax, 58",              // vfork
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rax, {number}",
            "xor esi, esi",
            "syscall",
            "mov eax, 60",              // exit
            "xor edi, edi",
            "syscall",
            "2:",
            number = in(reg) number,
            in("rdi") address,
            out("rax") failed,
            out("rcx") _,
            out("r11") _,
            out("rsi") _,
        );
    }
    i32::from(failed < 0)
}

/// Tells whether a task sleeps in vfork.
pub fn is_in_vfork(pid: i32) -> io::Result<bool> {
    let vfork = format!("{} ", libc::SYS_vfork);
    Ok(crate::proc::text(pid, "syscall")?.starts_with(&vfork))
}

/// Makes a signalfd for a set of signals.
pub fn signalfd(set: u64) -> io::Result<OwnedFd> {
    // SAFETY: the set lives through the call and has the kernel's size.
    let number = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const set, 8, 0) };
    let number = i32::try_from(super::check_long(number)?).map_err(io::Error::other)?;
    // SAFETY: the call has just returned the descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes a counter of the CPU time of this task, which every kernel has.
pub fn perf_event() -> io::Result<OwnedFd> {
    const SOFTWARE: u32 = 1;
    const SIZE: u32 = 64;
    const USER_ONLY: u64 = 1 << 5;
    let mut event = [0u8; 64];
    event[..4].copy_from_slice(&SOFTWARE.to_le_bytes());
    event[4..8].copy_from_slice(&SIZE.to_le_bytes());
    event[40..48].copy_from_slice(&USER_ONLY.to_le_bytes());
    let nr = libc::SYS_perf_event_open;
    // SAFETY: the event has the size it tells and lives through the call.
    let number = unsafe { libc::syscall(nr, event.as_ptr(), 0, -1, -1, 0) };
    let number = i32::try_from(super::check_long(number)?).map_err(io::Error::other)?;
    // SAFETY: the call has just returned the descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Maps secret memory; its descriptor is closed.
pub fn secret_memory(len: usize) -> io::Result<super::Region> {
    let file = descriptor_by(libc::SYS_memfd_secret, [0; 4])?;
    truncate(&file, len)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    super::Region::file(file.as_fd(), len, prot, libc::MAP_SHARED)
}

fn truncate(file: &OwnedFd, len: usize) -> io::Result<()> {
    let len = i64::try_from(len).map_err(io::Error::other)?;
    // SAFETY: numbers only.
    check(unsafe { libc::ftruncate(file.as_raw_fd(), len) }).map(drop)
}
