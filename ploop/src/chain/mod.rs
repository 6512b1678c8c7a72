//! A base image and its deltas as one disk.
//!
//! A cluster is read from the topmost layer that knows it. A write to a cluster that the top does not
//! have copies the rest of it up first. Requests of different clusters go on side by side; what changes
//! the place of a cluster excludes others of the same cluster for a moment, and what changes the chain
//! excludes all.

mod merge;
mod request;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::DiskError;
use crate::bitmap::{Bitmap, DirtyBitmap};
use crate::disk::{BitmapChange, Counters, Disk, Merge, NewTop, Placed, Way};
use crate::extent::{self, Extent, ExtentKind};
use crate::format::{Image, Slot};
use crate::storage::Access;

/// So many clusters can be worked on at once.
const LOCKS: usize = 256;

/// A chain of images as one disk.
pub struct ChainDisk {
    cluster: u32,
    size: AtomicU64,
    layers: RwLock<Vec<Arc<dyn Image>>>,
    locks: Vec<RwLock<()>>,
    bitmap: RwLock<Option<DirtyBitmap>>,
    /// What was written since a running merge copied it.
    missed: RwLock<Option<Arc<Bitmap>>>,
    merging: RwLock<()>,
    counters: Counters,
}

impl ChainDisk {
    /// Puts images on one another, base first. The last one decides about size and access; the others
    /// are never written.
    ///
    /// # Errors
    /// There is no image, or their cluster sizes differ.
    pub fn new(layers: Vec<Arc<dyn Image>>) -> Result<ChainDisk, DiskError> {
        let Some(top) = layers.last() else {
            return Err(DiskError::refused("chain", "there is no image in it"));
        };
        let cluster = top.cluster_bytes();
        for image in &layers {
            if image.cluster_bytes() != cluster {
                let what = format!(
                    "clusters of {} bytes don't fit those of {cluster} in {}",
                    image.cluster_bytes(),
                    top.name()
                );
                return Err(DiskError::refused(image.name(), what));
            }
        }
        let bitmap = match top.access() {
            Access::ReadWrite => top.take_bitmap(),
            Access::ReadOnly => None,
        };
        Ok(ChainDisk {
            cluster,
            size: AtomicU64::new(top.size_bytes()),
            layers: RwLock::new(layers),
            locks: (0..LOCKS).map(|_| RwLock::new(())).collect(),
            bitmap: RwLock::new(bitmap),
            missed: RwLock::new(None),
            merging: RwLock::new(()),
            counters: Counters::default(),
        })
    }

    fn chain(&self) -> RwLockReadGuard<'_, Vec<Arc<dyn Image>>> {
        read(&self.layers)
    }

    /// The lock of a cluster. Never hold two.
    fn lock(&self, cluster: u32) -> &RwLock<()> {
        let index = usize::try_from(cluster).unwrap_or_default() % LOCKS;
        &self.locks[index]
    }

    fn within(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        DiskError::check_range(offset, len, self.size_bytes())
    }

    /// Says that a range is about to change, to whoever keeps books of it.
    fn note(&self, offset: u64, len: u64) {
        set_in(&read(&self.bitmap), &read(&self.missed), offset, len);
    }

    fn counted<T>(&self, result: Result<T, DiskError>) -> Result<T, DiskError> {
        if result.is_err() {
            Counters::add(&self.counters.errors, 1);
        }
        result
    }

    fn flush_top(&self) -> Result<(), DiskError> {
        // Not under the chain's lock: a long flush must not hold up a snapshot's other steps.
        let top = top_of(&self.chain()).clone();
        match top.access() {
            Access::ReadWrite => top.flush(),
            Access::ReadOnly => Ok(()),
        }
    }

    fn put_on_top(&self, top: NewTop<'_>) -> Result<Option<DirtyBitmap>, DiskError> {
        let _one_at_a_time = write(&self.merging);
        if top.image.cluster_bytes() != self.cluster {
            return Err(DiskError::refused(
                top.image.name(),
                "its cluster size is another than the chain's",
            ));
        }
        // Most of it is written before anybody has to wait.
        self.flush_top()?;
        let mut layers = write(&self.layers);
        let last = layers.len() - 1;
        layers[last].close()?;
        if let Err(error) = (top.commit)() {
            layers[last].reopen()?;
            return Err(error);
        }
        // The old top was flushed: the log is empty.
        top.image.set_log(layers[last].take_log());
        layers.push(top.image);
        Ok(match top.bitmap {
            BitmapChange::Keep => None,
            BitmapChange::Replace(next) => std::mem::replace(&mut *write(&self.bitmap), next),
        })
    }

    /// Does the long part of growing while requests go on.
    fn make_way(&self, size_bytes: u64) -> Result<(), DiskError> {
        let top = top_of(&self.chain()).clone();
        for cluster in top.clusters_in_the_way(size_bytes)? {
            let _alone = write(self.lock(cluster));
            top.move_away(cluster)?;
        }
        self.flush_top()
    }

    fn map_range(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DiskError> {
        self.within(offset, len)?;
        let layers = self.chain();
        let mut extents = Vec::new();
        for part in self.parts(offset, len) {
            let next = Extent {
                offset: part.offset,
                len_bytes: part.len.into(),
                kind: kind(&layers, part.cluster)?,
            };
            extent::push(&mut extents, next);
        }
        Ok(extents)
    }
}

impl Disk for ChainDisk {
    fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_bytes(&self) -> u32 {
        self.cluster
    }

    fn access(&self) -> Access {
        top_of(&self.chain()).access()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        Counters::add(&self.counters.reads, 1);
        Counters::add(&self.counters.read_bytes, buf.len() as u64);
        self.counted(self.read_parts(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        Counters::add(&self.counters.writes, 1);
        Counters::add(&self.counters.write_bytes, buf.len() as u64);
        self.counted(self.write_parts(buf, offset))
    }

    fn place(&self, offset: u64, len_bytes: u64, way: Way) -> Option<Placed<'_>> {
        self.place_range(offset, len_bytes, way)
    }

    fn knows_places(&self) -> bool {
        self.chain().iter().all(|image| image.knows_places())
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        Counters::add(&self.counters.writes, 1);
        Counters::add(&self.counters.write_bytes, len_bytes);
        self.counted(self.zero_parts(offset, len_bytes))
    }

    fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), DiskError> {
        Counters::add(&self.counters.discards, 1);
        Counters::add(&self.counters.discard_bytes, len_bytes);
        self.counted(self.discard_parts(offset, len_bytes))
    }

    fn flush(&self) -> Result<(), DiskError> {
        Counters::add(&self.counters.flushes, 1);
        self.counted(self.flush_top())
    }

    fn map(&self, offset: u64, len_bytes: u64) -> Result<Vec<Extent>, DiskError> {
        self.map_range(offset, len_bytes)
    }

    fn push_top(&self, top: NewTop<'_>) -> Result<Option<DirtyBitmap>, DiskError> {
        self.put_on_top(top)
    }

    fn merge_down(&self, level: usize, merge: Merge<'_>) -> Result<(), DiskError> {
        self.merge(level, merge)
    }

    fn grow(&self, size_bytes: u64) -> Result<(), DiskError> {
        let _one_at_a_time = write(&self.merging);
        self.make_way(size_bytes)?;
        let layers = write(&self.layers);
        let old = self.size_bytes();
        top_of(&layers).grow(size_bytes)?;
        let mut bitmap = write(&self.bitmap);
        if let Some(kept) = bitmap.take() {
            *bitmap = Some(kept.resized(old, size_bytes));
        }
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }

    fn swap_bitmap(&self, bitmap: Option<DirtyBitmap>) -> Option<DirtyBitmap> {
        let _nothing_moves = write(&self.layers);
        std::mem::replace(&mut *write(&self.bitmap), bitmap)
    }

    fn mark_changed(&self, offset: u64, len_bytes: u64) {
        if let Some(bitmap) = &*read(&self.bitmap) {
            bitmap.bits.set(offset..offset.saturating_add(len_bytes));
        }
    }

    fn layers(&self) -> Vec<String> {
        let name = |image: &Arc<dyn Image>| image.name().to_owned();
        self.chain().iter().map(name).collect()
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn close(&self) -> Result<(), DiskError> {
        let _one_at_a_time = write(&self.merging);
        let layers = write(&self.layers);
        let top = top_of(&layers);
        if top.access() == Access::ReadWrite
            && let Some(bitmap) = write(&self.bitmap).take()
        {
            top.keep_bitmap(bitmap);
        }
        layers.iter().try_for_each(|image| image.close())
    }
}

fn set_in(bitmap: &Option<DirtyBitmap>, missed: &Option<Arc<Bitmap>>, offset: u64, len: u64) {
    if let Some(bitmap) = bitmap {
        bitmap.bits.set(offset..offset + len);
    }
    if let Some(missed) = missed {
        missed.set(offset..offset + len);
    }
}

/// The writable end of a chain, which is never empty.
fn top_of(layers: &[Arc<dyn Image>]) -> &Arc<dyn Image> {
    layers.last().expect("a chain has at least one image")
}

/// The topmost layer that knows a cluster, and what it knows.
fn find(layers: &[Arc<dyn Image>], cluster: u32) -> Result<Option<(&dyn Image, Slot)>, DiskError> {
    for image in layers.iter().rev() {
        match image.slot(cluster)? {
            Slot::Absent => {}
            known => return Ok(Some((image.as_ref(), known))),
        }
    }
    Ok(None)
}

/// What the chain holds of a cluster; a hole of the host's file counts as nothing.
fn kind(layers: &[Arc<dyn Image>], cluster: u32) -> Result<ExtentKind, DiskError> {
    for image in layers.iter().rev() {
        match image.probe(cluster)? {
            Slot::Absent => {}
            Slot::Zero => return Ok(ExtentKind::Zero),
            Slot::Data => return Ok(ExtentKind::Data),
        }
    }
    Ok(ExtentKind::Unallocated)
}

/// A thread that panicked inside of a lock left nothing half done that the next one could not see.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
