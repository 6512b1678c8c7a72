//! What was not written to since the parent was made.

use firn_images::{ImageDir, ImageKind, Pagemap as SavedPages};
use firn_sys::pagemap::{PageQuery, Pagemap, category};
use firn_sys::{Errno, Pid};

use crate::memory::copy::CopiedTask;
use crate::memory::error::MemoryDumpError;
use crate::memory::pages::{self, Run};
use crate::memory::range::{self, AddressRange};

/// The parts of `runs`, ascending, that are as the parent has them.
///
/// # Errors
/// The pagemap can't be read.
pub(in crate::memory) fn unchanged(
    task: CopiedTask,
    runs: &[Run],
    parent: &ImageDir,
) -> Result<Vec<AddressRange>, MemoryDumpError> {
    let CopiedTask { pid, speaker } = task;
    let saved = match SavedPages::read(parent, ImageKind::Pagemap, u64::from(pid.to_image())) {
        Ok(saved) => saved,
        Err(error) => {
            tracing::info!("all memory of task {pid} is saved: {error}");
            return Ok(Vec::new());
        }
    };
    let saved = saved.runs.iter();
    let saved = saved.map(|run| AddressRange::new(run.vaddr, run.end()));
    let clean = clean(speaker, runs).map_err(|source| MemoryDumpError::Read {
        pid,
        what: "pagemap",
        source,
    })?;
    let runs = runs.iter().map(|run| run.range).collect();
    let clean = range::intersect(&clean, &range::union(runs));
    // A page that the parent has not can't be one that it had; still, nothing is left to chance.
    Ok(range::intersect(&clean, &range::union(saved.collect())))
}

/// Pages that are tracked and that nobody has written to.
fn clean(pid: Pid, runs: &[Run]) -> Result<Vec<AddressRange>, Errno> {
    let query = PageQuery {
        all_of: category::WPALLOWED,
        none_of: category::WRITTEN | category::FILE | category::PFNZERO,
        any_of: category::PRESENT | category::SWAPPED,
        reported: 0,
    };
    let pagemap = Pagemap::open(pid)?;
    let mut found = Vec::new();
    for range in pages::clusters(runs.iter().map(|run| run.range)) {
        let regions = pages::regions(&pagemap, range, query)?;
        let regions = regions.iter();
        found.extend(regions.map(|region| AddressRange::new(region.start, region.end)));
    }
    Ok(range::union(found))
}
