//! What a task is beyond its memory and files: names, places, and what libc registered for it.

mod brk;
mod creds;
mod futexes;
mod libc_state;
mod low_limits;
mod modes;
mod names;
mod places;
mod rseq;
mod scheduling;
mod semaphores;

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
    &rseq::LARGE,
    &rseq::HUGE,
    &futexes::PLAIN,
    &futexes::PRIORITY,
    &futexes::ROBUST,
    &futexes::ROBUST_PRIORITY,
    &futexes::ROBUST_WAITED,
    &futexes::ROBUST_KILLED,
    &futexes::SEVERAL,
    &creds::IDS,
    &creds::CAPABILITIES,
    &creds::THREADS,
    &creds::DUMPABLE,
    &creds::KEYS,
    &scheduling::FAIR,
    &scheduling::REAL_TIME,
    &scheduling::LIMITS,
    &scheduling::FULL,
    &scheduling::LOCKED,
    &low_limits::BELOW_USE,
    &low_limits::NO_ROOM,
    &semaphores::UNDO,
    &semaphores::OF_THREAD,
    &semaphores::SHARED,
    &semaphores::CUT_OFF,
    &modes::SWITCHES,
    &modes::NO_WRITE_EXEC,
    &modes::NO_TSC,
    &modes::NO_CPUID,
    &modes::DISPATCH,
    &modes::DISPATCH_RANGE,
];
