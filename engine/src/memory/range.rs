//! Ranges of addresses.

use std::fmt;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = firn_images::PAGE_SIZE;
/// Bytes of a transparent huge page.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// End of what 32-bit programs can map: 4 GiB less two pages.
pub const IA32_END: u64 = 0xffff_e000;

/// A range of addresses, `end` excluded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddressRange {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

impl AddressRange {
    /// The range from `start` to `end`; empty when `end` is not above.
    pub fn new(start: u64, end: u64) -> AddressRange {
        AddressRange { start, end }
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// True when it holds no address.
    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// Number of whole pages.
    pub fn nr_pages(self) -> u64 {
        self.len() / PAGE_SIZE
    }

    /// Whether the address lies inside.
    pub fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// Whether all of `other` lies inside.
    pub fn covers(self, other: AddressRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// What both have, which may be empty.
    pub fn intersect(self, other: AddressRange) -> AddressRange {
        AddressRange::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Whether both have an address in common.
    pub fn overlaps(self, other: AddressRange) -> bool {
        !self.intersect(other).is_empty()
    }

    /// The largest part that begins and ends at multiples of `alignment`.
    pub fn aligned_inside(self, alignment: u64) -> AddressRange {
        let start = self
            .start
            .checked_next_multiple_of(alignment)
            .unwrap_or(self.end);
        AddressRange::new(start, self.end - self.end % alignment)
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

impl fmt::Debug for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Parts of the ascending, disjoint `ranges` that `holes`, likewise, do not cover.
pub fn subtract(ranges: &[AddressRange], holes: &[AddressRange]) -> Vec<AddressRange> {
    let mut left = Vec::new();
    // Often one range of very many: those before it are passed over at once.
    let mut first = first_after(holes, ranges);
    for range in ranges {
        let mut start = range.start;
        while holes.get(first).is_some_and(|hole| hole.end <= range.start) {
            first += 1;
        }
        for hole in holes[first..].iter().take_while(|h| h.start < range.end) {
            left.push(AddressRange::new(start, hole.start));
            start = start.max(hole.end);
        }
        left.push(AddressRange::new(start, range.end));
    }
    left.retain(|range| !range.is_empty());
    left
}

/// Common parts of two ascending lists of disjoint ranges.
pub fn intersect(a: &[AddressRange], b: &[AddressRange]) -> Vec<AddressRange> {
    let mut common = Vec::new();
    let (mut i, mut j) = (first_after(a, b), first_after(b, a));
    while let (Some(&x), Some(&y)) = (a.get(i), b.get(j)) {
        let both = x.intersect(y);
        if !both.is_empty() {
            common.push(both);
        }
        if x.end <= y.end {
            i += 1;
        } else {
            j += 1;
        }
    }
    common
}

/// Index of the first of `ranges` that does not end before the first of `others` begins.
fn first_after(ranges: &[AddressRange], others: &[AddressRange]) -> usize {
    let begin = others.first().map_or(0, |other| other.start);
    ranges.partition_point(|range| range.end <= begin)
}

/// Sorts ranges and joins those that touch or overlap.
pub fn union(mut ranges: Vec<AddressRange>) -> Vec<AddressRange> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable();
    let mut joined: Vec<AddressRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn r(start: u64, end: u64) -> AddressRange {
        AddressRange::new(start, end)
    }

    #[test]
    fn subtracts_and_intersects() {
        let a = [r(0, 10), r(20, 30), r(40, 50)];
        let b = [r(5, 22), r(25, 26), r(40, 50)];
        assert_eq!(subtract(&a, &b), [r(0, 5), r(22, 25), r(26, 30)]);
        assert_eq!(
            intersect(&a, &b),
            [r(5, 10), r(20, 22), r(25, 26), r(40, 50)]
        );
        assert_eq!(
            union(vec![r(8, 9), r(0, 5), r(5, 6), r(3, 3)]),
            [r(0, 6), r(8, 9)]
        );
    }

    #[test]
    fn aligns_inwards() {
        assert_eq!(r(1, 30).aligned_inside(10), r(10, 30));
        assert!(r(1, 9).aligned_inside(10).is_empty());
    }

    fn ranges() -> impl Strategy<Value = Vec<AddressRange>> {
        let one = (0u64..200, 0u64..20).prop_map(|(start, len)| r(start, start + len));
        proptest::collection::vec(one, 0..20).prop_map(union)
    }

    proptest! {
        #[test]
        fn every_address_lands_in_exactly_one_part(a in ranges(), b in ranges()) {
            let (only_a, both) = (subtract(&a, &b), intersect(&a, &b));
            let has = |list: &[AddressRange], x| list.iter().any(|range| range.contains(x));
            for x in 0..220 {
                prop_assert_eq!(has(&only_a, x), has(&a, x) && !has(&b, x));
                prop_assert_eq!(has(&both, x), has(&a, x) && has(&b, x));
            }
        }
    }
}
