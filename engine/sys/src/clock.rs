//! Clocks.
//!
//! Source: man 2 clock_gettime.

use std::time::Duration;

use rustix::time::{ClockId, clock_getres, clock_gettime};

/// Seconds and nanoseconds since an unspecified start, not counting suspend.
pub fn monotonic() -> (u64, u64) {
    read(ClockId::Monotonic)
}

/// Seconds and nanoseconds since boot, suspend included.
pub fn boottime() -> (u64, u64) {
    read(ClockId::Boottime)
}

/// Seconds and nanoseconds since 1970.
pub fn realtime() -> (u64, u64) {
    read(ClockId::Realtime)
}

/// How far apart the readings of the coarse clock are: a tick of the kernel's (Linux jiffies).
pub fn tick() -> Duration {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    let nanoseconds = u32::try_from(tick.tv_nsec).unwrap_or(0);
    Duration::new(tick.tv_sec.cast_unsigned(), nanoseconds)
}

fn read(clock: ClockId) -> (u64, u64) {
    let now = clock_gettime(clock);
    (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned())
}
