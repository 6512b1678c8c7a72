//! A worker's side: one thread speaks with the driver, others carry the requests out.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::abi::{Request, operation};
use super::ring::{Event, Queue};
use super::{PATIENCE, PAUSE};
use crate::device::{Ended, Export, View};
use crate::kernel::PageBuffer;

struct Job {
    tag: u16,
    request: Request,
    buffer: PageBuffer,
}

struct Done {
    tag: u16,
    result: i32,
    buffer: PageBuffer,
}

/// What the threads that carry requests out share.
struct Crew {
    export: Arc<Export>,
    view: View,
    jobs: Mutex<Receiver<Job>>,
    done: Mutex<Vec<Done>>,
    wake: File,
}

/// Starts the threads that answer the driver; returns when it has been asked for requests.
///
/// # Errors
/// The device is not there, or another server keeps it.
pub fn start(
    device: u32,
    export: &Arc<Export>,
    view: View,
    threads: usize,
    ended: &Sender<Ended>,
) -> io::Result<()> {
    let wake: File = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?.into();
    let (job, jobs) = channel();
    let crew = Arc::new(Crew {
        export: Arc::clone(export),
        view,
        jobs: Mutex::new(jobs),
        done: Mutex::new(Vec::new()),
        wake: wake.try_clone()?,
    });
    for number in 0..threads.max(2) {
        let crew = Arc::clone(&crew);
        std::thread::Builder::new()
            .name(format!("disk{number}"))
            .spawn(move || crew.work())?;
    }
    let ended = ended.clone();
    let (begun, has_begun) = channel();
    std::thread::Builder::new()
        .name("ublk".to_owned())
        .spawn(move || {
            // The driver knows the thread that asked first: everything has to happen in it.
            let mut queue = match open(device, wake) {
                Ok(queue) => {
                    let _ = begun.send(Ok(()));
                    queue
                }
                Err(error) => return drop(begun.send(Err(error))),
            };
            let cause = match converse(&mut queue, &crew, &job) {
                Ok(()) => Ended::Released,
                Err(error) => {
                    eprintln!("ublk: {error}");
                    Ended::Failed
                }
            };
            // The receiver leaves when the first cause has come.
            let _ = ended.send(cause);
            // What the driver was lent stays until the process ends.
            std::mem::forget(queue);
        })?;
    has_begun.recv().map_err(io::Error::other)?
}

fn open(device: u32, wake: File) -> io::Result<Queue> {
    let begun = Instant::now();
    let mut queue = loop {
        match Queue::open(device, wake.try_clone()?) {
            // The node may take a moment, and so may the last server's end.
            Err(error)
                if begun.elapsed() < PATIENCE
                    && matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy
                    ) =>
            {
                std::thread::sleep(PAUSE);
            }
            other => break other?,
        }
    };
    without_privilege(|| queue.begin())?;
    Ok(queue)
}

/// Does something without CAP_SYS_ADMIN. The driver takes a server that asks for its first requests so for
/// one that is not trusted, and does not look for partitions when it makes the device: that it does with its
/// lock held, and were the server to die meanwhile, nothing could free it. A loop device has none either.
///
/// Source: linux drivers/block/ublk_drv.c, ublk_mark_io_ready, ublk_ctrl_start_dev (linux 6.5)
fn without_privilege<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let all = capabilities(None)?;
    let mut fewer = all;
    fewer.effective.remove(CapabilitySet::SYS_ADMIN);
    set_capabilities(None, fewer)?;
    let done = work();
    set_capabilities(None, all)?;
    done
}

/// Hands requests out and answers in, until the device has no more.
fn converse(queue: &mut Queue, crew: &Crew, jobs: &Sender<Job>) -> io::Result<()> {
    loop {
        for event in queue.wait()? {
            match event {
                Event::Request(tag, request, buffer) => {
                    let job = Job {
                        tag,
                        request,
                        buffer,
                    };
                    jobs.send(job).map_err(|_| io::ErrorKind::BrokenPipe)?;
                }
                Event::Woken => {}
                Event::Over => return Ok(()),
            }
        }
        let done = std::mem::take(&mut *crew.done.lock().unwrap_or_else(PoisonError::into_inner));
        for one in done {
            queue.answer(one.tag, one.result, one.buffer)?;
        }
    }
}

impl Crew {
    fn work(&self) {
        loop {
            let next = self
                .jobs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .recv();
            let Ok(mut job) = next else { return };
            let result = self.carry_out(&job.request, &mut job.buffer);
            let done = Done {
                tag: job.tag,
                result: result.unwrap_or_else(|errno| -errno),
                buffer: job.buffer,
            };
            let mut waiting = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.push(done);
            let is_first = waiting.len() == 1;
            drop(waiting);
            // Whoever comes first wakes the queue's thread for all that follow.
            if is_first && let Err(error) = (&self.wake).write_all(&1u64.to_ne_bytes()) {
                eprintln!("ublk: {error}");
            }
        }
    }

    /// The bytes done, or an error number.
    fn carry_out(&self, request: &Request, buffer: &mut PageBuffer) -> Result<i32, i32> {
        let export = &self.export;
        // A flush is for all of the disk; its place means nothing.
        if request.operation == operation::FLUSH {
            return export.flush().map(|()| 0);
        }
        let len_bytes = request.len_bytes;
        let offset = self
            .view
            .place(request.offset, len_bytes, export.size_bytes())
            .ok_or(libc::EINVAL)?;
        let carries_data = matches!(request.operation, operation::READ | operation::WRITE);
        let len = match carries_data {
            true => usize::try_from(len_bytes).map_err(|_| libc::EINVAL)?,
            false => 0,
        };
        let data = buffer.get_mut(..len).ok_or(libc::EINVAL)?;
        match request.operation {
            operation::READ => export.read(data, offset)?,
            operation::WRITE => export.write(data, offset)?,
            operation::DISCARD => export.discard(offset, len_bytes)?,
            operation::WRITE_ZEROES => export.write_zeroes(offset, len_bytes)?,
            _ => return Err(libc::EOPNOTSUPP),
        }
        if request.fua {
            export.flush()?;
        }
        i32::try_from(len).map_err(|_| libc::EINVAL)
    }
}
