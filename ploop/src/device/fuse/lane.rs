//! The thread that takes the kernel's requests, and carries the common ones out without waiting for each.
//!
//! A read or a write of bytes that have a place in an image's file goes to the kernel's asynchronous I/O as
//! soon as it is taken, and is answered when that has ended: many at a time, without a thread that sleeps and
//! is woken for each. Where news follow one another closely, the lane looks for them instead of sleeping.
//! Whatever may wait for something else (a place that is being given or taken, a table, a flush) is handed to
//! the crew. So is a request that went wrong, which is carried out once more there and gets its error. As long
//! as requests are [large](super::bulk), the crew takes them itself, each thread one at a time.
//!
//! ```text
//! kernel --request--> lane --asynchronous I/O--> lane --answer--> kernel
//!                       \--job--> crew --answer--> kernel; the buffer goes back to the lane
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::abi::{self, Opcode, Span};
use super::bulk::Bulk;
use super::pace::Pace;
use super::serve::{Answer, BUFFER, DATA_AT, Request, Served, cause_of, spawn, written};
use crate::aio::{Aio, Context, Done, Transfer};
use crate::device::{Ended, Export};
use crate::disk::{Placed, Way};
use crate::kernel::PageBuffer;
use crate::storage::DIRECT_ALIGNMENT;

/// What the crew is to do.
struct Job {
    buffer: PageBuffer,
    /// A request to carry out; without one, those that come, as long as they are large.
    request: Option<Request>,
}

/// A request that is under way.
struct UnderWay<'d> {
    request: Request,
    span: Span,
    way: Way,
    /// Nothing moves the place before this is gone.
    _placed: Placed<'d>,
}

/// Buffers for each thread of the crew.
const BUFFERS: usize = 2;

/// Only what is new: what is told of has to be read until it is empty before the next wait.
const NEWS: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ET);

/// What wakes the lane: the channel, and an eventfd to which the kernel and the crew write.
struct Alarm {
    epoll: OwnedFd,
    eventfd: File,
    /// The lane has no buffer left.
    is_hungry: AtomicBool,
}

impl Alarm {
    /// Both tell only what is new: the channel has to be read until it is empty before the next wait.
    fn new(channel: &OwnedFd) -> io::Result<Alarm> {
        use rustix::event::{EventfdFlags, eventfd};
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let eventfd: File = eventfd(0, flags)?.into();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &eventfd, epoll::EventData::new_u64(0), NEWS)?;
        let alarm = Alarm {
            epoll,
            eventfd,
            is_hungry: AtomicBool::new(false),
        };
        alarm.listen(channel)?;
        Ok(alarm)
    }

    fn wait(&self) -> rustix::io::Result<()> {
        let mut events = Vec::with_capacity(2);
        epoll::wait(&self.epoll, spare_capacity(&mut events), None).map(drop)
    }

    fn listen(&self, channel: &OwnedFd) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, channel, epoll::EventData::new_u64(0), NEWS)
    }

    fn ignore(&self, channel: &OwnedFd) -> rustix::io::Result<()> {
        epoll::delete(&self.epoll, channel)
    }

    /// Tells a lane that has none that there is a buffer again.
    fn has_come_back(&self) {
        if self.is_hungry.swap(false, Ordering::SeqCst) {
            self.ring();
        }
    }

    fn ring(&self) {
        if let Err(error) = (&self.eventfd).write_all(&1u64.to_ne_bytes()) {
            eprintln!("fuse: {error}");
        }
    }
}

/// Starts the lane and its crew, and gives it twice as many buffers as the crew has threads; false where the
/// kernel has no asynchronous I/O to offer.
///
/// # Errors
/// No thread or no memory for the buffers.
pub fn start(served: &Served, threads: usize, ended: &Sender<Ended>) -> io::Result<bool> {
    let depth = threads * BUFFERS;
    let Ok(context) = Context::new(depth) else {
        return Ok(false);
    };
    let alarm = Arc::new(Alarm::new(&served.channel)?);
    rustix::fs::fcntl_setfl(&*served.channel, OFlags::NONBLOCK)?;
    let (jobs, taken) = channel();
    let (back, returned) = channel();
    let taken = Arc::new(Mutex::new(taken));
    let bulk = Arc::new(Bulk::default());
    for number in 0..threads {
        let crew = Crew {
            served: served.clone(),
            jobs: Arc::clone(&taken),
            back: back.clone(),
            alarm: Arc::clone(&alarm),
            bulk: Arc::clone(&bulk),
            ended: ended.clone(),
        };
        let buffers = (0..BUFFERS).map(|_| PageBuffer::unbacked(BUFFER));
        let buffers = buffers.collect::<io::Result<Vec<PageBuffer>>>()?;
        spawn(format!("disk{number}"), move || crew.run(buffers))?;
    }
    let (served, ended) = (served.clone(), ended.clone());
    spawn("lane".to_owned(), move || {
        let lane = Aio::new(context, alarm.eventfd.as_fd()).map(|aio| Lane {
            served: &served,
            aio,
            buffers: Vec::with_capacity(depth),
            depth,
            jobs: &jobs,
            bulk: &bulk,
            done: Vec::new(),
            has_taken: false,
        });
        let told = |cause| {
            // The receiver leaves when the first cause has come.
            let _ = ended.send(cause);
        };
        // Before the lane goes, which takes its time.
        match lane {
            Ok(mut lane) => told(lane.run(&alarm, &returned)),
            Err(error) => told(failed(&error)),
        }
    })?;
    Ok(true)
}

fn failed(error: &io::Error) -> Ended {
    eprintln!("fuse: {error}");
    Ended::Failed
}

struct Lane<'d> {
    served: &'d Served,
    aio: Aio<UnderWay<'d>>,
    /// Those that are free.
    buffers: Vec<PageBuffer>,
    /// How many there are.
    depth: usize,
    jobs: &'d Sender<Job>,
    bulk: &'d Bulk,
    done: Vec<Done<UnderWay<'d>>>,
    /// A request has come since this was last looked at.
    has_taken: bool,
}

impl<'d> Lane<'d> {
    /// Works until the service ends.
    fn run(&mut self, alarm: &Alarm, returned: &Receiver<PageBuffer>) -> Ended {
        self.work(alarm, returned)
            .unwrap_or_else(|error| failed(&error))
    }

    fn work(&mut self, alarm: &Alarm, returned: &Receiver<PageBuffer>) -> io::Result<Ended> {
        let channel = &self.served.channel;
        // The lane takes the requests, and not the crew.
        let mut listens = true;
        let mut pace = Pace::default();
        loop {
            self.buffers.extend(returned.try_iter());
            if !listens && !self.bulk.is_on() {
                alarm.listen(channel)?;
                listens = true;
            }
            let leaves = listens && self.bulk.is_wanted();
            if leaves && self.buffers.len() == self.depth {
                // Nothing is under way here that the crew, waiting for the channel, would not see.
                alarm.ignore(channel)?;
                listens = false;
                self.bulk.begin(channel)?;
                self.let_crew_take(self.depth / BUFFERS)?;
            } else if listens
                && !leaves
                && let Some(cause) = self.take_all()?
            {
                return Ok(cause);
            }
            self.aio.reap(&mut self.done)?;
            let has_news = self.has_taken || !self.done.is_empty();
            if let Some(cause) = self.answer_all()? {
                return Ok(cause);
            }
            if has_news {
                self.has_taken = false;
                pace.has_news();
                continue;
            }
            if pace.looks_on() {
                // Whoever makes the next news may want this processor.
                rustix::thread::sched_yield();
                continue;
            }
            if self.buffers.is_empty() || leaves {
                alarm.is_hungry.store(true, Ordering::SeqCst);
                // One may have come back before it could know.
                let had = self.buffers.len();
                self.buffers.extend(returned.try_iter());
                if self.buffers.len() != had {
                    continue;
                }
            }
            match alarm.wait() {
                Ok(()) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes requests until there are none, or no buffer is left: then the next buffer that comes back
    /// wakes the lane, and it goes on here.
    fn take_all(&mut self) -> io::Result<Option<Ended>> {
        while let Some(mut buffer) = self.buffers.pop() {
            match self.served.take(&mut buffer) {
                Ok(Some(request)) => {
                    self.has_taken = true;
                    if let Some(bytes) = request.data_bytes(&buffer) {
                        self.bulk.count(bytes);
                    }
                    self.begin(buffer, request)?;
                }
                Ok(None) => self.buffers.push(buffer),
                Err(error) => {
                    self.buffers.push(buffer);
                    if error == Errno::AGAIN {
                        return Ok(None);
                    }
                    if let Some(cause) = cause_of(Err(error)) {
                        return Ok(Some(cause));
                    }
                }
            }
        }
        Ok(None)
    }

    fn begin(&mut self, buffer: PageBuffer, request: Request) -> io::Result<()> {
        match place(&self.served.export, &buffer, request) {
            Some((transfer, under_way)) => {
                self.aio.push(transfer, buffer, under_way);
                // At once: the device works on it while the next one is taken.
                self.aio.submit(&mut self.done);
                Ok(())
            }
            None => self.hand_over(buffer, request),
        }
    }

    fn hand_over(&self, buffer: PageBuffer, request: Request) -> io::Result<()> {
        let request = Some(request);
        let sent = self.jobs.send(Job { buffer, request });
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Gives each thread of the crew a buffer to take requests into.
    fn let_crew_take(&mut self, threads: usize) -> io::Result<()> {
        for buffer in self.buffers.drain(..threads) {
            let sent = self.jobs.send(Job {
                buffer,
                request: None,
            });
            sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        }
        Ok(())
    }

    fn answer_all(&mut self) -> io::Result<Option<Ended>> {
        let mut done = std::mem::take(&mut self.done);
        let mut cause = None;
        for one in done.drain(..) {
            cause = cause.or(self.answer(one)?);
        }
        self.done = done;
        Ok(cause)
    }

    fn answer(&mut self, done: Done<UnderWay<'_>>) -> io::Result<Option<Ended>> {
        let UnderWay {
            request,
            span,
            way,
            _placed,
        } = done.kept;
        // Before anybody who may want to move it.
        drop(_placed);
        let len = DATA_AT..DATA_AT + span.len_bytes as usize;
        if done.result.ok() != Some(len.len()) {
            self.hand_over(done.buffer, request)?;
            return Ok(None);
        }
        self.served
            .export
            .was_done(span.offset, span.len_bytes.into(), way);
        let answer = match way {
            Way::Read => Answer::Data(len.len()),
            Way::Write => Answer::Small(abi::write_out(span.len_bytes).to_vec()),
        };
        let unique = request.header.unique;
        let answered = self.served.answer(&done.buffer, unique, &answer);
        self.buffers.push(done.buffer);
        Ok(cause_of(answered.map(|()| None)))
    }
}

/// A read or write of bytes that have a place, made ready for the kernel.
fn place<'d>(
    export: &'d Export,
    buffer: &PageBuffer,
    request: Request,
) -> Option<(Transfer, UnderWay<'d>)> {
    let (way, span, range) = match request.opcode()? {
        Opcode::Read => {
            let span = Span::parse(&buffer[request.args()])?;
            let end = DATA_AT + usize::try_from(span.len_bytes).ok()?;
            (Way::Read, span, DATA_AT..end)
        }
        Opcode::Write => {
            let (span, range) = written(buffer, request.args())?;
            (Way::Write, span, range)
        }
        _ => return None,
    };
    let len_bytes = u64::from(span.len_bytes);
    let is_aligned = (span.offset | len_bytes).is_multiple_of(DIRECT_ALIGNMENT);
    if !is_aligned || range.is_empty() || range.end > buffer.len() {
        return None;
    }
    // The last question: what comes of a write counts from here on.
    let placed = export.place(span.offset, len_bytes, way)?;
    let transfer = Transfer {
        way,
        file: Arc::clone(&placed.file),
        offset: placed.offset,
        range,
    };
    let under_way = UnderWay {
        request,
        span,
        way,
        _placed: placed,
    };
    Some((transfer, under_way))
}

/// One of the threads that may wait.
struct Crew {
    served: Served,
    jobs: Arc<Mutex<Receiver<Job>>>,
    back: Sender<PageBuffer>,
    alarm: Arc<Alarm>,
    bulk: Arc<Bulk>,
    ended: Sender<Ended>,
}

impl Crew {
    /// Gives the lane its buffers and works. Their pages are gotten here, beside whatever else has to be done
    /// for a disk's first request.
    fn run(&self, buffers: Vec<PageBuffer>) {
        for mut buffer in buffers {
            buffer.back();
            if self.back.send(buffer).is_err() {
                return;
            }
            self.alarm.has_come_back();
        }
        self.work();
    }

    fn work(&self) {
        loop {
            let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            let next = jobs.recv();
            drop(jobs);
            let Ok(mut job) = next else { return };
            if let Some(cause) = cause_of(self.carry_out(&mut job).map(|()| None)) {
                let _ = self.ended.send(cause);
                return;
            }
            if self.back.send(job.buffer).is_err() {
                return;
            }
            self.alarm.has_come_back();
        }
    }

    /// Carries a job out, and goes on with what comes as long as that is for the crew to take.
    fn carry_out(&self, job: &mut Job) -> rustix::io::Result<()> {
        let mut request = job.request;
        loop {
            if let Some(request) = request {
                let served = self.served.serve(&mut job.buffer, request);
                if let Some(cause) = cause_of(served) {
                    // The receiver leaves when the first cause has come.
                    let _ = self.ended.send(cause);
                }
            }
            if !self.bulk.is_on() {
                return Ok(());
            }
            request = match self.served.take(&mut job.buffer) {
                Ok(taken) => taken,
                Err(Errno::INTR | Errno::NOENT) => None,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            };
            if let Some(bytes) = request.and_then(|request| request.data_bytes(&job.buffer)) {
                self.bulk.count(bytes);
                if self.bulk.end(&self.served.channel)? {
                    self.alarm.ring();
                }
            }
        }
    }
}
