//! Answers the kernel's requests for one file, which is the disk.
//!
//! Each thread reads a request into its own buffer, carries it out and answers; a thread that waits
//! for the disk does not hold up the others. The buffer is laid out so that the data of a write begins
//! on a page: it goes to the image's file past the page cache and without another copy.
//!
//! ```text
//! | 4096 - 80 bytes unused | header 40 | arguments 40 | data: 1 MiB, page-aligned |
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use rustix::io::Errno;

use super::abi::{self, Fallocate, InHeader, Opcode, Span, open_flag};
use super::connection::MAX_DATA;
use crate::device::{Ended, Export};
use crate::kernel::PageBuffer;

/// Where data begins in a thread's buffer.
const DATA_AT: usize = 4096;
/// Where a request begins in a thread's buffer.
const REQUEST_AT: usize = DATA_AT - abi::WRITE_HEADER;

/// Starts the threads. The first cause of an end is sent; the threads go on until the process ends.
///
/// # Errors
/// No thread or no memory for its buffer.
pub fn start(
    channel: Arc<OwnedFd>,
    export: Arc<Export>,
    threads: usize,
    ended: &Sender<Ended>,
) -> io::Result<()> {
    for number in 0..threads.max(2) {
        let buffer = PageBuffer::new(DATA_AT + MAX_DATA as usize)?;
        let mut thread = Thread {
            channel: Arc::clone(&channel),
            export: Arc::clone(&export),
            buffer,
        };
        let ended = ended.clone();
        std::thread::Builder::new()
            .name(format!("disk{number}"))
            .spawn(move || thread.run(&ended))?;
    }
    Ok(())
}

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

struct Thread {
    channel: Arc<OwnedFd>,
    export: Arc<Export>,
    buffer: PageBuffer,
}

/// What is to be sent back.
enum Answer {
    /// Nothing.
    None,
    /// An error number or 0.
    Status(i32),
    /// A few bytes.
    Small(Vec<u8>),
    /// This many bytes of the buffer's data.
    Data(usize),
}

impl Thread {
    fn run(&mut self, ended: &Sender<Ended>) {
        loop {
            let cause = match self.next() {
                Ok(None) => continue,
                Ok(Some(cause)) => cause,
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(Errno::NODEV) => Ended::Unmounted,
                Err(_) => Ended::Failed,
            };
            // The receiver leaves when the first cause has come.
            let _ = ended.send(cause);
            if cause != Ended::Released {
                return;
            }
        }
    }

    /// Serves one request.
    fn next(&mut self) -> rustix::io::Result<Option<Ended>> {
        let len = rustix::io::read(&*self.channel, &mut self.buffer[REQUEST_AT..])?;
        let Some(header) = InHeader::parse(&self.buffer[REQUEST_AT..REQUEST_AT + len]) else {
            return Ok(None);
        };
        let opcode = Opcode::from_u32(header.opcode);
        let answer = match opcode {
            Some(opcode) if !opcode.is_answered() => Answer::None,
            Some(opcode) => self.carry_out(opcode, &header, len),
            None => Answer::Status(Errno::NOSYS.raw_os_error()),
        };
        self.answer(header.unique, &answer)?;
        Ok((opcode == Some(Opcode::Release)).then_some(Ended::Released))
    }

    fn answer(&self, unique: u64, answer: &Answer) -> rustix::io::Result<()> {
        let (error, data) = match answer {
            Answer::None => return Ok(()),
            Answer::Status(error) => (*error, &[][..]),
            Answer::Small(bytes) => (0, &bytes[..]),
            Answer::Data(len) => (0, &self.buffer[DATA_AT..DATA_AT + len]),
        };
        let head = abi::out_header(unique, -error, data.len());
        let parts = [io::IoSlice::new(&head), io::IoSlice::new(data)];
        match rustix::io::writev(&*self.channel, &parts) {
            // The request was called off, or an earlier server has answered it.
            Err(Errno::NOENT) => Ok(()),
            other => other.map(drop),
        }
    }

    fn carry_out(&mut self, opcode: Opcode, header: &InHeader, len: usize) -> Answer {
        let args = REQUEST_AT + abi::IN_HEADER..REQUEST_AT + len;
        let done = match opcode {
            Opcode::Read => self.read(args),
            Opcode::Write => self.write(args),
            Opcode::Fallocate => self.fallocate(args),
            Opcode::Fsync => self.export.flush().map(|()| Answer::Status(0)),
            Opcode::Lookup => self.lookup(args),
            Opcode::Getattr | Opcode::Setattr => Ok(self.attributes(header.node)),
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

    fn read(&mut self, args: std::ops::Range<usize>) -> Result<Answer, i32> {
        let span = Span::parse(&self.buffer[args]).ok_or(libc::EINVAL)?;
        let size = self.export.size_bytes();
        let there = size.saturating_sub(span.offset).min(span.len_bytes.into());
        let len = usize::try_from(there.min(MAX_DATA.into())).map_err(|_| libc::EINVAL)?;
        let data = &mut self.buffer[DATA_AT..DATA_AT + len];
        self.export.read(data, span.offset)?;
        Ok(Answer::Data(len))
    }

    fn write(&mut self, args: std::ops::Range<usize>) -> Result<Answer, i32> {
        let end = args.end;
        let span = Span::parse(&self.buffer[args]).ok_or(libc::EINVAL)?;
        let data = self.buffer.get(DATA_AT..end).ok_or(libc::EINVAL)?;
        if data.len() != span.len_bytes as usize {
            return Err(libc::EINVAL);
        }
        self.export.write(data, span.offset)?;
        Ok(Answer::Small(abi::write_out(span.len_bytes).to_vec()))
    }

    /// A hole. The loop device sends discards and writes of zeroes alike, so it has to read as zeroes.
    fn fallocate(&mut self, args: std::ops::Range<usize>) -> Result<Answer, i32> {
        const KEEP_SIZE: u32 = 1;
        const PUNCH_HOLE: u32 = 2;
        const ZERO_RANGE: u32 = 16;
        let span = Fallocate::parse(&self.buffer[args]).ok_or(libc::EINVAL)?;
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

    fn lookup(&self, args: std::ops::Range<usize>) -> Result<Answer, i32> {
        let name = &self.buffer[args];
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
