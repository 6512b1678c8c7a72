//! Signals: what is done with them, which are blocked, which wait, and where handlers run.

mod actions;
mod pending;
mod stacks;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &actions::ACTIONS,
    &actions::TRAP,
    &actions::MASKS,
    &pending::PRIVATE,
    &pending::SHARED,
    &pending::THREADS,
    &pending::SENDERS,
    &pending::CHILD,
    &pending::KILLED,
    &stacks::ALTSTACK,
    &stacks::NONE,
    &stacks::THREADS,
    &stacks::ON_STACK,
    &stacks::NESTED,
];
