//! The memory of tasks: mappings, their pages, shared memory, the vdso.
//!
//! Dump: [`survey`] before the freeze, [`AddressSpace::read`] and its `dump` in it.

pub mod address_space;
pub mod classify;
mod compare;
pub mod copy;
mod emit;
pub mod error;
pub mod fill;
pub mod huge;
pub mod image;
mod inherit;
pub mod pages;
pub mod piece;
pub mod plan;
pub mod range;
pub mod shared_dump;
pub mod shared_restore;
pub mod smaps;
pub mod vdso;
pub mod vma;

mod survey;

pub use address_space::{AddressSpace, MappedFiles, MmAnswers, PageStats};
pub use copy::PageCopy;
pub use error::MemoryDumpError;
pub use range::{AddressRange, HUGE_PAGE_SIZE, PAGE_SIZE};
pub use shared_dump::SharedDump;
pub use survey::survey;
pub use vma::Vma;
