//! A raw image: the file's bytes are the disk's.
//!
//! It can only be a base: there is no mark for a cluster that another layer holds. A file that does
//! not end with a whole cluster reads as zeroes behind its end.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Image, Slot};
use crate::DiskError;
use crate::storage::{Access, Storage};

/// A raw image.
pub struct RawImage {
    storage: Box<dyn Storage>,
    writable: AtomicBool,
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
            storage,
            writable: AtomicBool::new(access == Access::ReadWrite),
            size: AtomicU64::new(size),
            cluster: cluster_bytes,
        })
    }

    fn at(&self, cluster: u32, skip: u32) -> u64 {
        u64::from(cluster) * u64::from(self.cluster) + u64::from(skip)
    }

    fn writable(&self) -> Result<(), DiskError> {
        match self.access() {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(DiskError::ReadOnly {
                object: self.name().to_owned(),
            }),
        }
    }

    fn failed(&self, action: &'static str, offset: u64) -> impl Fn(io::Error) -> DiskError + '_ {
        move |error| DiskError::io(self.storage.name(), action, offset, error)
    }
}

impl Image for RawImage {
    fn name(&self) -> &str {
        self.storage.name()
    }

    fn format(&self) -> &'static str {
        "raw"
    }

    fn access(&self) -> Access {
        match self.writable.load(Ordering::Acquire) {
            true => Access::ReadWrite,
            false => Access::ReadOnly,
        }
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
        let data = self.storage.data_after(start);
        match data.map_err(self.failed("read", start))? {
            Some(range) if range.start < end => Ok(Slot::Data),
            _ => Ok(Slot::Absent),
        }
    }

    fn read(&self, cluster: u32, skip: u32, buf: &mut [u8]) -> Result<(), DiskError> {
        let at = self.at(cluster, skip);
        let there = self.size_bytes().saturating_sub(at);
        let len = usize::try_from(there).map_or(buf.len(), |there| there.min(buf.len()));
        let (inside, outside) = buf.split_at_mut(len);
        outside.fill(0);
        self.storage
            .read_at(inside, at)
            .map_err(self.failed("read", at))
    }

    fn overwrite(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.writable()?;
        let at = self.at(cluster, skip);
        self.storage
            .write_at(buf, at)
            .map_err(self.failed("write", at))
    }

    fn store(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.zero(cluster, 0, self.cluster)?;
        self.overwrite(cluster, skip, buf)
    }

    fn zero(&self, cluster: u32, skip: u32, len: u32) -> Result<(), DiskError> {
        self.writable()?;
        let start = self.at(cluster, skip);
        let end = (start + u64::from(len)).min(self.size_bytes());
        if start >= end {
            return Ok(());
        }
        let done = match len == self.cluster {
            true => self.storage.punch(start..end),
            false => self.storage.zero(start..end),
        };
        done.map_err(self.failed("write", start))
    }

    fn mark_zero(&self, _cluster: u32) -> Result<bool, DiskError> {
        Ok(false)
    }

    fn unmap(&self, cluster: u32) -> Result<(), DiskError> {
        self.zero(cluster, 0, self.cluster)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.storage.sync().map_err(self.failed("sync", 0))
    }

    fn grow(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.writable()?;
        if size_bytes < self.size_bytes() {
            return Err(DiskError::refused(
                self.name(),
                "an image can't be made smaller",
            ));
        }
        self.storage
            .set_len(size_bytes)
            .and_then(|()| self.storage.sync())
            .map_err(self.failed("write", size_bytes))?;
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }

    fn shrink(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.writable()?;
        if size_bytes > self.size_bytes() {
            return Err(DiskError::refused(
                self.name(),
                "shrinking would make it larger",
            ));
        }
        self.storage
            .set_len(size_bytes)
            .and_then(|()| self.storage.sync())
            .map_err(self.failed("write", size_bytes))?;
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }

    fn used_bytes(&self) -> Result<u64, DiskError> {
        let mut used = 0;
        let mut at = 0;
        while let Some(run) = self
            .storage
            .data_after(at)
            .map_err(self.failed("read", at))?
        {
            used += run.end - run.start;
            at = run.end;
        }
        Ok(used)
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.writable.load(Ordering::Acquire) {
            self.flush()?;
            self.writable.store(false, Ordering::Release);
            self.storage.release();
        }
        Ok(())
    }

    fn reopen(&self) -> Result<(), DiskError> {
        self.storage
            .claim()
            .map_err(|error| DiskError::claimed(self.name(), error))?;
        self.writable.store(true, Ordering::Release);
        Ok(())
    }
}
