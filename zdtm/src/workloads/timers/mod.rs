//! Interval timers and POSIX timers.

mod interval;
mod posix;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &interval::REAL,
    &interval::VIRTUAL,
    &interval::PROFILING,
    &interval::ALARM,
    &interval::SETTINGS,
    &interval::EXPIRED,
    &posix::SETTINGS,
    &posix::TICKS,
    &posix::OVERRUN,
    &posix::PENDING,
    &posix::FOREIGN_CLOCK,
];
