//! Programs unlike others: without libc, without their executable, with a dead main thread's habits.

mod executable;
mod no_libc;
mod raw_thread;

pub use no_libc::write_program;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &no_libc::STATIC,
    &executable::DELETED,
    &executable::MEMFD,
    &executable::COPIED,
    &executable::OVERLAY,
    &raw_thread::RAW,
    &raw_thread::NO_STACK,
];
