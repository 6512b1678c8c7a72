//! Checkpoint image directories.
