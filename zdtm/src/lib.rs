//! Conformance workloads and their runner.
//!
//! A *workload* is a small program that sets up one kind of state, says that it is ready, waits for
//! SIGTERM, and then checks from inside whether that state is still what it was:
//!
//! ```no_run
//! use anyhow::{Result, ensure};
//! use zdtm::{Stage, Workload};
//!
//! pub static NUMBER: Workload = Workload::new("memory/number", "a number on the heap", run);
//!
//! fn run(stage: &Stage) -> Result<()> {
//!     let number = Box::new(41);
//!     stage.ready_and_wait()?; // dumped, killed and restored in here, perhaps more than once
//!     ensure!(*number == 41, "the number is now {number}");
//!     Ok(())
//! }
//! ```
//!
//! All of them live in one binary and one table, [`workloads::all`]. The [`runner`] starts each in
//! a directory and a pid namespace of its own, freezes, kills and restores it with the engine, looks
//! at it from outside before and after, and collects the verdict:
//!
//! ```text
//! cargo build -p firn && cargo run -p firn-zdtm -- run --test 'files/*' --parallel 2
//! ```
//!
//! The protocol between the two is files in the instance's directory, so that nothing ties the
//! workload to the runner: it makes `ready`, and later `result`, which holds `PASS` or
//! `FAIL: reason`. Standard input is `/dev/null` (or an object with a side [`Outside`]), standard output and error are a log file.

pub mod proc;
mod random;
pub mod runner;
mod stage;
mod stop;
pub mod sys;
mod workload;
pub mod workloads;

pub use stage::{Child, Stage};
pub use workload::{Body, Expect, Need, OUTSIDE_WORDS, Outside, Workload};
