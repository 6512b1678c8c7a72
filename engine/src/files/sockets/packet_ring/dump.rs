//! Reading what waits in rings, and where the kernel is in them.

use std::os::fd::AsFd;

use firn_proto::PacketSockEntry;
use firn_sys::mapping::SharedMapping;
use firn_sys::{Errno, Result};

use super::{
    BLOCK_FIRST, BLOCK_HEADER, BLOCK_LAST_TIME, BLOCK_LEN, BLOCK_NUMBER, BLOCK_PACKETS,
    BLOCK_STATUS, BLOCK_TIMEOUT, CLOCKS, DumpedRings, HEADER, Layout, Ring, SEND_REQUEST, Side,
    Slot, USER, WRONG_FORMAT, half_word, long_word, word_at,
};

/// Reads what waits in the rings of a socket that `fd` leads to. `head_in_kernel` tells, if it can, where the kernel
/// is in a ring of frames.
///
/// # Errors
/// The rings can't be mapped.
pub(in crate::files::sockets) fn dump(
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

#[cfg(test)]
mod tests {
    use super::super::tests::layout;
    use super::super::{KERNEL, VERSION_3};
    use super::*;

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
