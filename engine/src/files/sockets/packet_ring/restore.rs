//! Giving rings back what they had.

use std::os::fd::{AsFd, OwnedFd};

use firn_proto::PacketSockEntry;
use firn_sys::mapping::SharedMapping;
use firn_sys::socket::{self, SOL_PACKET, packet};
use firn_sys::{Errno, Result};

use super::super::packets::Packet;
use super::moving::{Source, send_through};
use super::{Layout, Ring, Side, Slot};

/// Times that a ring is made anew because a block's time was over at the wrong moment.
const MAX_TRIES: usize = 5;

/// Gives fresh rings of a socket that hears nothing yet what they had. `remake` makes them anew.
///
/// # Errors
/// The kernel could not be moved on, most likely because the loopback interface is down.
pub(in crate::files::sockets) fn restore(
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
