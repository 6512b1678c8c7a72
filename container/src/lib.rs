//! The container manager behind `firn ct`.
//!
//! Will speak vzctl's words over OCI bundles, cgroups, namespaces and ploop disks. Nothing is
//! implemented yet, so the crate exports nothing.
#![forbid(unsafe_code)]
