//! Descriptors without a file: counters, sets, timers, watches, tasks.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::{c_path, check, check_long, descriptor_by, duration, timespec};

/// Makes an eventfd.
pub fn eventfd(count: u32, flags: i32) -> io::Result<OwnedFd> {
    let arguments = [i64::from(count), i64::from(flags), 0, 0];
    descriptor_by(libc::SYS_eventfd2, arguments)
}

/// Reads the 64-bit number that eventfds and timerfds give.
pub fn read_number(fd: impl AsFd) -> io::Result<u64> {
    let mut bytes = [0; 8];
    super::read(fd, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Makes an epoll set.
pub fn epoll() -> io::Result<OwnedFd> {
    descriptor_by(libc::SYS_epoll_create1, [0; 4])
}

/// Adds (`EPOLL_CTL_ADD`), changes or removes a target.
pub fn epoll_control(
    set: impl AsFd,
    operation: i32,
    target: i32,
    events: u32,
    data: u64,
) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    let set = set.as_fd().as_raw_fd();
    // SAFETY: the event lives through the call.
    check(unsafe { libc::epoll_ctl(set, operation, target, &raw mut event) }).map(drop)
}

/// Takes up to 16 events, waiting up to this time; events and data of each, sorted by data.
pub fn epoll_wait(set: impl AsFd, millis: i32) -> io::Result<Vec<(u32, u64)>> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    let set = set.as_fd().as_raw_fd();
    // SAFETY: there is room for 16 events.
    let count = check(unsafe { libc::epoll_wait(set, events.as_mut_ptr(), 16, millis) })?;
    let count = usize::try_from(count).map_err(io::Error::other)?;
    let mut found: Vec<(u32, u64)> = events[..count].iter().map(|e| (e.events, e.u64)).collect();
    found.sort_by_key(|(_, data)| *data);
    Ok(found)
}

/// Makes a timerfd.
pub fn timerfd(clock: i32, flags: i32) -> io::Result<OwnedFd> {
    let arguments = [i64::from(clock), i64::from(flags), 0, 0];
    descriptor_by(libc::SYS_timerfd_create, arguments)
}

/// Sets a timerfd.
pub fn set_timerfd(
    fd: impl AsFd,
    flags: i32,
    first: Duration,
    interval: Duration,
) -> io::Result<()> {
    let new = libc::itimerspec {
        it_interval: timespec(interval),
        it_value: timespec(first),
    };
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the setting lives through the call; the old one is not wanted.
    check(unsafe { libc::timerfd_settime(fd, flags, &raw const new, std::ptr::null_mut()) })
        .map(drop)
}

/// Reads what is left of a timerfd, and its interval.
pub fn timerfd_left(fd: impl AsFd) -> io::Result<(Duration, Duration)> {
    let zero = timespec(Duration::ZERO);
    let mut now = libc::itimerspec {
        it_interval: zero,
        it_value: zero,
    };
    // SAFETY: the setting lives through the call.
    check(unsafe { libc::timerfd_gettime(fd.as_fd().as_raw_fd(), &raw mut now) })?;
    Ok((duration(now.it_value), duration(now.it_interval)))
}

/// Makes an inotify instance.
pub fn inotify(flags: i32) -> io::Result<OwnedFd> {
    descriptor_by(libc::SYS_inotify_init1, [i64::from(flags), 0, 0, 0])
}

/// Adds a watch and returns its number.
pub fn add_watch(inotify: impl AsFd, path: &Path, mask: u32) -> io::Result<i32> {
    let path = c_path(path)?;
    let fd = inotify.as_fd().as_raw_fd();
    // SAFETY: the path is a C string.
    check(unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) })
}

/// Removes a watch.
pub fn remove_watch(inotify: impl AsFd, watch: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), watch) }).map(drop)
}

/// Reads all events that wait in a non-blocking inotify instance: watch, mask and name of each.
pub fn take_watched(inotify: impl AsFd) -> io::Result<Vec<(i32, u32, String)>> {
    let mut bytes = [0; 4096];
    let count = match super::read(inotify, &mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        count => count?,
    };
    let mut events = Vec::new();
    let mut rest = &bytes[..count];
    // An event is watch, mask, cookie and length of the name, all of 32 bits, then the name.
    while let Some((head, tail)) = rest.split_at_checked(16) {
        let word = |at: usize| {
            let bytes = head[at..at + 4].try_into().unwrap_or_default();
            u32::from_ne_bytes(bytes)
        };
        let len = usize::try_from(word(12)).map_err(io::Error::other)?;
        let (name, after) = tail.split_at(len);
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        events.push((word(0).cast_signed(), word(4), name));
        rest = after;
    }
    Ok(events)
}

/// Makes a fanotify group.
pub fn fanotify(flags: u32, event_flags: u32) -> io::Result<OwnedFd> {
    let arguments = [i64::from(flags), i64::from(event_flags), 0, 0];
    descriptor_by(libc::SYS_fanotify_init, arguments)
}

/// Adds a mark.
pub fn fanotify_mark(group: impl AsFd, flags: u32, mask: u64, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let fd = group.as_fd().as_raw_fd();
    // SAFETY: the path is a C string.
    check(unsafe { libc::fanotify_mark(fd, flags, mask, libc::AT_FDCWD, path.as_ptr()) }).map(drop)
}

/// Opens a pidfd.
pub fn pidfd(pid: i32, flags: i32) -> io::Result<OwnedFd> {
    let arguments = [i64::from(pid), i64::from(flags), 0, 0];
    descriptor_by(libc::SYS_pidfd_open, arguments)
}

/// Sends a signal through a pidfd.
pub fn pidfd_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    let fd = pidfd.as_fd().as_raw_fd();
    let none = std::ptr::null::<u8>();
    // SAFETY: no siginfo is passed.
    check_long(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) }).map(drop)
}
