//! A ring's memory in this process.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use firn_proto::FirnUringEntry;
use firn_sys::Errno;
use firn_sys::io_uring;
use firn_sys::mapping::SharedMapping;

use super::layout::{self, Layout, number};

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
        let word = |at: usize| self.word(at);
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
        self.write_entries(ring);
        self.write_completions(ring);
        self.set_word(layout::SQ_DROPPED, ring.sq_dropped.unwrap_or(0));
        self.set_word(layout::CQ_OVERFLOW, ring.cq_overflow.unwrap_or(0));
    }

    /// Writes the completions that the program had, and how far it has taken them. What has come behind them stays.
    pub(super) fn write_completions(&self, ring: &FirnUringEntry) {
        let new = self
            .word(layout::CQ_TAIL)
            .wrapping_sub(ring.cq_tail)
            .cast_signed();
        let new = new.max(0).unsigned_abs();
        let len = self.layout.completion_len();
        for nth in new..self.layout.cq_entries {
            let place = ring.cq_tail.wrapping_add(nth) & (self.layout.cq_entries - 1);
            let at = len * number(place);
            let bytes = &ring.cqes[at..at + len];
            self.rings.write(layout::COMPLETIONS + at, bytes);
        }
        self.set_word(layout::CQ_HEAD, self.possible_head(ring));
        self.set_word(layout::CQ_FLAGS, ring.cq_flags.unwrap_or(0));
    }

    /// The head of completions as far as there are any: those that repeat what was told are still to come.
    fn possible_head(&self, ring: &FirnUringEntry) -> u32 {
        let waiting = ring.cq_tail.wrapping_sub(ring.cq_head);
        let missing = ring.cq_tail.wrapping_sub(self.word(layout::CQ_TAIL));
        let missing = missing.cast_signed().max(0).unsigned_abs();
        ring.cq_tail.wrapping_sub(waiting.max(missing))
    }

    /// Writes the program's submission entries, and where they end.
    pub(super) fn write_entries(&self, ring: &FirnUringEntry) {
        self.entries.write(0, &ring.sqes);
        if let Some(array) = &ring.sq_array {
            self.rings.write(self.layout.array(), array);
        }
        self.set_word(layout::SQ_TAIL, ring.sq_tail);
    }

    /// Writes the beginning of an entry, or all of it, and has the index of the same number lead to it.
    pub(super) fn put_entry(&self, nth: u32, entry: &[u8]) {
        let at = self.layout.entry_len() * number(nth);
        self.entries.write(at, entry);
        if self.layout.array_len() > 0 {
            let at = self.layout.array() + 4 * number(nth);
            self.rings.write(at, &nth.to_le_bytes());
        }
    }

    /// Values and results of the completions from one on.
    pub(super) fn completions_from(&self, first: u32) -> Vec<(u64, i32)> {
        let layout = self.layout;
        let put = self.word(layout::CQ_TAIL).wrapping_sub(first);
        let completion = |nth: u32| {
            let place = first.wrapping_add(nth) & (layout.cq_entries - 1);
            let at = layout::COMPLETIONS + layout.completion_len() * number(place);
            let bytes = self.rings.read(at, 12);
            let (value, result) = bytes.split_at(8);
            (
                u64::from_le_bytes(value.try_into().expect("eight bytes")),
                i32::from_le_bytes(result.try_into().expect("four bytes")),
            )
        };
        (0..put.min(layout.cq_entries)).map(completion).collect()
    }

    /// A word of the head.
    pub(super) fn word(&self, at: usize) -> u32 {
        self.rings.word(at).load(Ordering::Acquire)
    }

    /// Sets a word of the head.
    pub(super) fn set_word(&self, at: usize, value: u32) {
        self.rings.word(at).store(value, Ordering::Release);
    }
}
