//! The transmission: requests and their replies, one at a time per connection.

use std::io::{self, Read, Write};

use super::abi::{self, chunk, command};
use super::handshake::{Agreed, broken, take};
use crate::device::Export;
use crate::kernel::PageBuffer;

/// Most bytes of one request.
pub(super) const MAX_DATA: u32 = 32 << 20;
/// Most extents of one answer.
const MAX_EXTENTS: usize = 1 << 16;

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

/// Serves requests until the client ends the connection.
pub(super) fn run(
    stream: &mut (impl Read + Write),
    export: &Export,
    writable: bool,
    agreed: Agreed,
) -> io::Result<()> {
    let mut server = Server {
        stream,
        export,
        writable,
        agreed,
        buffer: PageBuffer::new(1 << 20)?,
    };
    while let Some(request) = server.request()? {
        server.answer(&request)?;
    }
    Ok(())
}

struct Server<'a, S> {
    stream: &'a mut S,
    export: &'a Export,
    writable: bool,
    agreed: Agreed,
    buffer: PageBuffer,
}

impl<S: Read + Write> Server<'_, S> {
    fn request(&mut self) -> io::Result<Option<Request>> {
        let magic = match take(self.stream) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => u32::from_be_bytes(other?),
        };
        if magic != abi::REQUEST_MAGIC {
            return Err(broken("a request without its mark"));
        }
        let request = Request {
            flags: u16::from_be_bytes(take(self.stream)?),
            command: u16::from_be_bytes(take(self.stream)?),
            cookie: u64::from_be_bytes(take(self.stream)?),
            offset: u64::from_be_bytes(take(self.stream)?),
            len: u32::from_be_bytes(take(self.stream)?),
        };
        let carries_data = matches!(request.command, command::READ | command::WRITE);
        if carries_data && request.len > MAX_DATA {
            return Err(broken("a request that is too long"));
        }
        if carries_data && self.buffer.len() < request.len as usize {
            self.buffer = PageBuffer::new(request.len as usize)?;
        }
        if request.command == command::WRITE {
            self.stream
                .read_exact(&mut self.buffer[..request.len as usize])?;
        }
        Ok((request.command != command::DISCONNECT).then_some(request))
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        let is_change = matches!(
            request.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        );
        if is_change && !self.writable {
            return self.status(request, Err(libc::EPERM));
        }
        let end = request.offset.checked_add(request.len.into());
        if end.is_none_or(|end| end > self.export.size_bytes()) {
            let error = match is_change {
                true => libc::ENOSPC,
                false => libc::EINVAL,
            };
            return self.status(request, Err(error));
        }
        let len = request.len as usize;
        let done = match request.command {
            command::READ => return self.read(request),
            command::BLOCK_STATUS => return self.block_status(request),
            command::WRITE => self.export.write(&self.buffer[..len], request.offset),
            command::FLUSH => self.export.flush(),
            command::TRIM => self.export.discard(request.offset, request.len.into()),
            command::WRITE_ZEROES => self.export.write_zeroes(request.offset, request.len.into()),
            _ => Err(libc::EINVAL),
        };
        let fua = is_change && request.flags & abi::FLAG_FUA != 0;
        let done = match (done, fua) {
            (Ok(()), true) => self.export.flush(),
            (done, _) => done,
        };
        self.status(request, done)
    }

    fn status(&mut self, request: &Request, done: Result<(), i32>) -> io::Result<()> {
        let error = done.err().map_or(0, abi::error_number);
        if !self.agreed.structured {
            return self.simple(request, error);
        }
        match error {
            0 => self.chunk(request, chunk::NONE, &[]),
            error => {
                let mut data = error.to_be_bytes().to_vec();
                data.extend([0, 0]);
                self.chunk(request, chunk::ERROR, &data)
            }
        }
    }

    fn simple(&mut self, request: &Request, error: u32) -> io::Result<()> {
        let mut out = abi::SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend(error.to_be_bytes());
        out.extend(request.cookie.to_be_bytes());
        self.stream.write_all(&out)
    }

    fn chunk(&mut self, request: &Request, kind: u16, data: &[u8]) -> io::Result<()> {
        let head = chunk_head(request, kind, data.len());
        self.stream.write_all(&head)?;
        self.stream.write_all(data)
    }

    fn read(&mut self, request: &Request) -> io::Result<()> {
        let data = &mut self.buffer[..request.len as usize];
        if let Err(errno) = self.export.read(data, request.offset) {
            return self.status(request, Err(errno));
        }
        if self.agreed.structured {
            let mut head = chunk_head(request, chunk::OFFSET_DATA, data.len() + 8);
            head.extend(request.offset.to_be_bytes());
            self.stream.write_all(&head)?;
        } else {
            self.simple(request, 0)?;
        }
        self.stream.write_all(&self.buffer[..request.len as usize])
    }

    fn block_status(&mut self, request: &Request) -> io::Result<()> {
        if !self.agreed.structured || !self.agreed.allocation || request.len == 0 {
            return self.status(request, Err(libc::EINVAL));
        }
        let extents = self.export.disk().map(request.offset, request.len.into());
        let Ok(extents) = extents else {
            return self.status(request, Err(libc::EIO));
        };
        let mut runs: Vec<(u64, u32)> = Vec::new();
        for extent in extents {
            let state = match extent.kind.is_zero() {
                true => abi::STATE_HOLE | abi::STATE_ZERO,
                false => 0,
            };
            match runs.last_mut() {
                Some(last) if last.1 == state => last.0 += extent.len_bytes,
                _ => runs.push((extent.len_bytes, state)),
            }
        }
        let most = match request.flags & abi::FLAG_REQ_ONE {
            0 => MAX_EXTENTS,
            _ => 1,
        };
        let mut data = abi::ALLOCATION_ID.to_be_bytes().to_vec();
        for (len, state) in runs.into_iter().take(most) {
            data.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
            data.extend(state.to_be_bytes());
        }
        self.chunk(request, chunk::BLOCK_STATUS, &data)
    }
}

fn chunk_head(request: &Request, kind: u16, len: usize) -> Vec<u8> {
    let mut out = abi::CHUNK_MAGIC.to_be_bytes().to_vec();
    out.extend(chunk::DONE.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(request.cookie.to_be_bytes());
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    out
}
