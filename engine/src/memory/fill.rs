//! Filling the memory of restored tasks from the pages files, with all cores.

use std::fs::{File, OpenOptions};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use firn_images::{LentFile, PagesFile};
use firn_sys::process_vm::{MAX_RANGES, RemoteRange};
use firn_sys::uffd::Uffd;
use firn_sys::window::{FileWindow, Window, is_on_tmpfs};
use firn_sys::{Errno, Pid};

use super::image::MemoryImage;
use super::piece::Piece;
use super::plan::MemoryPlan;
use super::range::AddressRange;
use crate::cancel::CancelFlag;

/// Bytes read and then written at once: small enough to stay in a core's cache.
const BATCH_BYTES: u64 = 512 << 10;
const BATCH_LEN: usize = 512 << 10;
/// Bytes of a task that one worker takes at a time: whole huge pages.
const UNIT_BYTES: u64 = 16 << 20;
const UNIT_LEN: usize = 16 << 20;

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

/// Which of a task's fillings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before it forks its children.
    BeforeFork,
    /// After everything is mapped.
    Mapped,
    /// When it is traced: shadow stacks.
    Traced,
}

/// How pages come into a task.
#[derive(Debug)]
pub enum Way {
    /// By process_vm_writev.
    Written,
    /// Fresh ones through its userfaultfd, the others by process_vm_writev.
    Fresh(Uffd),
    /// Through /proc/PID/mem, where the kernel lets a tracer write what the task itself may not.
    Traced(File),
}

impl Way {
    /// The way into memory that the task may not write.
    ///
    /// # Errors
    /// The task is gone, or rights are missing.
    pub fn traced(pid: Pid) -> Result<Way, Errno> {
        let memory = OpenOptions::new()
            .write(true)
            .open(format!("/proc/{pid}/mem"));
        memory.map(Way::Traced).map_err(Errno::from)
    }
}

/// A task to be filled.
#[derive(Debug)]
pub struct Filling<'a> {
    /// The task.
    pub pid: Pid,
    /// What it gets.
    pub plan: &'a MemoryPlan,
    /// How it gets it.
    pub way: Way,
}

/// One task in one of its fillings.
#[derive(Debug, Clone, Copy)]
struct Target<'a> {
    pid: Pid,
    image: &'a MemoryImage,
    /// Mappings, ascending, that are filled through the userfaultfd.
    fresh: &'a [AddressRange],
    way: &'a Way,
}

/// Pieces that stand together in a pages file.
#[derive(Debug)]
struct Batch<'a> {
    target: Target<'a>,
    pieces: Vec<Piece>,
    len: usize,
}

/// Fills what the plans leave to the coordinator, in all of the given tasks.
///
/// **Preconditions**: the tasks have mapped what is filled and wait.
///
/// # Errors
/// A pages file can't be read, a task can't be written to.
pub fn fill(tasks: &[Filling<'_>], when: When, how: &PageFill<'_>) -> Result<(), MemoryFillError> {
    let mut batches = Vec::new();
    for Filling { pid, plan, way } in tasks {
        let (filled, fresh) = match when {
            When::BeforeFork => (&plan.early.filled, &plan.early.fresh),
            When::Mapped => (&plan.late.filled, &plan.late.fresh),
            When::Traced => (&plan.shadow, const { &Vec::new() }),
        };
        let target = Target {
            pid: *pid,
            image: plan.image(),
            fresh,
            way,
        };
        push_batches(&mut batches, target, filled);
    }
    run(&batches, how)
}

fn push_batches<'a>(batches: &mut Vec<Batch<'a>>, target: Target<'a>, pieces: &[Piece]) {
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let room = batches.last().map_or(0, |last: &Batch<'_>| {
                let end = last.pieces.last();
                let goes_on = last.unit() == (target.pid, rest.range.start / UNIT_BYTES)
                    && last.pieces.len() < MAX_RANGES
                    && end.is_some_and(|before| before.is_followed_in_file_by(&rest));
                match goes_on {
                    true => BATCH_BYTES.saturating_sub(to_u64(last.len)),
                    false => 0,
                }
            });
            if room == 0 {
                batches.push(Batch {
                    target,
                    pieces: Vec::new(),
                    len: 0,
                });
            }
            let room = if room == 0 { BATCH_BYTES } else { room };
            let room = room.min(UNIT_BYTES - rest.range.start % UNIT_BYTES);
            let end = rest.range.end.min(rest.range.start + room);
            let part = rest.within(AddressRange::new(rest.range.start, end));
            let last = batches.last_mut().expect("one was pushed");
            last.pieces.push(part);
            last.len += usize::try_from(part.len()).expect("a batch fits memory");
            rest = rest.within(AddressRange::new(end, rest.range.end));
        }
    }
}

/// Batches that one worker fills: together in the task, and in a pages file.
fn units<'b, 'a>(batches: &'b [Batch<'a>]) -> Vec<&'b [Batch<'a>]> {
    // Two workers in one huge page would both make it, and one of them for nothing.
    let together = batches.chunk_by(|a, b| a.unit() == b.unit() && a.is_followed_in_file_by(b));
    together.collect()
}

fn run(batches: &[Batch<'_>], how: &PageFill<'_>) -> Result<(), MemoryFillError> {
    let units = units(batches);
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
    std::thread::scope(|scope| {
        for _ in 1..how.workers.min(units.len()) {
            scope.spawn(work);
        }
        work();
    });
    let failure = failure.into_inner().unwrap_or_else(|e| e.into_inner());
    failure.map_or(Ok(()), Err)
}

/// Memory of one worker, made when it is first needed.
#[derive(Default)]
struct Buffers {
    through: Option<Window>,
    mapped: Option<FileWindow>,
}

fn worker(
    units: &[&[Batch<'_>]],
    next: &AtomicUsize,
    how: &PageFill<'_>,
) -> Result<(), MemoryFillError> {
    let mut buffers = Buffers::default();
    while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
        if how.cancel.is_cancelled() {
            return Err(MemoryFillError::Cancelled);
        }
        let file = unit[0].open()?;
        match is_on_tmpfs(&file) {
            true => fill_from_mapping(unit, &file, &mut buffers.mapped, how)?,
            false => fill_through_buffer(unit, &mut buffers.through, how)?,
        }
    }
    Ok(())
}

/// Fills a unit from the pages file where that is memory already: nothing is copied twice.
fn fill_from_mapping(
    unit: &[Batch<'_>],
    file: &File,
    mapped: &mut Option<FileWindow>,
    how: &PageFill<'_>,
) -> Result<(), MemoryFillError> {
    let first = &unit[0];
    let start = first.pieces[0].offset;
    let len: usize = unit.iter().map(|batch| batch.len).sum();
    let failed = |source| first.read_error(source);
    let window = match mapped {
        Some(window) => window,
        None => mapped.insert(FileWindow::reserve(UNIT_LEN).map_err(failed)?),
    };
    window.map(file, start, len).map_err(failed)?;
    for batch in unit {
        let (window, base) = window.window();
        let at = usize::try_from(batch.pieces[0].offset - start).expect("inside a unit");
        batch.write(window, base + at)?;
        how.written.fetch_add(to_u64(batch.len), Ordering::Relaxed);
    }
    Ok(())
}

/// Fills a unit by reading, which reads ahead on a disk.
fn fill_through_buffer(
    unit: &[Batch<'_>],
    buffer: &mut Option<Window>,
    how: &PageFill<'_>,
) -> Result<(), MemoryFillError> {
    let window = match buffer {
        Some(window) => window,
        None => {
            let made = Window::anonymous(BATCH_LEN);
            buffer.insert(made.map_err(|source| unit[0].read_error(source))?)
        }
    };
    for batch in unit {
        batch.read(window)?;
        batch.write(window, 0)?;
        how.written.fetch_add(to_u64(batch.len), Ordering::Relaxed);
    }
    Ok(())
}

impl Batch<'_> {
    /// The unit that it belongs to: batches do not cross the borders of units.
    fn unit(&self) -> (Pid, u64) {
        let start = self.pieces.first().map_or(0, |piece| piece.range.start);
        (self.target.pid, start / UNIT_BYTES)
    }

    fn is_followed_in_file_by(&self, next: &Batch<'_>) -> bool {
        let (last, first) = (self.pieces.last(), next.pieces.first());
        let pair = last.zip(first);
        pair.is_some_and(|(last, first)| last.is_followed_in_file_by(first))
    }

    fn pages_file(&self) -> &PagesFile {
        &self.target.image.pages().files()[self.pieces[0].file]
    }

    fn open(&self) -> Result<LentFile<'_>, MemoryFillError> {
        let file = self.pages_file().file();
        file.map_err(|error| self.read_error(error.into()))
    }

    fn read_error(&self, source: Errno) -> MemoryFillError {
        MemoryFillError::Read {
            path: self.pages_file().path().display().to_string(),
            source,
        }
    }

    fn read(&self, window: &Window) -> Result<(), MemoryFillError> {
        let file = self.open()?;
        let mut done = 0;
        while done < self.len {
            let offset = self.pieces[0].offset + to_u64(done);
            match window.read_file(&file, offset, done, self.len - done) {
                // Its size was checked when it was opened: somebody has cut it since.
                Ok(0) => return Err(self.read_error(Errno::EIO)),
                Ok(read) => done += read,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(self.read_error(error)),
            }
        }
        Ok(())
    }

    /// Brings the bytes that stand at `at` of the window into place.
    fn write(&self, window: &Window, mut at: usize) -> Result<(), MemoryFillError> {
        let is_fresh = |piece: &Piece| self.target.is_fresh(piece);
        for alike in self.pieces.chunk_by(|a, b| is_fresh(a) == is_fresh(b)) {
            at += match self.target.way {
                Way::Fresh(uffd) if is_fresh(&alike[0]) => {
                    self.target.copy(uffd, alike, window, at)?
                }
                Way::Fresh(_) | Way::Written => self.target.write(alike, window, at)?,
                Way::Traced(memory) => self.target.force(memory, alike, window, at)?,
            };
        }
        Ok(())
    }
}

impl Target<'_> {
    fn is_fresh(&self, piece: &Piece) -> bool {
        let next = self
            .fresh
            .partition_point(|range| range.end <= piece.range.start);
        let found = self.fresh.get(next);
        found.is_some_and(|range| range.start <= piece.range.start)
    }

    /// Makes pages that are not there yet; returns the bytes taken.
    fn copy(
        &self,
        uffd: &Uffd,
        pieces: &[Piece],
        window: &Window,
        at: usize,
    ) -> Result<usize, MemoryFillError> {
        let mut done = 0;
        for piece in pieces {
            let len = bytes(piece);
            uffd.copy(window, at + done, len, piece.range.start)
                .map_err(|source| self.write_error(piece, source))?;
            done += len;
        }
        Ok(done)
    }

    /// Writes over whatever is there; returns the bytes taken.
    fn write(
        &self,
        pieces: &[Piece],
        window: &Window,
        at: usize,
    ) -> Result<usize, MemoryFillError> {
        let ranges: Vec<RemoteRange> = pieces
            .iter()
            .map(|piece| RemoteRange {
                address: piece.range.start,
                len: bytes(piece),
            })
            .collect();
        let len: usize = ranges.iter().map(|range| range.len).sum();
        match window.write_process(self.pid, &ranges, at) {
            Ok(written) if written == len => Ok(len),
            Ok(_) => Err(self.write_error(&pieces[0], Errno::EFAULT)),
            Err(error) => Err(self.write_error(&pieces[0], error)),
        }
    }

    /// Writes over whatever is there, also where the task may not; returns the bytes taken.
    fn force(
        &self,
        memory: &File,
        pieces: &[Piece],
        window: &Window,
        at: usize,
    ) -> Result<usize, MemoryFillError> {
        let mut done = 0;
        for piece in pieces {
            let mut rest = bytes(piece);
            while rest > 0 {
                let address = piece.range.end - to_u64(rest);
                match window.write_file(memory, address, at + done, rest) {
                    Ok(0) => return Err(self.write_error(piece, Errno::EFAULT)),
                    Ok(written) => {
                        done += written;
                        rest -= written;
                    }
                    Err(Errno::EINTR) => {}
                    Err(source) => return Err(self.write_error(piece, source)),
                }
            }
        }
        Ok(done)
    }

    fn write_error(&self, piece: &Piece, source: Errno) -> MemoryFillError {
        MemoryFillError::Write {
            pid: self.pid,
            range: piece.range,
            source,
        }
    }
}

fn bytes(piece: &Piece) -> usize {
    usize::try_from(piece.len()).expect("a batch fits memory")
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("lengths fit 64 bits")
}
