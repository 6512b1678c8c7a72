//! Checkpoint and restore of process trees.

pub mod arch;
pub mod cancel;
pub mod check;
pub mod files;
pub mod freeze;
pub mod inject;
pub mod memory;
pub mod obstacle;
pub mod program;
pub mod script;
pub mod task;
pub mod tree;

pub use firn_sys::Pid;
