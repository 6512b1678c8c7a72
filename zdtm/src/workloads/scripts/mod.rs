//! Programs of other languages: interpreters have runtimes, signal handling and memory of their own.
//!
//! A script gets the instance's directory as its argument, makes `ready` there, waits for SIGTERM, and
//! writes `result`.

use crate::Workload;

static BASH: Workload = Workload::script(
    "scripts/bash",
    "a bash loop with a pipeline of children, counting",
    "bash",
    include_str!("count.sh"),
)
.moves(CHANGING);
static PERL: Workload = Workload::script(
    "scripts/perl",
    "perl with an open file, a hash and a forked child on a pipe",
    "perl",
    include_str!("child.pl"),
);
static PYTHON: Workload = Workload::script(
    "scripts/python",
    "python with threads, a subprocess and locks",
    "python3",
    include_str!("threads.py"),
)
.moves(CHANGING);

/// Interpreters allocate, call and start programs as they like.
pub(super) const CHANGING: &[&str] = &[
    "tree", "ids", "state", "exit", "comm", "maps", "vmflags", "mm", "fd", "cwd", "root", "exe",
    "signals", "umask", "tracer", "syscall",
];

pub static ALL: &[&Workload] = &[&BASH, &PERL, &PYTHON];
