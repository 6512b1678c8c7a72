//! Writing a pagemap.

use std::path::PathBuf;

use firn_proto::{PagemapEntry, PagemapHead};

use super::{PAGE_SIZE, PageFlags};
use crate::error::ImageWriteError;
use crate::kind::ImageKind;
use crate::set::ImageSetWriter;
use crate::writer::EntryWriter;

/// Writes the pagemap of a process or of a shared memory object.
///
/// Runs come in ascending order; neighbours with the same flags become one.
#[derive(Debug)]
pub struct PagemapWriter<'set> {
    entries: EntryWriter<'set>,
    path: PathBuf,
    pending: Option<Run>,
    present_pages: u64,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    vaddr: u64,
    nr_pages: u64,
    flags: PageFlags,
}

impl Run {
    fn end(&self) -> u64 {
        self.vaddr + self.nr_pages * PAGE_SIZE
    }
}

impl<'set> PagemapWriter<'set> {
    /// Begins the pagemap of kind `Pagemap` or `ShmemPagemap`, whose contents go to the pages
    /// file `pages_id`.
    pub fn new(
        set: &'set ImageSetWriter,
        kind: ImageKind,
        id: u64,
        pages_id: u32,
    ) -> Result<Self, ImageWriteError> {
        let path = set.path_of(&kind.file_name(id));
        let mut entries = set.writer(kind, id);
        entries.entry(&PagemapHead { pages_id })?;
        Ok(Self {
            entries,
            path,
            pending: None,
            present_pages: 0,
        })
    }

    /// Adds a run, and tells where in the pages file its contents go (for a run that is not
    /// present: where those of the next present one go).
    pub fn push(
        &mut self,
        vaddr: u64,
        nr_pages: u64,
        flags: PageFlags,
    ) -> Result<u64, ImageWriteError> {
        let len = nr_pages.checked_mul(PAGE_SIZE).filter(|len| *len > 0);
        let end = len.and_then(|len| vaddr.checked_add(len));
        let after_last = self.pending.is_none_or(|last| last.end() <= vaddr);
        if end.is_none() || !after_last || !vaddr.is_multiple_of(PAGE_SIZE) || !flags.is_valid() {
            return Err(ImageWriteError::PageOrder {
                path: self.path.clone(),
                vaddr,
            });
        }
        let offset = self.present_pages * PAGE_SIZE;
        if flags.contains(PageFlags::PRESENT) {
            self.present_pages += nr_pages;
        }
        match &mut self.pending {
            Some(last) if last.end() == vaddr && last.flags == flags => last.nr_pages += nr_pages,
            _ => {
                self.flush()?;
                self.pending = Some(Run {
                    vaddr,
                    nr_pages,
                    flags,
                });
            }
        }
        Ok(offset)
    }

    /// Completes the pagemap; tells how many pages the pages file has to hold.
    pub fn finish(mut self) -> Result<u64, ImageWriteError> {
        self.flush()?;
        self.entries.finish()?;
        Ok(self.present_pages)
    }

    fn flush(&mut self) -> Result<(), ImageWriteError> {
        let Some(run) = self.pending.take() else {
            return Ok(());
        };
        self.entries.entry(&PagemapEntry {
            vaddr: run.vaddr,
            // Releases that know no other count read this one; newer ones prefer the other.
            compat_nr_pages: u32::try_from(run.nr_pages).unwrap_or(0),
            in_parent: None,
            flags: Some(run.flags.bits()),
            nr_pages: Some(run.nr_pages),
        })
    }
}
