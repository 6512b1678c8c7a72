//! Disks that are mounted.
//!
//! Needs root, FUSE and loop devices; skipped by that reason elsewhere. Every disk has its own registry,
//! and is unmounted when its test ends, however that comes.
//!
//! What can be done more or less often is done a few times; the environment names more:
//! `FIRN_PLOOP_FILES` (50000), `FIRN_PLOOP_ROWS`, `FIRN_PLOOP_COPIES` (20), `FIRN_PLOOP_KILLS`.

#[path = "../common/mod.rs"]
mod common;

mod backup;
mod device;
mod full;
mod lane;
mod life;
mod namespace;
mod place;
mod programs;
mod snapshots;
