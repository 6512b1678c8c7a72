//! Netlink: requests and their answers, over a blocking socket.
//!
//! Source: man 7 netlink; linux include/uapi/linux/netlink.h.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::{Errno, Result, socket};

/// Sockets of all families.
pub const SOCK_DIAG: i32 = 4;
/// Packet filter.
pub const NETFILTER: i32 = 12;
/// Families that have a name instead of a number.
pub const GENERIC: i32 = 16;
/// A request.
pub const REQUEST: u16 = 1;
/// The answer is wanted also where there is no other.
pub const ACK: u16 = 4;
/// Everything is asked for.
pub const DUMP: u16 = 0x300;
/// Makes the object.
pub const CREATE: u16 = 0x400;
/// Fails where the object is there.
pub const EXCLUSIVE: u16 = 0x200;
/// Adds to the end.
pub const APPEND: u16 = 0x800;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;
const NESTED: u16 = 0x8000;
/// A kernel sends at most 32 KiB at a time.
const ROOM: usize = 1 << 16;

/// A message with its attributes, being put together.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// Begins a message of that type and flags, with the fixed part of its payload.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Request {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        let mut request = Request { bytes };
        request.pad();
        request
    }

    /// Appends an attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Request {
        let len = u16::try_from(4 + value.len()).expect("attributes of ours are short");
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
        self
    }

    /// Appends an attribute that is text, with its NUL.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Request {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Appends an attribute that is a number in network order.
    #[must_use]
    pub fn number(self, kind: u16, value: u32) -> Request {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// Appends an attribute that holds others.
    #[must_use]
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Request) -> Request) -> Request {
        let inner = fill(Request { bytes: Vec::new() });
        let len = u16::try_from(4 + inner.bytes.len()).expect("attributes of ours are short");
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        self.bytes.extend(inner.bytes);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The whole message, as the socket sends it under that number.
    pub fn finish(mut self, seq: u32) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).expect("messages of ours are short");
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&seq.to_ne_bytes());
        self.bytes
    }
}

/// A netlink socket.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    seq: u32,
}

impl Netlink {
    /// Opens a socket of that protocol, in this thread's network namespace.
    ///
    /// # Errors
    /// EPROTONOSUPPORT where the kernel lacks the protocol.
    pub fn open(protocol: i32) -> Result<Netlink> {
        let fd = socket::create(socket::AF_NETLINK, socket::SOCK_RAW, protocol)?;
        Ok(Netlink { fd, seq: 1 })
    }

    /// Sends a request for many objects and hands the payload of each to `take`.
    ///
    /// # Errors
    /// What the kernel answers, ENOENT where it lacks the kind.
    pub fn dump(&mut self, request: Request, mut take: impl FnMut(&[u8])) -> Result<()> {
        self.seq += 1;
        let seq = self.seq;
        self.send(&request.finish(seq))?;
        loop {
            let bytes = self.receive()?;
            for message in Messages(&bytes) {
                match message.kind {
                    _ if message.seq != seq => {}
                    DONE => return Ok(()),
                    ERROR => return message.error(),
                    _ => take(message.payload),
                }
            }
        }
    }

    /// Sends a request that is answered by one acknowledgement.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn request(&mut self, request: Request) -> Result<()> {
        self.batch(vec![request])
    }

    /// Sends requests in one datagram, of which those with [`ACK`] are answered; ends when all answers
    /// are there.
    ///
    /// # Errors
    /// The first error among the answers.
    pub fn batch(&mut self, requests: Vec<Request>) -> Result<()> {
        let mut bytes = Vec::new();
        let mut waiting = std::collections::HashSet::new();
        for request in requests {
            self.seq += 1;
            let flags = u16::from_ne_bytes([request.bytes[6], request.bytes[7]]);
            if flags & ACK != 0 {
                waiting.insert(self.seq);
            }
            bytes.extend(request.finish(self.seq));
        }
        self.make_room(bytes.len());
        self.send(&bytes)?;
        let mut result = Ok(());
        while !waiting.is_empty() {
            for message in Messages(&self.receive()?) {
                if message.kind != ERROR {
                    continue;
                }
                let known = waiting.remove(&message.seq);
                let answer = message.error();
                // What was not to be answered fails the whole batch, which has no other answers then.
                if !known && answer.is_err() {
                    return answer;
                }
                result = result.and(answer);
            }
        }
        result
    }

    /// Lets a message of that length be sent, which may be longer than the system's usual limit.
    fn make_room(&self, len: usize) {
        let wanted = i32::try_from(len).unwrap_or(i32::MAX);
        // Without CAP_NET_ADMIN there is no more room than usual, and a message that is too long is refused.
        let _ = socket::set_option(
            &self.fd,
            libc::SOL_SOCKET,
            libc::SO_SNDBUFFORCE,
            &wanted.to_ne_bytes(),
        );
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let mut kernel = [0u8; 12];
        kernel[..2].copy_from_slice(&16u16.to_ne_bytes());
        let message = socket::Outgoing {
            bytes,
            destination: Some(&kernel),
            ..socket::Outgoing::default()
        };
        socket::send(&self.fd, &message).map(drop)
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; ROOM];
        let fd = self.fd.as_raw_fd();
        // SAFETY: the buffer has the length that is told.
        let got = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), ROOM, 0) };
        let got = Errno::check(i64::try_from(got).unwrap_or(-1))?;
        bytes.truncate(usize::try_from(got).unwrap_or(0));
        Ok(bytes)
    }
}

struct Answer<'a> {
    kind: u16,
    seq: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    fn error(&self) -> Result<()> {
        match word(self.payload, 0).map_or(-libc::EIO, u32::cast_signed) {
            0 => Ok(()),
            errno => Err(Errno::from_raw(-errno)),
        }
    }
}

struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Answer<'a>;

    fn next(&mut self) -> Option<Answer<'a>> {
        let len = usize::try_from(word(self.0, 0)?).ok()?;
        if len < HEADER || len > self.0.len() {
            return None;
        }
        let answer = Answer {
            kind: u16::from_ne_bytes([self.0[4], self.0[5]]),
            seq: word(self.0, 8)?,
            payload: &self.0[HEADER..len],
        };
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(answer)
    }
}

/// The word at an offset.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().expect("four bytes")))
}

/// Attributes of a message one after the other: type, without the bits that say how it is written, and value.
#[derive(Debug, Clone)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let len = usize::from(u16::from_ne_bytes([*self.0.first()?, *self.0.get(1)?]));
        let kind = u16::from_ne_bytes([*self.0.get(2)?, *self.0.get(3)?]);
        let value = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind & 0x3fff, value))
    }
}
