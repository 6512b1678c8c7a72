//! The memory of tasks: mappings, their pages, shared memory, the vdso.
//!
//! Dump: [`survey`] before the freeze, [`AddressSpace::read`] and its `dump` in it. Restore:
//! [`MemoryImage::load`], a [`MemoryPlan`] for each task, whose parts become records of the task's
//! program, and [`fill`](mod@fill) for what the coordinator copies.

pub mod classify;
pub mod range;
pub mod smaps;
pub mod vma;

pub use range::{AddressRange, HUGE_PAGE_SIZE, PAGE_SIZE};
pub use vma::Vma;
