//! What a file system writes while it is mounted read-only: its journal, played back.
//!
//! A snapshot of a running disk is what a loss of power would have left, and so is a backup. File systems
//! want to put that right first, even for somebody who only reads; the disk itself must not change. So the
//! changes go into memory that outlives a worker, and vanish with the mount.
//!
//! ```text
//! 0.. the disk's bytes, as far as they were written | then one byte per page: 1 where it was written
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::disk::{Counters, Disk, Merge, NewTop};
use crate::extent::{Extent, ExtentKind};
use crate::storage::Access;

const PAGE_BYTES: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;

/// A disk that is only read, under changes that do not last.
pub struct Scratch {
    below: Arc<dyn Disk>,
    file: File,
    /// Byte of the file where the pages' marks begin.
    marks_at: u64,
    is_touched: AtomicBool,
    writing: Mutex<()>,
}

impl Scratch {
    /// The memory, which holds nothing yet.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn memory() -> io::Result<File> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        Ok(rustix::fs::memfd_create("firn-ploop-scratch", flags)?.into())
    }

    /// Lays the memory on a disk; what an earlier worker put there counts.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn new(below: Arc<dyn Disk>, file: File) -> io::Result<Scratch> {
        let pages = below.size_bytes().div_ceil(PAGE);
        let marks_at = pages * PAGE;
        let is_touched = file.metadata()?.len() > 0;
        file.set_len(marks_at + pages)?;
        Ok(Scratch {
            below,
            file,
            marks_at,
            is_touched: AtomicBool::new(is_touched),
            writing: Mutex::new(()),
        })
    }

    fn is_touched(&self) -> bool {
        self.is_touched.load(Ordering::Acquire)
    }

    fn failed(&self, action: &'static str, at: u64) -> impl Fn(io::Error) -> DiskError {
        move |error| DiskError::io("the memory for a journal's changes", action, at, error)
    }

    fn is_written(&self, page: u64) -> Result<bool, DiskError> {
        let mut mark = [0];
        let read = self.file.read_exact_at(&mut mark, self.marks_at + page);
        read.map_err(self.failed("read", page * PAGE))?;
        Ok(mark == [1])
    }

    /// Reads a range inside of one page.
    fn read_page(&self, buf: &mut [u8], at: u64) -> Result<(), DiskError> {
        match self.is_written(at / PAGE)? {
            true => {
                let read = self.file.read_exact_at(buf, at);
                read.map_err(self.failed("read", at))
            }
            false => self.below.read_at(buf, at),
        }
    }

    /// Writes a range inside of one page; the mark comes last.
    fn write_page(&self, buf: &[u8], at: u64) -> Result<(), DiskError> {
        let page = at / PAGE;
        let start = page * PAGE;
        let skip = usize::try_from(at - start).expect("smaller than a page");
        let mut bytes = [0; PAGE_BYTES];
        let there = self.size_bytes().saturating_sub(start).min(PAGE);
        let there = usize::try_from(there).expect("at most a page");
        self.read_page(&mut bytes[..there], start)?;
        bytes[skip..skip + buf.len()].copy_from_slice(buf);
        let written = self.file.write_all_at(&bytes, start);
        let marked = written.and_then(|()| self.file.write_all_at(&[1], self.marks_at + page));
        marked.map_err(self.failed("write", at))
    }
}

/// Lengths of the parts of a range, page by page.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let room = usize::try_from(PAGE - at % PAGE).expect("at most a page");
        let now = room.min(len - done);
        let part = done..done + now;
        done += now;
        (now > 0).then_some((at, part))
    })
}

impl Disk for Scratch {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn cluster_bytes(&self) -> u32 {
        self.below.cluster_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        if !self.is_touched() {
            return self.below.read_at(buf, offset);
        }
        self.within(offset, buf.len() as u64)?;
        for (at, part) in parts(offset, buf.len()) {
            self.read_page(&mut buf[part], at)?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.within(offset, buf.len() as u64)?;
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_touched.store(true, Ordering::Release);
        for (at, part) in parts(offset, buf.len()) {
            self.write_page(&buf[part], at)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        const AT_ONCE: u64 = 1 << 20;
        let end = offset.saturating_add(len_bytes);
        let mut at = offset;
        while at < end {
            let now = (end - at).min(AT_ONCE);
            let zeroes = vec![0; usize::try_from(now).expect("at most a mebibyte")];
            self.write_at(&zeroes, at)?;
            at += now;
        }
        Ok(())
    }

    fn discard(&self, _offset: u64, _len_bytes: u64) -> Result<(), DiskError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn map(&self, offset: u64, len_bytes: u64) -> Result<Vec<Extent>, DiskError> {
        if !self.is_touched() {
            return self.below.map(offset, len_bytes);
        }
        self.within(offset, len_bytes)?;
        let kind = ExtentKind::Data;
        Ok(vec![Extent {
            offset,
            len_bytes,
            kind,
        }])
    }

    fn push_top(&self, _top: NewTop<'_>) -> Result<Option<DirtyBitmap>, DiskError> {
        Err(self.refused())
    }

    fn merge_down(&self, _level: usize, _merge: Merge<'_>) -> Result<(), DiskError> {
        Err(self.refused())
    }

    fn grow(&self, _size_bytes: u64) -> Result<(), DiskError> {
        Err(self.refused())
    }

    fn swap_bitmap(&self, _bitmap: Option<DirtyBitmap>) -> Option<DirtyBitmap> {
        None
    }

    fn mark_changed(&self, _offset: u64, _len_bytes: u64) {}

    fn layers(&self) -> Vec<String> {
        self.below.layers()
    }

    fn counters(&self) -> &Counters {
        self.below.counters()
    }

    fn close(&self) -> Result<(), DiskError> {
        self.below.close()
    }
}

impl Scratch {
    fn refused(&self) -> DiskError {
        DiskError::ReadOnly {
            object: self.below.layers().pop().unwrap_or_default(),
        }
    }

    fn within(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        DiskError::check_range(offset, len, self.size_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChainDisk, HostFile, RawImage};

    #[test]
    fn changes_stay_in_memory_and_outlive_a_worker() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7; 5 * 4096 + 512]).unwrap();
        let below = || {
            let file = HostFile::open(&path, Access::ReadOnly).unwrap();
            let image = RawImage::open(Box::new(file), Access::ReadOnly, 1 << 16).unwrap();
            Arc::new(ChainDisk::new(vec![Arc::new(image)]).unwrap())
        };
        let memory = Scratch::memory().unwrap();
        let mut wanted = vec![7; 5 * 4096 + 512];
        let holds = |scratch: &Scratch, wanted: &[u8]| {
            let mut bytes = vec![1; wanted.len()];
            scratch.read_at(&mut bytes, 0).unwrap();
            assert!(bytes == wanted);
        };
        let scratch = Scratch::new(below(), memory.try_clone().unwrap()).unwrap();
        holds(&scratch, &wanted);
        scratch.write_at(&[9; 5000], 4000).unwrap();
        wanted[4000..9000].fill(9);
        scratch.write_zeroes(5 * 4096 + 100, 412).unwrap();
        wanted[5 * 4096 + 100..].fill(0);
        holds(&scratch, &wanted);
        drop(scratch);
        let scratch = Scratch::new(below(), memory).unwrap();
        holds(&scratch, &wanted);
        assert!(scratch.write_at(&[0; 2], 5 * 4096 + 511).is_err());
        let file = std::fs::read(&path).unwrap();
        assert!(file.iter().all(|byte| *byte == 7));
    }
}
