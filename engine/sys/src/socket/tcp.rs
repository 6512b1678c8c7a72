//! TCP connections in repair mode.
//!
//! In repair mode calls change a connection's state and send nothing; a socket that is closed in it
//! vanishes without a word to its peer.
//!
//! Source: man 7 tcp; linux include/uapi/linux/tcp.h, net/ipv4/tcp.c (Linux 3.5; windows 4.8).

use std::os::fd::AsFd;

use super::{SOL_TCP, number, option, set_number, set_option};
use crate::{Errno, Result};

/// `TCP_MAXSEG`.
pub const TCP_MAXSEG: i32 = 2;
/// `TCP_CORK`.
pub const TCP_CORK: i32 = 3;
/// `TCP_NODELAY`.
pub const TCP_NODELAY: i32 = 1;
/// `TCP_KEEPIDLE`.
pub const TCP_KEEPIDLE: i32 = 4;
/// `TCP_KEEPINTVL`.
pub const TCP_KEEPINTVL: i32 = 5;
/// `TCP_KEEPCNT`.
pub const TCP_KEEPCNT: i32 = 6;
/// `TCP_ULP`.
pub const TCP_ULP: i32 = 31;
const TCP_INFO: i32 = 11;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

/// What repair mode is set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// On.
    On,
    /// Off, with a window probe to the peer.
    Off,
    /// Off, without a word to the peer (Linux 4.19).
    OffSilently,
}

/// One of the two queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// What has been received.
    Receive,
    /// What waits to be acknowledged or sent.
    Send,
}

/// What TCP_INFO tells, as far as it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Info {
    /// State by the kernel's number.
    pub state: u32,
    /// Options of the handshake: 1 timestamps, 2 SACK, 4 window scaling.
    pub options: u32,
    /// Shift of the peer's window.
    pub snd_wscale: u32,
    /// Shift of our window.
    pub rcv_wscale: u32,
    /// Of a listening socket: connections that wait.
    pub waiting: u32,
    /// Of a listening socket: the backlog.
    pub backlog: u32,
    /// Bytes of a segment that is sent.
    pub snd_mss: u32,
    /// Segments that may be sent before the peer answers.
    pub snd_cwnd: u32,
}

/// Window state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Sequence number of the last window update.
    pub snd_wl1: u32,
    /// Window of the peer.
    pub snd_wnd: u32,
    /// The largest that it was.
    pub max_window: u32,
    /// Our window.
    pub rcv_wnd: u32,
    /// What was received when it was last told.
    pub rcv_wup: u32,
}

/// Options of the handshake to be set in repair mode: code and value.
///
/// Codes are those of the wire: 2 MSS, 3 window scale (ours in the upper half), 4 SACK, 8 timestamps.
pub type HandshakeOption = (u32, u32);

/// Reads state and handshake options.
///
/// # Errors
/// ENOPROTOOPT for a socket that is not TCP.
pub fn info(fd: impl AsFd) -> Result<Info> {
    let raw = option(fd, SOL_TCP, TCP_INFO, 104)?;
    let word = |at: usize| -> Result<u32> {
        let bytes = raw.get(at..at + 4).ok_or(Errno::EINVAL)?;
        Ok(u32::from_ne_bytes(bytes.try_into().expect("four bytes")))
    };
    let byte = |at: usize| raw.get(at).copied().map(u32::from).ok_or(Errno::EINVAL);
    Ok(Info {
        state: byte(0)?,
        options: byte(5)?,
        snd_wscale: byte(6)? & 15,
        rcv_wscale: byte(6)? >> 4,
        waiting: word(24)?,
        backlog: word(28)?,
        snd_mss: word(16)?,
        snd_cwnd: word(80)?,
    })
}

/// Switches repair mode.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN or in the wrong state.
pub fn set_repair(fd: impl AsFd, repair: Repair) -> Result<()> {
    let value = match repair {
        Repair::On => 1,
        Repair::Off => 0,
        Repair::OffSilently => -1,
    };
    set_number(fd, SOL_TCP, TCP_REPAIR, value)
}

/// Chooses the queue that reads and writes are about; None for neither.
///
/// # Errors
/// EPERM outside of repair mode.
pub fn choose_queue(fd: impl AsFd, queue: Option<Queue>) -> Result<()> {
    let value = match queue {
        None => 0,
        Some(Queue::Receive) => 1,
        Some(Queue::Send) => 2,
    };
    set_number(fd, SOL_TCP, TCP_REPAIR_QUEUE, value)
}

/// Reads the sequence number at the end of the chosen queue.
///
/// # Errors
/// EINVAL without a chosen queue.
pub fn sequence(fd: impl AsFd) -> Result<u32> {
    Ok(number(fd, SOL_TCP, TCP_QUEUE_SEQ)?.cast_unsigned())
}

/// Sets the sequence number at the end of the chosen queue of an unconnected socket.
///
/// # Errors
/// EPERM for a connected one.
pub fn set_sequence(fd: impl AsFd, value: u32) -> Result<()> {
    set_number(fd, SOL_TCP, TCP_QUEUE_SEQ, value.cast_signed())
}

/// Reads the clock of the timestamps.
///
/// # Errors
/// ENOPROTOOPT.
pub fn timestamp(fd: impl AsFd) -> Result<u32> {
    Ok(number(fd, SOL_TCP, TCP_TIMESTAMP)?.cast_unsigned())
}

/// Sets the clock of the timestamps.
///
/// # Errors
/// EPERM outside of repair mode.
pub fn set_timestamp(fd: impl AsFd, value: u32) -> Result<()> {
    set_number(fd, SOL_TCP, TCP_TIMESTAMP, value.cast_signed())
}

/// Sets the options of the handshake.
///
/// # Errors
/// EPERM outside of repair mode, EINVAL for a socket that is not connected.
pub fn set_handshake(fd: impl AsFd, options: &[HandshakeOption]) -> Result<()> {
    let words = options.iter().flat_map(|(code, value)| [*code, *value]);
    let bytes: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
    set_option(fd, SOL_TCP, TCP_REPAIR_OPTIONS, &bytes)
}

/// Reads the windows.
///
/// # Errors
/// ENOPROTOOPT before Linux 4.8; EPERM outside of repair mode.
pub fn window(fd: impl AsFd) -> Result<Window> {
    let raw = option(fd, SOL_TCP, TCP_REPAIR_WINDOW, 20)?;
    let words: Vec<u32> = raw
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
        .collect();
    let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = words[..] else {
        return Err(Errno::EINVAL);
    };
    Ok(Window {
        snd_wl1,
        snd_wnd,
        max_window,
        rcv_wnd,
        rcv_wup,
    })
}

/// Sets the windows.
///
/// # Errors
/// EINVAL for numbers that contradict the queues.
pub fn set_window(fd: impl AsFd, window: &Window) -> Result<()> {
    let words = [
        window.snd_wl1,
        window.snd_wnd,
        window.max_window,
        window.rcv_wnd,
        window.rcv_wup,
    ];
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    set_option(fd, SOL_TCP, TCP_REPAIR_WINDOW, &bytes)
}
