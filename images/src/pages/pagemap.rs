//! Reading one pagemap.

use std::io::Read;

use firn_proto::{PagemapEntry, PagemapHead};

use super::{PAGE_SIZE, PageFlags, PageSourceError};
use crate::dir::ImageDir;
use crate::kind::ImageKind;
use crate::reader::ImageReader;

/// A pagemap as it stands in one directory: ascending, without overlaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// Number of the pages file.
    pub pages_id: u32,
    /// The runs, ascending.
    pub runs: Vec<PagemapRun>,
}

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagemapRun {
    /// Address of the first page; in a shared memory object, its offset.
    pub vaddr: u64,
    /// Number of pages.
    pub nr_pages: u64,
    /// Where the contents are.
    pub flags: PageFlags,
    /// Where in the pages file the contents begin, in bytes, if they are there.
    pub offset: u64,
}

impl PagemapRun {
    /// Gives the address after the last page.
    pub fn end(&self) -> u64 {
        self.vaddr + self.nr_pages * PAGE_SIZE
    }
}

impl Pagemap {
    /// Reads the pagemap of a process or shared memory object.
    pub fn read(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Self, PageSourceError> {
        Self::read_from(dir.reader(kind, id)?)
    }

    /// Reads a pagemap from an image just opened.
    pub fn read_from<R: Read>(mut image: ImageReader<R>) -> Result<Self, PageSourceError> {
        let PagemapHead { pages_id } = image.expect_entry()?;
        let mut pagemap = Self {
            pages_id,
            runs: Vec::new(),
        };
        let mut place = image.place();
        while let Some(entry) = image.next_entry::<PagemapEntry>()? {
            let run = pagemap.next_run(&entry);
            let bad = |problem| PageSourceError::BadRun {
                place,
                vaddr: entry.vaddr,
                problem,
            };
            pagemap.runs.push(run.map_err(bad)?);
            place = image.place();
        }
        Ok(pagemap)
    }

    /// Gives the number of bytes that the pages file has to hold.
    pub fn present_bytes(&self) -> u64 {
        self.runs.last().map_or(0, bytes_up_to)
    }

    /// Checks an entry against the run before it.
    fn next_run(&self, entry: &PagemapEntry) -> Result<PagemapRun, &'static str> {
        let nr_pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let run = PagemapRun {
            vaddr: entry.vaddr,
            nr_pages,
            flags: flags(entry),
            offset: 0,
        };
        if nr_pages == 0 {
            return Err("has no pages");
        }
        if !run.vaddr.is_multiple_of(PAGE_SIZE) {
            return Err("does not begin at a page");
        }
        let len = nr_pages.checked_mul(PAGE_SIZE);
        if len.and_then(|len| run.vaddr.checked_add(len)).is_none() {
            return Err("goes beyond the end of memory");
        }
        if self.runs.last().is_some_and(|last| last.end() > run.vaddr) {
            return Err("begins before the end of the one before it");
        }
        if !run.flags.is_valid() {
            return Err("has flags that say nothing clear");
        }
        // No overflow: present runs are disjoint ranges of the address space.
        Ok(PagemapRun {
            offset: self.present_bytes(),
            ..run
        })
    }
}

fn bytes_up_to(last: &PagemapRun) -> u64 {
    let present = last.flags.contains(PageFlags::PRESENT);
    last.offset
        + if present {
            last.nr_pages * PAGE_SIZE
        } else {
            0
        }
}

/// Reads the flags, as old releases wrote them too.
fn flags(entry: &PagemapEntry) -> PageFlags {
    match (entry.in_parent, entry.flags) {
        (Some(true), None) => PageFlags::PARENT,
        (Some(true), Some(bits)) => PageFlags::from_bits(bits) | PageFlags::PARENT,
        (_, Some(bits)) => PageFlags::from_bits(bits),
        (_, None) => PageFlags::PRESENT,
    }
}
