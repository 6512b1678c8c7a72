//! The memory of all tasks on its way into the images.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};

use firn_images::{ImageDir, ImageSetWriter};

use super::increment::Increment;
use super::{DumpError, O_PATH_LIKE, Operation, REPORT_INTERVAL};
use crate::crew;
use crate::files::{FileTable, ProcLink};
use crate::memory::{
    AddressSpace, Buffers, DescribedSpace, MemoryDumpError, MmAnswers, PageCopy, PageStats,
    SharedDump,
};
use crate::task::questions::TaskAnswers;
use crate::tree::Tree;

/// A task's memory, and the images that have what it has not written to since.
pub(super) type Described<'a> = (DescribedSpace<'a>, Option<&'a ImageDir>);

/// Notes what stands behind the mappings of all tasks.
pub(super) fn describe_spaces<'a>(
    tree: &Tree,
    spaces: &'a [AddressSpace],
    answers: &[TaskAnswers],
    increment: &'a Increment,
    files: &mut FileTable,
    shared: &mut SharedDump,
) -> Result<Vec<Described<'a>>, DumpError> {
    let mut described = Vec::with_capacity(spaces.len());
    for ((task, space), answers) in tree.alive().zip(spaces).zip(answers) {
        let answers = MmAnswers {
            brk: answers.process.brk,
            dumpable: answers.process.dumpable,
            modes: answers.process.space,
            exe_file_id: files.add_link(task.speaker(), ProcLink::Exe, O_PATH_LIKE)?,
            policies: answers.policies.clone(),
        };
        let space = space.describe(&answers, files, shared)?;
        described.push((space, increment.parent_of(task.pid)));
    }
    Ok(described)
}

impl Operation<'_> {
    /// Writes all memory: of the tasks, and what they share.
    pub(super) fn dump_memory(
        &mut self,
        described: Vec<Described<'_>>,
        shared: &SharedDump,
        images: &ImageSetWriter,
    ) -> Result<(PageStats, PageStats), DumpError> {
        let (copied, buffers) = (AtomicU64::new(0), Buffers::default());
        let page_copy = PageCopy {
            copied: &copied,
            cancel: self.cancel,
            workers: crew::workers(),
            buffers: &buffers,
        };
        let nr_spaces = u32::try_from(described.len()).expect("few tasks");
        let pages = self.write_spaces(described, images, &page_copy)?;
        let mut next_pages_id = 1 + nr_spaces;
        let shared_pages = shared.write(
            images,
            || {
                next_pages_id += 1;
                next_pages_id - 1
            },
            &page_copy,
        )?;
        self.reporter.bytes(copied.load(Ordering::Relaxed), 0);
        Ok((pages, shared_pages))
    }

    /// Writes the pages of all tasks, several at a time; tasks and pages files have the same order.
    fn write_spaces(
        &mut self,
        described: Vec<Described<'_>>,
        images: &ImageSetWriter,
        page_copy: &PageCopy<'_>,
    ) -> Result<PageStats, DumpError> {
        let workers = page_copy.workers.min(described.len());
        let queue = Mutex::new((1u32..).zip(described));
        let work = &|| -> Result<PageStats, MemoryDumpError> {
            let mut pages = PageStats::default();
            loop {
                let next = queue.lock().unwrap_or_else(|e| e.into_inner()).next();
                let Some((pages_id, (space, parent))) = next else {
                    return Ok(pages);
                };
                pages += space.write(parent, images, pages_id, page_copy)?;
            }
        };
        let reporter = &mut self.reporter;
        // This thread works, too, unless somebody wants to hear how far the others are.
        let takes_part = !reporter.is_heard();
        std::thread::scope(|scope| {
            // Nothing is ever sent: the channel is closed when the last worker is done.
            let (working, ended) = mpsc::channel::<()>();
            let start = |_| {
                let working = working.clone();
                scope.spawn(move || {
                    let _until_done = working;
                    work()
                })
            };
            let others: Vec<_> = (usize::from(takes_part)..workers).map(start).collect();
            drop(working);
            let mut pages = PageStats::default();
            if takes_part {
                pages += work()?;
            }
            while ended.recv_timeout(REPORT_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                reporter.bytes(page_copy.copied.load(Ordering::Relaxed), 0);
            }
            for worker in others {
                pages += worker.join().expect("a worker does not panic")?;
            }
            Ok(pages)
        })
    }
}
