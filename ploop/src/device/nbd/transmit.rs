//! The transmission: requests and their replies. Any number of threads serve one connection; each
//! reads a whole request, carries it out and answers it, in whatever order they get done.
//!
//! A thread's buffer is laid out so that an answer and its data go out in one piece, and the data of a
//! write begins on a page:
//!
//! ```text
//! | 4096 bytes, of which the last ones are the answer's head | data, page-aligned |
//! ```

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::{self, chunk, command};
use super::handshake::{Agreed, broken, take};
use crate::device::{Export, View};
use crate::kernel::PageBuffer;

/// Most bytes of one request.
pub(super) const MAX_DATA: u32 = 32 << 20;
/// Most extents of one answer.
const MAX_EXTENTS: usize = 1 << 16;
/// Where data begins in a thread's buffer.
const DATA_AT: usize = 4096;
/// Data of a request that needs no larger buffer.
const USUAL_DATA: usize = 1 << 20;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client said so.
    Disconnected,
    /// It went without a word.
    Lost,
}

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Request {
    /// Reads what follows the mark.
    fn parse(bytes: &[u8; 24]) -> Request {
        let [f0, f1, c0, c1, rest @ ..] = *bytes;
        let [cookie @ .., o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Request {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: u64::from_be_bytes(cookie),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        }
    }

    fn carries_data(&self) -> bool {
        matches!(self.command, command::READ | command::WRITE)
    }
}

/// One connection, past its handshake.
pub(super) struct Connection {
    export: Arc<Export>,
    view: View,
    writable: bool,
    agreed: Agreed,
    stream: UnixStream,
    /// Held while a request is read; whether no more will come.
    incoming: Mutex<bool>,
    /// Held while an answer is written.
    outgoing: Mutex<()>,
}

impl Connection {
    /// A connection on which requests come next.
    pub fn new(
        stream: UnixStream,
        export: Arc<Export>,
        view: View,
        writable: bool,
        agreed: Agreed,
    ) -> Connection {
        Connection {
            export,
            view,
            writable,
            agreed,
            stream,
            incoming: Mutex::new(false),
            outgoing: Mutex::new(()),
        }
    }

    /// Serves requests until the connection ends. `ended` is told how, once, by the thread that saw it and
    /// before any other thread comes back.
    ///
    /// # Errors
    /// The client broke the protocol or the connection.
    pub fn run(&self, ended: &dyn Fn(End)) -> io::Result<()> {
        let mut thread = Thread {
            connection: self,
            buffer: PageBuffer::new(DATA_AT + USUAL_DATA)?,
        };
        while let Some(request) = thread.next(ended)? {
            thread.answer(&request)?;
        }
        Ok(())
    }
}

/// One of the threads that serve a connection.
struct Thread<'a> {
    connection: &'a Connection,
    buffer: PageBuffer,
}

impl Thread<'_> {
    /// Waits for its turn and reads a request; None when the connection is over.
    fn next(&mut self, ended: &dyn Fn(End)) -> io::Result<Option<Request>> {
        let connection = self.connection;
        let mut is_over = lock(&connection.incoming);
        if *is_over {
            return Ok(None);
        }
        let read = self.read_request();
        let end = match &read {
            Ok(Ok(_)) => None,
            Ok(Err(end)) => Some(*end),
            Err(_) => Some(End::Lost),
        };
        if let Some(end) = end {
            *is_over = true;
            ended(end);
        }
        Ok(read?.ok())
    }

    fn read_request(&mut self) -> io::Result<Result<Request, End>> {
        let stream = &mut &self.connection.stream;
        let magic = match take(stream) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Err(End::Lost));
            }
            other => u32::from_be_bytes(other?),
        };
        if magic != abi::REQUEST_MAGIC {
            return Err(broken("a request without its mark"));
        }
        let rest: [u8; 24] = take(stream)?;
        let request = Request::parse(&rest);
        if request.carries_data() && request.len > MAX_DATA {
            return Err(broken("a request that is too long"));
        }
        let len = request.len as usize;
        if request.carries_data() && self.buffer.len() < DATA_AT + len {
            self.buffer = PageBuffer::new(DATA_AT + len)?;
        }
        if request.command == command::WRITE {
            stream.read_exact(&mut self.buffer[DATA_AT..DATA_AT + len])?;
        }
        Ok(match request.command {
            command::DISCONNECT => Err(End::Disconnected),
            _ => Ok(request),
        })
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        let connection = self.connection;
        let export = &connection.export;
        let is_change = matches!(
            request.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        );
        if is_change && !connection.writable {
            return self.status(request, Err(libc::EPERM));
        }
        let (len, len_bytes) = (request.len as usize, u64::from(request.len));
        let Some(offset) = connection
            .view
            .place(request.offset, len_bytes, export.size_bytes())
        else {
            let error = match is_change {
                true => libc::ENOSPC,
                false => libc::EINVAL,
            };
            return self.status(request, Err(error));
        };
        let done = match request.command {
            command::READ => return self.read(request, offset),
            command::BLOCK_STATUS => return self.block_status(request, offset),
            command::WRITE => export.write(&self.buffer[DATA_AT..DATA_AT + len], offset),
            command::FLUSH => export.flush(),
            command::TRIM => export.discard(offset, len_bytes),
            command::WRITE_ZEROES => export.write_zeroes(offset, len_bytes),
            _ => Err(libc::EINVAL),
        };
        let fua = is_change && request.flags & abi::FLAG_FUA != 0;
        let done = match (done, fua) {
            (Ok(()), true) => export.flush(),
            (done, _) => done,
        };
        self.status(request, done)
    }

    fn status(&mut self, request: &Request, done: Result<(), i32>) -> io::Result<()> {
        let error = done.err().map_or(0, abi::error_number);
        if !self.connection.agreed.structured {
            return self.send(&simple_head(request, error), 0);
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

    fn chunk(&mut self, request: &Request, kind: u16, data: &[u8]) -> io::Result<()> {
        let mut answer = chunk_head(request, kind, data.len());
        answer.extend(data);
        let _turn = lock(&self.connection.outgoing);
        (&self.connection.stream).write_all(&answer)
    }

    /// Sends a head and that many bytes of the buffer's data, in one piece.
    fn send(&mut self, head: &[u8], data_len: usize) -> io::Result<()> {
        let start = DATA_AT - head.len();
        self.buffer[start..DATA_AT].copy_from_slice(head);
        let _turn = lock(&self.connection.outgoing);
        (&self.connection.stream).write_all(&self.buffer[start..DATA_AT + data_len])
    }

    fn read(&mut self, request: &Request, offset: u64) -> io::Result<()> {
        let len = request.len as usize;
        let data = &mut self.buffer[DATA_AT..DATA_AT + len];
        if let Err(errno) = self.connection.export.read(data, offset) {
            return self.status(request, Err(errno));
        }
        let head = match self.connection.agreed.structured {
            true => {
                let mut head = chunk_head(request, chunk::OFFSET_DATA, len + 8);
                head.extend(request.offset.to_be_bytes());
                head
            }
            false => simple_head(request, 0),
        };
        self.send(&head, len)
    }

    fn block_status(&mut self, request: &Request, offset: u64) -> io::Result<()> {
        let agreed = self.connection.agreed;
        if !agreed.structured || !agreed.allocation || request.len == 0 {
            return self.status(request, Err(libc::EINVAL));
        }
        let extents = self
            .connection
            .export
            .disk()
            .map(offset, request.len.into());
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn simple_head(request: &Request, error: u32) -> Vec<u8> {
    let mut out = abi::SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(error.to_be_bytes());
    out.extend(request.cookie.to_be_bytes());
    out
}

fn chunk_head(request: &Request, kind: u16, len: usize) -> Vec<u8> {
    let mut out = abi::CHUNK_MAGIC.to_be_bytes().to_vec();
    out.extend(chunk::DONE.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(request.cookie.to_be_bytes());
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    out
}
