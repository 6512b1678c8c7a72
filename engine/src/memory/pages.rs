//! Finding the pages of a frozen task that have to be saved.

use firn_sys::pagemap::{PageQuery, PageRegion, Pagemap, category, entry};
use firn_sys::{Errno, Pid};

use super::error::MemoryDumpError;
use super::range::{AddressRange, PAGE_SIZE};
use super::vma::{Vma, status};

/// Mappings further apart than this are scanned one by one.
const SCAN_GAP: u64 = 64 << 20;
/// Pages that are copied the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where they are.
    pub range: AddressRange,
    /// A lazy restore may leave them for later.
    pub is_lazy: bool,
    /// The task itself may not read them.
    pub is_hidden: bool,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Pages to save, ascending.
    pub runs: Vec<Run>,
    /// Guard regions, ascending.
    pub guards: Vec<AddressRange>,
}

/// Finds the pages of a frozen task that have to be saved, and its guard regions.
///
/// # Errors
/// The pagemap can't be read.
pub fn find(pid: Pid, vmas: &[Vma]) -> Result<Found, MemoryDumpError> {
    let failed = |source| MemoryDumpError::Read {
        pid,
        what: "pagemap",
        source,
    };
    let pagemap = Pagemap::open(pid).map_err(failed)?;
    let mut found = Found::default();
    let ordinary: Vec<&Vma> = vmas.iter().filter(|vma| vma.is(status::REGULAR)).collect();
    for cluster in ordinary.chunk_by(|a, b| b.range.start - a.range.end < SCAN_GAP) {
        let (first, last) = (cluster[0], cluster[cluster.len() - 1]);
        let range = AddressRange::new(first.range.start, last.range.end);
        let regions = scan(&pagemap, range).map_err(failed)?;
        sort_out(cluster, &regions, &mut found);
    }
    Ok(found)
}

/// All regions of own pages and guards in a range.
fn scan(pagemap: &Pagemap, range: AddressRange) -> firn_sys::Result<Vec<PageRegion>> {
    let mut query = PageQuery {
        all_of: 0,
        none_of: category::FILE | category::PFNZERO,
        any_of: category::PRESENT | category::SWAPPED,
        reported: category::GUARD,
    };
    let mut regions = Vec::new();
    let mut buffer = [PageRegion::default(); 256];
    let mut start = range.start;
    while start < range.end {
        match pagemap.scan(start, range.end, query, &mut buffer) {
            Ok((filled, walk_end)) => {
                regions.extend_from_slice(&buffer[..filled]);
                start = walk_end.max(start + PAGE_SIZE);
            }
            // A kernel that scans but does not know guard regions.
            Err(Errno::EINVAL) if query.reported != 0 => query.reported = 0,
            Err(Errno::ENOTTY) => return scan_entries(pagemap, range),
            Err(error) => return Err(error),
        }
    }
    Ok(regions)
}

/// The same through the old interface, page by page.
fn scan_entries(pagemap: &Pagemap, range: AddressRange) -> firn_sys::Result<Vec<PageRegion>> {
    let mut regions: Vec<PageRegion> = Vec::new();
    let mut entries = vec![0u64; 8192];
    let mut address = range.start;
    while address < range.end {
        let wanted = usize::try_from(AddressRange::new(address, range.end).nr_pages());
        let wanted = wanted.unwrap_or(usize::MAX).min(entries.len());
        let read = pagemap.entries(address, &mut entries[..wanted])?;
        if read == 0 {
            break;
        }
        for bits in &entries[..read] {
            let is_there = bits & (entry::PRESENT | entry::SWAPPED) != 0;
            if is_there && bits & entry::FILE == 0 {
                let categories = if bits & entry::GUARD == 0 {
                    0
                } else {
                    category::GUARD
                };
                push_page(&mut regions, address, categories);
            }
            address += PAGE_SIZE;
        }
    }
    Ok(regions)
}

fn push_page(regions: &mut Vec<PageRegion>, address: u64, categories: u64) {
    match regions.last_mut() {
        Some(last) if last.end == address && last.categories == categories => {
            last.end += PAGE_SIZE;
        }
        _ => regions.push(PageRegion {
            start: address,
            end: address + PAGE_SIZE,
            categories,
        }),
    }
}

/// Keeps of the regions what belongs to mappings with pages of their own. The vdso is kept whole.
fn sort_out(vmas: &[&Vma], regions: &[PageRegion], found: &mut Found) {
    let mut next = 0;
    for vma in vmas {
        if vma.is(status::VDSO) {
            push_run(found, vma, vma.range);
            continue;
        }
        while regions.get(next).is_some_and(|r| r.end <= vma.range.start) {
            next += 1;
        }
        let inside = regions[next..]
            .iter()
            .take_while(|r| r.start < vma.range.end);
        for region in inside {
            let range = AddressRange::new(region.start, region.end).intersect(vma.range);
            if region.categories & category::GUARD != 0 {
                push_guard(found, range);
            } else if vma.has_own_pages() {
                push_run(found, vma, range);
            }
        }
    }
}

fn push_guard(found: &mut Found, range: AddressRange) {
    match found.guards.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.guards.push(range),
    }
}

fn push_run(found: &mut Found, vma: &Vma, range: AddressRange) {
    let run = Run {
        range,
        is_lazy: vma.may_be_lazy(),
        is_hidden: vma.prot & firn_sys::mm::prot::READ == 0,
    };
    match found.runs.last_mut() {
        Some(last)
            if last.range.end == range.start
                && (last.is_lazy, last.is_hidden) == (run.is_lazy, run.is_hidden) =>
        {
            last.range.end = range.end;
        }
        _ => found.runs.push(run),
    }
}
