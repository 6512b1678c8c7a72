//! Fresh memory, which the coordinator fills without a single page fault.
//!
//! Writing into pages that are not there yet costs a fault and a cleared page for each, which is most of
//! the time of a large restore. UFFDIO_COPY makes the page with its contents in one step, from outside,
//! and leaves no trace in the mapping: the task opens a userfaultfd for its large private mappings and
//! waits, the coordinator fetches a duplicate of it and fills, and the task closes it.
//!
//! Huge pages would be cheaper still, but not where the machine's hypervisor has taken free memory back
//! (1.7 to 3 times the time of small pages, measured), and a mapping that asks for them keeps asking.
//! Mappings that get them anyway are written to in the ordinary way.

use firn_sys::mm::{advice, map};
use firn_sys::{nr, uffd};

use super::emit::words;
use super::piece::Piece;
use super::range::{self, AddressRange};
use super::vma::{Vma, status};
use crate::program::{Arg, Program, Rule, Slot};

/// Less than this in a mapping is not worth the calls.
const MIN_BYTES: u64 = 1 << 20;
/// Mappings beyond these are written to in the ordinary way.
const MAX_MAPPINGS: usize = 256;

/// Whether memory can be filled in this way here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreshFacts {
    /// The kernel copies pages into place, and does not give huge pages to everybody.
    pub can_copy: bool,
}

impl FreshFacts {
    /// Looks at the machine.
    pub fn probe() -> FreshFacts {
        let policy = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        let always_huge = policy.is_ok_and(|text| text.contains("[always]"));
        FreshFacts {
            can_copy: !always_huge && uffd::probe_copy().is_ok(),
        }
    }
}

/// The mappings, ascending, out of those that are about to be made, that are filled through userfaultfd.
pub(super) fn choose<'a>(
    mapped: impl Iterator<Item = &'a Vma>,
    filled: &[Piece],
    facts: &FreshFacts,
) -> Vec<AddressRange> {
    if !facts.can_copy || filled.is_empty() {
        return Vec::new();
    }
    let filled = range::union(filled.iter().map(|piece| piece.range).collect());
    let mut chosen: Vec<AddressRange> = mapped
        .filter(|vma| is_plain(vma) && bytes_in(&filled, vma.range) >= MIN_BYTES)
        .map(|vma| vma.range)
        .take(MAX_MAPPINGS)
        .collect();
    chosen.sort_unstable_by_key(|range| range.start);
    chosen
}

/// How much of a range is filled.
fn bytes_in(filled: &[AddressRange], range: AddressRange) -> u64 {
    let first = filled.partition_point(|part| part.end <= range.start);
    let parts = filled[first..].iter();
    let inside = parts.take_while(|part| part.start < range.end);
    inside.map(|part| part.intersect(range).len()).sum()
}

fn is_plain(vma: &Vma) -> bool {
    let plain = status::REGULAR | status::ANON_PRIVATE;
    vma.status & !status::HEAP == plain
        && !vma.has_flag(map::GROWSDOWN | map::LOCKED | map::HUGETLB | map::DROPPABLE)
        && !vma.has_advice(advice::HUGEPAGE)
}

/// Opens a userfaultfd for the mappings; its number is in the slot when the program goes on.
pub(super) fn open(p: &mut Program, mappings: &[AddressRange]) -> Option<Slot> {
    if mappings.is_empty() {
        return None;
    }
    let flags = Arg::from(uffd::USER_MODE_ONLY);
    let why = "userfaultfd to fill fresh memory";
    let fd = p.call_to_slot(nr::USERFAULTFD, &[flags], Rule::Ok, why);
    ioctl(p, fd, uffd::API, &uffd::API_ARG, "UFFDIO_API".to_owned());
    for range in mappings {
        let argument = uffd::register_arg(range.start, range.len());
        let why = format!("UFFDIO_REGISTER of [{range}]");
        ioctl(p, fd, uffd::REGISTER, &argument, why);
    }
    Some(fd)
}

/// Closes it, which leaves the mappings as if it had never been there.
pub(super) fn close(p: &mut Program, fd: Slot) {
    let why = "close of the userfaultfd";
    p.call(nr::CLOSE, &[Arg::Slot(fd)], Rule::Exact(0), why);
}

fn ioctl(p: &mut Program, fd: Slot, request: u64, argument: &[u64], why: String) {
    let call = [Arg::Slot(fd), request.into(), words(p, argument)];
    p.call(nr::IOCTL, &call, Rule::Exact(0), why);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_filled_is_summed_up_inside_a_mapping_only() {
        let filled = [(0, 0x2000), (0x3000, 0x5000), (0x9000, 0xa000)];
        let filled = filled.map(|(start, end)| AddressRange::new(start, end));
        assert_eq!(bytes_in(&filled, AddressRange::new(0x1000, 0x4000)), 0x2000);
        assert_eq!(bytes_in(&filled, AddressRange::new(0x5000, 0x9000)), 0);
    }
}
