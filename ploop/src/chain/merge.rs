//! Merging a delta into the layer below while requests go on.
//!
//! The upper layer keeps the last word until the end, so the order in which clusters arrive below
//! does not matter, and what a crash leaves half copied is hidden by the upper layer. Writes that hit
//! the upper layer while it is the top are remembered and copied again.

use std::sync::Arc;

use super::{ChainDisk, top_of, write};
use crate::DiskError;
use crate::bitmap::Bitmap;
use crate::disk::{Disk, Merge};
use crate::format::{Image, Slot};
use crate::storage::Access;

/// A writer that is faster than the copying is stopped after so many rounds.
const ROUNDS: usize = 8;
/// So many clusters may be left to copy while requests wait.
const FEW: u64 = 4;

impl ChainDisk {
    pub(super) fn merge(&self, level: usize, mut merge: Merge<'_>) -> Result<(), DiskError> {
        let _one_at_a_time = write(&self.merging);
        let upper = self.prepare(level, &merge)?;
        let copied = self.copy_down(upper.as_ref(), &mut merge);
        let done = copied.and_then(|()| self.finish(level, upper.as_ref(), &mut merge));
        *write(&self.missed) = None;
        done
    }

    /// Puts the writable lower layer in its place and starts to remember writes.
    fn prepare(&self, level: usize, merge: &Merge<'_>) -> Result<Arc<dyn Image>, DiskError> {
        let mut layers = write(&self.layers);
        let lower = &merge.lower;
        let Some(upper) = layers.get(level).filter(|_| level > 0).cloned() else {
            let what = format!("there is no layer {level} with one below it");
            return Err(DiskError::refused(lower.name(), what));
        };
        if lower.access() != Access::ReadWrite || lower.cluster_bytes() != self.cluster {
            let what = "a merge needs it open for writing and with the chain's cluster size";
            return Err(DiskError::refused(lower.name(), what));
        }
        if lower.size_bytes() < upper.size_bytes() {
            lower.grow(upper.size_bytes())?;
        }
        layers[level - 1] = lower.clone();
        let bitmap = Bitmap::new(upper.size_bytes(), self.cluster.into());
        *write(&self.missed) = Some(Arc::new(bitmap));
        Ok(upper)
    }

    fn copy_down(&self, upper: &dyn Image, merge: &mut Merge<'_>) -> Result<(), DiskError> {
        let mut buf = vec![0; usize::try_from(self.cluster).expect("fits in an address")];
        let clusters = clusters_of(upper);
        for cluster in 0..clusters {
            if !(merge.progress)(cluster.into(), clusters.into()) {
                return Err(self.cancelled());
            }
            self.copy_cluster(cluster, upper, merge.lower.as_ref(), &mut buf)?;
        }
        for _ in 0..ROUNDS {
            if self.missed().count() <= FEW {
                break;
            }
            self.copy_missed(upper, merge.lower.as_ref(), &mut buf)?;
        }
        merge.lower.flush()
    }

    fn copy_cluster(
        &self,
        cluster: u32,
        upper: &dyn Image,
        lower: &dyn Image,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        let _alone = write(self.lock(cluster));
        // Cleared before it is read: a write that comes later sets it again.
        self.missed().take(cluster.into());
        match upper.slot(cluster)? {
            Slot::Absent => return Ok(()),
            Slot::Zero => buf.fill(0),
            Slot::Data => upper.read(cluster, 0, buf)?,
        }
        let is_zero = buf.iter().all(|byte| *byte == 0);
        match (lower.slot(cluster)?, is_zero) {
            (Slot::Data, true) => lower.zero(cluster, 0, self.cluster),
            (Slot::Data, false) => lower.overwrite(cluster, 0, buf),
            (Slot::Zero, true) => Ok(()),
            // Layers under the lower one may hold something else.
            (Slot::Absent, true) if lower.mark_zero(cluster)? => Ok(()),
            (_, true) => lower.store(cluster, 0, &[]),
            (_, false) => lower.store(cluster, 0, buf),
        }
    }

    fn copy_missed(
        &self,
        upper: &dyn Image,
        lower: &dyn Image,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        let missed = self.missed();
        let mut at = 0;
        while let Some(cluster) = missed.next(at) {
            let index = u32::try_from(cluster).expect("an image has at most 2^32 clusters");
            self.copy_cluster(index, upper, lower, buf)?;
            at = cluster + 1;
        }
        Ok(())
    }

    /// The last steps, while all requests wait.
    fn finish(
        &self,
        level: usize,
        upper: &dyn Image,
        merge: &mut Merge<'_>,
    ) -> Result<(), DiskError> {
        let mut layers = write(&self.layers);
        let mut buf = vec![0; usize::try_from(self.cluster).expect("fits in an address")];
        self.copy_missed(upper, merge.lower.as_ref(), &mut buf)?;
        let is_top = level + 1 == layers.len() && upper.access() == Access::ReadWrite;
        if is_top {
            // From the commit on, the log of pending changes belongs to the lower layer: it has to be
            // empty by then.
            upper.flush()?;
            merge.lower.flush()?;
        } else {
            merge.lower.close()?;
        }
        (merge.commit)()?;
        if is_top {
            merge.lower.set_log(upper.take_log());
        }
        layers.remove(level);
        debug_assert!(top_of(&layers).size_bytes() >= self.size_bytes());
        Ok(())
    }

    fn missed(&self) -> Arc<Bitmap> {
        let missed = super::read(&self.missed);
        missed.clone().expect("set for as long as a merge runs")
    }

    fn cancelled(&self) -> DiskError {
        DiskError::Cancelled {
            object: top_of(&self.chain()).name().to_owned(),
        }
    }
}

fn clusters_of(image: &dyn Image) -> u32 {
    let clusters = image.size_bytes().div_ceil(image.cluster_bytes().into());
    u32::try_from(clusters).expect("an image has at most 2^32 clusters")
}
