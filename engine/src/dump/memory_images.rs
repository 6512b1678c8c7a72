//! The memory of all tasks on its way into the images.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use firn_images::{ImageDir, ImageSetWriter};

use super::increment::Increment;
use super::reader::{Given, Reader, Written};
use super::{DumpError, O_PATH_LIKE, Operation};
use crate::cancel::CancelFlag;
use crate::crew;
use crate::files::{FileTable, ProcLink};
use crate::memory::{
    AddressSpace, Buffers, DescribedSpace, MmAnswers, PageCopy, PageStats, SharedDump,
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

/// The memory of all tasks, for the thread that writes it.
pub(super) struct SpacesToWrite<'a> {
    described: Vec<Described<'a>>,
    images: &'a ImageSetWriter,
    way: CopyWay<'a>,
}

/// How pages are copied, for more than one thread.
#[derive(Clone)]
struct CopyWay<'a> {
    copied: Arc<AtomicU64>,
    given_up: Arc<AtomicBool>,
    cancel: &'a CancelFlag,
    buffers: Arc<Buffers>,
}

impl CopyWay<'_> {
    fn page_copy(&self) -> PageCopy<'_> {
        PageCopy {
            copied: &self.copied,
            given_up: &self.given_up,
            cancel: self.cancel,
            workers: crew::workers(),
            buffers: &self.buffers,
        }
    }
}

/// Memory that is being written by another thread. Dropped, it lets that thread give up.
pub(super) struct Writing<'a> {
    nr_spaces: u32,
    way: CopyWay<'a>,
    given: Given<'a>,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.way.given_up.store(true, Ordering::Relaxed);
    }
}

impl<'a> Operation<'a> {
    /// Has the reader write the memory of the tasks.
    pub(super) fn begin_memory<'scope>(
        &self,
        described: Vec<Described<'scope>>,
        images: &'scope ImageSetWriter,
        reader: &Reader<'scope>,
    ) -> Writing<'scope>
    where
        'a: 'scope,
    {
        let way = CopyWay {
            copied: Arc::default(),
            given_up: Arc::default(),
            cancel: self.cancel,
            buffers: Arc::clone(&self.buffers),
        };
        let nr_spaces = u32::try_from(described.len()).expect("few tasks");
        let spaces = SpacesToWrite {
            described,
            images,
            way: way.clone(),
        };
        Writing {
            nr_spaces,
            way,
            given: reader.write(spaces),
        }
    }

    /// Waits until the memory of the tasks is written, and writes what they share; returns the pages of both.
    pub(super) fn end_memory(
        &mut self,
        writing: &Writing<'_>,
        shared: &SharedDump,
        images: &ImageSetWriter,
    ) -> Result<(PageStats, PageStats), DumpError> {
        let copied = &writing.way.copied;
        let pages = match writing.given.take_back() {
            Some(spaces) => spaces.write()?,
            None => {
                let report = || self.reporter.bytes(copied.load(Ordering::Relaxed), 0);
                writing.given.written(report)?
            }
        };
        let mut next_pages_id = 1 + writing.nr_spaces;
        let shared_pages = shared.write(
            images,
            || {
                next_pages_id += 1;
                next_pages_id - 1
            },
            &writing.way.page_copy(),
        )?;
        self.reporter.bytes(copied.load(Ordering::Relaxed), 0);
        Ok((pages, shared_pages))
    }
}

impl SpacesToWrite<'_> {
    /// Writes the pages of all tasks, several at a time; tasks and pages files have the same order.
    pub(super) fn write(self) -> Written {
        let SpacesToWrite {
            described,
            images,
            way,
        } = self;
        let page_copy = way.page_copy();
        let workers = page_copy.workers.min(described.len());
        let queue = Mutex::new((1u32..).zip(described));
        let work = || -> Written {
            let mut pages = PageStats::default();
            loop {
                let next = queue.lock().unwrap_or_else(|e| e.into_inner()).next();
                let Some((pages_id, (space, parent))) = next else {
                    return Ok(pages);
                };
                pages += space.write(parent, images, pages_id, &page_copy)?;
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
            let mut pages = work()?;
            for worker in others {
                pages += worker.join().expect("a worker does not panic")?;
            }
            Ok(pages)
        })
    }
}
