//! Sets of descriptors to wait for.
//!
//! Source: man 2 epoll_create, epoll_ctl, epoll_wait; man 2 kcmp, KCMP_EPOLL_TFD (Linux 4.13).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::{Errno, Pid, Result, pidfd};

/// `EPOLL_CTL_ADD`, for records.
pub const CTL_ADD: i32 = libc::EPOLL_CTL_ADD;
/// `EPOLLET`.
pub const EDGE: u32 = 1 << 31;
/// `EPOLLONESHOT`.
pub const ONE_SHOT: u32 = 1 << 30;

/// Makes an empty set, close-on-exec.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn create() -> Result<OwnedFd> {
    // SAFETY: a number only.
    let fd = Errno::check(i64::from(unsafe {
        libc::epoll_create1(libc::EPOLL_CLOEXEC)
    }))?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the call has just returned it to us alone.
    Ok(unsafe { pidfd::own(fd) })
}

/// struct epoll_event as the kernel lays it out, for records.
pub fn event_bytes(events: u32, data: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&events.to_ne_bytes());
    bytes[4..].copy_from_slice(&data.to_ne_bytes());
    bytes
}

/// Lets the set watch descriptor number `target`, under that number.
///
/// # Errors
/// EEXIST, EPERM for files that can't be waited for, ELOOP.
pub fn add(set: impl AsFd, target: i32, events: u32, data: u64) -> Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event outlives the call.
    let result = unsafe {
        libc::epoll_ctl(
            set.as_fd().as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            target,
            &raw mut event,
        )
    };
    Errno::check(i64::from(result)).map(drop)
}

/// Takes what is ready, at most `max` events, without sleeping; returns how many there were.
///
/// # Errors
/// EINVAL for something that is no set.
pub fn take_ready(set: impl AsFd, max: usize) -> Result<usize> {
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; max.max(1)];
    let len = i32::try_from(events.len()).unwrap_or(i32::MAX);
    // SAFETY: the array has room for as many events as said.
    let result = unsafe { libc::epoll_wait(set.as_fd().as_raw_fd(), events.as_mut_ptr(), len, 0) };
    let count = Errno::check(i64::from(result))?;
    usize::try_from(count).map_err(|_| Errno::EINVAL)
}

/// Whether a descriptor can be read, which a set can when one of its targets is ready; takes nothing.
///
/// # Errors
/// EBADF.
pub fn is_readable(fd: impl AsFd) -> Result<bool> {
    Ok(poll(fd, libc::POLLIN)? & libc::POLLIN != 0)
}

/// What [`poll`] tells where an error waits to be told.
pub const POLLERR: i16 = libc::POLLERR;

/// Which of some events (`POLLIN`, `POLLOUT` and so on) a descriptor is ready for now, errors and ends included; takes
/// nothing.
///
/// # Errors
/// EINTR.
pub fn poll(fd: impl AsFd, events: i16) -> Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry lives through the call; no time is spent.
    Errno::check(i64::from(unsafe { libc::poll(&raw mut entry, 1, 0) }))?;
    Ok(entry.revents)
}

/// One of the targets of a set of another task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The set's number.
    pub set: i32,
    /// The number that the target was added under.
    pub number: u32,
    /// Which of the targets under that number, in the order of fdinfo.
    pub nth: u32,
}

/// Tells how descriptor `fd` of task `pid` compares with a target of a set of task `of`, by the order that
/// [`crate::kcmp`] has.
///
/// # Errors
/// ENOENT: no such target. EPERM, ESRCH, EBADF.
pub fn compare_target(pid: Pid, fd: i32, of: Pid, target: Target) -> Result<std::cmp::Ordering> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let slot = [target.set.cast_unsigned(), target.number, target.nth];
    // SAFETY: the kernel reads a slot of three u32, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid.raw(),
            of.raw(),
            KCMP_EPOLL_TFD,
            i64::from(fd),
            slot.as_ptr(),
        )
    };
    Ok(match Errno::check(result)? {
        0 => std::cmp::Ordering::Equal,
        2 => std::cmp::Ordering::Greater,
        _ => std::cmp::Ordering::Less,
    })
}

/// Puts one open file under a second number of this thread's table, closing what is there.
///
/// # Errors
/// EBADF: a number above the limit.
pub fn place(fd: impl AsFd, number: i32) -> Result<()> {
    // SAFETY: the caller runs in a table of its own, or has reserved the number.
    let result = unsafe { libc::dup3(fd.as_fd().as_raw_fd(), number, libc::O_CLOEXEC) };
    Errno::check(i64::from(result)).map(drop)
}

/// Gives the calling thread a copy of the process's descriptor table, to be changed at will.
///
/// # Errors
/// ENOMEM. Source: man 2 unshare, CLONE_FILES.
pub fn own_table() -> Result<()> {
    // SAFETY: a number only.
    let result = unsafe { libc::unshare(libc::CLONE_FILES) };
    Errno::check(i64::from(result)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_found_behind_its_number() {
        let set = create().expect("epoll");
        let (reader, writer) = crate::pipe::create().expect("a pipe");
        let number = reader.as_raw_fd();
        add(&set, number, 1, 7).expect("a pipe can be waited for");
        assert_eq!(is_readable(&set), Ok(false));
        crate::pipe::write(&writer, b"x").expect("room");
        assert_eq!(is_readable(&set), Ok(true));
        assert_eq!(take_ready(&set, 4), Ok(1));
        let me = Pid::this();
        let target = Target {
            set: set.as_raw_fd(),
            number: number.cast_unsigned(),
            nth: 0,
        };
        let same = compare_target(me, number, me, target).expect("kcmp");
        assert_eq!(same, std::cmp::Ordering::Equal);
        let other = compare_target(me, writer.as_raw_fd(), me, target).expect("kcmp");
        assert_ne!(other, std::cmp::Ordering::Equal);
    }
}
