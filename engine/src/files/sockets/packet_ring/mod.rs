//! What is in the rings of packet sockets, and where in them the kernel is.
//!
//! ```text
//! ring                        slots    a slot belongs to the program while it has
//! receiving, versions 1, 2    frames   TP_STATUS_USER
//! receiving, version 3        blocks   TP_STATUS_USER; the kernel fills one block at a time
//! sending                     frames   anything but TP_STATUS_SEND_REQUEST and TP_STATUS_SENDING
//! ```
//!
//! A program remembers in its own memory which slot comes next, and the kernel in its; a fresh ring begins with
//! the first one. So a restore moves the kernel on by as many slots as it was ahead: a ring that sends sends
//! frames of a protocol for experiments over the loopback interface, one that receives hears such frames, before
//! anything else is connected to it. Then the slots get back what nobody had read, or sent.
//!
//! Where the kernel is, the slots tell: by who owns them, by the times that frames came, by the numbers of
//! blocks. Of a ring for sending only the kernel's own structures tell, unless frames wait in it. A block that was
//! being filled comes back as one whose time was over. Not kept: the numbers of blocks count from 1 again.
//!
//! Source: linux Documentation/networking/packet_mmap.rst; net/packet/af_packet.c.

mod dump;
mod moving;
mod restore;

use std::sync::atomic::Ordering;

use firn_proto::{PacketRing, PacketSockEntry};
use firn_sys::mapping::SharedMapping;

pub(super) use dump::dump;
pub(super) use restore::restore;

/// Statuses of slots.
const KERNEL: u32 = 0;
const USER: u32 = 1;
const SEND_REQUEST: u32 = 1;
const WRONG_FORMAT: u32 = 4;
/// Bits of a sent frame that say which clock its time is of.
const CLOCKS: u32 = 7 << 29;
/// A block whose time was over before it was full.
const BLOCK_TIMEOUT: u32 = 1 << 5;

const VERSION_3: u32 = 2;
/// What slots begin at a multiple of: `TPACKET_ALIGNMENT`.
const ALIGNMENT: usize = 16;
/// Header of a frame: `struct tpacket_hdr`, `struct tpacket2_hdr`, `struct tpacket3_hdr`.
const HEADER: usize = 32;
const HEADER_3: usize = 48;
/// Header of a block: `struct tpacket_block_desc`.
const BLOCK_HEADER: usize = 48;
const BLOCK_STATUS: usize = 8;
const BLOCK_PACKETS: usize = 12;
const BLOCK_FIRST: usize = 16;
const BLOCK_LEN: usize = 20;
const BLOCK_NUMBER: usize = 24;
const BLOCK_LAST_TIME: usize = 40;

/// One of a socket's rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The ring for receiving.
    Receive,
    /// The ring for sending.
    Send,
}

/// What a slot holds that the program has not read, or the kernel not sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) side: Side,
    /// Its place in the ring.
    pub(super) nth: u32,
    /// As it stands in the ring, up to where it is used.
    pub(super) bytes: Vec<u8>,
}

/// The rings of a socket, being dumped.
#[derive(Debug, Default)]
pub(super) struct DumpedRings {
    /// The slot that the kernel fills next.
    pub(super) receive_head: Option<u32>,
    /// The slot that the kernel sends next; None also where nothing tells.
    pub(super) send_head: Option<u32>,
    /// Nothing tells where the ring for sending is.
    pub(super) send_head_is_lost: bool,
    pub(super) slots: Vec<Slot>,
}

/// Where the slots of a ring are in the mapping of all rings of a socket.
#[derive(Debug, Clone, Copy)]
struct Layout {
    side: Side,
    version: u32,
    begin: usize,
    block_size: usize,
    frame_size: usize,
    nr_slots: u32,
}

impl Layout {
    /// The rings of a socket, and the bytes that they take together. None for a geometry that no ring has.
    fn of(entry: &PacketSockEntry) -> Option<(Vec<Layout>, usize)> {
        let (mut layouts, mut begin) = (Vec::new(), 0usize);
        let rings = [
            (Side::Receive, &entry.rx_ring),
            (Side::Send, &entry.tx_ring),
        ];
        for (side, ring) in rings {
            let Some(ring) = ring else { continue };
            let layout = Layout::new(side, entry.version, ring, begin)?;
            let blocks = usize::try_from(ring.block_nr).ok()?;
            begin = begin.checked_add(layout.block_size.checked_mul(blocks)?)?;
            layouts.push(layout);
        }
        Some((layouts, begin))
    }

    fn new(side: Side, version: u32, ring: &PacketRing, begin: usize) -> Option<Layout> {
        let by_block = side == Side::Receive && version == VERSION_3;
        let layout = Layout {
            side,
            version,
            begin,
            block_size: usize::try_from(ring.block_size).ok()?,
            frame_size: usize::try_from(ring.frame_size).ok()?,
            nr_slots: if by_block {
                ring.block_nr
            } else {
                ring.frame_nr
            },
        };
        let frames_of_block = layout.block_size.checked_div(layout.frame_size)?;
        let nr_frames = u64::try_from(frames_of_block).ok()? * u64::from(ring.block_nr);
        let is_possible = layout.slot_len() >= BLOCK_HEADER
            && layout.block_size.is_multiple_of(ALIGNMENT)
            && layout.frame_size.is_multiple_of(ALIGNMENT)
            && layout.nr_slots > 0
            && (by_block || nr_frames >= u64::from(ring.frame_nr));
        is_possible.then_some(layout)
    }

    fn is_by_block(self) -> bool {
        self.side == Side::Receive && self.version == VERSION_3
    }

    fn slot_len(self) -> usize {
        if self.is_by_block() {
            self.block_size
        } else {
            self.frame_size
        }
    }

    /// Where a slot begins.
    fn place(self, nth: u32) -> usize {
        let nth = usize::try_from(nth).expect("numbers of slots fit usize");
        let within = match self.is_by_block() {
            true => nth * self.block_size,
            false => {
                let frames_of_block = self.block_size / self.frame_size;
                nth / frames_of_block * self.block_size + nth % frames_of_block * self.frame_size
            }
        };
        self.begin + within
    }

    /// Where the status of a slot is in it. (The first version's has 64 bits, of which 32 are used.)
    fn status_place(self) -> usize {
        match (self.is_by_block(), self.version) {
            (true, _) => BLOCK_STATUS,
            (false, VERSION_3) => 20,
            (false, _) => 0,
        }
    }

    /// Where the length of a frame is in its slot.
    fn len_place(self) -> usize {
        match self.version {
            0 => 8,
            VERSION_3 => 16,
            _ => 4,
        }
    }

    fn header_len(self) -> usize {
        if self.version == VERSION_3 {
            HEADER_3
        } else {
            HEADER
        }
    }

    fn after(self, nth: u32) -> u32 {
        (nth + 1) % self.nr_slots
    }

    fn before(self, nth: u32) -> u32 {
        nth.checked_sub(1).unwrap_or(self.nr_slots - 1)
    }
}

/// A ring in memory that the kernel writes to as well.
struct Ring<'a> {
    layout: Layout,
    memory: &'a SharedMapping,
}

impl Ring<'_> {
    fn word(&self, nth: u32, place: usize) -> u32 {
        let at = self.layout.place(nth) + place;
        self.memory.word(at).load(Ordering::Acquire)
    }

    fn set_word(&self, nth: u32, place: usize, value: u32) {
        let at = self.layout.place(nth) + place;
        self.memory.word(at).store(value, Ordering::Release);
    }

    fn status(&self, nth: u32) -> u32 {
        self.word(nth, self.layout.status_place())
    }

    fn set_status(&self, nth: u32, status: u32) {
        self.set_word(nth, self.layout.status_place(), status);
    }

    /// Bytes in use of a block.
    fn len_used(&self, nth: u32) -> usize {
        usize::try_from(self.word(nth, BLOCK_LEN)).unwrap_or(usize::MAX)
    }

    fn bytes(&self, nth: u32, len: usize) -> Vec<u8> {
        let len = len.min(self.layout.slot_len());
        self.memory.read(self.layout.place(nth), len)
    }

    fn slots(&self) -> std::ops::Range<u32> {
        0..self.layout.nr_slots
    }

    /// The one slot with `has` whose neighbour before it has not.
    fn only_begin(&self, has: impl Fn(u32) -> bool) -> Option<u32> {
        let mut begins = self
            .slots()
            .filter(|nth| has(*nth) && !has(self.layout.before(*nth)));
        begins.next().filter(|_| begins.next().is_none())
    }

    /// Puts a slot back; its status comes last.
    fn put(&self, slot: &Slot) {
        let status_at = self.layout.status_place();
        let Some(status) = word_at(&slot.bytes, status_at) else {
            return;
        };
        // Nobody may see another status meanwhile: the kernel would take a block that it waits for.
        let (place, rest) = (self.layout.place(slot.nth), status_at + 4);
        self.memory.write(place, &slot.bytes[..status_at]);
        self.memory.write(place + rest, &slot.bytes[rest..]);
        self.set_status(slot.nth, status);
    }
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().expect("four bytes")))
}

fn half_word(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 2).map_or(0, |half| {
        usize::from(u16::from_ne_bytes([half[0], half[1]]))
    })
}

fn long_word(bytes: &[u8], at: usize) -> u64 {
    let word = |at| u64::from(word_at(bytes, at).unwrap_or(0));
    word(at) | word(at + 4) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const GEOMETRY: PacketRing = PacketRing {
        block_size: 4096,
        block_nr: 2,
        frame_size: 1024,
        frame_nr: 8,
        retire_tmo: 0,
        sizeof_priv: 0,
        features: 0,
    };

    pub(super) fn layout(side: Side, version: u32) -> Layout {
        Layout::new(side, version, &GEOMETRY, 0).expect("it is possible")
    }

    #[test]
    fn rings_follow_each_other() {
        let entry = PacketSockEntry {
            version: 1,
            rx_ring: Some(GEOMETRY),
            tx_ring: Some(GEOMETRY),
            ..PacketSockEntry::default()
        };
        let (layouts, len) = Layout::of(&entry).expect("possible");
        assert_eq!(len, 16384);
        assert_eq!(layouts[1].place(5), 8192 + 5 * 1024);
        let blocks = layout(Side::Receive, VERSION_3);
        assert_eq!((blocks.place(1), blocks.nr_slots), (4096, 2));
        let odd = PacketRing {
            frame_size: 0,
            ..GEOMETRY
        };
        assert!(Layout::new(Side::Receive, 0, &odd, 0).is_none());
    }
}
