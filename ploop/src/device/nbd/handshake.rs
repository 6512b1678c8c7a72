//! The handshake: which export, which replies, which contexts.

use std::io::{self, Read, Write};

use super::abi::{self, export_flag, option, reply};
use crate::device::Export;

/// Longest option that is read.
const MAX_OPTION: u32 = 64 << 10;
/// Options of one handshake at most.
const MAX_OPTIONS: u32 = 1024;

/// What client and server agreed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Replies come in chunks.
    pub structured: bool,
    /// The client wants to know what is allocated.
    pub allocation: bool,
}

/// Talks until the client begins the transmission; None where it goes before.
pub(super) fn agree(
    stream: &mut (impl Read + Write),
    export: &Export,
    writable: bool,
) -> io::Result<Option<Agreed>> {
    let mut hello = abi::MAGIC.to_be_bytes().to_vec();
    hello.extend(abi::OPTION_MAGIC.to_be_bytes());
    hello.extend((abi::FIXED_NEWSTYLE | abi::NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;
    let flags = u32::from_be_bytes(take(stream)?);
    let mut talk = Talk {
        stream,
        agreed: Agreed::default(),
        size_bytes: export.size_bytes(),
        unit_bytes: export.discard_unit_bytes(),
        flags: export_flags(writable),
        no_zeroes: flags & u32::from(abi::NO_ZEROES) != 0,
    };
    for _ in 0..MAX_OPTIONS {
        match talk.next()? {
            Next::More => {}
            Next::Go => return Ok(Some(talk.agreed)),
            Next::End => return Ok(None),
        }
    }
    Err(broken("too many options"))
}

pub(super) fn export_flags(writable: bool) -> u16 {
    let common = export_flag::HAS_FLAGS
        | export_flag::FLUSH
        | export_flag::FUA
        | export_flag::DONT_FRAGMENT
        | export_flag::MULTI_CONN;
    match writable {
        true => common | export_flag::TRIM | export_flag::WRITE_ZEROES,
        false => common | export_flag::READ_ONLY,
    }
}

enum Next {
    More,
    Go,
    End,
}

struct Talk<'a, S> {
    stream: &'a mut S,
    agreed: Agreed,
    size_bytes: u64,
    unit_bytes: u32,
    flags: u16,
    no_zeroes: bool,
}

impl<S: Read + Write> Talk<'_, S> {
    fn next(&mut self) -> io::Result<Next> {
        if u64::from_be_bytes(take(self.stream)?) != abi::OPTION_MAGIC {
            return Err(broken("an option without its mark"));
        }
        let number = u32::from_be_bytes(take(self.stream)?);
        let len = u32::from_be_bytes(take(self.stream)?);
        if len > MAX_OPTION {
            return Err(broken("an option that is too long"));
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        match number {
            option::EXPORT_NAME => return self.export_name(),
            option::ABORT => {
                self.reply(number, reply::ACK, &[])?;
                return Ok(Next::End);
            }
            option::LIST => {
                self.reply(number, reply::SERVER, &[0; 4])?;
                self.reply(number, reply::ACK, &[])?;
            }
            option::STRUCTURED_REPLY => {
                self.agreed.structured = true;
                self.reply(number, reply::ACK, &[])?;
            }
            option::INFO | option::GO => return self.info(number, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(number, &data)?,
            _ => self.reply(number, reply::UNSUPPORTED, &[])?,
        }
        Ok(Next::More)
    }

    fn reply(&mut self, number: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = abi::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend(number.to_be_bytes());
        out.extend(kind.to_be_bytes());
        let len = u32::try_from(data.len()).map_err(|_| broken("an answer that is too long"))?;
        out.extend(len.to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)
    }

    /// The old way to begin: no answer but the export itself.
    fn export_name(&mut self) -> io::Result<Next> {
        let mut out = self.size_bytes.to_be_bytes().to_vec();
        out.extend(self.flags.to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        self.stream.write_all(&out)?;
        Ok(Next::Go)
    }

    fn info(&mut self, number: u32, data: &[u8]) -> io::Result<Next> {
        let Some(_name) = name(data) else {
            self.reply(number, reply::INVALID, &[])?;
            return Ok(Next::More);
        };
        let mut export = abi::INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(self.size_bytes.to_be_bytes());
        export.extend(self.flags.to_be_bytes());
        self.reply(number, reply::INFO, &export)?;
        let mut sizes = abi::INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        sizes.extend(1u32.to_be_bytes());
        sizes.extend(self.unit_bytes.min(super::transmit::MAX_DATA).to_be_bytes());
        sizes.extend(super::transmit::MAX_DATA.to_be_bytes());
        self.reply(number, reply::INFO, &sizes)?;
        self.reply(number, reply::ACK, &[])?;
        match number {
            option::GO => Ok(Next::Go),
            _ => Ok(Next::More),
        }
    }

    fn contexts(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        let Some(queries) = queries(data).filter(|_| self.agreed.structured) else {
            return self.reply(number, reply::INVALID, &[]);
        };
        let lists = number == option::LIST_META_CONTEXT;
        let is_wanted = |query: &String| {
            query == abi::ALLOCATION || lists && (query == "base:" || query.is_empty())
        };
        let wanted = lists && queries.is_empty() || queries.iter().any(is_wanted);
        if !lists {
            self.agreed.allocation = wanted;
        }
        if wanted {
            let id = if lists { 0 } else { abi::ALLOCATION_ID };
            let mut out = id.to_be_bytes().to_vec();
            out.extend(abi::ALLOCATION.as_bytes());
            self.reply(number, reply::META_CONTEXT, &out)?;
        }
        self.reply(number, reply::ACK, &[])
    }
}

/// The export's name, with which INFO, GO and the contexts begin, and what follows. Any name is this
/// disk's.
fn name(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = u32::from_be_bytes(data.get(..4)?.try_into().ok()?);
    let rest = &data[4..];
    let len = usize::try_from(len).ok()?;
    Some((rest.get(..len)?, &rest[len..]))
}

fn queries(data: &[u8]) -> Option<Vec<String>> {
    let (_, rest) = name(data)?;
    let count = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?);
    let mut rest = &rest[4..];
    let mut queries = Vec::new();
    for _ in 0..count {
        let (query, after) = name(rest)?;
        queries.push(String::from_utf8_lossy(query).into_owned());
        rest = after;
    }
    Some(queries)
}

pub(super) fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn broken(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the client sent {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_and_cut_ones_refused() {
        let mut data = vec![0, 0, 0, 1, b'x', 0, 0, 0, 2];
        data.extend([0, 0, 0, 0, 0, 0, 0, 3]);
        data.extend(b"a:b");
        let expected = vec![String::new(), "a:b".to_owned()];
        assert_eq!(queries(&data), Some(expected));
        for len in 0..data.len() {
            assert_eq!(queries(&data[..len]), None);
        }
        // A count that nothing follows costs nothing.
        assert_eq!(queries(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
