//! What images of every format have: a file, and whether it may be changed.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::DiskError;
use crate::storage::{Access, Storage};

/// The file of an image. Gives its [`Storage`] for everything that a format does in its own way.
pub struct ImageFile {
    storage: Box<dyn Storage>,
    writable: AtomicBool,
}

impl Deref for ImageFile {
    type Target = dyn Storage;

    fn deref(&self) -> &Self::Target {
        &*self.storage
    }
}

impl ImageFile {
    /// An image's file. One that is marked as open has to be so before [`set_access`](Self::set_access)
    /// lets anything be written.
    pub fn new(storage: Box<dyn Storage>, access: Access) -> ImageFile {
        ImageFile {
            storage,
            writable: AtomicBool::new(access == Access::ReadWrite),
        }
    }

    /// Whether it may be changed.
    pub fn access(&self) -> Access {
        match self.writable.load(Ordering::Acquire) {
            true => Access::ReadWrite,
            false => Access::ReadOnly,
        }
    }

    /// Lets it be changed, or no longer.
    pub fn set_access(&self, access: Access) {
        let writable = access == Access::ReadWrite;
        self.writable.store(writable, Ordering::Release);
    }

    /// Keeps changes out of a file that is open for reading.
    ///
    /// # Errors
    /// It is.
    pub fn must_be_writable(&self) -> Result<(), DiskError> {
        match self.access() {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(DiskError::ReadOnly {
                object: self.name().to_owned(),
            }),
        }
    }

    /// What a host's answer to `action` at a byte of this file is to the caller.
    pub fn failed(
        &self,
        action: &'static str,
        offset: u64,
    ) -> impl Fn(io::Error) -> DiskError + '_ {
        move |error| DiskError::io(self.name(), action, offset, error)
    }

    /// Fills `buf` from byte `at` on. What lies behind the file's end reads as zeroes: the last
    /// cluster need not be there to its end.
    ///
    /// # Errors
    /// The host refused.
    pub fn read(&self, buf: &mut [u8], at: u64) -> Result<(), DiskError> {
        match self.read_at(buf, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let len = self.len_bytes().map_err(self.failed("read", at))?;
                self.read_until(len, buf, at)
            }
            other => other.map_err(self.failed("read", at)),
        }
    }

    /// Like [`read`](Self::read), of a file that ends at byte `end`.
    ///
    /// # Errors
    /// The host refused.
    pub fn read_until(&self, end: u64, buf: &mut [u8], at: u64) -> Result<(), DiskError> {
        let there = end.saturating_sub(at);
        let inside = usize::try_from(there).map_or(buf.len(), |there| there.min(buf.len()));
        let (inside, outside) = buf.split_at_mut(inside);
        outside.fill(0);
        self.read_at(inside, at).map_err(self.failed("read", at))
    }

    /// Writes all of `buf` at byte `at`.
    ///
    /// # Errors
    /// The host refused, or it is open for reading.
    pub fn write(&self, buf: &[u8], at: u64) -> Result<(), DiskError> {
        self.must_be_writable()?;
        self.write_at(buf, at).map_err(self.failed("write", at))
    }

    /// Gives it another length, durably.
    ///
    /// # Errors
    /// The host refused, or it is open for reading.
    pub fn resize(&self, len_bytes: u64) -> Result<(), DiskError> {
        self.must_be_writable()?;
        let resized = self.set_len(len_bytes).and_then(|()| self.sync());
        resized.map_err(self.failed("write", len_bytes))
    }

    /// Everything is durable and no mark says otherwise: lets others write it.
    pub fn close(&self) {
        self.set_access(Access::ReadOnly);
        self.release();
    }

    /// Takes the writer's seat again, which [`close`](Self::close) left. Nothing may be written yet.
    ///
    /// # Errors
    /// Somebody else sits there.
    pub fn reclaim(&self) -> Result<(), DiskError> {
        self.claim()
            .map_err(|error| DiskError::claimed(self.name(), error))
    }
}
