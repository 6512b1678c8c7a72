//! Everything that writes into an open image, in the order that survives a crash.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};

use super::extension::{self, Leaf, StoredBitmap};
use super::header::{HEADER_BYTES, Header, Mark, SECTOR};
use super::space::{BLOCK, Handed, Space};
use super::{ExpandedImage, lock};
use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::format::{Image, PendingLog};
use crate::storage::Access;

/// Bytes by which the file grows at a time, at least and at most, or a cluster. Few large steps: some file
/// systems, such as ext4, let all direct I/O of the file end before each.
const STEP: std::ops::RangeInclusive<u64> = 8 << 20..=64 << 20;

/// By how much a file grows that has so many bytes.
fn step_bytes(file_bytes: u64) -> u64 {
    (file_bytes / 4).clamp(*STEP.start(), *STEP.end())
}

impl ExpandedImage {
    /// Marks the image as open. Only when that is durable may anything else change.
    pub(super) fn begin_writing(&self) -> Result<(), DiskError> {
        let mut header = lock(&self.header);
        let mut space = lock(&self.space);
        header.mark = Mark::Dirty;
        header.extension = 0;
        header.size_sectors = space.rounded_size / SECTOR;
        self.size.store(header.size_bytes(), Ordering::Release);
        self.write_header(&header)?;
        // What lies behind the end belongs to nothing: an old extension, or what a crash left.
        let end = u64::from(space.end) * u64::from(self.cluster);
        self.file
            .set_len(end)
            .map_err(self.file.failed("write", end))?;
        space.reserved = space.end;
        self.file.set_access(Access::ReadWrite);
        Ok(())
    }

    pub(super) fn write_header(&self, header: &Header) -> Result<(), DiskError> {
        self.file
            .write_at(&header.encode(), 0)
            .map_err(self.file.failed("write", 0))?;
        self.sync()
    }

    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.file.sync().map_err(self.file.failed("sync", 0))
    }

    /// Gives a cluster a place and its bytes; only then the BAT knows.
    pub(super) fn store_new(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        let handed = self.take_place()?;
        let at = u64::from(handed.index) * u64::from(self.cluster);
        let is_whole = buf.len() as u64 == u64::from(self.cluster);
        let mut written = Ok(());
        if handed.is_old && !is_whole {
            written = self.file.zero(at..at + u64::from(self.cluster));
        }
        let from = at + u64::from(skip);
        let written = written.and_then(|()| self.file.write_at(buf, from));
        if let Err(error) = written {
            lock(&self.space).give_back(handed.index);
            return Err(self.file.failed("write", from)(error));
        }
        let mut space = lock(&self.space);
        self.put_entry(cluster, handed.index);
        space.touch(cluster);
        Ok(())
    }

    /// Takes over what a former process had changed and not written: it is written by the next
    /// flush, and places that it had given up are free after that.
    pub(super) fn adopt(&self, old_bat: &[u32], changes: &[(u32, u32)]) {
        let mut space = lock(&self.space);
        for (cluster, _) in changes {
            space.touch(*cluster);
            let at = usize::try_from(*cluster).unwrap_or(usize::MAX);
            let old = old_bat.get(at).copied().unwrap_or(0);
            if old != 0 && space.used.set(old) {
                space.freed.push(old);
            }
        }
        space.end = space.end.max(space.used.end());
    }

    fn note_change(&self, cluster: u32, value: u32) {
        if let Some(log) = self.log() {
            log.record(cluster, value);
        }
    }

    fn log(&self) -> Option<Arc<dyn PendingLog>> {
        let log = self.pending_log.read();
        log.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn put_entry(&self, cluster: u32, value: u32) -> u32 {
        self.note_change(cluster, value);
        let bat = self.bat.read().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(cluster).unwrap_or(usize::MAX);
        bat.get(index)
            .map_or(0, |entry| entry.swap(value, Ordering::AcqRel))
    }

    pub(super) fn take_place(&self) -> Result<Handed, DiskError> {
        let mut space = lock(&self.space);
        let full =
            || DiskError::refused(self.name(), "it has as many clusters as entries can count");
        let handed = space.take().ok_or_else(full)?;
        if let Err(error) = self.reserve(&mut space) {
            space.give_back(handed.index);
            return Err(error);
        }
        Ok(handed)
    }

    /// Makes the file reach to the end of what was handed out, and some further.
    pub(super) fn reserve(&self, space: &mut Space) -> Result<(), DiskError> {
        if space.end <= space.reserved {
            return Ok(());
        }
        let unit = u64::from(self.cluster);
        let start = u64::from(space.reserved) * unit;
        let more = step_bytes(start) / unit;
        let more = u32::try_from(more).unwrap_or(u32::MAX).saturating_sub(1);
        let far = space.end.saturating_add(more);
        let mut reserved = self.file.allocate(start..u64::from(far) * unit);
        space.reserved = far;
        if reserved.is_err() && far > space.end {
            // Perhaps there is room for this one.
            reserved = self.file.allocate(start..u64::from(space.end) * unit);
            space.reserved = space.end;
        }
        reserved.map_err(|error| {
            space.end -= 1;
            space.reserved = space.end;
            self.file.failed("write", start)(error)
        })
    }

    /// Takes a cluster's place away.
    pub(super) fn forget(&self, cluster: u32) {
        let mut space = lock(&self.space);
        let old = self.put_entry(cluster, 0);
        if old != 0 {
            space.freed.push(old);
            space.touch(cluster);
        }
    }

    pub(super) fn flush_all(&self) -> Result<(), DiskError> {
        let ticket = self.tickets.fetch_add(1, Ordering::AcqRel) + 1;
        let mut flushed = lock(&self.flushed);
        if *flushed >= ticket {
            // One that began after this call has done it.
            return Ok(());
        }
        let covers = self.tickets.load(Ordering::Acquire);
        let (blocks, touched, freed, position) = self.pending();
        if let Err(error) = self.write_down(&blocks) {
            let mut space = lock(&self.space);
            space.touched.extend(touched);
            space.freed.extend(freed);
            return Err(error);
        }
        if let Some(log) = self.log() {
            log.forget(position);
        }
        for index in freed {
            let at = u64::from(index) * u64::from(self.cluster);
            self.file
                .punch(at..at + u64::from(self.cluster))
                .map_err(self.file.failed("write", at))?;
            lock(&self.space).give_back(index);
        }
        *flushed = covers;
        Ok(())
    }

    /// The changed blocks of the BAT as they are now: every entry in them leads to bytes that were
    /// written before.
    #[expect(
        clippy::type_complexity,
        reason = "four things that belong together for one step"
    )]
    fn pending(&self) -> (Vec<(u64, Vec<u8>)>, Vec<u64>, Vec<u32>, u64) {
        let mut space = lock(&self.space);
        let touched: Vec<u64> = std::mem::take(&mut space.touched).into_iter().collect();
        let freed = std::mem::take(&mut space.freed);
        let blocks = touched.iter().map(|block| self.encode_block(*block));
        let position = self.log().map_or(0, |log| log.position());
        (blocks.collect(), touched, freed, position)
    }

    fn encode_block(&self, block: u64) -> (u64, Vec<u8>) {
        let start = (block * BLOCK).max(HEADER_BYTES.into());
        let end = (block + 1) * BLOCK;
        let index = |at: u64| usize::try_from((at - u64::from(HEADER_BYTES)) / 4).unwrap_or(0);
        let bat = self.bat.read().unwrap_or_else(PoisonError::into_inner);
        let entries = &bat[index(start)..index(end).min(bat.len())];
        let word = |entry: &AtomicU32| entry.load(Ordering::Acquire).to_le_bytes();
        (start, entries.iter().flat_map(word).collect())
    }

    fn write_down(&self, blocks: &[(u64, Vec<u8>)]) -> Result<(), DiskError> {
        self.sync()?;
        for (at, bytes) in blocks {
            self.file
                .write_at(bytes, *at)
                .map_err(self.file.failed("write", *at))?;
        }
        match blocks.is_empty() {
            true => Ok(()),
            false => self.sync(),
        }
    }

    /// The last steps of closing: the bitmap, the end of the file, the mark.
    pub(super) fn seal(&self) -> Result<(), DiskError> {
        let mut header = lock(&self.header);
        let mut space = lock(&self.space);
        // Clusters at the end may have become free.
        space.end = space.used.end();
        space.reserved = space.end;
        let end = u64::from(space.end) * u64::from(self.cluster);
        self.file
            .set_len(end)
            .map_err(self.file.failed("write", end))?;
        let bitmap = lock(&self.bitmap).take();
        let extension = match &bitmap {
            Some(bitmap) => self.write_bitmap(bitmap, end, header.size_sectors)?,
            None => None,
        };
        self.sync()?;
        header.flags = self.flags();
        header.extension = extension.unwrap_or(0);
        header.mark = match extension {
            Some(_) => Mark::ClosedWithExtension,
            None => Mark::Closed,
        };
        self.write_header(&header)
    }

    /// Writes a bitmap behind the data; gives the extension's sector, or None where it has no room.
    fn write_bitmap(
        &self,
        bitmap: &DirtyBitmap,
        end: u64,
        size_sectors: u64,
    ) -> Result<Option<u64>, DiskError> {
        let cluster = usize::try_from(self.cluster).expect("32 bits fit in an address");
        let Some(granularity_sectors) = extension::granularity_sectors(bitmap) else {
            return Ok(None);
        };
        let mut at = end;
        let mut table = Vec::new();
        for index in 0..extension::table_len(bitmap, cluster) {
            table.push(match extension::leaf(bitmap, index, cluster) {
                Leaf::Same(set) => u64::from(set),
                Leaf::Bits(bits) => {
                    self.file
                        .write_at(&bits, at)
                        .map_err(self.file.failed("write", at))?;
                    at += u64::from(self.cluster);
                    at / SECTOR - u64::from(self.cluster) / SECTOR
                }
            });
        }
        let stored = StoredBitmap {
            id: bitmap.id,
            size_sectors,
            granularity_sectors,
            table,
        };
        let Some(bytes) = extension::encode(&[stored], cluster) else {
            return Ok(None);
        };
        self.file
            .write_at(&bytes, at)
            .map_err(self.file.failed("write", at))?;
        Ok(Some(at / SECTOR))
    }
}
