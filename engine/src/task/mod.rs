//! Per-task state: one module per kind, dump and restore side by side.

pub mod attributes;
pub(crate) mod autogroup;
pub mod child_events;
mod connects;
pub mod core_image;
pub mod creds;
pub mod ia32;
pub mod itimers;
pub mod limits;
pub mod lsm;
pub mod mempolicy;
pub mod modes;
pub(crate) mod notes;
pub mod outside;
pub mod posix_timers;
pub mod questions;
pub mod relations;
pub mod scheduling;
pub mod seccomp;
pub mod semaphores;
pub mod shadow_stack;
pub mod signals;
pub mod status;
pub mod survey;
pub mod threads;
pub(crate) mod traced;
