//! Checkpoint and restore of process trees.
