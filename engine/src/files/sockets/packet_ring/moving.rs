//! Moving the kernel on in fresh rings, by frames that it sends or hears over the loopback interface.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use firn_proto::PacketSockEntry;
use firn_sys::socket::{self, AF_PACKET, Outgoing, SOCK_RAW, packet};
use firn_sys::{Errno, Result};

use super::{
    ALIGNMENT, BLOCK_FIRST, BLOCK_LEN, BLOCK_PACKETS, CLOCKS, HEADER, KERNEL, Ring, SEND_REQUEST,
    USER,
};

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

/// Lets the kernel send frames from the first slots of a ring.
pub(super) fn send_through(
    fd: &OwnedFd,
    entry: &PacketSockEntry,
    ring: &Ring<'_>,
    head: u32,
) -> Result<()> {
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
pub(super) struct Source {
    sender: OwnedFd,
    destination: Vec<u8>,
}

impl Source {
    pub(super) fn begin(receiver: &OwnedFd) -> Result<Source> {
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
    pub(super) fn fill_frames(&self, ring: &Ring<'_>, count: u32) -> Result<()> {
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
    pub(super) fn fill_blocks(&self, ring: &Ring<'_>, head: u32, is_full: bool) -> Result<()> {
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
