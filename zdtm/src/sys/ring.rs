//! io_uring rings as liburing has them: indices kept by the program, entries written into shared memory.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use super::{PAGE, RW, Region, call};

/// Submission entries are taken in order, without an array of indices.
pub const NO_SQARRAY: u32 = 1 << 16;
/// Submission entries of 128 bytes.
pub const SQE128: u32 = 1 << 10;
/// Completion entries of 32 bytes.
pub const CQE32: u32 = 1 << 11;
/// A thread of the kernel submits.
pub const SQPOLL: u32 = 1 << 1;
/// The ring starts disabled.
pub const R_DISABLED: u32 = 1 << 6;
/// Submitting goes on behind an entry that fails.
pub const SUBMIT_ALL: u32 = 1 << 7;
/// The kernel does not interrupt the program for its work.
pub const COOP_TASKRUN: u32 = 1 << 8;
/// The ring says when such work waits.
pub const TASKRUN_FLAG: u32 = 1 << 9;
/// Only one thread may submit.
pub const SINGLE_ISSUER: u32 = 1 << 12;
/// The kernel works only when that thread asks for completions.
pub const DEFER_TASKRUN: u32 = 1 << 13;
const CQSIZE: u32 = 1 << 3;
const ENTRIES_AT: i64 = 0x1000_0000;
const GETEVENTS: usize = 1;
const WAKEUP: usize = 2;
const PARAMS: usize = 120;

/// Does nothing.
pub const NOP: u8 = 0;
/// Waits for a file to become ready.
pub const POLL_ADD: u8 = 6;
/// Ends a wait, of the request with the value `addr`.
pub const POLL_REMOVE: u8 = 7;
/// Length of a wait that goes on after each time.
pub const POLL_MULTI: u32 = 1;
/// Reads into several parts of memory.
pub const READV: u8 = 1;
/// Receives a message, with its sender.
pub const RECVMSG: u8 = 10;
/// Waits for some time.
pub const TIMEOUT: u8 = 11;
/// Ends a timeout, of the request with the value `addr`.
pub const TIMEOUT_REMOVE: u8 = 12;
/// Flag of a timeout: the time is a moment.
pub const TIMEOUT_MOMENT: u32 = 1;
/// Flag of a timeout: on the clock that counts suspend.
pub const TIMEOUT_BOOTTIME: u32 = 4;
/// Flag of a timeout: on the clock that tells the date.
pub const TIMEOUT_REALTIME: u32 = 8;
/// Flag of a timeout: goes on after each time.
pub const TIMEOUT_MULTI: u32 = 1 << 6;
/// Accepts a connection.
pub const ACCEPT: u8 = 13;
/// Flag of [`ACCEPT`] in `ioprio`: goes on after each.
pub const ACCEPT_MULTI: u16 = 1;
/// Ends what it is linked to after some time.
pub const LINK_TIMEOUT: u8 = 15;
/// Sends.
pub const SEND: u8 = 26;
/// Receives.
pub const RECV: u8 = 27;
/// Opens a file, for reading, whose path is at `addr`.
pub const OPENAT: u8 = 18;
/// Closes a descriptor.
pub const CLOSE: u8 = 19;
/// Reads.
pub const READ: u8 = 22;
/// Writes.
pub const WRITE: u8 = 23;
/// Writes from registered memory.
pub const WRITE_FIXED: u8 = 5;
/// Reads into registered memory.
pub const READ_FIXED: u8 = 4;
/// Flag of an entry: the descriptor is the number of a registered file.
pub const FIXED_FILE: u8 = 1;

/// A request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    /// What to do.
    pub opcode: u8,
    /// Flags of the entry.
    pub flags: u8,
    /// The file.
    pub fd: RawFd,
    /// Where in the file.
    pub offset: u64,
    /// Where in memory.
    pub addr: usize,
    /// How much.
    pub len: u32,
    /// Flags of the operation; for [`POLL_ADD`] the events, which are those of reading where there are none.
    pub operation_flags: u32,
    /// More flags of some operations.
    pub ioprio: u16,
    /// Comes back with the completion.
    pub value: u64,
}

/// What came of a request: the value it was given, and its result.
pub type Completion = (u64, i32);

/// A ring, with the program's own indices.
#[derive(Debug)]
pub struct Ring {
    /// Its descriptor.
    pub fd: OwnedFd,
    rings: Region,
    entries: Region,
    flags: u32,
    /// Where the indices of entries begin.
    array: usize,
    sq_entries: u32,
    cq_entries: u32,
    tail: u32,
}

impl Ring {
    /// Makes one; `completions` is their number where it is not twice that of entries.
    pub fn new(entries: u32, completions: Option<u32>, flags: u32) -> io::Result<Ring> {
        let params = Region::anon(PAGE)?;
        let size = completions.map_or(0, |_| CQSIZE);
        params.put(4, &completions.unwrap_or(0).to_ne_bytes());
        params.put(8, &(flags | size).to_ne_bytes());
        // Idle time of the thread that submits.
        params.put(16, &10u32.to_ne_bytes());
        let arguments = [as_usize(entries), params.addr, 0, 0, 0, 0];
        // SAFETY: the parameters have the kernel's size and live through the call.
        let fd = unsafe { call(libc::SYS_io_uring_setup, arguments) }?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the call has just returned the descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let answer = params.get(0, PARAMS);
        let word =
            |at: usize| u32::from_ne_bytes(answer[at..at + 4].try_into().unwrap_or_default());
        let (sq_entries, cq_entries) = (word(0), word(4));
        let one = if flags & CQE32 == 0 { 16 } else { 32 };
        // sq_off.array, with room for an index of each entry.
        let array = as_usize(word(64));
        let end = (64 + one * as_usize(cq_entries)).max(array) + 4 * as_usize(sq_entries);
        let len = if flags & SQE128 == 0 { 64 } else { 128 };
        let map = |len: usize, offset| {
            let len = len.next_multiple_of(PAGE);
            Region::map(
                None,
                len,
                RW,
                libc::MAP_SHARED,
                Some(std::os::fd::AsFd::as_fd(&fd)),
                offset,
            )
        };
        let rings = map(end, 0)?;
        let entries = map(len * as_usize(sq_entries), ENTRIES_AT)?;
        Ok(Ring {
            fd,
            rings,
            entries,
            flags,
            array,
            sq_entries,
            cq_entries,
            tail: 0,
        })
    }

    /// The four indices: taken and put entries, taken and put completions.
    pub fn indices(&self) -> [u32; 4] {
        [0, 4, 8, 12].map(|at| self.rings.word(at).load(Ordering::Acquire))
    }

    /// Puts a request into the ring, where the kernel does not look before it is told.
    pub fn put(&mut self, request: &Request) {
        let len = if self.flags & SQE128 == 0 { 64 } else { 128 };
        let nth = as_usize(self.tail & (self.sq_entries - 1));
        let mut entry = vec![0u8; len];
        entry[0] = request.opcode;
        entry[1] = request.flags;
        entry[2..4].copy_from_slice(&request.ioprio.to_ne_bytes());
        entry[4..8].copy_from_slice(&request.fd.to_ne_bytes());
        entry[8..16].copy_from_slice(&request.offset.to_ne_bytes());
        entry[16..24].copy_from_slice(&request.addr.to_ne_bytes());
        entry[24..28].copy_from_slice(&request.len.to_ne_bytes());
        let flags = match (request.opcode, request.operation_flags) {
            (POLL_ADD, 0) => 1,
            (_, flags) => flags,
        };
        entry[28..32].copy_from_slice(&flags.to_ne_bytes());
        entry[32..40].copy_from_slice(&request.value.to_ne_bytes());
        self.entries.put(nth * len, &entry);
        if self.flags & NO_SQARRAY == 0 {
            let nth = self.tail & (self.sq_entries - 1);
            self.rings
                .put(self.array + 4 * as_usize(nth), &nth.to_ne_bytes());
        }
        self.tail = self.tail.wrapping_add(1);
        self.rings.word(4).store(self.tail, Ordering::Release);
    }

    /// Has the kernel take what was put, and waits for so many completions.
    pub fn submit(&self, least: u32) -> io::Result<u32> {
        let nr = self.tail.wrapping_sub(self.indices()[0]);
        let mut flags = if least > 0 { GETEVENTS } else { 0 };
        if self.flags & SQPOLL != 0 {
            flags |= WAKEUP;
        }
        let fd = usize::try_from(self.fd.as_raw_fd()).map_err(io::Error::other)?;
        let arguments = [fd, as_usize(nr), as_usize(least), flags, 0, 0];
        // SAFETY: entries in the ring name memory that is never unmapped.
        let taken = unsafe { call(libc::SYS_io_uring_enter, arguments) }?;
        u32::try_from(taken).map_err(io::Error::other)
    }

    /// Takes all completions that are there.
    pub fn take(&self) -> Vec<Completion> {
        let one = if self.flags & CQE32 == 0 { 16 } else { 32 };
        let [.., head, tail] = self.indices();
        let nr = tail.wrapping_sub(head);
        let completion = |nth: u32| {
            let at = 64 + one * as_usize(head.wrapping_add(nth) & (self.cq_entries - 1));
            let bytes = self.rings.get(at, 12);
            let value = u64::from_ne_bytes(bytes[..8].try_into().unwrap_or_default());
            (
                value,
                i32::from_ne_bytes(bytes[8..12].try_into().unwrap_or_default()),
            )
        };
        let taken = (0..nr).map(completion).collect();
        self.rings.word(8).store(tail, Ordering::Release);
        taken
    }

    /// Puts, submits and waits for the completion.
    pub fn run(&mut self, request: &Request) -> io::Result<Completion> {
        self.put(request);
        self.submit(1)?;
        let mut taken = self.take();
        while taken.is_empty() {
            self.submit(1)?;
            taken = self.take();
        }
        taken.pop().ok_or_else(|| io::Error::other("no completion"))
    }

    /// Makes an operation on the ring with an argument in memory.
    pub fn register(&self, operation: usize, argument: Region, nr: usize) -> io::Result<u64> {
        let fd = usize::try_from(self.fd.as_raw_fd()).map_err(io::Error::other)?;
        let arguments = [fd, operation, argument.addr, nr, 0, 0];
        // SAFETY: the argument is memory that is never unmapped.
        unsafe { call(libc::SYS_io_uring_register, arguments) }
    }

    /// Has the kernel take entries of the ring that this thread has registered under a number.
    pub fn submit_registered(&self, index: i64) -> io::Result<u64> {
        const REGISTERED: i64 = 1 << 4;
        let nr = i64::from(self.tail.wrapping_sub(self.indices()[0]));
        super::call_plain(libc::SYS_io_uring_enter, [index, nr, 0, REGISTERED, 0, 0])
    }

    /// Whether the thread that submits sleeps, as the kernel says.
    pub fn thread_sleeps(&self) -> bool {
        self.rings.word(36).load(Ordering::Acquire) & 1 != 0
    }

    /// Where head and completions are mapped, and where entries are.
    pub fn regions(&self) -> (Region, Region) {
        (self.rings, self.entries)
    }
}

fn as_usize(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
