//! Futexes, sleeping, clocks and interval timers.

use std::io;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::{check, check_long};

/// A time as the kernel takes it.
pub fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

/// A time as we take it.
pub fn duration(time: libc::timespec) -> Duration {
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanos)
}

/// Sleeps while `word` is `value`, at most for `timeout`; shared between processes.
pub fn futex_wait(word: &AtomicU32, value: u32, timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(timespec);
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    let operation = libc::FUTEX_WAIT;
    // SAFETY: word and timeout live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, timeout) };
    check_long(result).map(drop)
}

/// Wakes up to `count` sleepers and returns how many.
pub fn futex_wake(word: &AtomicU32, count: i32) -> io::Result<u64> {
    // SAFETY: the word lives through the call.
    check_long(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) })
}

/// Sleeps by the raw system call and returns its error with the time that was left.
pub fn nanosleep(time: Duration) -> Result<(), (io::Error, Duration)> {
    let (time, mut left) = (timespec(time), timespec(Duration::ZERO));
    // SAFETY: both live through the call.
    let result = unsafe { libc::syscall(libc::SYS_nanosleep, &raw const time, &raw mut left) };
    check_long(result)
        .map(drop)
        .map_err(|error| (error, duration(left)))
}

/// Sleeps by libc's function, and tells whether it came back early; what was left is not asked for.
pub fn sleep_by_libc(time: Duration) -> io::Result<()> {
    let time = timespec(time);
    // SAFETY: the time lives through the call, and the other pointer may be null.
    let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
    check(result).map(drop)
}

/// Sleeps on a clock by the raw system call; the error comes with the time that was left.
pub fn clock_nanosleep(
    clock: i32,
    flags: i32,
    time: Duration,
) -> Result<(), (io::Error, Duration)> {
    let (time, mut left) = (timespec(time), timespec(Duration::ZERO));
    let nr = libc::SYS_clock_nanosleep;
    // SAFETY: both times live through the call.
    let result = unsafe { libc::syscall(nr, clock, flags, &raw const time, &raw mut left) };
    check_long(result)
        .map(drop)
        .map_err(|error| (error, duration(left)))
}

/// Reads a clock.
pub fn clock(clock: i32) -> Duration {
    let mut now = timespec(Duration::ZERO);
    // SAFETY: the time lives through the call.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    duration(now)
}

fn timeval(time: Duration) -> libc::timeval {
    libc::timeval {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_usec: i64::from(time.subsec_micros()),
    }
}

fn from_timeval(time: libc::timeval) -> Duration {
    duration(libc::timespec {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_usec * 1000,
    })
}

/// Sets an interval timer: time to the first tick, and between ticks.
pub fn set_itimer(timer: i32, value: Duration, interval: Duration) -> io::Result<()> {
    let new = libc::itimerval {
        it_interval: timeval(interval),
        it_value: timeval(value),
    };
    let none = std::ptr::null::<u8>();
    // SAFETY: the setting lives through the call.
    check_long(unsafe { libc::syscall(libc::SYS_setitimer, timer, &raw const new, none) }).map(drop)
}

/// Reads an interval timer: time to the next tick, and between ticks.
pub fn itimer(timer: i32) -> io::Result<(Duration, Duration)> {
    // SAFETY: an all-zero itimerval is a valid one.
    let mut now: libc::itimerval = unsafe { std::mem::zeroed() };
    // SAFETY: the setting lives through the call.
    check_long(unsafe { libc::syscall(libc::SYS_getitimer, timer, &raw mut now) })?;
    Ok((from_timeval(now.it_value), from_timeval(now.it_interval)))
}

/// Reads a clock by the system call, never by the vdso.
pub fn clock_by_call(clock: i32) -> io::Result<Duration> {
    let mut now = timespec(Duration::ZERO);
    let nr = libc::SYS_clock_gettime;
    // SAFETY: the time lives through the call.
    check_long(unsafe { libc::syscall(nr, clock, &raw mut now) })?;
    Ok(duration(now))
}
