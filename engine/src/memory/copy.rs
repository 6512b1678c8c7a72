//! Copying pages of a frozen task, or of a shared memory object, into a pages file.

use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use firn_images::{ImageKind, ImageSetWriter, PageFlags, PagemapWriter};
use firn_sys::process_vm::{MAX_RANGES, RemoteRange};
use firn_sys::uffd::FilePages;
use firn_sys::window::{Window, is_on_tmpfs};
use firn_sys::{Errno, Pid};

use super::address_space::PageStats;
use super::error::MemoryDumpError;
use super::pages::{self, ReadWay, Run};
use super::range::AddressRange;
use crate::cancel::CancelFlag;

/// Bytes that one worker reads and then writes: small enough to stay in a core's cache. Batches end at
/// multiples of it in the pages file.
const BATCH_BYTES: usize = 512 << 10;
/// Bytes of a buffer whose pages are made before they are needed.
const READY_BYTES: usize = 256 << 10;
/// Bytes of the pages file that one worker takes at a time at most.
const UNIT_BYTES: u64 = 4 << 20;
/// Units that each worker finds at least, so that all have work to the end.
const UNITS_PER_WORKER: u64 = 4;
/// From here on two workers are faster than one.
const PARALLEL_BYTES: u64 = 4 << 20;

/// How pages are copied, and who hears of it.
#[derive(Debug, Clone, Copy)]
pub struct PageCopy<'a> {
    /// Bytes copied so far, by all tasks.
    pub copied: &'a AtomicU64,
    /// Looked at between batches.
    pub cancel: &'a CancelFlag,
    /// Nobody wants the pages any more; looked at between batches, too.
    pub given_up: &'a AtomicBool,
    /// Most threads that copy at the same time.
    pub workers: usize,
    /// What they copy through.
    pub buffers: &'a Buffers,
}

impl PageCopy<'_> {
    fn is_over(&self) -> bool {
        self.cancel.is_cancelled() || self.given_up.load(Ordering::Relaxed)
    }
}

/// Buffers that workers take over from each other, task after task, so that their pages are made once.
#[derive(Debug, Default)]
pub struct Buffers(Mutex<Vec<Window>>);

impl Buffers {
    /// Makes a buffer with as many pages as a small task has, so that a stopped tree need not wait for them.
    pub fn make_one(&self) {
        if let Ok(window) = Window::anonymous(BATCH_BYTES) {
            window.populate(READY_BYTES);
            self.give_back(Some(window));
        }
    }

    fn take(&self) -> Option<Window> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).pop()
    }

    fn give_back(&self, buffer: Option<Window>) {
        let mut all = self.0.lock().unwrap_or_else(|e| e.into_inner());
        all.extend(buffer);
    }
}

/// Some pages on their way into the pages file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Batch {
    ranges: Vec<RemoteRange>,
    way: ReadWay,
    offset: u64,
    len: usize,
}

/// Whose pages are copied.
#[derive(Debug, Clone, Copy)]
pub struct CopiedTask {
    /// The process, which names the images.
    pub pid: Pid,
    /// A thread of it that lives.
    pub speaker: Pid,
}

/// Writes pagemap and pages of a frozen task; those `in_parent`, ascending parts of the runs, are left to it.
///
/// # Errors
/// Pages that can't be read, images that can't be written.
pub fn dump(
    task: CopiedTask,
    runs: &[Run],
    in_parent: &[AddressRange],
    images: &ImageSetWriter,
    pages_id: u32,
    page_copy: &PageCopy<'_>,
) -> Result<PageStats, MemoryDumpError> {
    let id = u64::from(task.pid.to_image());
    let mut pagemap = PagemapWriter::new(images, ImageKind::Pagemap, id, pages_id)?;
    let (mut copied, mut in_parent_pages) = (Vec::with_capacity(runs.len()), 0);
    for (run, is_copied) in pages::split(runs, in_parent) {
        let flags = match (is_copied, run.is_lazy) {
            (false, _) => PageFlags::PARENT,
            (true, true) => PageFlags::PRESENT | PageFlags::LAZY,
            (true, false) => PageFlags::PRESENT,
        };
        pagemap.push(run.range.start, run.range.nr_pages(), flags)?;
        match is_copied {
            true => copied.push(run),
            false => in_parent_pages += run.range.nr_pages(),
        }
    }
    let written = pagemap.finish()?;
    let pages = images.raw_file(ImageKind::Pages, u64::from(pages_id))?;
    let source = Source::Task { pid: task.speaker };
    let batches = batches(&copied);
    copy_batches(&source, &batches, &pages, pages_id, page_copy)?;
    Ok(PageStats {
        scanned: written + in_parent_pages,
        written,
        in_parent: in_parent_pages,
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
            let needs_new = batches.last().is_none_or(|last| {
                last.way != run.way
                    || last.ranges.len() == MAX_RANGES
                    || room_in_batch(offset) == BATCH_BYTES
            });
            if needs_new {
                batches.push(Batch {
                    ranges: Vec::new(),
                    way: run.way,
                    offset,
                    len: 0,
                });
            }
            let wanted = usize::try_from(range.len()).unwrap_or(usize::MAX);
            let len = wanted.min(room_in_batch(offset));
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
    page_copy: &PageCopy<'_>,
) -> Result<(), MemoryDumpError> {
    let runs: Vec<Run> = ranges
        .iter()
        .map(|range| Run {
            range: *range,
            is_lazy: false,
            way: ReadWay::Direct,
        })
        .collect();
    copy_batches(
        &Source::File { file, name },
        &batches(&runs),
        pages,
        pages_id,
        page_copy,
    )
}

/// Bytes up to the end of the batch that a byte of the pages file belongs to.
fn room_in_batch(offset: u64) -> usize {
    let batch = to_u64(BATCH_BYTES);
    usize::try_from(batch - offset % batch).expect("a batch fits memory")
}

/// Bytes of the pages file that one of so many workers takes at a time: whole batches.
fn unit_bytes(total: u64, workers: usize) -> u64 {
    let share = total / (UNITS_PER_WORKER * to_u64(workers.max(1)));
    let batch = to_u64(BATCH_BYTES);
    (share / batch * batch).clamp(batch, UNIT_BYTES)
}

/// What all workers of a copy have in common.
struct Job<'a> {
    source: &'a Source<'a>,
    units: Vec<&'a [Batch]>,
    pages: &'a File,
    /// The same file, where it can be filled without its lock.
    filled: Option<FilePages>,
    pages_id: u32,
    page_copy: &'a PageCopy<'a>,
    next: AtomicUsize,
}

/// Copies all batches; big jobs with several workers.
///
/// A worker reads a batch and writes it at its place: while one holds the lock of the file, the other
/// reads. On a tmpfs, where that lock is the limit, pages are made by userfaultfd instead (0.6 of the time
/// with two processors). Reading straight into a mapping saves a copy but costs a fault for each page, and
/// huge pages made by MADV_COLLAPSE wait for every processor: both were slower.
fn copy_batches(
    source: &Source<'_>,
    batches: &[Batch],
    pages: &File,
    pages_id: u32,
    page_copy: &PageCopy<'_>,
) -> Result<(), MemoryDumpError> {
    let Some(last) = batches.last() else {
        return Ok(());
    };
    let total = last.offset + to_u64(last.len);
    let is_large = total >= PARALLEL_BYTES;
    let unit = unit_bytes(total, page_copy.workers);
    let units = batches.chunk_by(|a, b| a.offset / unit == b.offset / unit);
    let job = Job {
        source,
        units: units.collect(),
        pages,
        filled: filled_beside_the_lock(pages, total, page_copy),
        pages_id,
        page_copy,
        next: AtomicUsize::new(0),
    };
    let failure = Mutex::new(None);
    let work = || {
        if let Err(error) = job.work() {
            // The others stop at their next unit.
            job.next.store(job.units.len(), Ordering::Relaxed);
            let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
            failure.get_or_insert(error);
        }
    };
    std::thread::scope(|scope| {
        if is_large {
            for _ in 1..page_copy.workers.min(job.units.len()) {
                scope.spawn(work);
            }
        }
        work();
    });
    let failure = failure.into_inner().unwrap_or_else(|e| e.into_inner());
    failure.map_or(Ok(()), Err)
}

/// The pages file as one that is filled without its lock, where that pays and can be done.
fn filled_beside_the_lock(pages: &File, total: u64, page_copy: &PageCopy<'_>) -> Option<FilePages> {
    if total < PARALLEL_BYTES || page_copy.workers < 2 || !is_on_tmpfs(pages) {
        return None;
    }
    FilePages::new(pages, usize::try_from(total).ok()?).ok()
}

impl Job<'_> {
    fn write_error(&self, source: Errno) -> MemoryDumpError {
        MemoryDumpError::Write {
            path: ImageKind::Pages.file_name(u64::from(self.pages_id)),
            source,
        }
    }

    fn work(&self) -> Result<(), MemoryDumpError> {
        let mut buffer = self.page_copy.buffers.take();
        let result = self.work_with(&mut buffer);
        self.page_copy.buffers.give_back(buffer);
        result
    }

    fn work_with(&self, buffer: &mut Option<Window>) -> Result<(), MemoryDumpError> {
        while let Some(unit) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            for batch in *unit {
                if self.page_copy.is_over() {
                    return Err(MemoryDumpError::Cancelled);
                }
                self.copy_through(batch, buffer)?;
                let copied = &self.page_copy.copied;
                copied.fetch_add(to_u64(batch.len), Ordering::Relaxed);
            }
            self.leave(unit);
        }
        Ok(())
    }

    /// Takes the pages of a unit out of our memory, in which they were on their way into the file.
    fn leave(&self, unit: &[Batch]) {
        let (Some(filled), Some(first)) = (&self.filled, unit.first()) else {
            return;
        };
        let len = unit.iter().map(|batch| batch.len).sum();
        filled.leave(to_usize(first.offset), len);
    }

    /// Copies a batch through a buffer.
    fn copy_through(
        &self,
        batch: &Batch,
        buffer: &mut Option<Window>,
    ) -> Result<(), MemoryDumpError> {
        let failed = |error| self.write_error(error);
        let window = match buffer {
            Some(window) => window,
            None => buffer.insert(Window::anonymous(BATCH_BYTES).map_err(failed)?),
        };
        self.source.read(batch, window)?;
        if let Some(filled) = &self.filled
            && filled
                .put(window, batch.len, to_usize(batch.offset))
                .is_ok()
        {
            return Ok(());
        }
        // Whatever was wrong, such as a full file system, is wrong with a write as well, which says what.
        let mut done = 0;
        while done < batch.len {
            let at = batch.offset + to_u64(done);
            match window.write_file(self.pages, at, done, batch.len - done) {
                Ok(0) => return Err(failed(Errno::EIO)),
                Ok(written) => done += written,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }
}

impl Source<'_> {
    /// Reads the pages of a batch to the start of the window.
    fn read(&self, batch: &Batch, window: &Window) -> Result<(), MemoryDumpError> {
        match self {
            Source::Task { pid } if batch.way == ReadWay::Proc => read_proc(*pid, batch, window),
            Source::Task { pid } => read_task(*pid, batch, window),
            Source::File { file, name } => read_file(file, name, batch, window),
        }
    }
}

fn read_task(pid: Pid, batch: &Batch, window: &Window) -> Result<(), MemoryDumpError> {
    match window.read_process(pid, &batch.ranges, 0) {
        Ok(read) if read == batch.len => Ok(()),
        // Something in the middle is not readable this way: the slow way reads it or names it.
        Ok(_) | Err(Errno::EFAULT) => read_proc(pid, batch, window),
        Err(source) => {
            let range = batch
                .ranges
                .first()
                .map_or(AddressRange::new(0, 0), range_of);
            Err(MemoryDumpError::Pages { pid, range, source })
        }
    }
}

/// Reads memory whatever its protection, and leaves it shared.
fn read_proc(pid: Pid, batch: &Batch, window: &Window) -> Result<(), MemoryDumpError> {
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

fn to_usize(offset: u64) -> usize {
    usize::try_from(offset).expect("offsets of a file that is mapped whole")
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("lengths fit 64 bits")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use firn_sys::memfd;
    use proptest::prelude::*;

    fn run(start: u64, nr_pages: u64) -> Run {
        Run {
            range: AddressRange::new(start, start + nr_pages * 4096),
            is_lazy: false,
            way: ReadWay::Direct,
        }
    }

    proptest! {
        #[test]
        fn batches_follow_each_other_and_keep_to_their_borders(
            lens in proptest::collection::vec((1u64..3000, any::<bool>()), 1..20),
        ) {
            let mut start = 0;
            let mut runs = Vec::new();
            for (nr_pages, is_direct) in lens {
                let way = if is_direct { ReadWay::Direct } else { ReadWay::Proc };
                runs.push(Run { way, ..run(start, nr_pages) });
                start += (nr_pages + 1) * 4096;
            }
            let mut offset = 0;
            let mut copied = Vec::new();
            for batch in batches(&runs) {
                prop_assert_eq!(batch.offset, offset);
                prop_assert!(batch.len <= room_in_batch(batch.offset) && batch.len > 0);
                prop_assert!(batch.ranges.len() <= MAX_RANGES);
                copied.extend(batch.ranges.iter().map(range_of));
                offset += to_u64(batch.len);
            }
            let wanted = runs.iter().map(|run| run.range).collect();
            prop_assert_eq!(super::super::range::union(copied), super::super::range::union(wanted));
        }
    }

    #[test]
    fn large_objects_are_copied_on_a_tmpfs_and_elsewhere() {
        let nr_pages = 9 * 512 + 3;
        let source = memfd::create(c"source", memfd::flag::CLOEXEC).expect("memfd");
        let contents: Vec<u8> = (0..nr_pages * 512u64)
            .flat_map(|word| (word ^ 0x5a5a_5a5a_0000).to_le_bytes())
            .collect();
        source.write_all_at(&contents, 0).expect("write");
        let on_tmpfs = memfd::create(c"pages", memfd::flag::CLOEXEC).expect("memfd");
        let elsewhere = tempfile::tempfile().expect("file");
        let (copied, cancel) = (AtomicU64::new(0), CancelFlag::new());
        let (buffers, given_up) = (Buffers::default(), AtomicBool::new(false));
        let page_copy = PageCopy {
            copied: &copied,
            cancel: &cancel,
            given_up: &given_up,
            workers: 2,
            buffers: &buffers,
        };
        let ranges = [run(0, nr_pages).range];
        for pages in [on_tmpfs, elsewhere] {
            copy_file(&source, "source", &ranges, &pages, 1, &page_copy).expect("copied");
            let mut out = vec![0; contents.len() + 1];
            assert_eq!(pages.read_at(&mut out, 0).ok(), Some(contents.len()));
            assert!(out[..contents.len()] == contents);
        }
        assert_eq!(copied.into_inner(), 2 * nr_pages * 4096);
    }
}
