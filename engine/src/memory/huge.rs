//! Huge pages for large memory, without asking for them in the mapping.
//!
//! Filling 4 KiB pages costs a fault for each, which is most of the time of a large restore. Where the
//! machine gives huge pages only to mappings that ask (`madvise`), asking would stay visible in the
//! mapping for ever. So the pages are filled in scratch memory that asks, and then moved into place
//! with UFFDIO_MOVE, which takes no copy. Where the machine gives them to everybody or to nobody, or
//! pages can't be moved, memory is filled in place.

use firn_sys::mm::TASK_SIZE;
use firn_sys::uffd;

use super::piece;
use super::plan::{MemoryPlan, Phase};
use super::range::{self, AddressRange, HUGE_PAGE_SIZE};

/// Less than this is not worth the calls.
const MIN_BYTES: u64 = 32 << 20;
/// More ranges than this are not moved one by one.
const MAX_MOVES: usize = 512;

/// Whether the detour is possible and worth it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugeFacts {
    /// Huge pages go to mappings that ask for them, and pages can be moved.
    pub use_scratch: bool,
}

impl HugeFacts {
    /// Looks at the machine.
    pub fn probe() -> HugeFacts {
        let policy = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        let on_request = policy.is_ok_and(|text| text.contains("[madvise]"));
        HugeFacts {
            use_scratch: on_request && uffd::probe_move().is_ok(),
        }
    }
}

/// Huge pages that move from the scratch memory into place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugeMove {
    /// Index of the mapping they belong to.
    pub vma: usize,
    /// Where they belong.
    pub to: AddressRange,
    /// Where they are filled.
    pub from: u64,
}

/// Redirects what can be filled with huge pages into scratch memory.
pub(super) fn plan(plan: &mut MemoryPlan, hole: AddressRange, facts: &HugeFacts) {
    if !facts.use_scratch {
        return;
    }
    let early = candidates(plan, &plan.early);
    let late = candidates(plan, &plan.late);
    let bytes = |list: &[(usize, AddressRange)]| list.iter().map(|(_, r)| r.len()).sum::<u64>();
    let len = bytes(&early).max(bytes(&late));
    if len < MIN_BYTES || early.len() + late.len() > MAX_MOVES {
        return;
    }
    let Some(scratch) = find_scratch(plan, hole, len) else {
        return;
    };
    redirect(&mut plan.early, &early, scratch);
    redirect(&mut plan.late, &late, scratch);
    plan.scratch = Some(scratch);
}

/// Ranges of whole huge pages that the coordinator fills completely.
fn candidates(plan: &MemoryPlan, phase: &Phase) -> Vec<(usize, AddressRange)> {
    let filled = range::union(phase.filled.iter().map(|piece| piece.range).collect());
    let mut found = Vec::new();
    for &index in &phase.mapped {
        let vma = plan.vma(index);
        if !plan.takes_huge_pages(vma) {
            continue;
        }
        for part in range::intersect(&filled, &[vma.range]) {
            let whole = part.aligned_inside(HUGE_PAGE_SIZE);
            if !whole.is_empty() {
                found.push((index, whole));
            }
        }
    }
    found
}

/// A free place for the scratch memory, far from everything that may grow.
fn find_scratch(plan: &MemoryPlan, hole: AddressRange, len: u64) -> Option<AddressRange> {
    let mut used = plan.image.used_ranges();
    used.push(hole);
    widest_gap(used, len)
}

/// Takes the start of the widest gap between used ranges that has room.
fn widest_gap(mut used: Vec<AddressRange>, len: u64) -> Option<AddressRange> {
    const DISTANCE: u64 = 1 << 30;
    // Between the last stack and vsyscall lies the widest gap of all, and nobody can map there.
    used.push(AddressRange::new(TASK_SIZE, u64::MAX));
    let used = range::union(used);
    let free = used.windows(2).filter_map(|pair| {
        let start = pair[0].end.checked_add(DISTANCE)?;
        let end = pair[1].start.checked_sub(DISTANCE)?;
        if start >= end {
            return None;
        }
        let gap = AddressRange::new(start, end).aligned_inside(HUGE_PAGE_SIZE);
        (gap.len() >= len).then_some(gap)
    });
    let gap = free.max_by_key(|gap| gap.len())?;
    Some(AddressRange::new(gap.start, gap.start + len))
}

fn redirect(phase: &mut Phase, ranges: &[(usize, AddressRange)], scratch: AddressRange) {
    let mut from = scratch.start;
    for &(vma, to) in ranges {
        let (mut inside, outside) = piece::split_by(&phase.filled, &[to]);
        for piece in &mut inside {
            piece.target = from + (piece.range.start - to.start);
        }
        phase.filled = outside;
        phase.filled.append(&mut inside);
        phase.moves.push(HugeMove { vma, to, from });
        from += to.len();
    }
    // In the order of the file, which is read ahead.
    phase
        .filled
        .sort_unstable_by_key(|piece| (piece.file, piece.offset));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_lies_where_a_task_may_map() {
        let program = AddressRange::new(0x5555_5555_0000, 0x5555_6000_0000);
        let stack = AddressRange::new(0x7ffd_0000_0000, 0x7ffd_0002_1000);
        let vsyscall = AddressRange::new(0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000);
        let scratch = widest_gap(vec![program, stack, vsyscall], 1 << 31).expect("there is room");
        assert!(
            scratch.start > program.end && scratch.end < stack.start,
            "{scratch}"
        );
        assert!(widest_gap(vec![stack, vsyscall], 1 << 46).is_none());
    }
}
