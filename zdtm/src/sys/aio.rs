//! Asynchronous I/O contexts, as io_setup makes them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::{Region, call};

const REQUEST: usize = 64;
const EVENT: usize = 32;
/// Requests or events of one call.
const MOST: usize = 64;
const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const POLL: u16 = 5;

/// A context, with memory for the arguments of its calls.
#[derive(Debug, Clone, Copy)]
pub struct AioContext {
    /// Its id: the address of its ring.
    pub id: usize,
    requests: Region,
    table: Region,
    events: Region,
}

/// What came of a request: the value it was given, and its result.
pub type AioEvent = (u64, i64);

impl AioContext {
    /// Makes one for so many requests.
    pub fn new(nr: usize) -> io::Result<AioContext> {
        let word = Region::anon(super::PAGE)?;
        // SAFETY: the word is memory of ours and zero, as the call wants it.
        unsafe { call(libc::SYS_io_setup, [nr, word.addr, 0, 0, 0, 0]) }?;
        let id = u64::from_ne_bytes(
            word.get(0, 8)
                .try_into()
                .map_err(|_| io::ErrorKind::Other)?,
        );
        Ok(AioContext {
            id: usize::try_from(id).map_err(io::Error::other)?,
            requests: Region::anon(MOST * REQUEST)?,
            table: Region::anon(MOST * 8)?,
            events: Region::anon(MOST * EVENT)?,
        })
    }

    /// Asks for writes of `memory` at the beginning of a file, one for each value; returns how many the
    /// kernel took.
    pub fn write(&self, fd: impl AsFd, memory: Region, values: &[u64]) -> io::Result<u64> {
        self.submit(fd, PWRITE, memory, values)
    }

    /// Asks for reads of the beginning of a file into `memory`, as [`AioContext::write`].
    pub fn read(&self, fd: impl AsFd, memory: Region, values: &[u64]) -> io::Result<u64> {
        self.submit(fd, PREAD, memory, values)
    }

    /// Asks to be told when a file can be read; returns how many requests the kernel took.
    pub fn poll(&self, fd: impl AsFd, value: u64) -> io::Result<u64> {
        let events = Region { addr: 1, len: 0 };
        self.submit(fd, POLL, events, &[value])
    }

    fn submit(
        &self,
        fd: impl AsFd,
        opcode: u16,
        memory: Region,
        values: &[u64],
    ) -> io::Result<u64> {
        let fd = fd.as_fd().as_raw_fd();
        let number = |value: usize| u64::try_from(value).unwrap_or(u64::MAX).to_ne_bytes();
        for (nth, value) in values.iter().take(MOST).enumerate() {
            let at = nth * REQUEST;
            self.requests.put(at, &[0; REQUEST]);
            self.requests.put(at, &value.to_ne_bytes());
            self.requests.put(at + 16, &opcode.to_ne_bytes());
            self.requests.put(at + 20, &fd.to_ne_bytes());
            self.requests.put(at + 24, &number(memory.addr));
            self.requests.put(at + 32, &number(memory.len));
            self.table.put(nth * 8, &number(self.requests.addr + at));
        }
        let arguments = [self.id, values.len().min(MOST), self.table.addr, 0, 0, 0];
        // SAFETY: the table holds so many addresses of whole requests, and those an address and a
        // length of memory that is never unmapped.
        unsafe { call(libc::SYS_io_submit, arguments) }
    }

    /// Takes between `least` and 64 events; waits for the first `least` of them.
    pub fn take(&self, least: usize) -> io::Result<Vec<AioEvent>> {
        let arguments = [self.id, least, MOST, self.events.addr, 0, 0];
        // SAFETY: there is room for so many events.
        let taken = unsafe { call(libc::SYS_io_getevents, arguments) }?;
        let word = |nth: usize, at: usize| {
            let bytes = self.events.get(nth * EVENT + at, 8);
            u64::from_ne_bytes(bytes.try_into().unwrap_or_default())
        };
        let taken = usize::try_from(taken).map_err(io::Error::other)?;
        Ok((0..taken)
            .map(|nth| (word(nth, 0), word(nth, 16).cast_signed()))
            .collect())
    }

    /// Number of events that the ring holds, its head and its tail.
    pub fn ring(&self) -> [u32; 3] {
        let ring = Region {
            addr: self.id,
            len: super::PAGE,
        };
        [4, 8, 12].map(|at| u32::from_ne_bytes(ring.get(at, 4).try_into().unwrap_or_default()))
    }

    /// Ends the context.
    pub fn destroy(self) -> io::Result<()> {
        // SAFETY: numbers only.
        unsafe { call(libc::SYS_io_destroy, [self.id, 0, 0, 0, 0, 0]) }.map(drop)
    }
}
