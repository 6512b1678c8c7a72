//! A raw image: the file's bytes are the disk's.
//!
//! It can only be a base: there is no mark for a cluster that another layer holds. A file that does
//! not end with a whole cluster reads as zeroes behind its end.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Image, ImageFile, Known, Slot};
use crate::DiskError;
use crate::storage::{Access, Storage};

/// A raw image.
pub struct RawImage {
    file: ImageFile,
    size: AtomicU64,
    cluster: u32,
}

impl RawImage {
    /// Takes a file as it is. `cluster_bytes` is the unit that the disk is handled in.
    ///
    /// # Errors
    /// The file's length can't be read, or the disk would have more than 2^32 clusters.
    pub fn open(
        storage: Box<dyn Storage>,
        access: Access,
        cluster_bytes: u32,
    ) -> Result<RawImage, DiskError> {
        let size = storage
            .len_bytes()
            .map_err(|error| DiskError::io(storage.name(), "open", 0, error))?;
        if cluster_bytes == 0 || u32::try_from(size.div_ceil(cluster_bytes.into())).is_err() {
            let what = format!("{size} bytes are too many for clusters of {cluster_bytes}");
            return Err(DiskError::refused(storage.name(), what));
        }
        Ok(RawImage {
            file: ImageFile::new(storage, access),
            size: AtomicU64::new(size),
            cluster: cluster_bytes,
        })
    }

    fn at(&self, cluster: u32, skip: u32) -> u64 {
        u64::from(cluster) * u64::from(self.cluster) + u64::from(skip)
    }

    fn resize(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.file.resize(size_bytes)?;
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }
}

impl Image for RawImage {
    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn format(&self) -> &'static str {
        "raw"
    }

    fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_bytes(&self) -> u32 {
        self.cluster
    }

    fn slot(&self, cluster: u32) -> Result<Slot, DiskError> {
        match self.at(cluster, 0) < self.size_bytes() {
            true => Ok(Slot::Data),
            false => Ok(Slot::Absent),
        }
    }

    fn probe(&self, cluster: u32) -> Result<Slot, DiskError> {
        let start = self.at(cluster, 0);
        let end = start + u64::from(self.cluster);
        if self.slot(cluster)? == Slot::Absent {
            return Ok(Slot::Absent);
        }
        let data = self.file.data_after(start);
        match data.map_err(self.file.failed("read", start))? {
            Some(range) if range.start < end => Ok(Slot::Data),
            _ => Ok(Slot::Absent),
        }
    }

    fn knows_places(&self) -> bool {
        self.file.past_cache().is_some()
    }

    fn known(&self, cluster: u32, skip: u32) -> Known {
        let at = self.at(cluster, skip);
        match self.file.past_cache() {
            _ if self.at(cluster, 0) >= self.size_bytes() => Known::Absent,
            Some(file) => Known::At(file, at),
            None => Known::Nothing,
        }
    }

    fn read(&self, cluster: u32, skip: u32, buf: &mut [u8]) -> Result<(), DiskError> {
        let at = self.at(cluster, skip);
        self.file.read_until(self.size_bytes(), buf, at)
    }

    fn overwrite(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.file.write(buf, self.at(cluster, skip))
    }

    fn store(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.zero(cluster, 0, self.cluster)?;
        self.overwrite(cluster, skip, buf)
    }

    fn zero(&self, cluster: u32, skip: u32, len: u32) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        let start = self.at(cluster, skip);
        let end = (start + u64::from(len)).min(self.size_bytes());
        if start >= end {
            return Ok(());
        }
        let done = match len == self.cluster {
            true => self.file.punch(start..end),
            false => self.file.zero(start..end),
        };
        done.map_err(self.file.failed("write", start))
    }

    fn mark_zero(&self, _cluster: u32) -> Result<bool, DiskError> {
        Ok(false)
    }

    fn unmap(&self, cluster: u32) -> Result<(), DiskError> {
        self.zero(cluster, 0, self.cluster)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.sync().map_err(self.file.failed("sync", 0))
    }

    fn grow(&self, size_bytes: u64) -> Result<(), DiskError> {
        match size_bytes < self.size_bytes() {
            true => Err(DiskError::refused(
                self.name(),
                "growing would make it smaller",
            )),
            false => self.resize(size_bytes),
        }
    }

    fn shrink(&self, size_bytes: u64) -> Result<(), DiskError> {
        match size_bytes > self.size_bytes() {
            true => Err(DiskError::refused(
                self.name(),
                "shrinking would make it larger",
            )),
            false => self.resize(size_bytes),
        }
    }

    fn used_bytes(&self) -> Result<u64, DiskError> {
        let mut used = 0;
        let mut at = 0;
        while let Some(run) = self
            .file
            .data_after(at)
            .map_err(self.file.failed("read", at))?
        {
            used += run.end - run.start;
            at = run.end;
        }
        Ok(used)
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.access() == Access::ReadWrite {
            self.flush()?;
            self.file.close();
        }
        Ok(())
    }

    fn reopen(&self) -> Result<(), DiskError> {
        self.file.reclaim()?;
        self.file.set_access(Access::ReadWrite);
        Ok(())
    }
}
