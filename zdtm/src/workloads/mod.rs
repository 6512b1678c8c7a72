//! All workloads, one module per area.

mod files;
mod ia32;
mod memory;
mod odd;
mod refusals;
mod registers;
mod requests;
mod scripts;
mod seccomp;
mod signals;
mod sockets;
mod syscalls;
mod task;
mod timers;
mod tree;

use crate::Workload;

static AREAS: &[&[&Workload]] = &[
    tree::ALL,
    registers::ALL,
    syscalls::ALL,
    signals::ALL,
    timers::ALL,
    task::ALL,
    seccomp::ALL,
    memory::ALL,
    files::ALL,
    requests::ALL,
    sockets::ALL,
    odd::ALL,
    ia32::ALL,
    scripts::ALL,
    refusals::ALL,
];

/// Every workload, area by area.
pub fn all() -> impl Iterator<Item = &'static Workload> {
    AREAS.iter().flat_map(|area| area.iter().copied())
}

/// Finds a workload by its exact name.
pub fn find(name: &str) -> Option<&'static Workload> {
    all().find(|workload| workload.name == name)
}
