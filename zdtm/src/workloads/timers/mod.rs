//! Interval timers.

mod interval;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &interval::REAL,
    &interval::VIRTUAL,
    &interval::PROFILING,
    &interval::ALARM,
    &interval::SETTINGS,
    &interval::EXPIRED,
];
