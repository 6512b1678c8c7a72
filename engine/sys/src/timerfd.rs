//! Timers as descriptors.
//!
//! Source: man 2 timerfd_create.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::{Errno, Result, pidfd};

/// `TFD_TIMER_ABSTIME`.
pub const ABSOLUTE: u32 = 1;
/// `TFD_TIMER_CANCEL_ON_SET`.
pub const CANCEL_ON_SET: u32 = 2;

/// A time in seconds and nanoseconds.
pub type Time = (i64, i64);

/// Makes a timer that is not set, close-on-exec.
///
/// # Errors
/// EINVAL for an unknown clock; EPERM for the alarm clocks without CAP_WAKE_ALARM.
pub fn create(clock: i32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) };
    let fd = i32::try_from(Errno::check(i64::from(fd))?).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the call has just returned it to us alone.
    Ok(unsafe { pidfd::own(fd) })
}

/// Sets the timer: time to the first expiration (zero stops it), interval, and `TFD_TIMER_*` flags.
///
/// # Errors
/// EINVAL: nanoseconds out of range, unknown flags.
pub fn set(fd: impl AsFd, first: Time, interval: Time, flags: u32) -> Result<()> {
    let spec = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let new = libc::itimerspec {
        it_interval: spec(interval),
        it_value: spec(first),
    };
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the new setting outlives the call; the old one is not asked for.
    let result = unsafe {
        libc::timerfd_settime(
            fd,
            flags.cast_signed(),
            &raw const new,
            std::ptr::null_mut(),
        )
    };
    Errno::check(i64::from(result)).map(drop)
}

/// Asks a timer what is left, which lets a periodic one that has expired go on.
///
/// # Errors
/// EBADF, EINVAL for something else.
pub fn ask(fd: impl AsFd) -> Result<()> {
    // SAFETY: an all-zero itimerspec is a valid one.
    let mut now: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the setting, which outlives the call.
    let result = unsafe { libc::timerfd_gettime(fd.as_fd().as_raw_fd(), &raw mut now) };
    Errno::check(i64::from(result)).map(drop)
}

/// Sets how many expirations wait to be read.
///
/// # Errors
/// EINVAL for none; ENOTTY without CONFIG_CHECKPOINT_RESTORE.
/// Source: linux fs/timerfd.c, TFD_IOC_SET_TICKS (Linux 3.17).
pub fn set_ticks(fd: impl AsFd, ticks: u64) -> Result<()> {
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
    // SAFETY: the kernel reads one u64, which outlives the call.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    Errno::check(i64::from(result)).map(drop)
}

/// The time of a clock by number.
///
/// # Errors
/// EINVAL for an unknown clock.
pub fn now(clock: i32) -> Result<Time> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills one timespec, which outlives the call.
    Errno::check(i64::from(unsafe {
        libc::clock_gettime(clock, &raw mut time)
    }))?;
    Ok((time.tv_sec, time.tv_nsec))
}
