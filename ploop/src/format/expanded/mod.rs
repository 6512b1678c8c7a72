//! The expanded format, ploop's own: a header, a table of clusters (BAT), clusters in any order.
//!
//! Version 2 is written, version 1 is read. What makes a crash harmless is one order: a cluster's bytes
//! are durable before an entry of the BAT leads to them, and a cluster that no entry leads to any more is
//! used again only when that is durable. So a flush syncs, writes the changed entries, and syncs again;
//! entries changed later than its beginning wait for the next one.
//!
//! While it is open for writing, the header says so; closing takes that back, cuts the unused end off,
//! and puts the dirty bitmap behind the data.

mod change;
mod create;
mod extension;
mod growth;
mod header;
mod load;
mod md5;
mod repair;
mod space;
mod survey;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

pub use create::{Preallocation, create};
pub use extension::{
    ExtensionError, StoredBitmap, encode as encode_extension, parse as parse_extension,
};
pub use header::{CLUSTER_RANGE, DEFAULT_CLUSTER, Header, HeaderError, Mark, SECTOR, Version};
pub use repair::{Checked, Repair, check, check_telling};
pub use survey::{Finding, Severity};

use self::header::{FLAG_EMPTY, HEADER_BYTES};
use self::load::{Loaded, load};
use self::space::Space;
use super::{Image, ImageFile, Known, PendingLog, Slot};
use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::storage::{Access, Storage};

/// What opening for writing does with an image that was not closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unclosed {
    /// Refuses it.
    Refuse,
    /// Goes on with what is durable, provided that the rules hold: for the server that starts again
    /// after a crash.
    Recover,
}

/// An expanded image.
pub struct ExpandedImage {
    file: ImageFile,
    version: Version,
    cluster: u32,
    data_start: u64,
    header: Mutex<Header>,
    size: AtomicU64,
    bat: RwLock<Vec<AtomicU32>>,
    space: Mutex<Space>,
    /// The last ticket that a finished flush covers.
    flushed: Mutex<u64>,
    tickets: AtomicU64,
    bitmap: Mutex<Option<DirtyBitmap>>,
    pending_log: RwLock<Option<Arc<dyn PendingLog>>>,
    notes: Vec<String>,
}

impl ExpandedImage {
    /// Opens an image. For reading it may still be marked as open; for writing it is marked so.
    ///
    /// # Errors
    /// It is no such image, rules are broken, it was not closed, it is of version 1 and would be
    /// written, or the host refused.
    pub fn open(
        storage: Box<dyn Storage>,
        access: Access,
        unclosed: Unclosed,
    ) -> Result<ExpandedImage, DiskError> {
        ExpandedImage::open_logged(storage, access, unclosed, None)
    }

    /// Like [`open`](ExpandedImage::open), with a log of changed entries. Changes that a former
    /// process left in it are made first, as if they had just been.
    ///
    /// # Errors
    /// As `open`; also when the log's changes break the rules.
    pub fn open_logged(
        storage: Box<dyn Storage>,
        access: Access,
        unclosed: Unclosed,
        pending_log: Option<Arc<dyn PendingLog>>,
    ) -> Result<ExpandedImage, DiskError> {
        let mut loaded = load(storage.as_ref())?;
        let name = storage.name();
        let changes = match (&pending_log, access) {
            (Some(log), Access::ReadWrite) => log.entries(),
            _ => Vec::new(),
        };
        let old_bat = loaded.apply(&changes);
        match access {
            Access::ReadOnly => loaded.refuse(name, blocks_reading)?,
            Access::ReadWrite => {
                if loaded.header.version == Version::V1 {
                    let what =
                        "version 1 is only read; 'firn ploop convert -v 2' makes it version 2";
                    return Err(DiskError::refused(name, what));
                }
                if !loaded.header.cluster_sectors.is_power_of_two() {
                    let what = "clusters that are no power of two are only read";
                    return Err(DiskError::refused(name, what));
                }
                // A file that was growing when the machine died may end anywhere.
                let tail_is_free = loaded.file_bytes >= loaded.survey.end_bytes;
                loaded.refuse(name, |finding| {
                    blocks_writing(finding, unclosed, tail_is_free)
                })?;
            }
        }
        let bitmap = match access {
            Access::ReadOnly => None,
            Access::ReadWrite => loaded.bitmap(storage.as_ref())?,
        };
        let image = ExpandedImage::assemble(storage, loaded, bitmap);
        image.set_log(pending_log);
        if let Some(old_bat) = old_bat {
            image.adopt(&old_bat, &changes);
        }
        if access == Access::ReadWrite {
            image.begin_writing()?;
        }
        Ok(image)
    }

    fn assemble(
        storage: Box<dyn Storage>,
        loaded: Loaded,
        bitmap: Option<DirtyBitmap>,
    ) -> ExpandedImage {
        let header = loaded.header;
        let unit = header.cluster_sectors.into();
        let mut notes = Vec::new();
        for finding in &loaded.survey.findings {
            match finding {
                Finding::NotClosed => {
                    notes.push("it was not closed; nothing flushed is lost".into())
                }
                Finding::Size { .. } => notes.push(format!("{finding}; it counts as rounded up")),
                _ => {}
            }
        }
        let rounded = header.size_sectors.next_multiple_of(unit) * SECTOR;
        ExpandedImage {
            version: header.version,
            cluster: header.cluster_bytes(),
            data_start: header.data_start_bytes(),
            size: AtomicU64::new(header.size_bytes()),
            bat: RwLock::new(loaded.bat.into_iter().map(AtomicU32::new).collect()),
            space: Mutex::new(Space::new(loaded.survey.used, rounded)),
            header: Mutex::new(header),
            flushed: Mutex::new(0),
            tickets: AtomicU64::new(0),
            bitmap: Mutex::new(bitmap),
            pending_log: RwLock::new(None),
            notes,
            // It is marked as open before anything is written.
            file: ImageFile::new(storage, Access::ReadOnly),
        }
    }

    /// Names of the bitmaps that the file of a closed image has: the one that begins with what it
    /// holds, and those that its contents were made by.
    ///
    /// # Errors
    /// The extension is damaged, or the host refused.
    pub fn bitmap_ids(&self) -> Result<Vec<[u8; 16]>, DiskError> {
        let stored = load(&*self.file)?.stored_bitmaps(&*self.file)?;
        Ok(stored.iter().map(|bitmap| bitmap.id).collect())
    }

    /// How its BAT counts.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Number of clusters that have a place in the file.
    pub fn allocated_clusters(&self) -> u64 {
        let bat = self.bat.read().unwrap_or_else(PoisonError::into_inner);
        let used = bat
            .iter()
            .filter(|entry| entry.load(Ordering::Relaxed) != 0);
        used.count() as u64
    }

    fn entry(&self, cluster: u32) -> u32 {
        let bat = self.bat.read().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(cluster).unwrap_or(usize::MAX);
        bat.get(index)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Byte of the file where a part of a cluster lies that has a place.
    fn place(&self, cluster: u32, skip: u32) -> Result<u64, DiskError> {
        self.place_of(cluster, skip).ok_or_else(|| {
            let what = format!("cluster {cluster} has no place");
            DiskError::refused(self.name(), what)
        })
    }

    fn place_of(&self, cluster: u32, skip: u32) -> Option<u64> {
        let unit = match self.version {
            Version::V1 => SECTOR,
            Version::V2 => self.cluster.into(),
        };
        match u64::from(self.entry(cluster)) {
            0 => None,
            entry => Some(entry * unit + u64::from(skip)),
        }
    }
}

/// Whether an image may be opened for writing, by version and cluster.
///
/// # Errors
/// It is no expanded image, or the host refused.
pub fn is_writable(storage: &dyn Storage) -> Result<bool, DiskError> {
    let mut bytes = [0; HEADER_BYTES as usize];
    storage
        .read_at(&mut bytes, 0)
        .map_err(|error| DiskError::io(storage.name(), "read", 0, error))?;
    let header = Header::parse(&bytes)
        .map_err(|error| DiskError::corrupt(storage.name(), error.to_string()))?;
    Ok(header.version == Version::V2 && header.cluster_sectors.is_power_of_two())
}

/// What a reader can live with: nothing that leads to wrong bytes.
fn blocks_reading(finding: &Finding) -> bool {
    let harmless = matches!(
        finding,
        Finding::NotClosed
            | Finding::UnknownMark(_)
            | Finding::Length { .. }
            | Finding::SlotBeyond { .. }
            | Finding::Extension(_)
    );
    let long =
        matches!(finding, Finding::Entries { entries, wanted } if u64::from(*entries) >= *wanted);
    finding.severity() == Severity::Damage && !harmless && !long
}

fn blocks_writing(finding: &Finding, unclosed: Unclosed, tail_is_free: bool) -> bool {
    let recovers = unclosed == Unclosed::Recover
        && match finding {
            Finding::NotClosed => true,
            Finding::Length { .. } => tail_is_free,
            _ => false,
        };
    finding.severity() == Severity::Damage && !recovers
}

/// A thread that panicked inside of a lock left nothing half done that the next one could not see.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Image for ExpandedImage {
    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn format(&self) -> &'static str {
        "expanded"
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn was_closed(&self) -> bool {
        lock(&self.header).mark != Mark::Dirty
    }

    fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_bytes(&self) -> u32 {
        self.cluster
    }

    fn slot(&self, cluster: u32) -> Result<Slot, DiskError> {
        Ok(match self.entry(cluster) {
            0 => Slot::Absent,
            _ => Slot::Data,
        })
    }

    fn knows_places(&self) -> bool {
        self.file.past_cache().is_some()
    }

    fn known(&self, cluster: u32, skip: u32) -> Known {
        match (self.place_of(cluster, skip), self.file.past_cache()) {
            (None, _) => Known::Absent,
            (Some(at), Some(file)) => Known::At(file, at),
            (Some(_), None) => Known::Nothing,
        }
    }

    fn read(&self, cluster: u32, skip: u32, buf: &mut [u8]) -> Result<(), DiskError> {
        // Only an image that is open for reading may end inside of a cluster.
        self.file.read(buf, self.place(cluster, skip)?)
    }

    fn overwrite(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.file.write(buf, self.place(cluster, skip)?)
    }

    fn store(&self, cluster: u32, skip: u32, buf: &[u8]) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.store_new(cluster, skip, buf)
    }

    fn zero(&self, cluster: u32, skip: u32, len: u32) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        let at = self.place(cluster, skip)?;
        let range = at..at + u64::from(len);
        let done = match len == self.cluster {
            true => self.file.punch(range),
            false => self.file.zero(range),
        };
        done.map_err(self.file.failed("write", at))
    }

    fn mark_zero(&self, _cluster: u32) -> Result<bool, DiskError> {
        Ok(false)
    }

    fn unmap(&self, cluster: u32) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.forget(cluster);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.flush_all()
    }

    fn clusters_in_the_way(&self, size_bytes: u64) -> Result<Vec<u32>, DiskError> {
        self.file.must_be_writable()?;
        self.in_the_way(size_bytes)
    }

    fn move_away(&self, cluster: u32) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.relocate(cluster)
    }

    fn grow(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.enlarge(size_bytes)
    }

    fn take_bitmap(&self) -> Option<DirtyBitmap> {
        lock(&self.bitmap).take()
    }

    fn keep_bitmap(&self, bitmap: DirtyBitmap) -> bool {
        *lock(&self.bitmap) = Some(bitmap);
        true
    }

    fn take_log(&self) -> Option<Arc<dyn PendingLog>> {
        let mut log = self
            .pending_log
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        log.take()
    }

    fn set_log(&self, log: Option<Arc<dyn PendingLog>>) {
        *self
            .pending_log
            .write()
            .unwrap_or_else(PoisonError::into_inner) = log;
    }

    fn shrink(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.file.must_be_writable()?;
        self.cut(size_bytes)
    }

    fn used_bytes(&self) -> Result<u64, DiskError> {
        Ok(self.data_start + self.allocated_clusters() * u64::from(self.cluster))
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.access() == Access::ReadOnly {
            return Ok(());
        }
        self.flush_all()?;
        self.seal()?;
        self.file.close();
        Ok(())
    }

    fn reopen(&self) -> Result<(), DiskError> {
        self.file.reclaim()?;
        self.begin_writing()
    }
}

impl ExpandedImage {
    /// The empty flag follows from the BAT.
    fn flags(&self) -> u32 {
        match self.allocated_clusters() {
            0 => FLAG_EMPTY,
            _ => 0,
        }
    }
}
