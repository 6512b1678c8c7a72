//! The device layer: a disk as a block server sees it.
//!
//! A server keeps one `Arc<dyn Disk>` and calls it from as many threads as it likes. What makes a
//! snapshot or merges two deltas of a running disk calls the same object, between the requests.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLockReadGuard};

use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::extent::Extent;
use crate::format::Image;
use crate::storage::Access;

/// A disk that is open.
///
/// A write is seen by every read that begins after it has returned. It outlives a crash when a
/// [`flush`](Disk::flush) that began after it has returned. Requests may be unaligned and of any length
/// inside of the disk.
pub trait Disk: Send + Sync {
    /// Size in bytes; grows by [`grow`](Disk::grow) only.
    fn size_bytes(&self) -> u64;
    /// The unit of allocation, in bytes: requests that stay inside of one are the cheap ones.
    fn cluster_bytes(&self) -> u32;
    /// Whether it may be changed.
    fn access(&self) -> Access;
    /// Fills `buf` from byte `offset` on.
    ///
    /// # Errors
    /// The range is not inside of the disk, or an image can't be read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError>;
    /// Writes all of `buf` at byte `offset`.
    ///
    /// # Errors
    /// The range is not inside of the disk, the disk is read-only, or the host refused (no space).
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError>;
    /// Where a range lies in one piece in a file, for whoever carries the request out himself, past the
    /// file's cache and without waiting for anybody. None says that only the other calls know how; they
    /// are right, too, when it went wrong in the file. What was done counts in nothing but the dirty bitmap.
    fn place(&self, _offset: u64, _len_bytes: u64, _way: Way) -> Option<Placed<'_>> {
        None
    }
    /// Whether [`place`](Disk::place) is worth asking.
    fn knows_places(&self) -> bool {
        false
    }
    /// Makes a range read as zeroes; whole clusters give their space back where they can.
    ///
    /// # Errors
    /// As `write_at`.
    fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), DiskError>;
    /// Says that a range's contents are of no more use. Whole clusters give their space back and read
    /// as zeroes; what is left of the range at its ends stays as it is.
    ///
    /// # Errors
    /// As `write_at`.
    fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), DiskError>;
    /// Returns when every write that had returned before the call outlives a crash.
    ///
    /// # Errors
    /// The host refused; the writes since the last flush may be lost.
    fn flush(&self) -> Result<(), DiskError>;
    /// What a range consists of, in order and without gaps, cluster by cluster.
    ///
    /// # Errors
    /// The range is not inside of the disk, or an image can't be read.
    fn map(&self, offset: u64, len_bytes: u64) -> Result<Vec<Extent>, DiskError>;
    /// Puts a new, empty top delta on the chain while requests go on: they wait, the old top is
    /// flushed and closed, `commit` writes down that there is a new one, and the requests go on.
    /// Gives the old dirty bitmap back where [`BitmapChange::Replace`] asked for it.
    ///
    /// # Errors
    /// The host or `commit` refused; the disk goes on with its old top.
    fn push_top(&self, top: NewTop<'_>) -> Result<Option<DirtyBitmap>, DiskError>;
    /// Merges layer `level` (0 is the base) into the one below while requests go on. See
    /// [`Merge`].
    ///
    /// # Errors
    /// The host or `commit` refused, or the caller called it off. The chain is as it was, and the
    /// merge can be begun again.
    fn merge_down(&self, level: usize, merge: Merge<'_>) -> Result<(), DiskError>;
    /// Enlarges the disk while requests go on.
    ///
    /// # Errors
    /// It would shrink, the format can't hold so much, or the host refused.
    fn grow(&self, size_bytes: u64) -> Result<(), DiskError>;
    /// Replaces the dirty bitmap, gives the old one back. None turns the tracking off.
    fn swap_bitmap(&self, bitmap: Option<DirtyBitmap>) -> Option<DirtyBitmap>;
    /// Counts a range as changed in the dirty bitmap, as a write does.
    fn mark_changed(&self, offset: u64, len_bytes: u64);
    /// Paths of the chain's files, base first.
    fn layers(&self) -> Vec<String>;
    /// What was done so far.
    fn counters(&self) -> &Counters;
    /// Flushes, writes the dirty bitmap down, takes the marks of open images off. The disk is
    /// read-only from then on. A disk that is dropped without it stays marked as open.
    ///
    /// # Errors
    /// The host refused.
    fn close(&self) -> Result<(), DiskError>;
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the disk.
    Read,
    /// To it.
    Write,
}

/// A place in a file that stays a range's own as long as this lives.
pub struct Placed<'a> {
    /// The file, open for direct I/O.
    pub file: Arc<File>,
    /// Byte of the file where the range begins.
    pub offset: u64,
    /// What would move it waits for these.
    pub(crate) _held: (
        RwLockReadGuard<'a, Vec<Arc<dyn Image>>>,
        RwLockReadGuard<'a, ()>,
    ),
}

/// Called while all requests wait: makes a change of the chain last. On an error nothing has changed.
pub type Commit<'a> = &'a mut dyn FnMut() -> Result<(), DiskError>;

/// What a snapshot puts on top.
pub struct NewTop<'a> {
    /// The new image: empty, synced, open for writing, of the same cluster size.
    pub image: Arc<dyn Image>,
    /// What becomes of the dirty bitmap, at exactly this moment.
    pub bitmap: BitmapChange,
    /// Writes down that the chain has a new top.
    pub commit: Commit<'a>,
}

/// What becomes of the dirty bitmap when a snapshot is made.
#[derive(Debug)]
pub enum BitmapChange {
    /// It goes on, on the new top.
    Keep,
    /// This one begins, the old one is given back.
    Replace(Option<DirtyBitmap>),
}

/// How a delta goes into the one below it.
///
/// The clusters of the upper layer are copied down while requests go on; the upper layer still has the
/// last word, so that a crash at any byte leaves a whole chain. In the end requests wait, the rest is
/// copied, the lower layer is synced, `commit` writes down that the upper one is no more, and the
/// requests go on. Begun again after a crash it copies the same clusters once more.
pub struct Merge<'a> {
    /// The lower layer, open for writing. It stays so when the upper layer is the writable top of the
    /// chain, and is closed before `commit` otherwise.
    pub lower: Arc<dyn Image>,
    /// Told the number of clusters done and to do; false calls the merge off.
    pub progress: &'a mut dyn FnMut(u64, u64) -> bool,
    /// Writes down that the chain lacks the upper layer.
    pub commit: Commit<'a>,
}

/// What a disk has done since it was opened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Read requests.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Write requests, those for zeroes included.
    pub writes: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
    /// Discard requests.
    pub discards: AtomicU64,
    /// Bytes discarded.
    pub discard_bytes: AtomicU64,
    /// Flush requests.
    pub flushes: AtomicU64,
    /// Clusters that the top delta got.
    pub allocated_clusters: AtomicU64,
    /// Clusters that were copied up from a lower layer for a write to a part of them.
    pub copied_clusters: AtomicU64,
    /// Clusters whose space was given back.
    pub freed_clusters: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
}

impl Counters {
    /// The names and values, in a fixed order.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let rows = [
            ("reads", &self.reads),
            ("read_bytes", &self.read_bytes),
            ("writes", &self.writes),
            ("write_bytes", &self.write_bytes),
            ("discards", &self.discards),
            ("discard_bytes", &self.discard_bytes),
            ("flushes", &self.flushes),
            ("allocated_clusters", &self.allocated_clusters),
            ("copied_clusters", &self.copied_clusters),
            ("freed_clusters", &self.freed_clusters),
            ("errors", &self.errors),
        ];
        rows.map(|(name, value)| (name, value.load(Ordering::Relaxed)))
            .to_vec()
    }

    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
