//! The few kernel calls that workloads and floors make, without the wrappers that are measured.
//!
//! A floor is what the bare call costs, and a workload must hold exactly the objects that its
//! case names; both are easiest to trust when nothing stands between them and libc.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use libc::{c_int, c_void, pid_t};

/// How a finished child ended and what it used.
pub struct Ended {
    /// Raw wait status.
    pub status: c_int,
    /// Largest resident size that the child ever had, in KiB.
    pub peak_rss_kib: u64,
}

fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}

/// Makes orphans below this process its children, so that their pids are free once it reaps them.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes one integer and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Waits for one child and returns its status and peak memory.
pub fn wait_for(pid: pid_t) -> io::Result<Ended> {
    let mut status = 0;
    // SAFETY: rusage is plain integers, for which all zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right type.
    check(unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) })?;
    Ok(Ended {
        status,
        peak_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    })
}

/// Reaps every child that has ended. Only called while no engine command is running, or its
/// status would be lost.
pub fn reap_ended() {
    // SAFETY: a null status pointer asks for none.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// Sends a signal to one process.
pub fn kill(pid: pid_t, signal: c_int) -> io::Result<()> {
    // SAFETY: kill touches no memory of ours.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Starts a session of its own, so that a dump needs no terminal option.
pub fn new_session() -> io::Result<()> {
    // SAFETY: setsid touches no memory of ours.
    check(unsafe { libc::setsid() }).map(drop)
}

/// Closes what whoever started the bench left open in it, which is no part of any case.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: nothing in this process owns a descriptor above the standard three yet.
    check(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) }).map(drop)
}

/// Raises the soft limit of descriptors to the hard one.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live local of the right type.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above, only read by the kernel.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).map(drop)
}

/// The hard limit of descriptors.
pub fn descriptor_limit() -> io::Result<usize> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live local of the right type.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    Ok(usize::try_from(limit.rlim_max).unwrap_or(usize::MAX))
}

/// Makes that many mappings of a page each, one in sixteen of them written to, which stay until the process ends.
pub fn many_mappings(count: usize) -> io::Result<()> {
    const PAGE_LEN: usize = 4096;
    let words = fresh_memory(count * PAGE_LEN)?;
    let pages = words.chunks_exact_mut(PAGE_LEN / 8).enumerate();
    for (nth, page) in pages {
        if nth % 16 == 0 {
            page[0] = 1;
        }
        if nth % 2 == 1 {
            // Neighbours with other rights are mappings of their own.
            // SAFETY: the page stays mapped and is not written to any more.
            check(unsafe { libc::mprotect(page.as_mut_ptr().cast(), PAGE_LEN, libc::PROT_READ) })?;
        }
    }
    Ok(())
}

/// Sleeps until a signal comes, for ever.
pub fn pause_for_ever() -> ! {
    loop {
        // SAFETY: pause touches no memory.
        unsafe { libc::pause() };
    }
}

/// Forks; `None` in the child. The caller has one thread.
pub fn fork() -> io::Result<Option<pid_t>> {
    // SAFETY: every caller is a workload or floor with a single thread, so the child owns all locks.
    let pid = check(unsafe { libc::fork() })?;
    Ok((pid != 0).then_some(pid))
}

/// Makes a pipe (read end, write end).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two numbers that pipe writes.
    check(unsafe { libc::pipe(ends.as_mut_ptr()) })?;
    // SAFETY: the kernel has just given us this number and nobody else owns it.
    let read = unsafe { OwnedFd::from_raw_fd(ends[0]) };
    // SAFETY: as above.
    let write = unsafe { OwnedFd::from_raw_fd(ends[1]) };
    Ok((read, write))
}

/// Blocks SIGUSR1, to be taken by [`wait_for_request`].
pub fn block_requests() -> io::Result<()> {
    let set = request_set();
    // SAFETY: the set is initialised and the old mask is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })
        .map(drop)
}

/// Waits for a SIGUSR1 that was blocked by [`block_requests`].
pub fn wait_for_request() -> io::Result<()> {
    let set = request_set();
    let mut signal = 0;
    // SAFETY: both pointers are to live locals of the right type.
    let errno = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
    if errno == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(errno))
    }
}

fn request_set() -> libc::sigset_t {
    // SAFETY: sigset_t is an array of integers, for which all zero is a value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a live local.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: as above, and SIGUSR1 is a valid signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGUSR1) };
    set
}

fn map(len: usize, flags: c_int, fd: c_int) -> io::Result<*mut u64> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
    if address == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(address.cast())
    }
}

/// Maps fresh private anonymous memory that stays until the process ends.
pub fn fresh_memory(len_bytes: usize) -> io::Result<&'static mut [u64]> {
    let address = map(len_bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    // SAFETY: the mapping is new, page aligned, zeroed, that long, and never unmapped.
    Ok(unsafe { std::slice::from_raw_parts_mut(address, len_bytes / 8) })
}

/// Maps the first word of a file, shared, as an atomic that stays until the process ends.
pub fn shared_word(file: &File) -> io::Result<&'static std::sync::atomic::AtomicU64> {
    let address = map(4096, libc::MAP_SHARED, file.as_raw_fd())?;
    // SAFETY: page aligned, mapped for ever, and only ever accessed as an atomic.
    Ok(unsafe { std::sync::atomic::AtomicU64::from_ptr(address) })
}

/// Reads another process's memory into `buffer`, as far as one call gets.
pub fn read_remote(pid: pid_t, address: usize, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let remote = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(address),
        iov_len: buffer.len(),
    };
    // SAFETY: the local vector is exactly `buffer`; the remote address is only read by the kernel.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    check_len(got)
}

/// Reads from a file position into words, as far as one `preadv` gets; returns bytes.
pub fn read_at(file: &File, words: &mut [u64], offset_bytes: usize) -> io::Result<usize> {
    let vector = libc::iovec {
        iov_base: words.as_mut_ptr().cast::<c_void>(),
        iov_len: size_of_val(words),
    };
    let offset = i64::try_from(offset_bytes).map_err(io::Error::other)?;
    // SAFETY: the vector covers exactly `words`.
    check_len(unsafe { libc::preadv(file.as_raw_fd(), &raw const vector, 1, offset) })
}

/// Gives this process a mount namespace of its own, from which nothing spreads back.
pub fn private_mounts() -> io::Result<()> {
    // SAFETY: unshare touches no memory of ours.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount(None, Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE)
}

/// Mounts a tmpfs.
pub fn mount_tmpfs(target: &Path) -> io::Result<()> {
    mount(Some(Path::new("tmpfs")), target, Some(c"tmpfs"), 0)
}

/// Makes `target` show what `source` holds.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    mount(Some(source), target, None, libc::MS_BIND)
}

/// Takes the newest mount off `target`.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: the string lives over the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

fn mount(
    source: Option<&Path>,
    target: &Path,
    kind: Option<&std::ffi::CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let source = source.map(c_path).transpose()?;
    let source = source.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
    let kind = kind.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
    let target = c_path(target)?;
    // SAFETY: every pointer is null or a string that lives over the call.
    check(unsafe { libc::mount(source, target.as_ptr(), kind, flags, std::ptr::null()) }).map(drop)
}
