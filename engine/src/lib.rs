//! Checkpoint and restore of process trees.

pub mod arch;
pub mod cancel;
pub mod check;
pub mod class;
pub mod dump;
pub mod files;
pub mod freeze;
pub mod inject;
pub mod memory;
pub mod obstacle;
pub mod program;
pub mod progress;
pub mod restore;
pub mod script;
pub mod task;
pub mod tree;

pub use class::ErrorClass;
pub use dump::{Dump, DumpError, DumpReport, Leave};
pub use files::FileValidation;
pub use firn_sys::Pid;
pub use progress::{Phase, Progress};
pub use restore::{Restore, RestoreError, RestoreReport};
