//! Filling the memory of restored tasks from the pages files, with all cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use firn_sys::process_vm::{MAX_RANGES, RemoteRange};
use firn_sys::window::Window;
use firn_sys::{Errno, Pid};

use super::image::MemoryImage;
use super::piece::Piece;
use super::plan::MemoryPlan;
use super::range::{AddressRange, HUGE_PAGE_SIZE};
use crate::cancel::CancelFlag;

/// Bytes read and then written at once: small enough to stay in a core's cache.
const BATCH_BYTES: u64 = 512 << 10;
/// From here on several workers are faster than one.
const PARALLEL_UNITS: usize = 4;

/// Failure to fill the memory of a task.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFillError {
    /// The pages file could not be read.
    #[error("can't read {path}")]
    Read {
        /// The file.
        path: String,
        /// Cause.
        source: Errno,
    },
    /// The task's memory could not be written.
    #[error("can't write memory {range} of task {pid}")]
    Write {
        /// The task.
        pid: Pid,
        /// Where.
        range: AddressRange,
        /// Cause.
        source: Errno,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// How memory is filled, and who hears of it.
#[derive(Debug, Clone, Copy)]
pub struct PageFill<'a> {
    /// Bytes written so far, in all tasks.
    pub written: &'a AtomicU64,
    /// Looked at between batches.
    pub cancel: &'a CancelFlag,
    /// Most threads that fill at the same time.
    pub workers: usize,
}

/// Which of a task's two fillings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before it forks its children.
    BeforeFork,
    /// After everything is mapped.
    Mapped,
}

/// Pieces that stand together in a pages file.
#[derive(Debug)]
struct Batch<'a> {
    pid: Pid,
    image: &'a MemoryImage,
    pieces: Vec<Piece>,
    len: usize,
}

/// Fills what the plans leave to the coordinator, in all of the given tasks.
///
/// **Preconditions**: the tasks have mapped what is filled and wait.
///
/// # Errors
/// A pages file can't be read, a task can't be written to.
pub fn fill(
    tasks: &[(Pid, &MemoryPlan)],
    when: When,
    how: &PageFill<'_>,
) -> Result<(), MemoryFillError> {
    let mut batches = Vec::new();
    for (pid, plan) in tasks {
        let phase = match when {
            When::BeforeFork => &plan.early,
            When::Mapped => &plan.late,
        };
        push_batches(&mut batches, *pid, plan.image(), &phase.filled);
    }
    run(&batches, how)
}

/// Writes pages of a range into place, whatever was there.
pub(super) fn refill(
    pid: Pid,
    image: &MemoryImage,
    range: AddressRange,
    how: &PageFill<'_>,
) -> Result<(), MemoryFillError> {
    let mut batches = Vec::new();
    let pieces = super::piece::pieces_in(image.pages(), range);
    push_batches(&mut batches, pid, image, &pieces);
    run(&batches, how)
}

fn push_batches<'a>(
    batches: &mut Vec<Batch<'a>>,
    pid: Pid,
    image: &'a MemoryImage,
    pieces: &[Piece],
) {
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let room = batches.last().map_or(0, |last| {
                let goes_on = last.huge_page() == (pid, rest.target / HUGE_PAGE_SIZE)
                    && last.pieces.len() < MAX_RANGES
                    && last
                        .pieces
                        .last()
                        .is_some_and(|before| before.is_followed_in_file_by(&rest));
                match goes_on {
                    true => BATCH_BYTES.saturating_sub(to_u64(last.len)),
                    false => 0,
                }
            });
            if room == 0 {
                batches.push(Batch {
                    pid,
                    image,
                    pieces: Vec::new(),
                    len: 0,
                });
            }
            let room = if room == 0 { BATCH_BYTES } else { room };
            let room = room.min(HUGE_PAGE_SIZE - rest.target % HUGE_PAGE_SIZE);
            let end = rest.range.end.min(rest.range.start + room);
            let part = rest.within(AddressRange::new(rest.range.start, end));
            let last = batches.last_mut().expect("one was pushed");
            last.pieces.push(part);
            last.len += usize::try_from(part.len()).expect("a batch fits memory");
            rest = rest.within(AddressRange::new(end, rest.range.end));
        }
    }
}

fn run(batches: &[Batch<'_>], how: &PageFill<'_>) -> Result<(), MemoryFillError> {
    // Two workers in one huge page would both make it, and one of them for nothing.
    let units: Vec<&[Batch<'_>]> = batches
        .chunk_by(|a, b| a.huge_page() == b.huge_page())
        .collect();
    if units.is_empty() {
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        if let Err(error) = worker(&units, &next, how) {
            // The others stop at their next unit.
            next.store(units.len(), Ordering::Relaxed);
            let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
            failure.get_or_insert(error);
        }
    };
    if units.len() < PARALLEL_UNITS || how.workers < 2 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 1..how.workers {
                scope.spawn(work);
            }
            work();
        });
    }
    let failure = failure.into_inner().unwrap_or_else(|e| e.into_inner());
    failure.map_or(Ok(()), Err)
}

fn worker(
    units: &[&[Batch<'_>]],
    next: &AtomicUsize,
    how: &PageFill<'_>,
) -> Result<(), MemoryFillError> {
    let largest = units.iter().copied().flatten().map(|batch| batch.len).max();
    let window =
        Window::anonymous(largest.unwrap_or(1)).map_err(|source| MemoryFillError::Read {
            path: "pages".to_owned(),
            source,
        })?;
    while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
        if how.cancel.is_cancelled() {
            return Err(MemoryFillError::Cancelled);
        }
        for batch in *unit {
            batch.read(&window)?;
            batch.write(&window)?;
            how.written.fetch_add(to_u64(batch.len), Ordering::Relaxed);
        }
    }
    Ok(())
}

impl Batch<'_> {
    /// The huge page that it begins in.
    fn huge_page(&self) -> (Pid, u64) {
        let target = self.pieces.first().map_or(0, |piece| piece.target);
        (self.pid, target / HUGE_PAGE_SIZE)
    }

    fn read(&self, window: &Window) -> Result<(), MemoryFillError> {
        let first = &self.pieces[0];
        let pages = &self.image.pages().files()[first.file];
        let failed = |source| MemoryFillError::Read {
            path: pages.path().display().to_string(),
            source,
        };
        let mut done = 0;
        while done < self.len {
            let offset = first.offset + to_u64(done);
            match window.read_file(pages.file(), offset, done, self.len - done) {
                // Its size was checked when it was opened: somebody has cut it since.
                Ok(0) => return Err(failed(Errno::EIO)),
                Ok(read) => done += read,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    fn write(&self, window: &Window) -> Result<(), MemoryFillError> {
        let ranges: Vec<RemoteRange> = self
            .pieces
            .iter()
            .map(|piece| RemoteRange {
                address: piece.target,
                len: usize::try_from(piece.len()).expect("a batch fits memory"),
            })
            .collect();
        let failed = |source| MemoryFillError::Write {
            pid: self.pid,
            range: self.pieces[0].range,
            source,
        };
        match window.write_process(self.pid, &ranges, 0) {
            Ok(written) if written == self.len => Ok(()),
            Ok(_) => Err(failed(Errno::EFAULT)),
            Err(error) => Err(failed(error)),
        }
    }
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("lengths fit 64 bits")
}
