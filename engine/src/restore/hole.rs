//! One address range that is free in every task of the tree and in this process: the arena stands there.
//!
//! It keeps a distance from everything, because stacks and heaps grow while the tasks are rebuilt.

use firn_sys::procfs;

use crate::memory::{AddressRange, IA32_END};

/// End of the address space with four levels of page tables.
const TO: u64 = 0x7fff_ffff_f000;
/// Distance to neighbours in bytes.
const DISTANCE: u64 = 2 << 20;
/// Room in bytes: far more than the programs of the largest tree.
pub(super) const HOLE_LEN: u64 = 8 << 30;
/// Most and least room below 4 GiB; the least is enough for a hundred tasks.
const IA32_HOLE_LEN: u64 = 1 << 30;
const LEAST_IA32_HOLE_LEN: u64 = 16 << 20;

/// Who has to reach the hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// 64-bit code only.
    Native,
    /// 32-bit calls, too: below 4 GiB.
    Ia32,
}

impl Reach {
    /// Where the search begins and ends: above what small programs and below what large ones use.
    fn limits(self) -> (u64, u64) {
        match self {
            Reach::Native => (1 << 40, TO),
            // Nothing may be mapped at the very beginning.
            Reach::Ia32 => (DISTANCE, IA32_END),
        }
    }
}

/// Finds a hole between the ranges, which may overlap and stand in any order.
pub(super) fn find(used: &[AddressRange], reach: Reach) -> Option<AddressRange> {
    let mut used: Vec<(u64, u64)> = used
        .iter()
        .map(|range| {
            (
                range.start.saturating_sub(DISTANCE),
                range.end.saturating_add(DISTANCE),
            )
        })
        .collect();
    used.sort_unstable();
    let (from, to) = reach.limits();
    let mut gaps = Vec::new();
    let mut at = from;
    for (start, end) in used.into_iter().chain([(to, to)]) {
        if at < start.min(to) {
            gaps.push(AddressRange::new(at, start.min(to)));
        }
        at = at.max(end.checked_next_multiple_of(DISTANCE).unwrap_or(u64::MAX));
    }
    let len = |gap: &AddressRange| match reach {
        Reach::Native => HOLE_LEN,
        // Large mappings that the kernel makes itself need room as well.
        Reach::Ia32 => (gap.len() / 2).min(IA32_HOLE_LEN) & !(DISTANCE - 1),
    };
    let gap = match reach {
        Reach::Native => gaps.into_iter().find(|gap| gap.len() >= HOLE_LEN),
        Reach::Ia32 => gaps.into_iter().max_by_key(|gap| gap.len()),
    }?;
    let len = len(&gap);
    (len >= LEAST_IA32_HOLE_LEN).then(|| AddressRange::new(gap.start, gap.start + len))
}

/// What this process has mapped.
pub(super) fn own_ranges() -> Vec<AddressRange> {
    let maps = procfs::read_to_string("/proc/self/maps").unwrap_or_default();
    let range = |line: &str| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let parse = |hex| u64::from_str_radix(hex, 16).ok();
        let (start, end) = (parse(start)?, parse(end)?);
        (end <= TO).then(|| AddressRange::new(start, end))
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: u64 = 1 << 40;

    #[test]
    fn an_empty_space_starts_at_the_beginning() {
        let hole = AddressRange::new(FROM, FROM + HOLE_LEN);
        assert_eq!(find(&[], Reach::Native), Some(hole));
    }

    #[test]
    fn it_keeps_its_distance() {
        let taken = AddressRange::new(FROM + 0x1000, FROM + 0x2000);
        let hole = find(&[taken], Reach::Native).unwrap();
        assert!(hole.start >= taken.end + DISTANCE);
    }

    #[test]
    fn a_full_space_has_none() {
        let all = [AddressRange::new(0, TO)];
        assert_eq!(find(&all, Reach::Native), None);
        assert_eq!(find(&all, Reach::Ia32), None);
    }

    #[test]
    fn of_32_bit_programs_it_lies_in_the_largest_gap_below_4_gib() {
        let program = AddressRange::new(0x0804_8000, 0x0900_0000);
        let libraries = AddressRange::new(0xf7d0_0000, 0xffff_d000);
        let far = AddressRange::new(FROM, FROM + HOLE_LEN);
        let hole = find(&[far, libraries, program], Reach::Ia32).unwrap();
        assert!(hole.start >= program.end + DISTANCE);
        assert!(hole.end + DISTANCE <= libraries.start);
        assert_eq!(hole.len(), IA32_HOLE_LEN);
        let most = AddressRange::new(0x100_0000, 0xffff_d000);
        assert_eq!(find(&[most], Reach::Ia32), None);
    }

    #[test]
    fn this_process_has_ranges() {
        assert!(own_ranges().len() > 3);
        assert!(find(&own_ranges(), Reach::Native).is_some());
        assert!(find(&own_ranges(), Reach::Ia32).is_some());
    }
}
