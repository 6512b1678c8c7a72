//! Checkpoint and restore of process trees.
//!
//! One builder per operation: [`Dump`] freezes a running tree and writes its images, [`Restore`] makes it
//! again from them. Both return a report, take a callback for progress and a flag to cancel, and leave
//! everything as it was when they fail. Errors say which object of which task is in the way
//! ([`DumpError::obstacles`]) and what kind of failure it is ([`ErrorClass`]).
//!
//! ```no_run
//! use firn_engine::{Dump, Leave, Pid, Restore};
//!
//! let images = "/var/lib/checkpoints/web";
//! let report = Dump::new(Pid::from_raw(4711)).images_dir(images).leave(Leave::Killed).run()?;
//! println!("{} tasks, frozen for {:?}", report.tasks, report.frozen);
//!
//! let mut restored = Restore::new(images).run()?;
//! let status = restored.wait()?;
//! println!("process {} ended with {status}", restored.pid);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `cargo run -p firn-engine --example round_trip -- PID DIRECTORY` does that to a process of yours.
//!
//! The calling thread traces the tasks, so it must stay the same during one operation; other threads may
//! do what they like, because no library code runs in the children that the engine forks. What the
//! machine offers is told by [`check`].
//!
//! Inside, one kind of object is one module with its dump, its restore and its image: [`task`],
//! [`memory`], [`files`]. What runs inside a task is data: see [`program`].

pub mod arch;
pub mod cancel;
pub mod check;
pub mod class;
mod crew;
pub mod dump;
pub mod files;
pub mod freeze;
pub mod inject;
mod kernel;
pub mod memory;
pub mod network_lock;
pub mod obstacle;
pub mod program;
pub mod progress;
pub mod restore;
pub mod script;
pub mod task;
pub mod tree;

pub use class::ErrorClass;
pub use dump::{Dump, DumpError, DumpReport, Leave};
pub use files::{FilePolicy, FileValidation};
pub use firn_sys::Pid;
pub use progress::{Phase, Progress};
pub use restore::{Restore, RestoreError, RestoreReport};
pub use task::lsm::LabelChoice;
