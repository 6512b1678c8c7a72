//! The worker's side of the control socket.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::control::{self, MAX_READ, MapRun, Reply, Request, Stat};
use super::open::Refusal;
use super::worker::Worker;
use super::{chain_of, long, open};
use crate::device::{Ended, nbd};
use crate::guest::gpt;
use crate::kernel::PageBuffer;
use crate::tracker::TrackerError;

/// Conversations at once; more wait.
const MAX_CONVERSATIONS: u32 = 64;

/// Starts answering clients.
pub(super) fn listen(worker: Arc<Worker>, listener: UnixListener) -> io::Result<()> {
    let running = Arc::new(AtomicU32::new(0));
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                if running.fetch_add(1, Ordering::AcqRel) >= MAX_CONVERSATIONS {
                    running.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let worker = Arc::clone(&worker);
                let running = Arc::clone(&running);
                std::thread::spawn(move || {
                    if let Err(error) = converse(&worker, stream) {
                        eprintln!("control: {error}");
                    }
                    running.fetch_sub(1, Ordering::AcqRel);
                });
            }
        })?;
    Ok(())
}

/// What a client holds as long as its connection lives.
struct Guest<'a> {
    worker: &'a Worker,
    has_frozen: bool,
    nbd: Option<nbd::Listening>,
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if self.has_frozen
            && let Err(error) = self.worker.thaw()
        {
            eprintln!("thaw: {error}");
        }
    }
}

fn converse(worker: &Worker, mut stream: UnixStream) -> io::Result<()> {
    let mut guest = Guest {
        worker,
        has_frozen: false,
        nbd: None,
    };
    let mut buffer: Option<PageBuffer> = None;
    while let Some(request) = control::receive::<Request>(&mut stream)? {
        if let Request::Read { offset, len_bytes } = request {
            let buffer = match &mut buffer {
                Some(buffer) => buffer,
                None => buffer.insert(PageBuffer::new(MAX_READ as usize)?),
            };
            answer_read(worker, &mut stream, buffer, offset, len_bytes)?;
            continue;
        }
        let answer = match long::is_long(&request) {
            true => long::answer(worker, &stream, &request),
            false => guest.answer(request),
        };
        let reply = answer.unwrap_or_else(|(message, code)| Reply::Failed { message, code });
        control::send(&mut stream, &reply)?;
    }
    Ok(())
}

fn answer_read(
    worker: &Worker,
    stream: &mut UnixStream,
    buffer: &mut PageBuffer,
    offset: u64,
    len_bytes: u32,
) -> io::Result<()> {
    let Some(data) = buffer.get_mut(..len_bytes as usize) else {
        let message = format!("{len_bytes} bytes are too many for one read");
        return control::send(stream, &Reply::Failed { message, code: 38 });
    };
    match worker.export.disk().read_at(data, offset) {
        Ok(()) => {
            control::send(stream, &Reply::Data { len_bytes })?;
            stream.write_all(data)
        }
        Err(error) => {
            let (message, code) = (chain_of(&error), error.exit_code());
            control::send(stream, &Reply::Failed { message, code })
        }
    }
}

fn host(error: &io::Error) -> Refusal {
    (error.to_string(), 12)
}

fn tracker(error: &TrackerError) -> Refusal {
    (error.to_string(), 38)
}

fn disk(error: &crate::DiskError) -> Refusal {
    (chain_of(error), error.exit_code())
}

impl Guest<'_> {
    fn answer(&mut self, request: Request) -> Result<Reply, Refusal> {
        let export = &self.worker.export;
        let trackers = export.trackers();
        match request {
            Request::Stat => Ok(Reply::Stat(Box::new(stat(self.worker)))),
            Request::Flush => {
                export.disk().flush().map_err(|error| disk(&error))?;
                Ok(Reply::Done)
            }
            Request::TrackerStart { spec, begin } => {
                trackers
                    .start(spec, begin)
                    .map_err(|error| tracker(&error))?;
                self.keep_listeners()?;
                Ok(Reply::Done)
            }
            Request::TrackerTake {
                name,
                from,
                max_bytes,
            } => {
                let taken = trackers.take(&name, from, max_bytes);
                let taken = taken.map_err(|error| tracker(&error))?;
                let ranges = taken.into_iter().map(|range| (range.start, range.end));
                Ok(Reply::Ranges {
                    ranges: ranges.collect(),
                })
            }
            Request::TrackerPutBack {
                name,
                offset,
                len_bytes,
            } => {
                let range = offset..offset.saturating_add(len_bytes);
                trackers
                    .put_back(&name, range)
                    .map_err(|error| tracker(&error))?;
                Ok(Reply::Done)
            }
            Request::TrackerPending { name } => {
                let bytes = trackers.pending_bytes(&name);
                let bytes = bytes.map_err(|error| tracker(&error))?;
                Ok(Reply::Bytes { bytes })
            }
            Request::TrackerStop { name } => {
                let bytes = trackers.stop(&name).map_err(|error| tracker(&error))?;
                self.keep_listeners()?;
                Ok(Reply::Bytes { bytes })
            }
            Request::Map { offset, len_bytes } => self.map(offset, len_bytes),
            Request::Read { .. }
            | Request::SnapshotDelete { .. }
            | Request::Merge { .. }
            | Request::Backup { .. } => Err(("it is answered elsewhere".to_owned(), 13)),
            Request::WriteOut { dir } => {
                let done = self.worker.write_out(dir.as_deref());
                done.map_err(|error| host(&error))?;
                Ok(Reply::Done)
            }
            Request::Freeze { dir } => {
                self.worker
                    .freeze(dir.as_deref())
                    .map_err(|error| host(&error))?;
                self.has_frozen = true;
                Ok(Reply::Done)
            }
            Request::Thaw => {
                self.has_frozen = false;
                self.worker.thaw().map_err(|error| host(&error))?;
                Ok(Reply::Done)
            }
            Request::Grow { size_bytes } => self.grow(size_bytes),
            Request::Snapshot { id, freeze } => self.snapshot(id.as_deref(), freeze),
            Request::Nbd { socket, writable } => {
                let writable = writable && !self.worker.config.serve.read_only;
                let listening = nbd::listen(Arc::clone(export), &socket, writable);
                self.nbd = Some(listening.map_err(|error| host(&error))?);
                Ok(Reply::Done)
            }
            Request::Stop if self.worker.config.channel.is_none() => {
                // Sent to the main thread, which is there as long as this one.
                let _ = self.worker.ended.send(Ended::Released);
                Ok(Reply::Done)
            }
            Request::Stop => Err(("the disk has a device; unmount it".to_owned(), 17)),
        }
    }

    fn keep_listeners(&self) -> Result<(), Refusal> {
        let listeners = self.worker.export.trackers().list();
        let kept = self.worker.state.update(|kept| kept.listeners = listeners);
        kept.map_err(|error| host(&error))
    }

    fn map(&self, offset: u64, len_bytes: u64) -> Result<Reply, Refusal> {
        let extents = self.worker.export.disk().map(offset, len_bytes);
        let extents = extents.map_err(|error| disk(&error))?;
        let mut runs: Vec<MapRun> = Vec::new();
        for extent in extents {
            let is_zero = extent.kind.is_zero();
            match runs.last_mut() {
                Some(last) if last.is_zero == is_zero => last.len_bytes += extent.len_bytes,
                _ => runs.push(MapRun {
                    len_bytes: extent.len_bytes,
                    is_zero,
                }),
            }
        }
        Ok(Reply::Map { runs })
    }

    fn grow(&self, size_bytes: u64) -> Result<Reply, Refusal> {
        let export = &self.worker.export;
        let worker = self.worker;
        // Before anything has grown.
        if worker.config.channel.as_ref().is_some_and(|it| !it.grows()) {
            let text = "the kernel's ublk driver can't enlarge a device that runs (Linux 6.16 can); \
                        unmount the disk first, or mount it with --device nbd or fuse";
            return Err((text.to_owned(), 38));
        }
        open::grow(
            &worker.config.serve,
            &**export.disk(),
            &worker.options,
            size_bytes,
        )?;
        export.trackers().grow(export.size_bytes());
        let partition = gpt::fit(&**export, export.size_bytes()).map_err(|error| host(&error))?;
        Ok(Reply::Bytes {
            bytes: partition.map_or(0, |partition| partition.len_bytes),
        })
    }

    fn snapshot(&self, id: Option<&str>, freeze: bool) -> Result<Reply, Refusal> {
        if freeze {
            self.worker.freeze(None).map_err(|error| host(&error))?;
        }
        let begun = std::time::Instant::now();
        let worker = self.worker;
        let disk = &**worker.export.disk();
        let made = open::snapshot(&worker.config.serve, disk, &worker.options, id);
        let held_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        if freeze {
            self.worker.thaw().map_err(|error| host(&error))?;
        }
        Ok(Reply::Snapshot { id: made?, held_us })
    }
}

fn stat(worker: &Worker) -> Stat {
    let export = &worker.export;
    let disk = export.disk();
    let trackers = export.trackers();
    let listeners = trackers.list().into_iter().map(|spec| {
        let pending = trackers.pending_bytes(&spec.name).unwrap_or(0);
        (spec, pending)
    });
    let counters = disk.counters().list().into_iter();
    Stat {
        size_bytes: disk.size_bytes(),
        cluster_bytes: disk.cluster_bytes(),
        read_only: worker.config.serve.read_only,
        layers: disk.layers(),
        counters: counters
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        listeners: listeners.collect(),
        worker: std::process::id(),
        resident_bytes: resident_bytes(),
        restarted: worker.config.restarted,
        is_closing: worker.state.get().released,
    }
}

/// Resident memory of this process; 0 where /proc is not there.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|word| word.parse().ok());
    pages.unwrap_or(0u64) * rustix::param::page_size() as u64
}
