//! One address range that is free in every task of the tree and in this process: the arena stands there.
//!
//! It keeps a distance from everything, because stacks and heaps grow while the tasks are rebuilt.

use firn_sys::procfs;

use crate::memory::AddressRange;

/// Where the search begins: above what small programs and below what large ones use.
const FROM: u64 = 1 << 40;
/// End of the address space with four levels of page tables.
const TO: u64 = 0x7fff_ffff_f000;
/// Distance to neighbours in bytes.
const DISTANCE: u64 = 2 << 20;
/// Room in bytes: far more than the programs of the largest tree.
pub(super) const HOLE_LEN: u64 = 8 << 30;

/// Finds a hole between the ranges, which may overlap and stand in any order.
pub(super) fn find(used: &[AddressRange]) -> Option<AddressRange> {
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
    let mut at = FROM;
    for (start, end) in used {
        if start > at && start - at >= HOLE_LEN {
            break;
        }
        at = at.max(end.next_multiple_of(DISTANCE));
    }
    (at + HOLE_LEN <= TO).then(|| AddressRange::new(at, at + HOLE_LEN))
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

    #[test]
    fn an_empty_space_starts_at_the_beginning() {
        assert_eq!(find(&[]), Some(AddressRange::new(FROM, FROM + HOLE_LEN)));
    }

    #[test]
    fn it_keeps_its_distance() {
        let taken = AddressRange::new(FROM + 0x1000, FROM + 0x2000);
        let hole = find(&[taken]).unwrap();
        assert!(hole.start >= taken.end + DISTANCE);
    }

    #[test]
    fn a_full_space_has_none() {
        assert_eq!(find(&[AddressRange::new(0, TO)]), None);
    }

    #[test]
    fn this_process_has_ranges() {
        assert!(own_ranges().len() > 3);
        assert!(find(&own_ranges()).is_some());
    }
}
