//! Making a ring again.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use firn_proto::FirnUringEntry;
use firn_sys::Errno;
use firn_sys::io_uring::{self, request, setup};
use firn_sys::mapping::SharedMapping;

use super::layout::{self, Layout};
use crate::files::error::FileRestoreError;

/// Bits that this restores; others come from images of later versions.
const KNOWN: u32 = setup::SQE128 | setup::CQE32 | setup::NO_SQARRAY;
const PAGE: usize = 4096;
const OPCODE: usize = 0;
const FLAGS: usize = 1;

/// Makes the ring and brings it to where it was.
pub(super) fn open(ring: &FirnUringEntry) -> Result<OwnedFd, FileRestoreError> {
    let corrupt = |what: &str| FileRestoreError::corrupt(ring.id, what);
    if ring.setup_flags & !KNOWN != 0 {
        return Err(FileRestoreError::Unsupported {
            id: ring.id,
            kind: "io_uring ring with parameters that are not known",
        });
    }
    let layout = layout::of_image(ring).map_err(corrupt)?;
    let skipped = ring.sq_head.wrapping_sub(ring.cq_tail);
    if skipped != ring.sq_dropped.unwrap_or(0) {
        return Err(corrupt("requests of the io_uring ring are in flight"));
    }
    let refused = |action| FileRestoreError::refused(action, "an io_uring ring");
    let made = io_uring::create(layout.params()).map_err(refused("create"))?;
    if !layout.fits(&made) {
        return Err(FileRestoreError::Unsupported {
            id: ring.id,
            kind: "io_uring ring of a shape that this kernel gives another layout",
        });
    }
    let fd = made.fd;
    let memory = Memory::map(&fd, layout).map_err(refused("map"))?;
    memory
        .turn(&fd, ring.cq_tail, skipped)
        .map_err(refused("move the indices of"))?;
    memory.write(ring);
    crate::files::open::set_flags(&fd, ring.flags, "an io_uring ring")?;
    Ok(fd)
}

/// A ring's memory in this process.
struct Memory {
    layout: Layout,
    rings: SharedMapping,
    entries: SharedMapping,
}

impl Memory {
    fn map(fd: &OwnedFd, layout: Layout) -> Result<Memory, Errno> {
        let map = |offset, len: usize| io_uring::map(fd, offset, len.next_multiple_of(PAGE));
        Ok(Memory {
            layout,
            rings: map(io_uring::OFFSET_RINGS, layout.rings_len())?,
            entries: map(io_uring::OFFSET_ENTRIES, layout.entries_len())?,
        })
    }

    /// Moves the kernel's counters: `completed` requests that do nothing, and then `dropped` entries that are
    /// none, as they were.
    fn turn(&self, fd: &OwnedFd, completed: u32, dropped: u32) -> Result<(), Errno> {
        for nth in 0..self.layout.sq_entries {
            let at = self.layout.entry_len() * number(nth);
            self.entries.write(at + OPCODE, &[request::NOP, 0]);
            self.point(nth, nth);
        }
        self.submit(fd, completed)?;
        for nth in 0..self.layout.sq_entries {
            let at = self.layout.entry_len() * number(nth);
            self.entries.write(at + FLAGS, &[request::SKIP_SUCCESS]);
        }
        self.submit(fd, dropped)
    }

    /// Has so many entries taken, and their completions with them. The tail may be far ahead: the kernel takes
    /// no more at once than there are entries.
    fn submit(&self, fd: &OwnedFd, nr: u32) -> Result<(), Errno> {
        let word = |at| self.rings.word(at);
        let tail = word(layout::SQ_TAIL).load(Ordering::Acquire);
        word(layout::SQ_TAIL).store(tail.wrapping_add(nr), Ordering::Release);
        let mut left = nr;
        while left > 0 {
            let taken = io_uring::submit(fd, left.min(self.layout.sq_entries))?;
            if taken == 0 || taken > left {
                return Err(Errno::EIO);
            }
            left -= taken;
            let put = word(layout::CQ_TAIL).load(Ordering::Acquire);
            word(layout::CQ_HEAD).store(put, Ordering::Release);
        }
        Ok(())
    }

    fn point(&self, nth: u32, entry: u32) {
        if self.layout.array_len() > 0 {
            let at = self.layout.array() + 4 * number(nth);
            self.rings.write(at, &entry.to_le_bytes());
        }
    }

    /// Writes everything that is the program's.
    fn write(&self, ring: &FirnUringEntry) {
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

fn number(count: u32) -> usize {
    usize::try_from(count).expect("usize has at least 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(flags: u32, sq_entries: u32, cq_entries: u32) -> FirnUringEntry {
        let layout = Layout::new(sq_entries, cq_entries, flags).expect("possible");
        let has_array = flags & setup::NO_SQARRAY == 0;
        FirnUringEntry {
            setup_flags: flags,
            sq_entries,
            cq_entries,
            sq_head: 1003,
            sq_tail: 1005,
            cq_head: 998,
            cq_tail: 1000,
            sq_dropped: Some(3),
            sqes: vec![5; layout.entries_len()],
            cqes: vec![6; layout.completions_len()],
            sq_array: has_array.then(|| vec![0; layout.array_len()]),
            ..FirnUringEntry::default()
        }
    }

    #[test]
    fn a_ring_comes_to_stand_where_it_was() {
        let smallest = Layout::new(1, 2, 0).expect("possible");
        if io_uring::create(smallest.params()).is_err() {
            eprintln!("skipped: no io_uring here");
            return;
        }
        let shapes = [
            (0, 8, 16),
            (setup::NO_SQARRAY, 4, 64),
            (setup::SQE128 | setup::CQE32, 8, 8),
        ];
        for (flags, sq_entries, cq_entries) in shapes {
            let ring = image(flags, sq_entries, cq_entries);
            let fd = open(&ring).expect("a ring");
            let layout = layout::of_image(&ring).expect("sound");
            let memory = Memory::map(&fd, layout).expect("memory");
            let word = |at| memory.rings.word(at).load(Ordering::Acquire);
            assert_eq!(word(layout::SQ_HEAD), 1003);
            assert_eq!(word(layout::SQ_TAIL), 1005);
            assert_eq!(word(layout::CQ_HEAD), 998);
            assert_eq!(word(layout::CQ_TAIL), 1000);
            assert_eq!(memory.entries.read(0, 2), [5, 5]);
        }
    }

    #[test]
    fn what_is_in_flight_or_unknown_is_not_restored() {
        let busy = FirnUringEntry {
            sq_dropped: None,
            ..image(0, 8, 16)
        };
        assert!(matches!(open(&busy), Err(FileRestoreError::Corrupt { .. })));
        let odd = image(1 << 30, 8, 16);
        let result = open(&odd);
        assert!(matches!(result, Err(FileRestoreError::Unsupported { .. })));
    }
}
