//! The stream of a copy.
//!
//! Packets, each a header of 40 bytes (little endian) and its payload:
//!
//! | bytes | field |
//! |---:|---|
//! | 0..4 | magic `0x4CC0AC40` |
//! | 4..5 | kind |
//! | 5..6 | flags: bit 0, the payload is compressed by zstd |
//! | 6..8 | zero |
//! | 8..12 | length of the payload in the stream |
//! | 12..16 | length of the payload itself |
//! | 16..24 | offset in the disk, or a number of the kind's |
//! | 24..32 | xxh3 of the payload itself, seeded with the offset and the kind |
//! | 32..40 | sequence number, from 0 |
//!
//! | kind | from | payload |
//! |---|---|---|
//! | 1 hello | sender | JSON: version, session, size, unit, whether it hears |
//! | 2 data | sender | bytes at the offset, at most a unit |
//! | 3 zero | sender | 8 bytes: how many zeroes at the offset |
//! | 4 barrier | sender | none; asks for an ack when everything before is durable |
//! | 5 end | sender | none; nothing follows |
//! | 16 have | receiver | blocks that are there from an earlier try: index (8 bytes) and hash (8) each |
//! | 17 ack | receiver | none; the barrier's or end's sequence number is in the offset |
//! | 18 failed | receiver | text: why the receiver gives up |

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::CopyError;

/// First word of each packet.
pub const MAGIC: u32 = 0x4CC0_AC40;
/// Bytes of a header.
pub const HEADER: usize = 40;
/// Version of the stream.
pub const VERSION: u32 = 2;
/// Longest payload of any packet but [`Kind::Have`].
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// Largest disk that is received unless told otherwise: 64 TiB.
pub const MAX_SIZE: u64 = 64 << 40;
/// Smallest unit.
pub const MIN_UNIT: u32 = 4096;
/// Most units of a disk: what a receiver keeps in memory of each stays below 1 GiB, whatever is sent.
pub const MAX_UNITS: u64 = 1 << 26;
/// Longest payload of a [`Kind::Have`]: 16 bytes for each unit.
pub const MAX_HAVE: u32 = 1 << 30;
const COMPRESSED: u8 = 1;

/// What a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Begins the stream.
    Hello,
    /// Bytes.
    Data,
    /// Zeroes.
    Zero,
    /// Asks for an ack.
    Barrier,
    /// Ends the stream.
    End,
    /// What the receiver has.
    Have,
    /// Everything before is durable.
    Ack,
    /// The receiver gives up.
    Failed,
}

const KINDS: [(u8, Kind); 8] = [
    (1, Kind::Hello),
    (2, Kind::Data),
    (3, Kind::Zero),
    (4, Kind::Barrier),
    (5, Kind::End),
    (16, Kind::Have),
    (17, Kind::Ack),
    (18, Kind::Failed),
];

impl Kind {
    fn number(self) -> u8 {
        let row = KINDS.iter().find(|(_, kind)| *kind == self);
        row.map_or(0, |(number, _)| *number)
    }

    fn from_number(number: u8) -> Option<Kind> {
        let row = KINDS.iter().find(|(known, _)| *known == number);
        row.map(|(_, kind)| *kind)
    }
}

/// What the sender says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the stream.
    pub version: u32,
    /// Name of this copy, for continuing it: 1 to 64 letters, digits and dashes.
    pub session: String,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes of a block.
    pub unit_bytes: u32,
    /// Whether the sender hears what the receiver has of an earlier try. One that does not takes the
    /// target for empty.
    #[serde(default)]
    pub hears: bool,
}

/// Whether a copy may have this name.
pub fn is_session(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(is_part)
}

impl Hello {
    /// Whether another one is of the same copy, so that it can go on with what the other one left.
    pub fn is_same_copy(&self, other: &Hello) -> bool {
        let same = Hello {
            hears: other.hears,
            ..self.clone()
        };
        same == *other
    }

    /// Holds what somebody else said against the rules.
    ///
    /// # Errors
    /// Another version, or values that can't be.
    pub fn check(&self, max_size: u64) -> Result<(), CopyError> {
        let what = if self.version != VERSION {
            format!("version {} is not {VERSION}", self.version)
        } else if !is_session(&self.session) {
            "the session's name is not well-formed".to_owned()
        } else if self.size_bytes == 0 || self.size_bytes > max_size {
            format!("a disk of {} bytes is too large", self.size_bytes)
        } else if !self.unit_bytes.is_power_of_two()
            || !(MIN_UNIT..=MAX_PAYLOAD).contains(&self.unit_bytes)
        {
            format!("a unit of {} bytes can't be", self.unit_bytes)
        } else if self.size_bytes.div_ceil(self.unit_bytes.into()) > MAX_UNITS {
            format!(
                "{} bytes are too many for units of {}",
                self.size_bytes, self.unit_bytes
            )
        } else {
            return Ok(());
        };
        Err(CopyError::Stream { what })
    }
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it is.
    pub kind: Kind,
    /// Where it belongs.
    pub offset: u64,
    /// Its payload, not compressed.
    pub payload: Vec<u8>,
    /// Its number in the stream.
    pub sequence: u64,
}

/// Hash of a packet: a payload that is whole under a kind or at a place that is not its own does not pass.
fn packet_hash(kind: Kind, payload: &[u8], offset: u64) -> u64 {
    hash(payload, offset ^ u64::from(kind.number()) << 56)
}

/// Hash of a block of the disk.
pub fn hash(payload: &[u8], offset: u64) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(payload, offset)
}

/// Writes packets and counts them.
#[derive(Debug)]
pub struct Encoder {
    sequence: u64,
    zstd_level: Option<i32>,
}

impl Encoder {
    /// A stream that begins; payloads are compressed where a level is given and it pays.
    pub fn new(zstd_level: Option<i32>) -> Encoder {
        Encoder {
            sequence: 0,
            zstd_level,
        }
    }

    /// A whole packet as bytes, and its number.
    ///
    /// # Errors
    /// The payload is too long.
    pub fn encode(
        &mut self,
        kind: Kind,
        offset: u64,
        payload: &[u8],
    ) -> io::Result<(Vec<u8>, u64)> {
        let too_long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let len = u32::try_from(payload.len()).map_err(too_long)?;
        let packed = match self.zstd_level {
            Some(level) if kind == Kind::Data => Some(zstd::bulk::compress(payload, level)?),
            _ => None,
        };
        let packed = packed.filter(|packed| packed.len() < payload.len());
        let body = packed.as_deref().unwrap_or(payload);
        let body_len = u32::try_from(body.len()).map_err(too_long)?;
        let mut out = Vec::with_capacity(HEADER + body.len());
        out.extend(MAGIC.to_le_bytes());
        out.extend([kind.number(), u8::from(packed.is_some()), 0, 0]);
        out.extend(body_len.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend(offset.to_le_bytes());
        out.extend(packet_hash(kind, payload, offset).to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(body);
        self.sequence += 1;
        Ok((out, self.sequence - 1))
    }
}

/// Reads packets, never more than is allowed.
#[derive(Debug)]
pub struct Decoder<R> {
    from: R,
    next: u64,
    max_payload: u32,
}

impl<R: Read> Decoder<R> {
    /// A stream that begins.
    pub fn new(from: R, max_payload: u32) -> Decoder<R> {
        Decoder {
            from,
            next: 0,
            max_payload,
        }
    }

    /// Lets payloads be of another length from here on.
    pub fn set_max_payload(&mut self, max_payload: u32) {
        self.max_payload = max_payload;
    }

    /// The next packet, or None where the stream ends between two. `start` are its first bytes where
    /// they have been read already.
    ///
    /// # Errors
    /// The stream breaks its rules or breaks off.
    pub fn next(&mut self, start: &[u8]) -> Result<Option<Packet>, DecodeError> {
        let mut head = [0; HEADER];
        head[..start.len()].copy_from_slice(start);
        let mut have = start.len();
        while have < HEADER {
            match self.from.read(&mut head[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(DecodeError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DecodeError::Io(error)),
            }
        }
        self.body(&head).map(Some)
    }

    fn body(&mut self, head: &[u8; HEADER]) -> Result<Packet, DecodeError> {
        let u32_at = |at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let rule = |what: &str| DecodeError::Rule(what.to_owned());
        if u32_at(0) != MAGIC {
            return Err(rule("a packet does not begin with its mark"));
        }
        let kind = Kind::from_number(head[4]).ok_or_else(|| rule("a packet of no known kind"))?;
        let (body_len, len, offset) = (u32_at(8), u32_at(12), u64_at(16));
        if head[5] & !COMPRESSED != 0 || head[6] != 0 || head[7] != 0 {
            return Err(rule("flags that are not known"));
        }
        if len > self.max_payload || body_len > len {
            return Err(rule("a packet that is too long"));
        }
        if u64_at(32) != self.next {
            return Err(rule("a packet is missing"));
        }
        self.next += 1;
        let mut body = Vec::new();
        let read = (&mut self.from)
            .take(body_len.into())
            .read_to_end(&mut body);
        read.map_err(DecodeError::Io)?;
        if body.len() != body_len as usize {
            return Err(DecodeError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        let payload = match head[5] & COMPRESSED {
            0 => body,
            _ => zstd::bulk::decompress(&body, len as usize)
                .map_err(|_| rule("a payload that can't be unpacked"))?,
        };
        if payload.len() != len as usize || packet_hash(kind, &payload, offset) != u64_at(24) {
            return Err(rule("a payload that does not fit its hash"));
        }
        Ok(Packet {
            kind,
            offset,
            payload,
            sequence: u64_at(32),
        })
    }
}

/// Why there is no packet.
#[derive(Debug)]
pub enum DecodeError {
    /// The pipe.
    Io(io::Error),
    /// The sender.
    Rule(String),
}

/// Writes everything, and then lets it go on its way.
pub(super) fn write(to: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bit_of_a_packet_can_flip_without_being_seen() {
        let long = vec![7; 600];
        for level in [None, Some(1)] {
            for (_, kind) in KINDS {
                for payload in [&[][..], &3u64.to_le_bytes(), &long] {
                    let (packet, _) = Encoder::new(level).encode(kind, 4096, payload).unwrap();
                    let decoded = |bytes: &[u8]| Decoder::new(bytes, 1 << 20).next(&[]);
                    let whole = decoded(&packet).unwrap().unwrap();
                    assert_eq!((whole.kind, &whole.payload[..]), (kind, payload));
                    for bit in 0..packet.len() * 8 {
                        let mut damaged = packet.clone();
                        damaged[bit / 8] ^= 1 << (bit % 8);
                        // A packed payload has bits that mean nothing.
                        if let Ok(packet) = decoded(&damaged) {
                            assert_eq!(packet, Some(whole.clone()), "bit {bit}");
                        }
                    }
                }
            }
        }
    }
}
