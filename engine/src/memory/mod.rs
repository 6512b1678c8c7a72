//! The memory of tasks: mappings, their pages, shared memory, the vdso.
//!
//! Dump: [`survey`] before the freeze, [`AddressSpace::read`] and its `dump` in it, [`SharedDump`] for
//! what tasks share.
//!
//! Restore: [`MemoryImage::load`] and [`SharedRestore::load`]; [`plan_tree`] decides; the parts of a
//! [`MemoryPlan`] become records of the task's program; [`fill()`] copies what the tasks do not read
//! themselves.

pub mod address_space;
mod aio;
pub mod classify;
mod compare;
pub mod copy;
mod descriptors;
mod emit;
pub mod error;
pub mod fill;
pub mod fresh;
mod gap;
pub mod image;
mod inherit;
mod names;
pub mod pages;
pub mod piece;
pub mod plan;
pub mod policies;
pub mod range;
pub mod shared_dump;
pub mod shared_fill;
mod shared_restore;
pub mod smaps;
mod sources;
pub mod space_modes;
pub mod sysv;
pub mod vdso;
pub mod vma;

mod shadow_stacks;
mod survey;
mod tracking;

pub use address_space::{AddressSpace, DescribedSpace, MappedFiles, MmAnswers, PageStats};
pub use aio::settle as settle_aio;
pub use copy::{Buffers, PageCopy};
pub use descriptors::Descriptors;
pub use error::MemoryDumpError;
pub use fill::{Filling, MemoryFillError, PageFill, Way, When, fill};
pub use image::{MemoryImage, MemoryLoadError};
pub use plan::{MemoryFacts, MemoryPlan, MemoryPlanError, TaskMemory, plan_tree};
pub use range::{AddressRange, HUGE_PAGE_SIZE, IA32_END, PAGE_SIZE};
pub use shared_dump::SharedDump;
pub use shared_restore::{SharedRestore, SharedRestoreError};
pub use sources::{MappingFdError, MappingFds, MappingSource};
pub use survey::survey;
pub(crate) use tracking::arm;
pub use tracking::{Tracker, Trackers, TrackersHere};
pub use vdso::{KernelVdso, KernelVdsos, VdsoChoice};
pub use vma::Vma;
