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

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use firn_proto::{PacketRing, PacketSockEntry};
use firn_sys::mapping::SharedMapping;
use firn_sys::socket::{self, AF_PACKET, Outgoing, SOCK_RAW, SOL_PACKET, packet};
use firn_sys::{Errno, Result};

use super::packets::Packet;

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

/// A protocol for experiments, in network order, that nobody else should listen to.
const EXPERIMENTAL: u16 = 0x88b5u16.to_be();
/// A frame of the least length.
const TINY: usize = 60;
/// The largest frame that is sent over the loopback interface.
const LARGE: usize = 60_000;
/// A frame that most interfaces take.
const SHORT: usize = 1400;
/// Frames arrive at once, but another processor may have to bring them.
const PATIENCE: Duration = Duration::from_secs(2);
/// Times that a ring is made anew because a block's time was over at the wrong moment.
const MAX_TRIES: usize = 5;

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

/// Reads what waits in the rings of a socket that `fd` leads to. `head_in_kernel` tells, if it can, where the kernel
/// is in a ring of frames.
///
/// # Errors
/// The rings can't be mapped.
pub(super) fn dump(
    fd: impl AsFd,
    entry: &PacketSockEntry,
    head_in_kernel: impl Fn(Side) -> Option<u32>,
) -> Result<DumpedRings> {
    let mut dumped = DumpedRings::default();
    let (layouts, len) = Layout::of(entry).ok_or(Errno::EINVAL)?;
    if layouts.is_empty() {
        return Ok(dumped);
    }
    let memory = SharedMapping::of_file(fd.as_fd(), len)?;
    for layout in layouts {
        let ring = Ring {
            layout,
            memory: &memory,
        };
        let in_kernel = || head_in_kernel(layout.side).filter(|head| *head < layout.nr_slots);
        match layout.side {
            Side::Receive if layout.is_by_block() => dump_blocks(&ring, &mut dumped),
            Side::Receive => dump_received(&ring, in_kernel, &mut dumped),
            Side::Send => dump_unsent(&ring, in_kernel, &mut dumped),
        }
    }
    Ok(dumped)
}

/// Blocks that the program has not given back, and the one that is being filled.
fn dump_blocks(ring: &Ring<'_>, dumped: &mut DumpedRings) {
    let number = |nth: &u32| long_word(&ring.bytes(*nth, BLOCK_HEADER), BLOCK_NUMBER);
    let active = ring.slots().max_by_key(number).unwrap_or(0);
    let mut head = active;
    for nth in ring.slots() {
        let header = ring.bytes(nth, BLOCK_HEADER);
        let is_users = ring.status(nth) & USER != 0;
        let is_begun = nth == active && word_at(&header, BLOCK_PACKETS).unwrap_or(0) > 0;
        if !is_users && !is_begun {
            continue;
        }
        if nth == active {
            head = ring.layout.after(active);
        }
        let len = word_at(&header, BLOCK_LEN).unwrap_or(0);
        let len = usize::try_from(len).unwrap_or(usize::MAX).max(BLOCK_HEADER);
        let mut bytes = ring.bytes(nth, len);
        if !is_users {
            // It may have got more meanwhile.
            bytes[..BLOCK_HEADER].copy_from_slice(&header);
            end_block(&mut bytes);
        }
        dumped.slots.push(Slot {
            side: Side::Receive,
            nth,
            bytes,
        });
    }
    dumped.receive_head = Some(head);
}

/// Makes a block that is being filled one whose time was over.
fn end_block(block: &mut [u8]) {
    const NEXT: usize = 0;
    const TIME: usize = 4;
    let number = |block: &[u8], at| word_at(block, at).and_then(|word| usize::try_from(word).ok());
    let mut at = number(block, BLOCK_FIRST).unwrap_or(usize::MAX);
    for _ in 1..word_at(block, BLOCK_PACKETS).unwrap_or(0) {
        match number(block, at.saturating_add(NEXT)) {
            Some(next) if next > 0 => at = at.saturating_add(next),
            _ => break,
        }
    }
    let end = at.saturating_add(TIME + 8);
    if let Some(packet) = block.get_mut(at..end) {
        packet[NEXT..NEXT + 4].fill(0);
        block.copy_within(at + TIME..end, BLOCK_LAST_TIME);
    }
    let status = USER | BLOCK_TIMEOUT;
    block[BLOCK_STATUS..BLOCK_STATUS + 4].copy_from_slice(&status.to_ne_bytes());
}

/// Frames that the program has not read.
fn dump_received(ring: &Ring<'_>, in_kernel: impl Fn() -> Option<u32>, dumped: &mut DumpedRings) {
    let is_users = |nth| ring.status(nth) & USER != 0;
    let (mac, time) = if ring.layout.version == 0 {
        (16, 20)
    } else {
        (12, 16)
    };
    let came = |nth| {
        let header = ring.bytes(nth, HEADER);
        let part = |at| word_at(&header, at).unwrap_or(0);
        (part(time), part(time + 4))
    };
    let latest = || {
        let newest = ring.slots().max_by_key(|nth| came(*nth))?;
        (came(newest) != (0, 0)).then(|| ring.layout.after(newest))
    };
    let head = ring.only_begin(|nth| !is_users(nth));
    let head = head.or_else(in_kernel).or_else(latest).unwrap_or(0);
    dumped.receive_head = Some(head);
    for nth in ring.slots() {
        // The last frame that came tells a later dump where the kernel is.
        let is_last = nth == ring.layout.before(head) && came(nth) != (0, 0);
        if !is_users(nth) && !is_last {
            continue;
        }
        let header = ring.bytes(nth, HEADER);
        let snap_len = word_at(&header, ring.layout.len_place() + 4).unwrap_or(0);
        let len = half_word(&header, mac).saturating_add(usize::try_from(snap_len).unwrap_or(0));
        let len = if is_users(nth) {
            len.max(HEADER)
        } else {
            HEADER
        };
        dumped.slots.push(Slot {
            side: Side::Receive,
            nth,
            bytes: ring.bytes(nth, len),
        });
    }
}

/// Frames that the kernel has not sent.
fn dump_unsent(ring: &Ring<'_>, in_kernel: impl Fn() -> Option<u32>, dumped: &mut DumpedRings) {
    let waits = |nth| ring.status(nth) & !CLOCKS == SEND_REQUEST;
    let is_used = |nth| ring.status(nth) != 0 || ring.word(nth, ring.layout.len_place()) != 0;
    let head = match ring.slots().any(is_used) {
        true => ring.only_begin(waits).or_else(in_kernel),
        false => Some(0),
    };
    dumped.send_head = head;
    dumped.send_head_is_lost = head.is_none();
    for nth in ring.slots() {
        if matches!(ring.status(nth) & !CLOCKS, SEND_REQUEST | WRONG_FORMAT) {
            dumped.slots.push(Slot {
                side: Side::Send,
                nth,
                bytes: ring.bytes(nth, usize::MAX),
            });
        }
    }
}

/// Gives fresh rings of a socket that hears nothing yet what they had. `remake` makes them anew.
///
/// # Errors
/// The kernel could not be moved on, most likely because the loopback interface is down.
pub(super) fn restore(
    fd: &OwnedFd,
    entry: &PacketSockEntry,
    packets: &[Packet],
    remake: impl Fn() -> Result<()>,
) -> Result<()> {
    let firn = entry.firn.unwrap_or_default();
    let heads = [firn.rx_head.unwrap_or(0), firn.tx_head.unwrap_or(0)];
    if heads == [0, 0] && packets.is_empty() {
        return Ok(());
    }
    let (layouts, len) = Layout::of(entry).ok_or(Errno::EINVAL)?;
    let slots = slots_of(packets, &layouts)?;
    for attempt in 1..=MAX_TRIES {
        let memory = SharedMapping::of_file(fd.as_fd(), len)?;
        let result = refill(fd, entry, &memory, &layouts, &slots);
        drop(memory);
        match result {
            Err(Errno::EAGAIN) if attempt < MAX_TRIES => remake()?,
            result => return result,
        }
    }
    Err(Errno::EAGAIN)
}

/// The slots of an image, which must be of the rings.
fn slots_of(packets: &[Packet], layouts: &[Layout]) -> Result<Vec<Slot>> {
    let slot = |packet: &Packet| {
        let (side, nth) = packet.ring_slot?;
        let layout = layouts.iter().find(|layout| layout.side == side)?;
        let fits = nth < layout.nr_slots
            && (layout.status_place() + 4..=layout.slot_len()).contains(&packet.bytes.len());
        fits.then(|| Slot {
            side,
            nth,
            bytes: packet.bytes.clone(),
        })
    };
    let slots: Option<Vec<Slot>> = packets.iter().map(slot).collect();
    slots.ok_or(Errno::EINVAL)
}

fn refill(
    fd: &OwnedFd,
    entry: &PacketSockEntry,
    memory: &SharedMapping,
    layouts: &[Layout],
    slots: &[Slot],
) -> Result<()> {
    let firn = entry.firn.unwrap_or_default();
    let rings = layouts.iter().map(|layout| Ring {
        layout: *layout,
        memory,
    });
    // First the one that sends: its frames would come into the other one.
    for ring in rings.rev() {
        let own = || slots.iter().filter(|slot| slot.side == ring.layout.side);
        let head = match ring.layout.side {
            Side::Receive => firn.rx_head.unwrap_or(0),
            Side::Send => firn.tx_head.unwrap_or(0),
        };
        if head >= ring.layout.nr_slots {
            return Err(Errno::EINVAL);
        }
        let is_full = own().any(|slot| slot.nth == head);
        match ring.layout.side {
            Side::Send => send_through(fd, entry, &ring, head)?,
            Side::Receive if head > 0 || (is_full && ring.layout.is_by_block()) => {
                let source = Source::begin(fd)?;
                match ring.layout.is_by_block() {
                    true => source.fill_blocks(&ring, head, is_full)?,
                    false => source.fill_frames(&ring, head)?,
                }
                // What was heard so is not to be counted.
                let _ = socket::option(fd, SOL_PACKET, packet::STATISTICS, 12);
            }
            Side::Receive => {}
        }
        own().for_each(|slot| ring.put(slot));
    }
    Ok(())
}

/// Lets the kernel send frames from the first slots of a ring.
fn send_through(fd: &OwnedFd, entry: &PacketSockEntry, ring: &Ring<'_>, head: u32) -> Result<()> {
    if head == 0 {
        return Ok(());
    }
    let layout = ring.layout;
    let begin = layout.header_len();
    // Before the frame there may be a `struct virtio_net_hdr`, which says nothing when it is zero.
    const MAX_VNET: usize = 12;
    let prefix = if entry.vnet_hdr { MAX_VNET } else { 0 };
    let frame = [vec![0; prefix], frame(TINY)].concat();
    if layout.frame_size < begin + frame.len() {
        return Err(Errno::EINVAL);
    }
    let len = u32::try_from(frame.len()).expect("it is short");
    for nth in 0..head {
        ring.memory.write(layout.place(nth) + begin, &frame);
        ring.set_word(nth, layout.len_place(), len);
        ring.set_status(nth, SEND_REQUEST);
    }
    let is_sent = || (0..head).all(|nth| ring.status(nth) & !CLOCKS == 0);
    let destination = loopback()?;
    await_that(|| {
        let sent = send(fd, &[], &destination);
        Ok(sent.is_ok() && is_sent())
    })?;
    let clean = vec![0; begin + frame.len()];
    for nth in 0..head {
        ring.memory.write(layout.place(nth), &clean);
        // It tells a later dump that the ring was used.
        ring.set_word(nth, layout.len_place(), len);
    }
    Ok(())
}

/// A frame of zeros with the protocol for experiments.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; len.max(TINY)];
    frame[12..14].copy_from_slice(&EXPERIMENTAL.to_ne_bytes());
    frame
}

fn loopback() -> Result<Vec<u8>> {
    let index = socket::interface_index("lo")?;
    Ok(packet::address(index, EXPERIMENTAL))
}

fn send(fd: &OwnedFd, bytes: &[u8], destination: &[u8]) -> Result<()> {
    let message = Outgoing {
        bytes,
        destination: Some(destination),
        ..Outgoing::default()
    };
    socket::send(fd, &message).map(drop)
}

/// Waits until something is so.
///
/// # Errors
/// Of the question. ETIMEDOUT.
fn await_that(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !holds()? {
        if started.elapsed() > PATIENCE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Sends frames to a socket that hears nothing else.
struct Source {
    sender: OwnedFd,
    destination: Vec<u8>,
}

impl Source {
    fn begin(receiver: &OwnedFd) -> Result<Source> {
        let destination = loopback()?;
        socket::bind(receiver, &destination)?;
        Ok(Source {
            sender: socket::create(AF_PACKET, SOCK_RAW, 0)?,
            destination,
        })
    }

    /// Sends a frame of about that many bytes.
    fn send(&self, len: usize) -> Result<()> {
        await_that(
            || match send(&self.sender, &frame(len), &self.destination) {
                Err(Errno::EAGAIN) => Ok(false),
                Err(Errno::EMSGSIZE) if len > SHORT => {
                    send(&self.sender, &frame(SHORT), &self.destination)?;
                    Ok(true)
                }
                result => result.map(|()| true),
            },
        )
    }

    /// Fills as many frames, and gives them back.
    fn fill_frames(&self, ring: &Ring<'_>, count: u32) -> Result<()> {
        for nth in 0..count {
            self.send(TINY)?;
            await_that(|| Ok(ring.status(nth) & USER != 0))?;
        }
        for nth in 0..count {
            ring.memory.write(ring.layout.place(nth), &[0; HEADER]);
        }
        Ok(())
    }

    /// Fills blocks until the kernel is at `head`, which belongs to the program if the ring is full.
    ///
    /// # Errors
    /// EAGAIN: the time of a block was over at the wrong moment, and the kernel is at another one.
    fn fill_blocks(&self, ring: &Ring<'_>, head: u32, is_full: bool) -> Result<()> {
        let layout = ring.layout;
        let count = if head == 0 { layout.nr_slots } else { head };
        let last = count - 1;
        for nth in 0..last {
            while ring.status(nth) & USER == 0 {
                self.send_into(ring, nth, LARGE.min(layout.block_size))?;
            }
        }
        if is_full {
            // The kernel waits for it to be given back.
            ring.set_status(head, USER);
        }
        self.close_block(ring, last)?;
        if !is_full {
            pass_over(ring, head)?;
        }
        let others = (0..count).filter(|nth| *nth != head);
        others.for_each(|nth| ring.set_status(nth, KERNEL));
        Ok(())
    }

    /// Fills a block so that only a tiny frame comes into the next one.
    fn close_block(&self, ring: &Ring<'_>, nth: u32) -> Result<()> {
        let mut of_tiny = None;
        while ring.status(nth) & USER == 0 {
            let used = ring.len_used(nth);
            let room = ring.layout.block_size.saturating_sub(used);
            let wanted = match of_tiny {
                Some(of_tiny) if room > of_tiny => {
                    let around = of_tiny - TINY + ALIGNMENT;
                    room.saturating_sub(around).clamp(TINY, LARGE)
                }
                _ => TINY,
            };
            self.send_into(ring, nth, wanted)?;
            of_tiny.get_or_insert(ring.len_used(nth).saturating_sub(used).max(TINY));
        }
        Ok(())
    }

    /// Sends a frame that comes into a block or closes it.
    fn send_into(&self, ring: &Ring<'_>, nth: u32, len: usize) -> Result<()> {
        let used = ring.len_used(nth);
        self.send(len)?;
        await_that(|| Ok(ring.len_used(nth) != used || ring.status(nth) & USER != 0))
    }
}

/// Lets what has come into a block that is being filled be no part of it: the next packet is its first.
///
/// # Errors
/// EAGAIN: it is not being filled any more.
fn pass_over(ring: &Ring<'_>, nth: u32) -> Result<()> {
    let is_closed = || ring.status(nth) & USER != 0;
    await_that(|| Ok(ring.word(nth, BLOCK_PACKETS) > 0 || is_closed()))?;
    ring.set_word(nth, BLOCK_FIRST, ring.word(nth, BLOCK_LEN));
    ring.set_word(nth, BLOCK_PACKETS, 0);
    match is_closed() {
        true => Err(Errno::EAGAIN),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: PacketRing = PacketRing {
        block_size: 4096,
        block_nr: 2,
        frame_size: 1024,
        frame_nr: 8,
        retire_tmo: 0,
        sizeof_priv: 0,
        features: 0,
    };

    fn layout(side: Side, version: u32) -> Layout {
        Layout::new(side, version, &GEOMETRY, 0).expect("it is possible")
    }

    fn memory() -> SharedMapping {
        let file = firn_sys::memfd::create(c"ring", 0).expect("a memory file");
        file.set_len(8192).expect("room");
        SharedMapping::of_file(file.as_fd(), 8192).expect("mapped")
    }

    fn received(ring: &Ring<'_>) -> DumpedRings {
        let mut dumped = DumpedRings::default();
        dump_received(ring, || None, &mut dumped);
        dumped
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

    #[test]
    fn frames_that_nobody_has_read_are_between_program_and_kernel() {
        let memory = memory();
        let layout = layout(Side::Receive, 1);
        let ring = Ring {
            layout,
            memory: &memory,
        };
        assert_eq!(received(&ring).receive_head, Some(0));
        assert!(received(&ring).slots.is_empty());
        // It went round once: 6 and 7, then 0.
        for (nth, time) in [(5, 8), (6, 9), (7, 10), (0, 11)] {
            ring.set_word(nth, 4, 100);
            ring.set_word(nth, 8, 100);
            ring.set_word(nth, 12, 80 << 16 | 66);
            ring.set_word(nth, 16, time);
            ring.set_status(nth, if nth == 5 { KERNEL } else { USER });
        }
        let dumped = received(&ring);
        assert_eq!(dumped.receive_head, Some(1));
        let slots: Vec<_> = dumped
            .slots
            .iter()
            .map(|s| (s.nth, s.bytes.len()))
            .collect();
        assert_eq!(slots, [(0, 166), (6, 166), (7, 166)]);
        // All are read: the last one that came tells.
        ring.slots().for_each(|nth| ring.set_status(nth, KERNEL));
        let dumped = received(&ring);
        assert_eq!(dumped.receive_head, Some(1));
        assert_eq!(dumped.slots.len(), 1);
        // All are full: the same.
        ring.slots().for_each(|nth| ring.set_status(nth, USER));
        assert_eq!(received(&ring).receive_head, Some(1));
    }

    #[test]
    fn a_block_that_is_being_filled_is_ended() {
        let memory = memory();
        let ring = Ring {
            layout: layout(Side::Receive, VERSION_3),
            memory: &memory,
        };
        let dumped = |ring: &Ring<'_>| {
            let mut dumped = DumpedRings::default();
            dump_blocks(ring, &mut dumped);
            dumped
        };
        ring.set_word(0, BLOCK_NUMBER, 3);
        ring.set_word(0, BLOCK_FIRST, 48);
        ring.set_word(0, BLOCK_LEN, 48);
        assert_eq!(dumped(&ring).receive_head, Some(0));
        assert!(dumped(&ring).slots.is_empty());
        ring.set_word(0, BLOCK_PACKETS, 2);
        ring.set_word(0, BLOCK_LEN, 248);
        ring.set_word(0, 48, 100);
        ring.set_word(0, 148, 100);
        ring.set_word(0, 148 + 4, 77);
        let found = dumped(&ring);
        assert_eq!(found.receive_head, Some(1));
        let block = &found.slots[0].bytes;
        assert_eq!(block.len(), 248);
        assert_eq!(word_at(block, BLOCK_STATUS), Some(USER | BLOCK_TIMEOUT));
        assert_eq!(word_at(block, BLOCK_LAST_TIME), Some(77));
        assert_eq!(
            (word_at(block, 48), word_at(block, 148)),
            (Some(100), Some(0))
        );
        // Whatever stands there, nothing is read outside.
        ring.set_word(0, BLOCK_PACKETS, u32::MAX);
        ring.set_word(0, BLOCK_FIRST, u32::MAX - 3);
        ring.set_word(0, BLOCK_LEN, 20);
        assert!(dumped(&ring).slots.len() <= 1);
        // Both are the program's: the kernel waits for the older one.
        ring.set_word(1, BLOCK_NUMBER, 4);
        ring.set_status(0, USER);
        ring.set_status(1, USER);
        assert_eq!(dumped(&ring).receive_head, Some(0));
    }

    #[test]
    fn a_ring_that_was_used_tells_nothing_by_itself() {
        let memory = memory();
        let ring = Ring {
            layout: layout(Side::Send, 1),
            memory: &memory,
        };
        let unsent = |in_kernel: Option<u32>| {
            let mut dumped = DumpedRings::default();
            dump_unsent(&ring, || in_kernel, &mut dumped);
            dumped
        };
        assert_eq!(unsent(None).send_head, Some(0));
        ring.set_word(2, ring.layout.len_place(), 60);
        assert_eq!(unsent(Some(3)).send_head, Some(3));
        assert!(unsent(None).send_head_is_lost);
        ring.set_status(3, SEND_REQUEST);
        let found = unsent(None);
        assert_eq!(found.send_head, Some(3));
        assert_eq!(found.slots[0].bytes.len(), 1024);
    }
}
