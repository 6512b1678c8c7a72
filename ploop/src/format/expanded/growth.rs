//! Another size: a longer table needs room at the file's start, where clusters lie.
//!
//! They move while requests go on, one by one; each is written at its new place before its entry leads
//! there, in one step, so that neither a crash nor the death of the process finds it nowhere. What is
//! left for the moment in which everybody waits is a flush, the zeroes of the new table, and the header.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, Ordering};

use super::header::{Header, SECTOR};
use super::{ExpandedImage, lock};
use crate::DiskError;
use crate::format::Image;

impl ExpandedImage {
    /// The header for a larger disk.
    fn header_for(&self, size_bytes: u64) -> Result<Header, DiskError> {
        let unit = u64::from(self.cluster);
        if size_bytes < self.size_bytes() {
            let what = "a disk that is open can't be made smaller";
            return Err(DiskError::refused(self.name(), what));
        }
        if !size_bytes.is_multiple_of(unit) || u32::try_from(size_bytes / unit).is_err() {
            let what = format!("{size_bytes} bytes are not a number of clusters that it can have");
            return Err(DiskError::refused(self.name(), what));
        }
        let mut wanted = lock(&self.header).clone();
        wanted.size_sectors = size_bytes / SECTOR;
        wanted.entries = u32::try_from(size_bytes / unit).unwrap_or(u32::MAX);
        let area = wanted.area_bytes().max(wanted.data_start_bytes());
        wanted.data_start = u32::try_from(area / SECTOR).unwrap_or(u32::MAX);
        Ok(wanted)
    }

    /// The clusters that lie where the table of a larger disk will be. From now on none is put there.
    pub(super) fn in_the_way(&self, size_bytes: u64) -> Result<Vec<u32>, DiskError> {
        let area = self.header_for(size_bytes)?.data_start_bytes();
        let first = u32::try_from(area / u64::from(self.cluster)).unwrap_or(u32::MAX);
        self.keep_free(first)?;
        let bat = self.bat.read().unwrap_or_else(PoisonError::into_inner);
        let entries = bat.iter().map(|entry| entry.load(Ordering::Acquire));
        let blocking = (0u32..).zip(entries);
        let blocking = blocking.filter(|(_, entry)| (1..first).contains(entry));
        Ok(blocking.map(|(cluster, _)| cluster).collect())
    }

    /// Gives a cluster another place. Nobody else uses it meanwhile.
    pub(super) fn relocate(&self, cluster: u32) -> Result<(), DiskError> {
        let old = self.entry(cluster);
        if old == 0 {
            return Ok(());
        }
        let unit = u64::from(self.cluster);
        let handed = self.take_place()?;
        let (from, to) = (u64::from(old) * unit, u64::from(handed.index) * unit);
        let mut bytes = vec![0; usize::try_from(unit).unwrap_or_default()];
        let moved = self
            .file
            .read_at(&mut bytes, from)
            .map_err(self.file.failed("read", from));
        let written = self.file.failed("write", to);
        if let Err(error) = moved.and_then(|()| self.file.write_at(&bytes, to).map_err(written)) {
            lock(&self.space).give_back(handed.index);
            return Err(error);
        }
        let mut space = lock(&self.space);
        self.put_entry(cluster, handed.index);
        space.freed.push(old);
        space.touch(cluster);
        Ok(())
    }

    /// Makes the disk larger; clusters that are still in the way of a longer BAT move first.
    pub(super) fn enlarge(&self, size_bytes: u64) -> Result<(), DiskError> {
        let unit = u64::from(self.cluster);
        let wanted = self.header_for(size_bytes)?;
        let (old_table, area) = (lock(&self.header).table_bytes(), wanted.data_start_bytes());
        for cluster in self.in_the_way(size_bytes)? {
            self.relocate(cluster)?;
        }
        // Places given up before may lie in the new table: they are emptied for the last time.
        self.flush_all()?;
        // A crash leaves the old header, for which this is no table but lost space.
        self.file
            .zero(old_table..area)
            .map_err(self.file.failed("write", old_table))?;
        self.sync()?;
        self.write_header(&wanted)?;
        let mut bat = self.bat.write().unwrap_or_else(PoisonError::into_inner);
        let entries = usize::try_from(wanted.entries).unwrap_or(usize::MAX);
        bat.resize_with(entries, || AtomicU32::new(0));
        drop(bat);
        let mut space = lock(&self.space);
        for index in 0..u32::try_from(area / unit).unwrap_or(0) {
            space.used.set(index);
        }
        space.end = space.end.max(space.used.end());
        space.rounded_size = size_bytes;
        drop(space);
        self.size.store(size_bytes, Ordering::Release);
        *lock(&self.header) = wanted;
        Ok(())
    }

    /// Lets no cluster below `first` be handed out from now on.
    fn keep_free(&self, first: u32) -> Result<(), DiskError> {
        let mut space = lock(&self.space);
        space.floor = space.floor.max(first);
        for index in 0..first {
            space.used.set(index);
        }
        if space.end < first {
            space.end = first;
            self.reserve(&mut space)?;
        }
        Ok(())
    }

    /// Makes the disk smaller: what lies behind goes first, then the header says so. The BAT keeps its
    /// room.
    pub(super) fn cut(&self, size_bytes: u64) -> Result<(), DiskError> {
        let unit = u64::from(self.cluster);
        if size_bytes > self.size_bytes() || !size_bytes.is_multiple_of(unit) || size_bytes == 0 {
            let what = format!("{size_bytes} bytes are not a smaller number of clusters");
            return Err(DiskError::refused(self.name(), what));
        }
        let entries = u32::try_from(size_bytes / unit).unwrap_or(u32::MAX);
        let old = lock(&self.header).entries;
        for cluster in entries..old {
            self.forget(cluster);
        }
        self.flush_all()?;
        let mut header = lock(&self.header);
        header.entries = entries;
        header.size_sectors = size_bytes / SECTOR;
        self.write_header(&header)?;
        let mut bat = self.bat.write().unwrap_or_else(PoisonError::into_inner);
        bat.truncate(usize::try_from(entries).unwrap_or(usize::MAX));
        lock(&self.space).rounded_size = size_bytes;
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }
}
