//! Which mappings a child gets from its parent at fork, so that pages they shared are shared again.
//!
//! Images do not say what was shared. But pages that are equal, at the same address of the same
//! mapping, in a child and its parent, may be shared without anybody noticing; so the child inherits
//! the mapping, drops the pages that only the parent has, and gets only the pages that differ.

use firn_sys::mm::{advice, map};

use super::image::MemoryImage;
use super::range::{self, AddressRange};
use super::vma::{Vma, status};

/// A child that would have to drop more ranges than this of a mapping gets it anew instead.
const MAX_DROPPED_RANGES: usize = 512;

/// Advice that has to be the same in both, because it is given before the fork or can't be taken back.
const SAME_ADVICE: u64 = 1 << advice::HUGEPAGE | 1 << advice::NOHUGEPAGE;

/// A mapping that a child inherits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inherited {
    /// Index among the child's mappings.
    pub child: usize,
    /// Index among the parent's mappings.
    pub parent: usize,
}

/// What a child gets from its parent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inheritance {
    /// The mappings, ascending.
    pub mappings: Vec<Inherited>,
    /// Pages that came along and that the child does not have.
    pub dropped: Vec<AddressRange>,
}

/// Finds what a child can inherit from its parent.
pub fn inheritance(parent: &MemoryImage, child: &MemoryImage) -> Inheritance {
    let parent_pages = parent.page_ranges();
    let child_pages = child.page_ranges();
    let mut found = Inheritance::default();
    for (index, vma) in child.vmas().iter().enumerate() {
        let at = parent
            .vmas()
            .partition_point(|other| other.range.end <= vma.range.start);
        let Some(other) = parent.vmas().get(at) else {
            break;
        };
        if !can_inherit(other, vma) {
            continue;
        }
        let mut dropped = Vec::new();
        if vma.has_own_pages() {
            let came = range::intersect(&parent_pages, &[vma.range]);
            dropped = range::subtract(&came, &child_pages);
        }
        if dropped.len() <= MAX_DROPPED_RANGES {
            found.dropped.extend(dropped);
            found.mappings.push(Inherited {
                child: index,
                parent: at,
            });
        }
    }
    found
}

fn can_inherit(parent: &Vma, child: &Vma) -> bool {
    let kernels = status::VDSO | status::VVAR | status::VSYSCALL;
    let never = kernels | status::SYSVIPC | status::SHSTK;
    let never_flags = map::HUGETLB | map::DROPPABLE;
    let is_mappable = child.status & never == 0
        && !child.has_flag(never_flags)
        && !child.is_ring
        && child.status & status::REGULAR != 0;
    // Whether the kernel calls it heap follows from the addresses alone.
    let heap = status::HEAP;
    is_mappable
        && parent.range.covers(child.range)
        && parent.flags & !map::LOCKED == child.flags & !map::LOCKED
        && parent.status & !heap == child.status & !heap
        && parent.shmid == child.shmid
        && parent.open_flags == child.open_flags
        && parent.advice & SAME_ADVICE == child.advice & SAME_ADVICE
        && has_same_offset(parent, child)
}

fn has_same_offset(parent: &Vma, child: &Vma) -> bool {
    !child.has_object()
        || child.offset.wrapping_sub(parent.offset) == child.range.start - parent.range.start
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64) -> Vma {
        Vma {
            range: AddressRange::new(start, end),
            offset: 0,
            shmid: 0,
            prot: 3,
            flags: map::PRIVATE | map::ANONYMOUS,
            status: status::REGULAR | status::ANON_PRIVATE,
            advice: 0,
            open_flags: None,
            lock_on_fault: false,
            is_sealed: false,
            is_ring: false,
        }
    }

    #[test]
    fn inherits_what_lies_inside_and_is_alike() {
        let parent = vma(0x1000, 0x9000);
        assert!(can_inherit(&parent, &vma(0x1000, 0x9000)));
        assert!(can_inherit(&parent, &vma(0x2000, 0x3000)));
        assert!(!can_inherit(&parent, &vma(0x2000, 0xa000)));
        let mut other = vma(0x1000, 0x9000);
        other.flags |= map::NORESERVE;
        assert!(!can_inherit(&parent, &other));
        // The protection is given again at the end.
        let mut other = vma(0x1000, 0x9000);
        other.prot = 1;
        assert!(can_inherit(&parent, &other));
        other.advice = 1 << advice::HUGEPAGE;
        assert!(!can_inherit(&parent, &other));
        other.advice = 1 << advice::DONTFORK;
        assert!(can_inherit(&parent, &other));
        let mut shadow = vma(0x1000, 0x9000);
        shadow.status |= status::SHSTK;
        assert!(!can_inherit(&shadow, &shadow));
    }

    #[test]
    fn file_offsets_must_fit() {
        let mut parent = vma(0x1000, 0x9000);
        parent.status = status::REGULAR | status::FILE_PRIVATE;
        parent.offset = 0x4000;
        let mut child = parent;
        child.range.start = 0x3000;
        assert!(!can_inherit(&parent, &child));
        child.offset = 0x6000;
        assert!(can_inherit(&parent, &child));
    }
}
