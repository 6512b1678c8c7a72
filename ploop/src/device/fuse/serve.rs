//! Answers the kernel's requests for one file, which is the disk.
//!
//! One thread, the [`lane`](super::lane), takes the requests and does itself what needs nothing but a place in
//! a file; a crew of threads does the rest, and everything where the kernel has no asynchronous I/O: a thread
//! that waits for the disk does not hold up the others. A buffer is laid out so that the data of a write begins
//! on a page: it goes to the image's file past the page cache and without another copy.
//!
//! ```text
//! | 4096 - 80 bytes unused | header 40 | arguments 40 | data: 1 MiB, page-aligned |
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::abi::{self, Fallocate, InHeader, Opcode, Span, open_flag};
use super::connection::MAX_DATA;
use super::lane;
use crate::device::{Ended, Export};
use crate::kernel::PageBuffer;

/// Where data begins in a thread's buffer.
pub(super) const DATA_AT: usize = 4096;
/// Where a request begins in a thread's buffer.
const REQUEST_AT: usize = DATA_AT - abi::WRITE_HEADER;

/// Starts the threads. The first cause of an end is sent; the threads go on until the process ends.
///
/// # Errors
/// No thread or no memory for a buffer.
pub fn start(
    channel: Arc<OwnedFd>,
    export: Arc<Export>,
    threads: usize,
    ended: &Sender<Ended>,
) -> io::Result<()> {
    let served = Served { channel, export };
    let threads = threads.max(2);
    // A worker before this one may have had a lane.
    rustix::fs::fcntl_setfl(&*served.channel, OFlags::empty())?;
    if served.export.disk().knows_places() && lane::start(&served, threads, ended)? {
        return Ok(());
    }
    for number in 0..threads {
        let mut buffer = PageBuffer::new(BUFFER)?;
        let (served, ended) = (served.clone(), ended.clone());
        spawn(format!("disk{number}"), move || {
            served.run(&mut buffer, &ended)
        })?;
    }
    Ok(())
}

pub(super) fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name);
    thread.spawn(work).map(drop)
}

/// Bytes of a buffer.
pub(super) const BUFFER: usize = DATA_AT + MAX_DATA as usize;

/// Asks the kernel for the requests that an earlier server read and did not answer.
///
/// # Errors
/// The kernel is older than 6.9.
///
/// Source: linux fs/fuse/dev.c, fuse_notify_resend (linux 6.9)
pub fn resend(channel: impl AsFd) -> io::Result<()> {
    let notification = abi::out_header(0, abi::NOTIFY_RESEND, 0);
    rustix::io::write(channel, &notification)?;
    Ok(())
}

/// What all threads share.
#[derive(Clone)]
pub(super) struct Served {
    pub channel: Arc<OwnedFd>,
    pub export: Arc<Export>,
}

/// A request that lies in a buffer.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub header: InHeader,
    /// Bytes of header, arguments and data.
    len: usize,
}

impl Request {
    /// None where it is an operation that is not there.
    pub fn opcode(&self) -> Option<Opcode> {
        Opcode::from_u32(self.header.opcode)
    }

    /// Bytes that it reads or writes, if that is what it does.
    pub fn data_bytes(&self, buffer: &PageBuffer) -> Option<u32> {
        match self.opcode()? {
            Opcode::Read | Opcode::Write => {
                Span::parse(&buffer[self.args()]).map(|span| span.len_bytes)
            }
            _ => None,
        }
    }

    /// Where its arguments lie in the buffer, and the data of a write behind them.
    pub fn args(&self) -> Range<usize> {
        REQUEST_AT + abi::IN_HEADER..REQUEST_AT + self.len
    }
}

/// What is to be sent back.
pub(super) enum Answer {
    /// Nothing.
    None,
    /// An error number or 0.
    Status(i32),
    /// A few bytes.
    Small(Vec<u8>),
    /// This many bytes of the buffer's data.
    Data(usize),
}

impl Served {
    fn run(&self, buffer: &mut PageBuffer, ended: &Sender<Ended>) {
        loop {
            let taken = self.take(buffer);
            let served = taken.and_then(|request| match request {
                Some(request) => self.serve(buffer, request),
                None => Ok(None),
            });
            if let Some(cause) = cause_of(served) {
                // The receiver leaves when the first cause has come.
                let _ = ended.send(cause);
                if cause != Ended::Released {
                    return;
                }
            }
        }
    }

    /// Takes the next request; None where there was something else.
    pub fn take(&self, buffer: &mut PageBuffer) -> rustix::io::Result<Option<Request>> {
        let len = rustix::io::read(&*self.channel, &mut buffer[REQUEST_AT..])?;
        let header = InHeader::parse(&buffer[REQUEST_AT..REQUEST_AT + len]);
        Ok(header.map(|header| Request { header, len }))
    }

    /// Carries a request out and answers; tells where that was the last user's farewell.
    pub fn serve(
        &self,
        buffer: &mut PageBuffer,
        request: Request,
    ) -> rustix::io::Result<Option<Ended>> {
        let opcode = request.opcode();
        let answer = match opcode {
            Some(opcode) if !opcode.is_answered() => Answer::None,
            Some(opcode) => self.carry_out(buffer, opcode, request),
            None => Answer::Status(Errno::NOSYS.raw_os_error()),
        };
        self.answer(buffer, request.header.unique, &answer)?;
        Ok((opcode == Some(Opcode::Release)).then_some(Ended::Released))
    }

    pub fn answer(
        &self,
        buffer: &PageBuffer,
        unique: u64,
        answer: &Answer,
    ) -> rustix::io::Result<()> {
        let (error, data) = match answer {
            Answer::None => return Ok(()),
            Answer::Status(error) => (*error, &[][..]),
            Answer::Small(bytes) => (0, &bytes[..]),
            Answer::Data(len) => (0, &buffer[DATA_AT..DATA_AT + len]),
        };
        let head = abi::out_header(unique, -error, data.len());
        let parts = [io::IoSlice::new(&head), io::IoSlice::new(data)];
        match rustix::io::writev(&*self.channel, &parts) {
            // The request was called off, or an earlier server has answered it.
            Err(Errno::NOENT) => Ok(()),
            other => other.map(drop),
        }
    }

    fn carry_out(&self, buffer: &mut PageBuffer, opcode: Opcode, request: Request) -> Answer {
        let args = request.args();
        let done = match opcode {
            Opcode::Read => self.read(buffer, args),
            Opcode::Write => self.write(buffer, args),
            Opcode::Fallocate => self.fallocate(&buffer[args]),
            Opcode::Fsync => self.export.flush().map(|()| Answer::Status(0)),
            Opcode::Lookup => self.lookup(&buffer[args]),
            Opcode::Getattr | Opcode::Setattr => Ok(self.attributes(request.header.node)),
            Opcode::Statfs => Ok(Answer::Small(self.statfs())),
            Opcode::Open => Ok(Answer::Small(
                abi::open_out(
                    open_flag::DIRECT_IO | open_flag::NOFLUSH | open_flag::PARALLEL_DIRECT_WRITES,
                )
                .to_vec(),
            )),
            _ => Ok(Answer::Status(0)),
        };
        done.unwrap_or_else(Answer::Status)
    }

    fn read(&self, buffer: &mut PageBuffer, args: Range<usize>) -> Result<Answer, i32> {
        let span = Span::parse(&buffer[args]).ok_or(libc::EINVAL)?;
        let size = self.export.size_bytes();
        let there = size.saturating_sub(span.offset).min(span.len_bytes.into());
        let len = usize::try_from(there.min(MAX_DATA.into())).map_err(|_| libc::EINVAL)?;
        let data = &mut buffer[DATA_AT..DATA_AT + len];
        self.export.read(data, span.offset)?;
        Ok(Answer::Data(len))
    }

    fn write(&self, buffer: &PageBuffer, args: Range<usize>) -> Result<Answer, i32> {
        let (span, data) = written(buffer, args).ok_or(libc::EINVAL)?;
        self.export.write(&buffer[data], span.offset)?;
        Ok(Answer::Small(abi::write_out(span.len_bytes).to_vec()))
    }

    /// A hole. The loop device sends discards and writes of zeroes alike, so it has to read as zeroes.
    fn fallocate(&self, args: &[u8]) -> Result<Answer, i32> {
        const KEEP_SIZE: u32 = 1;
        const PUNCH_HOLE: u32 = 2;
        const ZERO_RANGE: u32 = 16;
        let span = Fallocate::parse(args).ok_or(libc::EINVAL)?;
        let zeroes = match span.mode {
            mode if mode & (PUNCH_HOLE | ZERO_RANGE) != 0 => true,
            0 | KEEP_SIZE => false,
            _ => return Err(libc::EOPNOTSUPP),
        };
        if zeroes {
            self.export.write_zeroes(span.offset, span.len_bytes)?;
        }
        Ok(Answer::Status(0))
    }

    fn lookup(&self, name: &[u8]) -> Result<Answer, i32> {
        let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
        if name != abi::FILE_NAME {
            return Err(libc::ENOENT);
        }
        let entry = abi::entry_out(self.export.size_bytes());
        Ok(Answer::Small(entry.to_vec()))
    }

    fn attributes(&self, node: u64) -> Answer {
        Answer::Small(abi::attr_out(node, self.export.size_bytes()).to_vec())
    }

    fn statfs(&self) -> Vec<u8> {
        let unit = self.export.discard_unit_bytes();
        abi::statfs_out(self.export.size_bytes(), unit).to_vec()
    }
}

/// Where a write goes, and where its data lie in the buffer.
pub(super) fn written(buffer: &PageBuffer, args: Range<usize>) -> Option<(Span, Range<usize>)> {
    let data = DATA_AT..args.end;
    let span = Span::parse(&buffer[args])?;
    (data.len() == span.len_bytes as usize).then_some((span, data))
}

/// Which end a step of the conversation means, if any.
pub(super) fn cause_of(step: rustix::io::Result<Option<Ended>>) -> Option<Ended> {
    match step {
        Ok(cause) => cause,
        Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => None,
        Err(Errno::NODEV) => Some(Ended::Unmounted),
        Err(_) => Some(Ended::Failed),
    }
}
