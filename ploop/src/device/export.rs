//! What every kind of device serves: the disk, with its trackers told of each change.

use std::io;
use std::sync::Arc;

use crate::disk::{Counters, Placed, Way};
use crate::guest::gpt::Place;
use crate::tracker::Trackers;
use crate::{Access, Disk, DiskError};

impl Place for Export {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buf, offset).map_err(io::Error::from_raw_os_error)
    }

    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write(buf, offset)
            .map_err(io::Error::from_raw_os_error)
    }

    fn sync(&self) -> io::Result<()> {
        self.flush().map_err(io::Error::from_raw_os_error)
    }
}

/// A disk on its way out. Errors are error numbers, as devices answer them; their text goes to the log.
pub struct Export {
    disk: Arc<dyn Disk>,
    trackers: Trackers,
}

impl Export {
    /// Serves a disk.
    pub fn new(disk: Arc<dyn Disk>) -> Export {
        let trackers = Trackers::new(disk.size_bytes());
        Export { disk, trackers }
    }

    /// The disk itself.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Who listens to changes.
    pub fn trackers(&self) -> &Trackers {
        &self.trackers
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    /// The unit in which space is given back.
    pub fn discard_unit_bytes(&self) -> u32 {
        self.disk.cluster_bytes()
    }

    /// Whether it takes writes.
    pub fn is_writable(&self) -> bool {
        self.disk.access() == Access::ReadWrite
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The error number of what went wrong.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), i32> {
        self.disk.read_at(buf, offset).map_err(|error| told(&error))
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// The error number of what went wrong.
    pub fn write(&self, buf: &[u8], offset: u64) -> Result<(), i32> {
        let done = self.disk.write_at(buf, offset);
        self.changed(offset, buf.len() as u64);
        done.map_err(|error| told(&error))
    }

    /// Where a range lies, for whoever reads or writes it himself; what came of it is
    /// [told](Export::was_done).
    pub fn place(&self, offset: u64, len_bytes: u64, way: Way) -> Option<Placed<'_>> {
        self.disk.place(offset, len_bytes, way)
    }

    /// A range that had been [placed](Export::place) was read or written, and nobody knows of it yet.
    pub fn was_done(&self, offset: u64, len_bytes: u64, way: Way) {
        let counters = self.disk.counters();
        let (requests, bytes) = match way {
            Way::Read => (&counters.reads, &counters.read_bytes),
            Way::Write => (&counters.writes, &counters.write_bytes),
        };
        Counters::add(requests, 1);
        Counters::add(bytes, len_bytes);
        if way == Way::Write {
            self.changed(offset, len_bytes);
        }
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The error number of what went wrong.
    pub fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), i32> {
        let done = self.disk.write_zeroes(offset, len_bytes);
        self.changed(offset, len_bytes);
        done.map_err(|error| told(&error))
    }

    /// Gives a range's space back.
    ///
    /// # Errors
    /// The error number of what went wrong.
    pub fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), i32> {
        let done = self.disk.discard(offset, len_bytes);
        self.changed(offset, len_bytes);
        done.map_err(|error| told(&error))
    }

    /// Makes everything that was answered safe.
    ///
    /// # Errors
    /// The error number of what went wrong.
    pub fn flush(&self) -> Result<(), i32> {
        self.disk.flush().map_err(|error| told(&error))
    }

    /// Marks after the change and before its answer: a reader that cleared the bit before it read
    /// either saw the change or finds the bit set again. A change that failed may still have
    /// happened in part.
    fn changed(&self, offset: u64, len_bytes: u64) {
        let end = offset.saturating_add(len_bytes);
        self.trackers.mark(offset..end);
    }
}

fn told(error: &DiskError) -> i32 {
    use std::error::Error;
    match error.source() {
        Some(source) => eprintln!("{error}: {source}"),
        None => eprintln!("{error}"),
    }
    error.raw_os_error()
}
