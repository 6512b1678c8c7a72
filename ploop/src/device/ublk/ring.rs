//! The rings over which ublk is spoken to, and what it shares with us. Everything unsafe of ublk
//! stands here.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::mm::{MapFlags, ProtFlags};

use super::abi::{self, DEPTH, Request};
use crate::kernel::PageBuffer;

/// The control device.
pub(super) struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// The driver is not there, or io_uring is switched off.
    pub fn open() -> io::Result<Control> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(abi::CONTROL)?;
        let ring = IoUring::builder().build(4)?;
        Ok(Control { file, ring })
    }

    /// Carries a command out, with a value and what lies at an address, which it may change.
    pub fn command(
        &mut self,
        command: u32,
        device: u32,
        value: u64,
        shared: &mut [u8],
    ) -> io::Result<()> {
        let len = u16::try_from(shared.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let address = shared.as_mut_ptr().addr() as u64;
        self.begin(command, abi::control_command(device, value, len, address))?;
        // `shared` stays borrowed until the command has come back.
        while !self.is_done(None)? {}
        self.result()
    }

    /// Carries a command out that may wait for long and has no memory of ours; called off when `gives_up`.
    pub fn command_unless(
        mut self,
        command: u32,
        device: u32,
        value: u64,
        gives_up: impl Fn() -> bool,
    ) -> io::Result<()> {
        const LOOK: types::Timespec = types::Timespec::new().nsec(100_000_000);
        self.begin(command, abi::control_command(device, value, 0, 0))?;
        while !self.is_done(Some(&LOOK))? {
            if gives_up() {
                // With the ring the command goes, too.
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        self.result()
    }

    fn begin(&mut self, command: u32, argument: [u8; 80]) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::UringCmd80::new(fd, command).cmd(argument).build();
        // SAFETY: the file lives as long as the ring; whoever names memory in the argument waits for the
        // command's end.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// Waits for the command, so long at most.
    fn is_done(&mut self, patience: Option<&types::Timespec>) -> io::Result<bool> {
        let waited = match patience {
            None => self.ring.submit_and_wait(1),
            Some(patience) => {
                let args = types::SubmitArgs::new().timespec(patience);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match waited {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => {}
            other => other.map(drop)?,
        }
        Ok(!self.ring.completion().is_empty())
    }

    fn result(&mut self) -> io::Result<()> {
        let done = self.ring.completion().next();
        match done.ok_or(io::ErrorKind::BrokenPipe)?.result() {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            _ => Ok(()),
        }
    }
}

/// The one queue of a device. It belongs to one thread, which has to be the same all the time.
pub(super) struct Queue {
    ring: IoUring,
    channel: File,
    requests: Requests,
    /// The driver's: it copies data in and out at any time.
    lent: Vec<Option<PageBuffer>>,
    wake: File,
    woken: Box<[u8; 8]>,
}

/// What happened.
pub(super) enum Event {
    /// A request, its data in the buffer where it is a write.
    Request(u16, Request, PageBuffer),
    /// The device gives no more requests for this tag.
    Over,
    /// Somebody has written to the queue's event.
    Woken,
}

const WAKE: u64 = u64::MAX;

impl Queue {
    /// Takes a device's requests; `wake` is an eventfd that others write to.
    ///
    /// # Errors
    /// `EBUSY` as long as another server has it.
    pub fn open(device: u32, wake: File) -> io::Result<Queue> {
        let path = format!("/dev/ublkc{device}");
        let channel = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Queue {
            ring: IoUring::new(u32::from(DEPTH) * 2)?,
            requests: Requests::map(&channel)?,
            channel,
            lent: (0..DEPTH).map(|_| None).collect(),
            wake,
            woken: Box::new([0; 8]),
        })
    }

    /// Asks for the first requests.
    pub fn begin(&mut self) -> io::Result<()> {
        for tag in 0..DEPTH {
            self.ask(
                abi::io::FETCH,
                tag,
                0,
                PageBuffer::new(abi::MAX_DATA as usize)?,
            )?;
        }
        self.listen()?;
        self.ring.submit().map(drop)
    }

    /// Answers a request and asks for the next one of its tag. Goes out with the next [`wait`](Queue::wait).
    pub fn answer(&mut self, tag: u16, result: i32, buffer: PageBuffer) -> io::Result<()> {
        self.ask(abi::io::COMMIT_AND_FETCH, tag, result, buffer)
    }

    fn ask(&mut self, command: u32, tag: u16, result: i32, buffer: PageBuffer) -> io::Result<()> {
        let argument = abi::answer(tag, result, buffer.as_ptr().addr() as u64);
        self.lent[usize::from(tag)] = Some(buffer);
        let fd = types::Fd(self.channel.as_raw_fd());
        let entry = opcode::UringCmd16::new(fd, command).cmd(argument).build();
        let entry = entry.user_data(tag.into());
        // SAFETY: the buffer stays where it is, in `lent`, until the command has come back; `channel`
        // lives as long as the ring.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    fn listen(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.woken.as_mut_ptr(), 8).build();
        // SAFETY: the eight bytes are boxed and live as long as the ring, as does `wake`.
        unsafe { self.ring.submission().push(&entry.user_data(WAKE)) }.map_err(io::Error::other)
    }

    /// Sends what was said and returns what happened, at least one thing.
    pub fn wait(&mut self) -> io::Result<Vec<Event>> {
        match self.ring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        let done: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        let mut events = Vec::with_capacity(done.len());
        for (what, result) in done {
            if what == WAKE {
                self.listen()?;
                events.push(Event::Woken);
                continue;
            }
            let tag = u16::try_from(what).map_err(io::Error::other)?;
            let buffer = self.lent.get_mut(usize::from(tag)).and_then(Option::take);
            events.push(match (result, buffer) {
                (0, Some(buffer)) => Event::Request(tag, self.requests.get(tag), buffer),
                (abi::ABORTED, _) => Event::Over,
                (error, _) => return Err(io::Error::from_raw_os_error(-error)),
            });
        }
        Ok(events)
    }
}

/// The requests of a queue, which the driver writes and we read.
struct Requests {
    start: NonNull<[u8; Request::SIZE]>,
}

const MAPPED: usize = (DEPTH as usize * Request::SIZE).next_multiple_of(4096);

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Requests {}

impl Requests {
    fn map(channel: &File) -> io::Result<Requests> {
        let (read, shared) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; offset 0 is the
        // first queue's.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), MAPPED, read, shared, channel, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Requests { start })
    }

    fn get(&self, tag: u16) -> Request {
        assert!(tag < DEPTH, "tags are the queue's own");
        // SAFETY: the mapping holds DEPTH requests, and the tag is one of them.
        let at = unsafe { self.start.add(usize::from(tag)) };
        // SAFETY: the place is mapped; the driver writes a request before it completes its command and not
        // again before the answer.
        Request::parse(&unsafe { at.read_volatile() })
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), MAPPED) };
    }
}
