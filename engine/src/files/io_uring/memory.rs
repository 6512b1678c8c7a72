//! A ring's memory in this process.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use firn_proto::FirnUringEntry;
use firn_sys::Errno;
use firn_sys::io_uring;
use firn_sys::mapping::SharedMapping;

use super::layout::{self, Layout};

const PAGE: usize = 4096;

/// A ring's memory in this process.
pub(super) struct Memory {
    pub(super) layout: Layout,
    pub(super) rings: SharedMapping,
    pub(super) entries: SharedMapping,
}

impl Memory {
    /// Maps it.
    ///
    /// # Errors
    /// EINVAL for a ring of another shape; ENOMEM.
    pub(super) fn map(fd: impl AsFd, layout: Layout) -> Result<Memory, Errno> {
        let map = |offset, len: usize| io_uring::map(&fd, offset, len.next_multiple_of(PAGE));
        Ok(Memory {
            layout,
            rings: map(io_uring::OFFSET_RINGS, layout.rings_len())?,
            entries: map(io_uring::OFFSET_ENTRIES, layout.entries_len())?,
        })
    }

    /// Reads everything; what else an image holds is left to the caller.
    pub(super) fn read(&self, flags: u32) -> FirnUringEntry {
        let layout = self.layout;
        let word = |at: usize| self.rings.word(at).load(Ordering::Acquire);
        let some = |at: usize| Some(word(at)).filter(|value| *value != 0);
        let has_array = layout.array_len() > 0;
        FirnUringEntry {
            setup_flags: flags,
            sq_entries: layout.sq_entries,
            cq_entries: layout.cq_entries,
            sq_head: word(layout::SQ_HEAD),
            sq_tail: word(layout::SQ_TAIL),
            cq_head: word(layout::CQ_HEAD),
            cq_tail: word(layout::CQ_TAIL),
            sq_dropped: some(layout::SQ_DROPPED),
            cq_overflow: some(layout::CQ_OVERFLOW),
            cq_flags: some(layout::CQ_FLAGS),
            sqes: self.entries.read(0, layout.entries_len()),
            cqes: self
                .rings
                .read(layout::COMPLETIONS, layout.completions_len()),
            sq_array: has_array.then(|| self.rings.read(layout.array(), layout.array_len())),
            ..FirnUringEntry::default()
        }
    }

    /// Writes everything that is the program's.
    pub(super) fn write(&self, ring: &FirnUringEntry) {
        self.entries.write(0, &ring.sqes);
        self.rings.write(layout::COMPLETIONS, &ring.cqes);
        if let Some(array) = &ring.sq_array {
            self.rings.write(self.layout.array(), array);
        }
        let words = [
            (layout::SQ_TAIL, ring.sq_tail),
            (layout::CQ_HEAD, ring.cq_head),
            (layout::SQ_DROPPED, ring.sq_dropped.unwrap_or(0)),
            (layout::CQ_FLAGS, ring.cq_flags.unwrap_or(0)),
            (layout::CQ_OVERFLOW, ring.cq_overflow.unwrap_or(0)),
        ];
        for (at, value) in words {
            self.rings.word(at).store(value, Ordering::Release);
        }
    }
}
