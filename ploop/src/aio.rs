//! The kernel's asynchronous I/O, as far as a block server needs it: reads and writes of files, many at a
//! time, whose ends an eventfd tells.
//!
//! Not io_uring, for one promise: a process counts as dead for its parent only when all that it had under way
//! here has ended. So no write of a worker that was killed can come after one of the next worker.
//!
//! Source: man 2 io_submit, linux fs/aio.c, exit_aio
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use crate::disk::Way;
use crate::kernel::PageBuffer;

/// One request, as the kernel reads it.
///
/// Source: linux include/uapi/linux/aio_abi.h, struct iocb (little endian)
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    address: u64,
    len_bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// The end of one.
///
/// Source: linux include/uapi/linux/aio_abi.h, struct io_event
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<Iocb>() == 64 && size_of::<Event>() == 32);

const READ: u16 = 0;
const WRITE: u16 = 1;
/// The end is told to the eventfd.
const TELLS: u32 = 1;
/// What would have to wait for anything but the device comes back with `EAGAIN`.
const NO_WAIT: u32 = 8;

/// What the kernel is to do.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// From a file or to it.
    pub way: Way,
    /// The file.
    pub file: Arc<File>,
    /// Where in the file.
    pub offset: u64,
    /// Which bytes of the buffer.
    pub range: Range<usize>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Done<T> {
    /// The buffer.
    pub buffer: PageBuffer,
    /// What was kept with it.
    pub kept: T,
    /// Bytes read or written.
    pub result: io::Result<usize>,
}

struct Slot<T> {
    buffer: PageBuffer,
    kept: T,
    _file: Arc<File>,
}

/// Room for requests in the kernel. To give it back takes the kernel some 20 ms, in which whoever does it
/// sleeps.
#[derive(Debug)]
pub(crate) struct Context {
    number: libc::c_ulong,
    depth: usize,
}

impl Context {
    /// Room for so many requests at a time.
    ///
    /// # Errors
    /// The kernel has none, or its users have used up `fs.aio-max-nr`.
    pub fn new(depth: usize) -> io::Result<Context> {
        let mut number: libc::c_ulong = 0;
        // SAFETY: the kernel writes the number of the new context, which outlives the call.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut number) };
        check(made)?;
        Ok(Context { number, depth })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is ours. The call returns when nothing is under way any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.number) };
    }
}

/// Requests that are under way, with all that belongs to them.
pub(crate) struct Aio<T> {
    /// The first to go: the buffers have to stay as long as something is under way.
    context: Context,
    eventfd: u32,
    slots: Vec<Option<Slot<T>>>,
    queued: Vec<Iocb>,
    events: Vec<Event>,
}

impl<T> Aio<T> {
    /// Nothing is under way yet. `eventfd` has to live as long.
    ///
    /// # Errors
    /// `eventfd` has no number.
    pub fn new(context: Context, eventfd: BorrowedFd<'_>) -> io::Result<Aio<T>> {
        let depth = context.depth;
        Ok(Aio {
            context,
            eventfd: u32::try_from(eventfd.as_raw_fd()).map_err(io::Error::other)?,
            slots: (0..depth).map(|_| None).collect(),
            queued: Vec::with_capacity(depth),
            events: vec![Event::default(); depth],
        })
    }

    /// Takes a request, which goes out with the next [`submit`](Aio::submit). There has to be room.
    pub fn push(&mut self, transfer: Transfer, mut buffer: PageBuffer, kept: T) {
        let free = self.slots.iter().position(Option::is_none);
        let free = free.expect("the caller has as many buffers as there are slots");
        let data = &mut buffer[transfer.range];
        self.queued.push(Iocb {
            data: free as u64,
            key: 0,
            rw_flags: NO_WAIT,
            opcode: match transfer.way {
                Way::Read => READ,
                Way::Write => WRITE,
            },
            priority: 0,
            fd: u32::try_from(transfer.file.as_raw_fd()).expect("an open file has a number"),
            address: data.as_mut_ptr().addr() as u64,
            len_bytes: data.len() as u64,
            offset: i64::try_from(transfer.offset).unwrap_or(i64::MAX),
            reserved: 0,
            flags: TELLS,
            eventfd: self.eventfd,
        });
        self.slots[free] = Some(Slot {
            buffer,
            kept,
            _file: transfer.file,
        });
    }

    /// Sends what was pushed. What the kernel does not take goes to `done` with its answer.
    pub fn submit(&mut self, done: &mut Vec<Done<T>>) {
        let queued = std::mem::take(&mut self.queued);
        let mut rest: Vec<*const Iocb> = queued.iter().map(std::ptr::from_ref).collect();
        while !rest.is_empty() {
            // SAFETY: the pointers lead to requests that outlive the call. Their buffers and files are in
            // `slots`, where they stay untouched until the kernel has told the end of each.
            let taken = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context.number,
                    rest.len(),
                    rest.as_ptr(),
                )
            };
            let answer = check(taken);
            let count = answer.as_ref().map_or(0, |count| *count);
            let first = queued.len() - rest.len() + count;
            rest.drain(..count);
            if count == 0
                && let Some(refused) = queued.get(first)
            {
                rest.remove(0);
                let error = answer.err().unwrap_or(io::ErrorKind::WouldBlock.into());
                self.end(refused.data, Err(error), done);
            }
        }
        self.queued = queued;
        self.queued.clear();
    }

    /// Puts what has ended into `done`; does not wait.
    ///
    /// # Errors
    /// The context is broken.
    pub fn reap(&mut self, done: &mut Vec<Done<T>>) -> io::Result<()> {
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = std::mem::take(&mut self.events);
        // SAFETY: the kernel writes as many events as there are at most, and reads the time; both outlive
        // the call.
        let count = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context.number,
                0,
                events.len(),
                events.as_mut_ptr(),
                &raw const now,
            )
        };
        let count = match check(count) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            other => other,
        };
        for event in events.iter().take(*count.as_ref().unwrap_or(&0)) {
            let result = match usize::try_from(event.result) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(errno(event.result)),
            };
            self.end(event.data, result, done);
        }
        self.events = events;
        count.map(drop)
    }

    fn end(&mut self, slot: u64, result: io::Result<usize>, done: &mut Vec<Done<T>>) {
        let slot = usize::try_from(slot)
            .ok()
            .and_then(|at| self.slots.get_mut(at));
        if let Some(slot) = slot.and_then(Option::take) {
            done.push(Done {
                buffer: slot.buffer,
                kept: slot.kept,
                result,
            });
        }
    }
}

fn check(answer: libc::c_long) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

fn errno(result: i64) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_was_asked_for_comes_back_with_what_was_kept() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&[7; 8192], 0).unwrap();
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        let told = rustix::event::eventfd(0, flags).unwrap();
        let mut aio = Aio::new(Context::new(4).unwrap(), told.as_fd()).unwrap();
        let transfer = |way, offset| Transfer {
            way,
            file: Arc::clone(&file),
            offset,
            range: 4096..8192,
        };
        let mut written = PageBuffer::new(8192).unwrap();
        written.fill(9);
        aio.push(transfer(Way::Write, 4096), written, "write");
        aio.push(
            transfer(Way::Read, 0),
            PageBuffer::new(8192).unwrap(),
            "read",
        );
        aio.push(
            transfer(Way::Read, 1 << 40),
            PageBuffer::new(8192).unwrap(),
            "end",
        );
        let mut done = Vec::new();
        aio.submit(&mut done);
        while done.len() < 3 {
            aio.reap(&mut done).unwrap();
        }
        done.sort_by_key(|one| one.kept);
        let told: Vec<_> = done
            .iter()
            .map(|one| (one.kept, one.result.as_ref().ok()))
            .collect();
        // A file system that would have to wait says so; the caller does it in another way then.
        for (kept, bytes) in told {
            let whole = if kept == "end" { 0 } else { 4096 };
            assert!(
                bytes.is_none_or(|bytes| *bytes == whole),
                "{kept}: {bytes:?}"
            );
        }
        if done[1].result.is_ok() {
            assert!(done[1].buffer[4096..].iter().all(|byte| *byte == 7));
        }
    }
}
