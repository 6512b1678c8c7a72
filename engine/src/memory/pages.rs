//! Finding the pages of a frozen task that have to be saved.
//!
//! Pages that a task shares copy-on-write with another one are told apart: process_vm_readv pins what
//! it reads, and the kernel gives the task a copy of its own before it pins such a page. A dump that
//! leaves the tasks running would have taken their sharing away, and their memory would have grown.

use firn_sys::pagemap::{PageQuery, PageRegion, Pagemap, category, entry};
use firn_sys::{Errno, Pid};

use super::error::MemoryDumpError;
use super::range::{self, AddressRange, PAGE_SIZE};
use super::vma::{Vma, status};

/// Mappings further apart than this are scanned one by one.
const SCAN_GAP: u64 = 64 << 20;
/// Entries of the pagemap that are read with one call.
const ENTRIES_AT_ONCE: usize = 8192;

/// Pages that are copied the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where they are.
    pub range: AddressRange,
    /// A lazy restore may leave them for later.
    pub is_lazy: bool,
    /// How they are read.
    pub way: ReadWay,
}

/// How pages of a task are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadWay {
    /// By process_vm_readv, which is fast.
    Direct,
    /// Through /proc/PID/mem: the task itself may not read them, or they are shared copy-on-write.
    Proc,
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
/// `partly_shared` are the ranges, ascending, in which pages may be shared with other tasks.
///
/// # Errors
/// The pagemap can't be read.
pub fn find(
    pid: Pid,
    vmas: &[Vma],
    partly_shared: &[AddressRange],
) -> Result<Found, MemoryDumpError> {
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
    // The kernel writes to all of a ring, whatever of it the task has touched.
    let rings = vmas.iter().filter(|vma| vma.is(status::AIORING));
    found.runs.extend(rings.map(|vma| Run {
        range: vma.range,
        is_lazy: false,
        way: ReadWay::Direct,
    }));
    found.runs = set_shared_apart(&pagemap, &found.runs, partly_shared).map_err(failed)?;
    Ok(found)
}

/// Splits runs so that pages which other tasks have as well are read in the way that leaves them shared.
fn set_shared_apart(
    pagemap: &Pagemap,
    runs: &[Run],
    partly_shared: &[AddressRange],
) -> firn_sys::Result<Vec<Run>> {
    let mut split = Vec::with_capacity(runs.len());
    let mut entries = Vec::new();
    for run in runs {
        let own = [run.range];
        for range in range::subtract(&own, partly_shared) {
            split.push(Run { range, ..*run });
        }
        for range in range::intersect(&own, partly_shared) {
            for (range, is_exclusive) in exclusive_parts(pagemap, range, &mut entries)? {
                let way = if is_exclusive { run.way } else { ReadWay::Proc };
                split.push(Run { range, way, ..*run });
            }
        }
    }
    split.sort_unstable_by_key(|run| run.range.start);
    Ok(split)
}

/// Parts of a range of present pages, and whether they are mapped by this task only. `entries` is a buffer.
fn exclusive_parts(
    pagemap: &Pagemap,
    range: AddressRange,
    entries: &mut Vec<u64>,
) -> firn_sys::Result<Vec<(AddressRange, bool)>> {
    let mut parts: Vec<(AddressRange, bool)> = Vec::new();
    let mut address = range.start;
    while address < range.end {
        let left = usize::try_from(AddressRange::new(address, range.end).nr_pages());
        let wanted = left.unwrap_or(usize::MAX).min(ENTRIES_AT_ONCE);
        entries.resize(wanted.max(entries.len()), 0);
        let read = pagemap.entries(address, &mut entries[..wanted])?;
        if read == 0 {
            break;
        }
        for bits in &entries[..read] {
            let is_exclusive = bits & entry::EXCLUSIVE != 0;
            let end = address + PAGE_SIZE;
            match parts.last_mut() {
                Some((last, kind)) if *kind == is_exclusive => last.end = end,
                _ => parts.push((AddressRange::new(address, end), is_exclusive)),
            }
            address = end;
        }
    }
    Ok(parts)
}

/// All regions of own pages and guards in a range.
fn scan(pagemap: &Pagemap, range: AddressRange) -> firn_sys::Result<Vec<PageRegion>> {
    let mut query = PageQuery {
        all_of: 0,
        none_of: category::FILE | category::PFNZERO,
        any_of: category::PRESENT | category::SWAPPED,
        reported: category::GUARD,
    };
    match regions(pagemap, range, query) {
        // A kernel that scans but does not know guard regions.
        Err(Errno::EINVAL) => query.reported = 0,
        Err(Errno::ENOTTY) => return scan_entries(pagemap, range),
        result => return result,
    }
    regions(pagemap, range, query)
}

/// All regions of a range that a query asks for.
pub(super) fn regions(
    pagemap: &Pagemap,
    range: AddressRange,
    query: PageQuery,
) -> firn_sys::Result<Vec<PageRegion>> {
    let mut regions = Vec::new();
    let mut buffer = [PageRegion::default(); 256];
    let mut start = range.start;
    while start < range.end {
        let (filled, walk_end) = pagemap.scan(start, range.end, query, &mut buffer)?;
        regions.extend_from_slice(&buffer[..filled]);
        start = walk_end.max(start + PAGE_SIZE);
    }
    Ok(regions)
}

/// Ranges to scan at once, out of ascending ones: those that are not far apart together.
pub(super) fn clusters(ranges: impl Iterator<Item = AddressRange>) -> Vec<AddressRange> {
    let mut clusters: Vec<AddressRange> = Vec::new();
    for range in ranges {
        match clusters.last_mut() {
            Some(last) if range.start.saturating_sub(last.end) < SCAN_GAP => {
                last.end = last.end.max(range.end);
            }
            _ => clusters.push(range),
        }
    }
    clusters
}

/// The same through the old interface, page by page.
fn scan_entries(pagemap: &Pagemap, range: AddressRange) -> firn_sys::Result<Vec<PageRegion>> {
    let mut regions: Vec<PageRegion> = Vec::new();
    let mut entries = vec![0u64; ENTRIES_AT_ONCE];
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
        way: match vma.prot & firn_sys::mm::prot::READ {
            0 => ReadWay::Proc,
            _ => ReadWay::Direct,
        },
    };
    match found.runs.last_mut() {
        Some(last)
            if last.range.end == range.start
                && (last.is_lazy, last.way) == (run.is_lazy, run.way) =>
        {
            last.range.end = range.end;
        }
        _ => found.runs.push(run),
    }
}

/// Runs in parts that are to be copied, and parts that are in the parent.
pub(super) fn split(runs: &[Run], in_parent: &[AddressRange]) -> Vec<(Run, bool)> {
    let mut parts = Vec::with_capacity(runs.len() + 2 * in_parent.len());
    for run in runs {
        let first = in_parent.partition_point(|range| range.end <= run.range.start);
        let mut start = run.range.start;
        let inside = in_parent[first..].iter();
        for range in inside.take_while(|range| range.start < run.range.end) {
            let range = range.intersect(run.range);
            parts.push((AddressRange::new(start, range.start), true, run));
            parts.push((range, false, run));
            start = range.end;
        }
        parts.push((AddressRange::new(start, run.range.end), true, run));
    }
    parts.retain(|(range, ..)| !range.is_empty());
    let part =
        |(range, is_copied, run): (AddressRange, bool, &Run)| (Run { range, ..*run }, is_copied);
    parts.into_iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parent_has_is_set_apart() {
        let r = |start: u64, end: u64| AddressRange::new(start * 4096, end * 4096);
        let runs = [r(0, 10), r(20, 25)].map(|range| Run {
            range,
            is_lazy: false,
            way: ReadWay::Direct,
        });
        let parts = |in_parent: &[AddressRange]| -> Vec<(AddressRange, bool)> {
            let parts = split(&runs, in_parent).into_iter();
            parts
                .map(|(run, is_copied)| (run.range, is_copied))
                .collect()
        };
        assert_eq!(parts(&[]), [(r(0, 10), true), (r(20, 25), true)]);
        assert_eq!(
            parts(&[r(0, 2), r(4, 5), r(20, 25)]),
            [
                (r(0, 2), false),
                (r(2, 4), true),
                (r(4, 5), false),
                (r(5, 10), true),
                (r(20, 25), false),
            ]
        );
    }

    #[test]
    fn what_is_far_apart_is_scanned_apart() {
        let r = AddressRange::new;
        let near = SCAN_GAP - 0x1000;
        let ranges = [
            r(0, 0x1000),
            r(near, 2 * near),
            r(4 * SCAN_GAP, 5 * SCAN_GAP),
        ];
        assert_eq!(clusters(ranges.into_iter()), [r(0, 2 * near), ranges[2]]);
    }
}
