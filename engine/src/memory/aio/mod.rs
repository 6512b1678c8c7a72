//! Asynchronous I/O contexts (io_setup): a ring of events in memory, whose address is the context's id.
//!
//! The kernel shows the ring only, as a mapping. Everything else follows from it: the size that io_setup
//! was asked for from its length, the kernel's own tail from the tail in its header. What is in flight is
//! shown nowhere, see [`settle`].
//!
//! ```text
//! offset  size  field of the header, all little-endian
//!      0     4  id                 index in the kernel's table of contexts, chosen by the kernel
//!      4     4  nr                 number of events that the ring holds
//!      8     4  head               where the next event is taken, moved by the program or the kernel
//!     12     4  tail               where the next event is put; the kernel has a copy of its own
//!     16     4  magic              0xa10a10a1
//!     20     4  compat_features    1
//!     24     4  incompat_features  0
//!     28     4  header_length      32
//!     32   32n  events
//! ```
//!
//! A restored context is made by io_setup wherever the kernel likes and moved to its old address, which
//! changes its id. Its tail moves as it always does, by requests that end: writes to /dev/null.
//!
//! Source: linux fs/aio.c, struct aio_ring, ioctx_alloc, aio_ring_mremap.

mod dump;
mod restore;

pub use dump::settle;
pub(super) use restore::{AioPlan, PROT_AT_FIRST, plan};

use firn_proto::AioRingEntry;

use super::range::{AddressRange, PAGE_SIZE};
use super::smaps::Mapping;
use super::vma::{Vma, status};

pub(super) const HEADER_LEN: usize = 32;
const EVENT_LEN: u64 = 32;
const MAGIC: u32 = 0xa10a_10a1;
/// Longest ring that the kernel makes.
const MAX_LEN: u64 = 1 << 29;

/// The head of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    nr: u32,
    head: u32,
    tail: u32,
}

impl Header {
    /// Reads the head of a ring that is `len` bytes long; None where it is none.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN], len: u64) -> Option<Header> {
        let word = |nth: usize| {
            let bytes = bytes[4 * nth..4 * nth + 4].try_into();
            u32::from_le_bytes(bytes.expect("four bytes"))
        };
        let header = Header {
            nr: word(1),
            head: word(2),
            tail: word(3),
        };
        let is_sound = word(4) == MAGIC
            && u64::from(header.nr) == nr_events(len)
            && header.head < header.nr
            && header.tail < header.nr;
        is_sound.then_some(header)
    }

    /// Events that have not been taken yet.
    fn waiting(self) -> u32 {
        (self.tail + self.nr - self.head) % self.nr
    }
}

/// Whether a mapping is the ring of a context.
pub(super) fn is_ring(mapping: &Mapping) -> bool {
    mapping.name.starts_with(b"/[aio]")
}

/// Number of events in a ring.
fn nr_events(len: u64) -> u64 {
    len.saturating_sub(EVENT_LEN) / EVENT_LEN
}

/// What images say of a context: its address, and how many requests to ask io_setup for. The kernel doubles
/// that number, adds two, and fills the last page.
fn entry(range: AddressRange) -> AioRingEntry {
    let nr_req = (nr_events(range.len()).saturating_sub(2)) / 2;
    AioRingEntry {
        id: range.start,
        nr_req: u32::try_from(nr_req).unwrap_or(u32::MAX),
        ring_len: u32::try_from(range.len()).unwrap_or(u32::MAX),
    }
}

/// The entries of all rings among the mappings.
pub(super) fn entries(vmas: &[Vma]) -> Vec<AioRingEntry> {
    let rings = vmas.iter().filter(|vma| vma.is(status::AIORING));
    rings.map(|vma| entry(vma.range)).collect()
}

/// What is wrong with the entries, which must be those of the mappings.
pub(super) fn problem(vma: &Vma, entries: &[AioRingEntry]) -> Option<&'static str> {
    let len = vma.range.len();
    let known = entries
        .iter()
        .find(|entry| entry.id == vma.range.start && u64::from(entry.ring_len) == len);
    match known {
        None => Some("is a ring of asynchronous I/O without an entry among the contexts"),
        Some(entry) if entry.nr_req == 0 => Some("is a context for no requests"),
        Some(_) if !(PAGE_SIZE..=MAX_LEN).contains(&len) => Some("is no ring by its size"),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(words: [u32; 8]) -> [u8; HEADER_LEN] {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.try_into().expect("eight words")
    }

    #[test]
    fn reads_the_header_that_the_kernel_writes() {
        let bytes = header([0, 127, 120, 5, MAGIC, 1, 0, 32]);
        let read = Header::parse(&bytes, PAGE_SIZE).expect("captured from a kernel");
        assert_eq!((read.nr, read.head, read.tail), (127, 120, 5));
        assert_eq!(read.waiting(), 12);
        assert_eq!(Header::parse(&bytes, 2 * PAGE_SIZE), None);
        let beyond = header([0, 127, 127, 5, MAGIC, 1, 0, 32]);
        assert_eq!(Header::parse(&beyond, PAGE_SIZE), None);
        let foreign = header([0, 127, 1, 5, 7, 1, 0, 32]);
        assert_eq!(Header::parse(&foreign, PAGE_SIZE), None);
    }

    #[test]
    fn asks_for_as_many_requests_as_the_length_tells() {
        for (pages, nr_req) in [(1, 62), (2, 126), (6, 382), (18, 1150)] {
            let range = AddressRange::new(0x10000, 0x10000 + pages * PAGE_SIZE);
            let entry = entry(range);
            assert_eq!(entry.nr_req, nr_req);
            let bytes = EVENT_LEN + EVENT_LEN * (2 * u64::from(nr_req) + 2);
            assert_eq!(bytes.div_ceil(PAGE_SIZE), pages);
        }
    }
}
