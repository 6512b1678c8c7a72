//! What a task is beyond its memory and files: names, places, and what libc registered for it.

mod brk;
mod libc_state;
mod names;
mod places;
mod rseq;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &names::COMM,
    &names::ARGUMENTS,
    &names::TITLE,
    &names::AUXV,
    &places::CWD,
    &places::CWD_REMOVED,
    &places::ROOT,
    &places::UMASK,
    &places::EXE,
    &brk::BRK,
    &libc_state::JOIN,
    &libc_state::ROBUST,
    &libc_state::TLS,
    &rseq::GLIBC,
    &rseq::OWN,
];
