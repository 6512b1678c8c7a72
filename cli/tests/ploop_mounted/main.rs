//! Disks that are mounted.
//!
//! Needs root, FUSE and loop devices; skipped by that reason elsewhere. Every disk has its own registry,
//! and is unmounted when its test ends, however that comes.

#[path = "../common/mod.rs"]
mod common;

mod backup;
mod life;
mod namespace;
mod place;
