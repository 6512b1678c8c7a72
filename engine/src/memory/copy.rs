//! Copying pages of a frozen task, or of a shared memory object, into a pages file.

use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use firn_images::{ImageKind, ImageSetWriter, PageFlags, PagemapWriter};
use firn_sys::process_vm::{MAX_RANGES, RemoteRange};
use firn_sys::window::Window;
use firn_sys::{Errno, Pid};

use super::address_space::PageStats;
use super::error::MemoryDumpError;
use super::pages::Run;
use super::range::AddressRange;
use crate::cancel::CancelFlag;

/// Bytes that one worker reads and then writes: small enough to stay in a core's cache.
const BATCH_BYTES: usize = 512 << 10;
/// From here on two workers are faster than one.
const PARALLEL_BYTES: u64 = 4 << 20;

/// How pages are copied, and who hears of it.
#[derive(Debug, Clone, Copy)]
pub struct PageCopy<'a> {
    /// Bytes copied so far, by all tasks.
    pub copied: &'a AtomicU64,
    /// Looked at between batches.
    pub cancel: &'a CancelFlag,
    /// Most threads that copy at the same time.
    pub workers: usize,
}

/// Some pages on their way into the pages file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Batch {
    ranges: Vec<RemoteRange>,
    is_hidden: bool,
    offset: u64,
    len: usize,
}

/// Writes pagemap and pages of a frozen task.
///
/// # Errors
/// Pages that can't be read, images that can't be written.
pub fn dump(
    pid: Pid,
    runs: &[Run],
    images: &ImageSetWriter,
    pages_id: u32,
    copy: &PageCopy<'_>,
) -> Result<PageStats, MemoryDumpError> {
    let id = u64::from(pid.to_image());
    let mut pagemap = PagemapWriter::new(images, ImageKind::Pagemap, id, pages_id)?;
    for run in runs {
        let flags = match run.is_lazy {
            true => PageFlags::PRESENT | PageFlags::LAZY,
            false => PageFlags::PRESENT,
        };
        pagemap.push(run.range.start, run.range.nr_pages(), flags)?;
    }
    let written = pagemap.finish()?;
    let pages = images.raw_file(ImageKind::Pages, u64::from(pages_id))?;
    let source = Source::Task { pid };
    let batches = batches(runs);
    copy_batches(&source, &batches, &pages, pages_id, copy)?;
    Ok(PageStats {
        scanned: written,
        written,
    })
}

/// Where batches come from.
#[derive(Debug)]
pub(super) enum Source<'a> {
    /// Memory of a task.
    Task {
        /// The task.
        pid: Pid,
    },
    /// A file; addresses are offsets in it.
    File {
        /// The file.
        file: &'a File,
        /// Its name for messages.
        name: &'a str,
    },
}

fn batches(runs: &[Run]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut offset = 0;
    for run in runs {
        let mut range = run.range;
        while !range.is_empty() {
            let room = batches.last().map_or(0, |last| {
                let full = last.is_hidden != run.is_hidden || last.ranges.len() == MAX_RANGES;
                if full { 0 } else { BATCH_BYTES - last.len }
            });
            if room == 0 {
                batches.push(Batch {
                    ranges: Vec::new(),
                    is_hidden: run.is_hidden,
                    offset,
                    len: 0,
                });
                continue;
            }
            let len = usize::try_from(range.len()).unwrap_or(usize::MAX).min(room);
            let last = batches.last_mut().expect("one was pushed");
            last.ranges.push(RemoteRange {
                address: range.start,
                len,
            });
            last.len += len;
            range.start += to_u64(len);
            offset += to_u64(len);
        }
    }
    batches
}

/// Copies ranges of a file into a pages file, one after the other.
pub(super) fn copy_file(
    file: &File,
    name: &str,
    ranges: &[AddressRange],
    pages: &File,
    pages_id: u32,
    copy: &PageCopy<'_>,
) -> Result<(), MemoryDumpError> {
    let runs: Vec<Run> = ranges
        .iter()
        .map(|range| Run {
            range: *range,
            is_lazy: false,
            is_hidden: false,
        })
        .collect();
    copy_batches(
        &Source::File { file, name },
        &batches(&runs),
        pages,
        pages_id,
        copy,
    )
}

/// Copies all batches; big jobs with several workers, each of which reads a batch and writes it at its
/// place: while one holds the lock of the pages file, the others read.
fn copy_batches(
    source: &Source<'_>,
    batches: &[Batch],
    pages: &File,
    pages_id: u32,
    copy: &PageCopy<'_>,
) -> Result<(), MemoryDumpError> {
    let Some(last) = batches.last() else {
        return Ok(());
    };
    let total = last.offset + to_u64(last.len);
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        if let Err(error) = worker(source, batches, &next, pages, pages_id, copy) {
            // The others stop at their next batch.
            next.store(batches.len(), Ordering::Relaxed);
            let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
            failure.get_or_insert(error);
        }
    };
    if total < PARALLEL_BYTES || copy.workers < 2 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 1..copy.workers {
                scope.spawn(work);
            }
            work();
        });
    }
    let failure = failure.into_inner().unwrap_or_else(|e| e.into_inner());
    failure.map_or(Ok(()), Err)
}

fn worker(
    source: &Source<'_>,
    batches: &[Batch],
    next: &AtomicUsize,
    pages: &File,
    pages_id: u32,
    copy: &PageCopy<'_>,
) -> Result<(), MemoryDumpError> {
    let write_error = |source| MemoryDumpError::Write {
        path: ImageKind::Pages.file_name(u64::from(pages_id)),
        source,
    };
    let first = batches.first().map_or(0, |batch| batch.len);
    let size = if batches.len() == 1 {
        first
    } else {
        BATCH_BYTES
    };
    let window = Window::anonymous(size.max(1)).map_err(write_error)?;
    while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
        if copy.cancel.is_cancelled() {
            return Err(MemoryDumpError::Cancelled);
        }
        source.read(batch, &window)?;
        let mut done = 0;
        while done < batch.len {
            let at = batch.offset + to_u64(done);
            match window.write_file(pages, at, done, batch.len - done) {
                Ok(0) => return Err(write_error(Errno::EIO)),
                Ok(written) => done += written,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(write_error(error)),
            }
        }
        copy.copied.fetch_add(to_u64(batch.len), Ordering::Relaxed);
    }
    Ok(())
}

impl Source<'_> {
    /// Fills the window with the pages of a batch.
    fn read(&self, batch: &Batch, window: &Window) -> Result<(), MemoryDumpError> {
        match self {
            Source::Task { pid } if batch.is_hidden => read_hidden(*pid, batch, window),
            Source::Task { pid } => read_task(*pid, batch, window),
            Source::File { file, name } => read_file(file, name, batch, window),
        }
    }
}

fn read_task(pid: Pid, batch: &Batch, window: &Window) -> Result<(), MemoryDumpError> {
    match window.read_process(pid, &batch.ranges, 0) {
        Ok(read) if read == batch.len => Ok(()),
        // Something in the middle is not readable this way: the slow way reads it or names it.
        Ok(_) | Err(Errno::EFAULT) => read_hidden(pid, batch, window),
        Err(source) => {
            let range = batch
                .ranges
                .first()
                .map_or(AddressRange::new(0, 0), range_of);
            Err(MemoryDumpError::Pages { pid, range, source })
        }
    }
}

/// Reads memory that the task itself may not read.
fn read_hidden(pid: Pid, batch: &Batch, window: &Window) -> Result<(), MemoryDumpError> {
    let mem = File::open(format!("/proc/{pid}/mem")).map_err(|source| MemoryDumpError::Read {
        pid,
        what: "mem",
        source: source.into(),
    })?;
    read_each(batch, window, &mem, AtEnd::Gone, |range, source| {
        MemoryDumpError::Pages { pid, range, source }
    })
}

fn read_file(
    file: &File,
    name: &str,
    batch: &Batch,
    window: &Window,
) -> Result<(), MemoryDumpError> {
    read_each(batch, window, file, AtEnd::Zeros, |_, source| {
        MemoryDumpError::Shared {
            name: name.to_owned(),
            source,
        }
    })
}

/// What it means that nothing more can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtEnd {
    /// The last page of an object goes on with zeros.
    Zeros,
    /// The task has died.
    Gone,
}

fn read_each(
    batch: &Batch,
    window: &Window,
    file: &File,
    at_end: AtEnd,
    failed: impl Fn(AddressRange, Errno) -> MemoryDumpError,
) -> Result<(), MemoryDumpError> {
    let mut at = 0;
    for range in &batch.ranges {
        let mut done = 0;
        while done < range.len {
            let from = range.address + to_u64(done);
            match window.read_file(file, from, at + done, range.len - done) {
                Ok(0) if at_end == AtEnd::Zeros => {
                    window.fill(at + done, &vec![0; range.len - done]);
                    done = range.len;
                }
                Ok(0) => return Err(failed(range_of(range), Errno::ESRCH)),
                Ok(read) => done += read,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(failed(range_of(range), error)),
            }
        }
        at += range.len;
    }
    Ok(())
}

fn range_of(range: &RemoteRange) -> AddressRange {
    AddressRange::new(range.address, range.address + to_u64(range.len))
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("lengths fit 64 bits")
}
