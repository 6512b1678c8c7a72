//! Contents of memory: pagemaps, and the pages files that they describe.
//!
//! A pagemap lists runs of pages, ascending by address. What stands in the pages file has no
//! header: the contents of all `PRESENT` runs one after the other, in the order of the pagemap.
//! A `PARENT` run has nothing there; its pages are found at the same addresses through the
//! pagemap of the same name in the directory behind the `parent` link.

mod flags;
mod pagemap;
mod source;
mod writer;

pub use flags::PageFlags;
pub use pagemap::{Pagemap, PagemapRun};
pub use source::{LentFile, PagePlace, PageRun, PageSource, PagesFile};
pub use writer::PagemapWriter;

use std::path::PathBuf;

use crate::error::{EntryPlace, ImageReadError};

/// Bytes of a page; nothing in an image records it.
pub const PAGE_SIZE: u64 = 4096;

/// Why the pages of a process or object cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PageSourceError {
    /// An image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageReadError),
    /// A run of a pagemap makes no sense.
    #[error("{place}: page run at {vaddr:#x} {problem}")]
    BadRun {
        /// The entry.
        place: EntryPlace,
        /// Where the run begins.
        vaddr: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The pages file ends before the pagemap does.
    #[error("{} has {size} bytes where its pagemap describes {needed}", path.display())]
    PagesTooShort {
        /// The pages file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The size that the pagemap asks for.
        needed: u64,
    },
    /// Pages are said to be in a parent that does not have them.
    #[error("page at {vaddr:#x} of {} is in no parent: {} has it not", pagemap.display(), searched.display())]
    NotInParent {
        /// The pagemap that was asked for.
        pagemap: PathBuf,
        /// Address of the first such page.
        vaddr: u64,
        /// Where it was searched last: a pagemap, or a directory without a parent.
        searched: PathBuf,
    },
    /// The parent links lead in a circle.
    #[error("parent links lead from {} back to {}", from.display(), to.display())]
    ParentLoop {
        /// The directory with the link.
        from: PathBuf,
        /// The directory met before.
        to: PathBuf,
    },
    /// There are more parents than anybody makes.
    #[error("{} has more than {limit} parents", path.display())]
    TooManyParents {
        /// The directory that was asked for.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}
