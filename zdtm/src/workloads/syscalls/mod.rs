//! Calls that sleep in the kernel when the checkpoint comes, and must finish as if nothing had been.
//!
//! The kernel knows two kinds. Calls that restart from their arguments (read, wait4, futex without a
//! time, pause) must not show that anything happened. Calls that restart from kernel state (nanosleep,
//! poll) may come back with EINTR in a restored task, since that state is nobody's to give back, but
//! with the remaining time right.

mod blocked;
mod restarted;
mod rests;
mod sleep;
mod wakeups;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &blocked::READ,
    &blocked::WRITE,
    &blocked::WAIT4,
    &blocked::FUTEX,
    &blocked::FUTEX_TIMED,
    &blocked::POLL,
    &blocked::PPOLL,
    &blocked::SELECT,
    &blocked::OPEN,
    &wakeups::SIGSUSPEND,
    &wakeups::SIGTIMEDWAIT,
    &sleep::NANOSLEEP,
    &sleep::CLOCK_NANOSLEEP,
    &sleep::ABSOLUTE,
    &sleep::REPEATED,
    &sleep::TIMEOUTS,
    &restarted::WAITS,
    &rests::SLEEP,
    &rests::POLL,
    &rests::FUTEX,
    &rests::READY,
    &rests::STOPPED,
];
