//! End-to-end tests of the `firn` command on real programs, and the harness that they share.
//!
//! Every test runs in a pid and mount namespace of its own ([`isolated`]): a restore needs the very
//! pids of the dump, which on a busy host another process may have taken meanwhile, and tests run in
//! parallel. The test body is pid 1 there, so orphans become its children and nothing outlives it.
//!
//! * `FIRN_BIN` names the binary under test; without it the workspace's own is built and used.
//! * `FIRN_CRIU` names a CRIU binary for the tests that let each engine restore the other's dump.
//! * A test that cannot run says `skipped: NAME: REASON` and passes; with `FIRN_TESTS_REQUIRE` set it
//!   fails instead (packages that the tests need are listed in `packages.txt`).
//! * `FIRN_TESTS_ROUNDS` says how often the long-running programs are dumped and restored, 3 times without it.
//! * `FIRN_TESTS_TRIES` says how often a tree that never stands still is dumped, 6 times without it.
//! * With `FIRN_TESTS_KEEP` set, the scratch directory of a failed test (images, logs) stays.
#![forbid(unsafe_code)]

mod command;
mod images;
mod network;
mod sandbox;
mod sequence;
mod service;
mod standstill;
mod survive;
mod task;

pub use command::{Finished, criu, firn_path};
pub use images::image_files;
pub use network::{HERE, Network, THERE};
pub use sandbox::{Sandbox, isolated, isolated_server, skip};
pub use sequence::sequence;
pub use service::Service;
pub use survive::{Program, Progress, rounds, tries};
pub use task::Task;
