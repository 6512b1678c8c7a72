//! Clocks.
//!
//! Source: man 2 clock_gettime.

use rustix::time::{ClockId, clock_gettime};

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

fn read(clock: ClockId) -> (u64, u64) {
    let now = clock_gettime(clock);
    (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned())
}
