//! qcow2 as a second format: version 3 is written, 2 and 3 are read, without encryption, compression,
//! internal snapshots and backing names (the descriptor names the chain).
//!
//! Tables are kept in memory as they are touched. A flush makes a crash harmless by its order: data,
//! refcounts of what was taken, L2 tables, the L1 table; only then refcounts of what was given back fall.
//! What a crash leaves are clusters that are counted and belong to nothing.

mod header;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::header::{CORRUPT, DIRTY, HEADER_BYTES, Header};
use self::tables::Tables;
use super::{Image, ImageFile, Slot};
use crate::DiskError;
use crate::format::expanded::Unclosed;
use crate::storage::{Access, Storage};

pub use tables::create;

/// L1 and L2: nobody else uses the cluster.
const COPIED: u64 = 1 << 63;
/// L2: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// L2: the cluster reads as zeroes.
const ZERO: u64 = 1;
/// Where the cluster lies.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A qcow2 image.
pub struct Qcow2Image {
    file: ImageFile,
    cluster_bits: u32,
    size: AtomicU64,
    tables: Mutex<Tables>,
}

impl Qcow2Image {
    /// Opens an image.
    ///
    /// # Errors
    /// It is none, has features that are not handled here, would be written and is not clean, or the host
    /// refused.
    pub fn open(
        storage: Box<dyn Storage>,
        access: Access,
        unclosed: Unclosed,
    ) -> Result<Qcow2Image, DiskError> {
        let name = storage.name().to_owned();
        let mut bytes = [0; HEADER_BYTES];
        storage
            .read_at(&mut bytes, 0)
            .map_err(|error| DiskError::io(&name, "read", 0, error))?;
        let header = Header::parse(&bytes).map_err(|what| DiskError::refused(&name, what))?;
        if access == Access::ReadWrite {
            if header.incompatible & CORRUPT != 0 || header.snapshots > 0 || header.version < 3 {
                let what = "with damage, internal snapshots, or of version 2 it is only read";
                return Err(DiskError::refused(&name, what));
            }
            if header.incompatible & DIRTY != 0 && unclosed == Unclosed::Refuse {
                return Err(DiskError::InUse {
                    object: name,
                    what: "it was not closed; 'qemu-img check -r all' mends it".to_owned(),
                });
            }
        }
        let tables = Tables::load(storage.as_ref(), header.clone(), access)?;
        Ok(Qcow2Image {
            file: ImageFile::new(storage, access),
            cluster_bits: header.cluster_bits,
            size: AtomicU64::new(header.size_bytes),
            tables: Mutex::new(tables),
        })
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, cluster: u32) -> Result<u64, DiskError> {
        self.tables().entry(&*self.file, cluster)
    }

    fn place(&self, cluster: u32, skip: u32) -> Result<u64, DiskError> {
        let entry = self.entry(cluster)?;
        if entry & COMPRESSED != 0 {
            let what = "compressed clusters are not read; 'qemu-img convert' writes plain ones";
            return Err(DiskError::refused(self.name(), what));
        }
        match entry & OFFSET {
            0 => Err(DiskError::refused(
                self.name(),
                format!("cluster {cluster} has no place"),
            )),
            at => Ok(at + u64::from(skip)),
        }
    }
}

impl Image for Qcow2Image {
    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_bytes(&self) -> u32 {
        1 << self.cluster_bits
    }

    fn slot(&self, cluster: u32) -> Result<Slot, DiskError> {
        let entry = self.entry(cluster)?;
        Ok(if entry & COMPRESSED != 0 {
            Slot::Data
        } else if entry & ZERO != 0 {
            Slot::Zero
        } else if entry & OFFSET == 0 {
            Slot::Absent
        } else {
            Slot::Data
        })
    }

    fn read(&self, cluster: u32, skip: u32, buf: &mut [u8]) -> Result<(), DiskError> {
        self.file.read(buf, self.place(cluster, skip)?)
    }

    fn overwrite(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.file.write(buf, self.place(cluster, skip)?)
    }

    fn store(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        let unit = u64::from(self.cluster_bytes());
        let storage = &*self.file;
        let at = self.tables().take(storage)?;
        let mut written = Ok(());
        if buf.len() as u64 != unit {
            written = storage.zero(at..at + unit);
        }
        let written = written.and_then(|()| storage.write_at(buf, at + u64::from(skip)));
        let mut tables = self.tables();
        if let Err(error) = written {
            tables.give_back(at);
            return Err(self.file.failed("write", at)(error));
        }
        tables.set(storage, cluster, at | COPIED)
    }

    fn zero(&self, cluster: u32, skip: u32, len: u32) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        let at = self.place(cluster, skip)?;
        self.file
            .zero(at..at + u64::from(len))
            .map_err(self.file.failed("write", at))
    }

    fn mark_zero(&self, cluster: u32) -> Result<bool, DiskError> {
        self.file.must_be_writable()?;
        self.tables().set(&*self.file, cluster, ZERO)?;
        Ok(true)
    }

    fn unmap(&self, cluster: u32) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.tables().set(&*self.file, cluster, 0)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.tables().flush(&*self.file)
    }

    fn grow(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        if size_bytes < self.size_bytes() {
            return Err(DiskError::refused(
                self.name(),
                "growing would make it smaller",
            ));
        }
        self.tables().grow(&*self.file, size_bytes)?;
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }

    fn used_bytes(&self) -> Result<u64, DiskError> {
        self.file.len_bytes().map_err(self.file.failed("read", 0))
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.access() == Access::ReadOnly {
            return Ok(());
        }
        let mut tables = self.tables();
        // Twice: what the first one gives back is counted by the second.
        tables.flush(&*self.file)?;
        tables.flush(&*self.file)?;
        drop(tables);
        self.file.close();
        Ok(())
    }

    fn reopen(&self) -> Result<(), DiskError> {
        self.file.reclaim()?;
        self.file.set_access(Access::ReadWrite);
        Ok(())
    }
}
