//! POSIX timers by the raw system calls, ids and all.

use std::io;
use std::time::Duration;

use super::{check_long, duration, timespec};

/// `SIGEV_*` as the kernel numbers them.
pub const SIGEV_SIGNAL: i32 = 0;
/// See [`SIGEV_SIGNAL`].
pub const SIGEV_NONE: i32 = 1;
/// See [`SIGEV_SIGNAL`].
pub const SIGEV_THREAD_ID: i32 = 4;

/// What a timer does when it expires.
#[derive(Debug, Clone, Copy)]
pub struct Notify {
    /// `SIGEV_*`.
    pub how: i32,
    /// Signal.
    pub signal: i32,
    /// Value that comes with it.
    pub value: u64,
    /// Thread that gets it, with [`SIGEV_THREAD_ID`].
    pub tid: i32,
}

/// Makes a timer and returns its id.
pub fn make_timer(clock: i32, notify: Notify) -> io::Result<i32> {
    let mut event = [0u8; 64];
    event[..8].copy_from_slice(&notify.value.to_le_bytes());
    event[8..12].copy_from_slice(&notify.signal.to_le_bytes());
    event[12..16].copy_from_slice(&notify.how.to_le_bytes());
    event[16..20].copy_from_slice(&notify.tid.to_le_bytes());
    let mut id = 0i32;
    let nr = libc::SYS_timer_create;
    // SAFETY: the event has the kernel's size and lives through the call, as does the id.
    check_long(unsafe { libc::syscall(nr, clock, event.as_ptr(), &raw mut id) }).map(|_| id)
}

/// Deletes a timer.
pub fn delete_timer(id: i32) -> io::Result<()> {
    super::call_plain(libc::SYS_timer_delete, [i64::from(id), 0, 0, 0, 0, 0]).map(drop)
}

/// Sets a timer: time to the first expiry (`TIMER_ABSTIME`: its date), and between expiries.
pub fn set_timer(id: i32, flags: i32, value: Duration, interval: Duration) -> io::Result<()> {
    let new = libc::itimerspec {
        it_interval: timespec(interval),
        it_value: timespec(value),
    };
    let nr = libc::SYS_timer_settime;
    let none = std::ptr::null::<u8>();
    // SAFETY: the setting lives through the call.
    check_long(unsafe { libc::syscall(nr, id, flags, &raw const new, none) }).map(drop)
}

/// Reads a timer: time to the next expiry, and between expiries.
pub fn timer(id: i32) -> io::Result<(Duration, Duration)> {
    let zero = timespec(Duration::ZERO);
    let mut now = libc::itimerspec {
        it_interval: zero,
        it_value: zero,
    };
    // SAFETY: the setting lives through the call.
    check_long(unsafe { libc::syscall(libc::SYS_timer_gettime, id, &raw mut now) })?;
    Ok((duration(now.it_value), duration(now.it_interval)))
}

/// Reads how often a timer expired before its last signal was taken.
pub fn overruns(id: i32) -> io::Result<u64> {
    super::call_plain(libc::SYS_timer_getoverrun, [i64::from(id), 0, 0, 0, 0, 0])
}
