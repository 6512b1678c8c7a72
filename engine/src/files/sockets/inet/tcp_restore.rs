//! Making TCP connections again, without a packet.
//!
//! ```text
//! repair    a socket in repair mode is connected without a handshake, with the old sequence numbers
//! receive   what had been received is put into the queue
//! end       a closed direction of a peer outside is told by a packet of our own making
//! wake      repair mode ends; the network lock drops what the socket says from here on
//! queue     what was not acknowledged is queued, as new data: in repair mode it would count as sent and
//!           wait for a retransmission timeout. What the lock drops counts as not sent
//! push      the lock is lifted; the peer is probed, and the kernel sends what is queued
//! ```
//!
//! A restorer that dies before the tasks live without it takes all sockets with it. Their last words, a reset
//! or the end of the stream, are dropped by the lock, which stays. The end is repeated for a while by a
//! socket that nobody has any more; the next restore ends that one ([`super::orphans`]).
//!
//! What the peer has got already it drops as a duplicate, and acknowledges. An acknowledgement of bytes
//! that count as never sent would be ignored, though, and with it all that the peer says, so this is done only for
//! as much as the first flight takes, and its last segment holds nothing new, for which the peer's window may be full.
//! More of it goes into the queue in repair mode; how much of it has arrived the peer answers to the window probe. A
//! peer that is restored, too, tells what it has.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_images::{ImageDir, ImageKind};
use firn_proto::{InetSkEntry, TcpOptsEntry, TcpStreamEntry};
use firn_sys::socket::tcp::{self, HandshakeOption, Queue, Repair};
use firn_sys::socket::{
    self, Outgoing, SO_BUF_LOCK, SO_REUSEADDR, SO_SNDBUFFORCE, SOL_IP, SOL_IPV6, SOL_SOCKET,
    SOL_TCP,
};
use firn_sys::{Errno, Result};

use super::orphans::Orphans;
use super::tcp_dump::{
    OPT_SACK, OPT_TIMESTAMPS, OPT_WSCALE, SYN_SENT, has_received_fin, has_sent_fin,
};
use super::{address, inject, local_of, remote_of, shown};
use crate::files::error::FileRestoreError;
use crate::network_lock::Connection;

/// Codes of handshake options on the wire.
const MSS: u32 = 2;
const WINDOW_SCALE: u32 = 3;
const SACK_PERMITTED: u32 = 4;
const TIMESTAMPS: u32 = 8;
/// Bytes that are put into a queue at once; larger pieces may find no memory in one.
const PIECE: usize = 64 << 10;
/// Room for everything that was in a queue.
const ROOMY: i32 = 1 << 28;

/// A connection that has been made and does not run yet.
#[derive(Debug)]
pub(in crate::files) struct Resting {
    entry: InetSkEntry,
    unsent: Vec<u8>,
    /// Bytes at the beginning of these that had been sent before.
    sent_before: usize,
    state: u32,
}

/// Both ends of a connection.
pub(super) fn connection_of(entry: &InetSkEntry) -> Option<Connection> {
    Some(Connection {
        local: local_of(entry)?,
        remote: remote_of(entry)?,
    })
}

/// Makes the connection of an entry on a fresh socket. `peer` is the other end, if this restore makes it,
/// too.
pub(super) fn make(
    fd: &OwnedFd,
    entry: &InetSkEntry,
    images: &ImageDir,
    peer: Option<&InetSkEntry>,
    orphans: &Orphans,
) -> std::result::Result<Resting, FileRestoreError> {
    let name = shown(entry);
    let refused = |action| FileRestoreError::refused(action, name.clone());
    let missing = || FileRestoreError::corrupt(entry.id, "its connection has no addresses");
    let ends = connection_of(entry).ok_or_else(missing)?;
    let mut reader = images.reader(ImageKind::TcpStream, entry.ino.into())?;
    let stream: TcpStreamEntry = reader.expect_entry()?;
    let received = reader.payload(stream.inq_len.into())?;
    let mut unsent = reader.payload(stream.outq_len.into())?;
    tcp::set_repair(fd, Repair::On).map_err(refused("repair"))?;
    let bound = orphans.end_for(|| socket::bind(fd, &address::to_raw(ends.local)));
    bound.map_err(refused("bind"))?;
    if entry.state == SYN_SENT {
        // It connects when packets flow again.
        return Ok(Resting::new(entry, unsent));
    }
    let got_end = u32::from(has_received_fin(entry.state));
    let sent_end = u32::from(has_sent_fin(entry.state));
    let rcv_nxt = stream.inq_seq.wrapping_sub(got_end);
    let mut snd_una = stream.outq_seq.wrapping_sub(sent_end);
    snd_una = snd_una.wrapping_sub(stream.outq_len);
    if let Some(peer) = peer {
        let has = received_by(peer, images)?.wrapping_sub(snd_una);
        if let Some(rest) = usize::try_from(has).ok().and_then(|has| unsent.get(has..)) {
            unsent = rest.to_vec();
            snd_una = snd_una.wrapping_add(has);
        }
    }
    connect(fd, &stream, ends, rcv_nxt, snd_una, orphans).map_err(refused("connect"))?;
    fill(fd, &received).map_err(refused("fill the queue of"))?;
    set_window(fd, &stream, got_end).map_err(refused("set the windows of"))?;
    sync_mss(fd, entry, ends);
    let sent = match peer {
        Some(_) => 0,
        None => stream.outq_len.saturating_sub(stream.unsq_len.unwrap_or(0)),
    };
    let mut sent_before = usize::try_from(sent)
        .expect("32 bits fit")
        .min(unsent.len());
    if sent > first_flight(fd, entry).map_err(refused("ask"))? {
        fill_sent(fd, &unsent[..sent_before]).map_err(refused("fill the queue of"))?;
        unsent.drain(..sent_before);
        sent_before = 0;
    }
    if got_end != 0 && peer.is_none() {
        let window = stream.rcv_wnd.unwrap_or(u32::from(u16::MAX));
        let end = inject::TcpEnd {
            ends: ends.on_the_wire(),
            seq: rcv_nxt,
            ack: snd_una,
            window: u16::try_from(window).unwrap_or(u16::MAX),
        };
        inject::end_of_stream(&end).map_err(refused("close the peer's direction of"))?;
    }
    Ok(Resting {
        sent_before,
        ..Resting::new(entry, unsent)
    })
}

/// Bytes that a connection sends before it hears from its peer.
fn first_flight(fd: &OwnedFd, entry: &InetSkEntry) -> Result<u32> {
    let corked = entry.tcp_opts.as_ref().and_then(|opts| opts.cork) == Some(true);
    if corked {
        // The last segment, which is not full, would not go.
        return Ok(0);
    }
    let info = tcp::info(fd)?;
    Ok(info.snd_mss.saturating_mul(info.snd_cwnd))
}

/// What the peer has received, when it is restored, too.
fn received_by(
    peer: &InetSkEntry,
    images: &ImageDir,
) -> std::result::Result<u32, FileRestoreError> {
    let mut reader = images.reader(ImageKind::TcpStream, peer.ino.into())?;
    let stream: TcpStreamEntry = reader.expect_entry()?;
    let end = u32::from(has_received_fin(peer.state));
    Ok(stream.inq_seq.wrapping_sub(end))
}

/// Lets the kernel work out the size of segments again: it has done so when the connection was made, before
/// it knew the peer's. A change of IP options makes it.
fn sync_mss(fd: impl AsFd, entry: &InetSkEntry, ends: Connection) {
    const IP_OPTIONS: i32 = 4;
    const IPV6_DSTOPTS: i32 = 59;
    let has_own = |level, name| {
        let wanted = (Some(level), Some(name));
        let mut options = entry.opts.firn.iter();
        options.any(|option| (option.level, option.name) == wanted)
    };
    let fd = fd.as_fd();
    let result = match ends.on_the_wire().local.is_ipv4() {
        true if has_own(SOL_IP, IP_OPTIONS) => Ok(()),
        true => socket::set_option(fd, SOL_IP, IP_OPTIONS, &[]),
        false => socket::set_option(fd, SOL_IPV6, IPV6_DSTOPTS, &[]),
    };
    if let Err(errno) = result {
        tracing::debug!("{}: segments stay small: {errno}", shown(entry));
    }
}

/// Puts bytes into the send queue of a connection in repair mode, as sent and not acknowledged.
fn fill_sent(fd: impl AsFd, bytes: &[u8]) -> Result<()> {
    let fd = fd.as_fd();
    tcp::choose_queue(fd, Some(Queue::Send))?;
    for piece in bytes.chunks(PIECE) {
        send_all(fd, piece, false)?;
    }
    tcp::choose_queue(fd, None)
}

fn connect(
    fd: impl AsFd,
    stream: &TcpStreamEntry,
    ends: Connection,
    rcv_nxt: u32,
    snd_una: u32,
    orphans: &Orphans,
) -> Result<()> {
    let fd = fd.as_fd();
    tcp::choose_queue(fd, Some(Queue::Receive))?;
    tcp::set_sequence(fd, rcv_nxt.wrapping_sub(stream.inq_len))?;
    tcp::choose_queue(fd, Some(Queue::Send))?;
    tcp::set_sequence(fd, snd_una)?;
    orphans.end_for(|| socket::connect(fd, &address::to_raw(ends.remote)))?;
    tcp::set_handshake(fd, &handshake(stream))?;
    match stream.timestamp {
        Some(value) if stream.opt_mask & OPT_TIMESTAMPS != 0 => tcp::set_timestamp(fd, value),
        _ => Ok(()),
    }
}

fn handshake(stream: &TcpStreamEntry) -> Vec<HandshakeOption> {
    let has = |option| stream.opt_mask & option != 0;
    let mut options = Vec::new();
    if has(OPT_SACK) {
        options.push((SACK_PERMITTED, 0));
    }
    if has(OPT_WSCALE) {
        let own = stream.rcv_wscale.unwrap_or(0);
        options.push((WINDOW_SCALE, stream.snd_wscale | own << 16));
    }
    if has(OPT_TIMESTAMPS) {
        options.push((TIMESTAMPS, 0));
    }
    options.push((MSS, stream.mss_clamp));
    options
}

/// Puts bytes into the receive queue of a connection in repair mode.
fn fill(fd: impl AsFd, bytes: &[u8]) -> Result<()> {
    let fd = fd.as_fd();
    tcp::choose_queue(fd, Some(Queue::Receive))?;
    for piece in bytes.chunks(PIECE) {
        send_all(fd, piece, false)?;
    }
    tcp::choose_queue(fd, None)
}

fn send_all(fd: BorrowedFd<'_>, mut bytes: &[u8], ends_segment: bool) -> Result<()> {
    while !bytes.is_empty() {
        let message = Outgoing {
            bytes,
            ends_segment,
            ..Outgoing::default()
        };
        bytes = &bytes[socket::send(fd, &message)?..];
    }
    Ok(())
}

fn set_window(fd: impl AsFd, stream: &TcpStreamEntry, got_end: u32) -> Result<()> {
    let window = (|| {
        Some(tcp::Window {
            snd_wl1: stream.snd_wl1?,
            snd_wnd: stream.snd_wnd?,
            max_window: stream.max_window?,
            rcv_wnd: stream.rcv_wnd?.wrapping_add(got_end),
            rcv_wup: stream.rcv_wup?.wrapping_sub(got_end),
        })
    })();
    match window {
        Some(window) => tcp::set_window(fd, &window),
        None => Ok(()),
    }
}

/// Sets TCP's own options.
pub(super) fn set_options(fd: impl AsFd, opts: &TcpOptsEntry) -> Result<()> {
    let fd = fd.as_fd();
    let set = |name, value: Option<i32>| match value {
        Some(value) => socket::set_number(fd, SOL_TCP, name, value),
        None => Ok(()),
    };
    set(tcp::TCP_NODELAY, opts.nodelay.map(i32::from))?;
    set(tcp::TCP_CORK, opts.cork.map(i32::from))?;
    set(tcp::TCP_KEEPIDLE, opts.keepidle.map(u32::cast_signed))?;
    set(tcp::TCP_KEEPINTVL, opts.keepintvl.map(u32::cast_signed))?;
    set(tcp::TCP_KEEPCNT, opts.keepcnt.map(u32::cast_signed))
}

impl Resting {
    fn new(entry: &InetSkEntry, unsent: Vec<u8>) -> Resting {
        Resting {
            entry: entry.clone(),
            unsent,
            sent_before: 0,
            state: entry.state,
        }
    }

    /// Number of the socket in files.img.
    pub(in crate::files::sockets) fn id(&self) -> u32 {
        self.entry.id
    }

    /// Ends repair mode.
    pub(in crate::files::sockets) fn wake(
        &self,
        fd: BorrowedFd<'_>,
    ) -> std::result::Result<(), FileRestoreError> {
        self.end_repair(fd).map_err(FileRestoreError::refused(
            "end the repair of",
            shown(&self.entry),
        ))
    }

    /// Ends repair mode, which sends a window probe, also where it has ended already; and undoes what it has changed.
    ///
    /// Source: linux net/ipv4/tcp.c, do_tcp_setsockopt, TCP_REPAIR_OFF.
    fn end_repair(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let reuse = self.entry.opts.reuseaddr == Some(true);
        tcp::set_repair(fd, Repair::Off)?;
        socket::set_number(fd, SOL_SOCKET, SO_REUSEADDR, reuse.into())
    }

    /// Queues what was not acknowledged, and closes the direction that was closed.
    pub(in crate::files::sockets) fn queue(
        &self,
        fd: BorrowedFd<'_>,
    ) -> std::result::Result<(), FileRestoreError> {
        let refused = |action| FileRestoreError::refused(action, shown(&self.entry));
        if self.state == SYN_SENT {
            let raw = remote_of(&self.entry)
                .map(address::to_raw)
                .unwrap_or_default();
            let flags = firn_sys::fcntl::flags(fd).map_err(refused("connect"))?;
            let nonblock = firn_sys::file::O_NONBLOCK.cast_unsigned();
            let result = firn_sys::fcntl::set_flags(fd, flags | nonblock)
                .and_then(|()| socket::connect(fd, &raw));
            let back = firn_sys::fcntl::set_flags(fd, flags);
            return match result {
                // The task learns of an error as it would have.
                Err(Errno::EINPROGRESS) | Ok(()) => back.map_err(refused("connect")),
                Err(errno) => {
                    tracing::warn!("{}: {errno}", shown(&self.entry));
                    Ok(())
                }
            };
        }
        if !self.unsent.is_empty() {
            self.send(fd)
                .map_err(refused("queue what was not acknowledged of"))?;
        }
        if has_sent_fin(self.state) {
            socket::shutdown(fd, socket::SHUT_WR).map_err(refused("close our direction of"))?;
        }
        Ok(())
    }

    /// Asks the peer for its window and for what it has received, and has the kernel send what it could not while
    /// packets were dropped.
    pub(in crate::files::sockets) fn push(&self, fd: BorrowedFd<'_>) {
        if self.state == SYN_SENT {
            return;
        }
        let is_corked = self.entry.tcp_opts.as_ref().and_then(|opts| opts.cork) == Some(true);
        let pushed = self.end_repair(fd).and_then(|()| match is_corked {
            // The peer's answer makes whole segments go, and no others.
            true => Ok(()),
            false => socket::set_number(fd, SOL_TCP, tcp::TCP_CORK, 0),
        });
        if let Err(errno) = pushed {
            tracing::debug!("{} waits for a timer: {errno}", shown(&self.entry));
        }
    }

    fn send(&self, fd: BorrowedFd<'_>) -> Result<()> {
        socket::set_number(fd, SOL_SOCKET, SO_SNDBUFFORCE, ROOMY)?;
        // What the peer may have is within its window. What follows may not be, and would hold up a segment with both.
        let (sent_before, rest) = self.unsent.split_at(self.sent_before);
        match send_all(fd, sent_before, true).and_then(|()| send_all(fd, rest, false)) {
            // The peer has gone meanwhile: the task will be told.
            Err(errno) if errno != Errno::EAGAIN => {
                tracing::warn!("{}: {errno}", shown(&self.entry))
            }
            result => result?,
        }
        let size = i32::try_from(self.entry.opts.so_sndbuf / 2).unwrap_or(i32::MAX);
        socket::set_number(fd, SOL_SOCKET, SO_SNDBUFFORCE, size)?;
        match self.entry.opts.so_buf_lock {
            Some(lock) => socket::set_number(fd, SOL_SOCKET, SO_BUF_LOCK, lock.cast_signed()),
            None => Ok(()),
        }
    }
}
