//! ploop: a container's disk in a file.
//!
//! Will hold the on-disk format (v2 written, v1 read), deltas and snapshots, the block device, the
//! write tracker and iterative copy. Nothing is implemented yet, so the crate exports nothing.
#![forbid(unsafe_code)]
