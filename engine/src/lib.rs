//! Checkpoint and restore of process trees.

pub mod arch;
pub mod files;
pub mod memory;
pub mod obstacle;
pub mod program;
pub mod tree;
