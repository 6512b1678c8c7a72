//! Where everything is in a ring's memory.
//!
//! ```text
//! rings                                   entries
//! offset  size  field                     offset  size  field
//!      0     4  head of submissions            0   64n  submission entries, or 128n
//!      4     4  tail of submissions
//!      8     4  head of completions
//!     12     4  tail of completions
//!     16    16  masks and numbers of entries
//!     32     4  entries dropped
//!     36     4  flags of submissions, the kernel's
//!     40     4  flags of completions, the program's
//!     44     4  completions lost
//!     64   16m  completions, or 32m
//!      …    4n  indices of submission entries, at a multiple of 64
//! ```
//!
//! Source: linux include/linux/io_uring_types.h, struct io_rings; io_uring.c, rings_size.

use firn_proto::FirnUringEntry;
use firn_sys::io_uring::{Params, Ring, setup};

pub(super) const SQ_HEAD: usize = 0;
pub(super) const SQ_TAIL: usize = 4;
pub(super) const CQ_HEAD: usize = 8;
pub(super) const CQ_TAIL: usize = 12;
pub(super) const SQ_ENTRIES: usize = 24;
pub(super) const CQ_ENTRIES: usize = 28;
pub(super) const SQ_DROPPED: usize = 32;
pub(super) const SQ_FLAGS: usize = 36;
pub(super) const CQ_FLAGS: usize = 40;
pub(super) const CQ_OVERFLOW: usize = 44;
pub(super) const COMPLETIONS: usize = 64;

const MAX_SQ_ENTRIES: u32 = 32_768;
const MAX_CQ_ENTRIES: u32 = 2 * MAX_SQ_ENTRIES;
const ALIGNMENT: usize = 64;

/// The shape of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) sq_entries: u32,
    pub(super) cq_entries: u32,
    flags: u32,
}

impl Layout {
    /// The shape by numbers of entries and `IORING_SETUP_*` bits; None for one that no ring has.
    pub(super) fn new(sq_entries: u32, cq_entries: u32, flags: u32) -> Option<Layout> {
        let possible = sq_entries.is_power_of_two()
            && cq_entries.is_power_of_two()
            && sq_entries <= cq_entries
            && sq_entries <= MAX_SQ_ENTRIES
            && cq_entries <= MAX_CQ_ENTRIES;
        possible.then_some(Layout {
            sq_entries,
            cq_entries,
            flags,
        })
    }

    /// Whether an `IORING_SETUP_*` bit is set.
    pub(super) fn has(self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Bytes of one submission entry.
    pub(super) fn entry_len(self) -> usize {
        if self.has(setup::SQE128) { 128 } else { 64 }
    }

    /// Bytes of all submission entries.
    pub(super) fn entries_len(self) -> usize {
        self.entry_len() * number(self.sq_entries)
    }

    /// Bytes of one completion.
    pub(super) fn completion_len(self) -> usize {
        if self.has(setup::CQE32) { 32 } else { 16 }
    }

    /// Bytes of all completions.
    pub(super) fn completions_len(self) -> usize {
        self.completion_len() * number(self.cq_entries)
    }

    /// Bytes of the array of indices.
    pub(super) fn array_len(self) -> usize {
        match self.has(setup::NO_SQARRAY) {
            true => 0,
            false => 4 * number(self.sq_entries),
        }
    }

    /// Where the array of indices begins. With wide completions the kernel doubles the head's length as well.
    pub(super) fn array(self) -> usize {
        let head = if self.has(setup::CQE32) {
            2 * COMPLETIONS
        } else {
            COMPLETIONS
        };
        (head + self.completions_len()).next_multiple_of(ALIGNMENT)
    }

    /// Whether the kernel has put the array of a ring of this shape where this says.
    pub(super) fn fits(self, ring: &Ring) -> bool {
        self.array_len() == 0 || self.array() == number(ring.array)
    }

    /// What a ring of this shape is made with.
    pub(super) fn params(self) -> Params {
        let mut params = Params {
            flags: self.flags,
            sq_entries: self.sq_entries,
            ..Params::default()
        };
        if self.cq_entries != 2 * self.sq_entries {
            params.flags |= setup::CQSIZE;
            params.cq_entries = self.cq_entries;
        }
        params
    }

    /// Bytes of head, completions and indices.
    pub(super) fn rings_len(self) -> usize {
        self.array() + self.array_len()
    }
}

/// The shape of the ring that an image describes; what is wrong with it otherwise.
pub(super) fn of_image(ring: &FirnUringEntry) -> Result<Layout, &'static str> {
    let layout = Layout::new(ring.sq_entries, ring.cq_entries, ring.setup_flags);
    let layout = layout.ok_or("no io_uring ring has so many entries")?;
    if ring.sq_tail.wrapping_sub(ring.sq_head) > ring.sq_entries
        || ring.cq_tail.wrapping_sub(ring.cq_head) > ring.cq_entries
    {
        return Err("more entries wait in the io_uring ring than it has");
    }
    let array = ring.sq_array.as_deref().unwrap_or_default();
    if ring.sqes.len() != layout.entries_len()
        || ring.cqes.len() != layout.completions_len()
        || array.len() != layout.array_len()
    {
        return Err("the entries of the io_uring ring are not complete");
    }
    Ok(layout)
}

/// A number of entries.
pub(super) fn number(count: u32) -> usize {
    usize::try_from(count).expect("usize has at least 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stand_where_the_kernel_puts_them() {
        // As io_uring_setup tells on Linux 6.18 for 8 entries: sq_off.array, cq_off.cqes.
        let plain = Layout::new(8, 16, 0).expect("possible");
        assert_eq!((plain.array(), plain.rings_len()), (320, 352));
        let bare = Layout::new(8, 16, setup::NO_SQARRAY).expect("possible");
        assert_eq!(bare.rings_len(), 320);
        let wide = Layout::new(8, 16, setup::CQE32 | setup::SQE128).expect("possible");
        assert_eq!((wide.array(), wide.entries_len()), (640, 1024));
    }

    #[test]
    fn impossible_rings_are_refused() {
        assert_eq!(Layout::new(7, 16, 0), None);
        assert_eq!(Layout::new(16, 8, 0), None);
        assert_eq!(Layout::new(1 << 20, 1 << 21, 0), None);
        let ring = FirnUringEntry {
            sq_entries: 1,
            cq_entries: 2,
            sqes: vec![0; 64],
            cqes: vec![0; 32],
            sq_array: Some(vec![0; 4]),
            ..FirnUringEntry::default()
        };
        assert!(of_image(&ring).is_ok());
        let overfull = FirnUringEntry {
            cq_tail: 3,
            ..ring.clone()
        };
        assert!(of_image(&overfull).is_err());
        let cut = FirnUringEntry {
            sqes: Vec::new(),
            ..ring
        };
        assert!(of_image(&cut).is_err());
    }
}
