//! Backups: a stream that is an expanded image by itself.
//!
//! A full backup is an image of the whole disk, which any program that knows the format reads. An
//! incremental one holds the clusters that changed since the backup before it, and lies on that one as a
//! delta does: a chain of them is a disk again. The header and the BAT come first, so a pipe will do.
//!
//! The format extension at the end names two bitmaps: the one that begins with this backup, which
//! the next incremental one will use, and the one that this backup was made by. So
//! [`restore_backup`](super::restore_backup) knows which follows which.

use std::io::Write;

use super::{Folder, FolderError, OnProgress, OpenOptions};
use crate::bitmap::{Bitmap, DirtyBitmap};
use crate::descriptor::{Guid, Temporary};
use crate::disk::BitmapChange;
use crate::extent::ExtentKind;
use crate::folder::NewSnapshot;
use crate::format::expanded::{Header, Mark, SECTOR, StoredBitmap, encode_extension};
use crate::storage::Access;
use crate::{ChainDisk, Disk, DiskError};

/// Blocks of the dirty bitmap, as the original has them.
pub(super) const GRANULARITY: u64 = 64 << 10;

/// What is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backup {
    /// Everything.
    Full,
    /// What changed since the backup that has this bitmap.
    Incremental,
}

/// What a backup came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupReport {
    /// Clusters in it.
    pub clusters: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// Name of the bitmap that the next incremental one will use.
    pub next: Guid,
    /// Name of the bitmap that this one used.
    pub since: Option<Guid>,
}

impl Folder {
    /// Writes a backup of the disk and starts a new dirty bitmap, which the next incremental one will
    /// use. Of a running disk it is the state at one moment. A failure leaves the old bitmap.
    ///
    /// # Errors
    /// There is no bitmap to be incremental by, the disk is open elsewhere, it was called off, or the host
    /// or `out` refused.
    pub fn backup(
        &mut self,
        kind: Backup,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
        out: &mut dyn Write,
        progress: OnProgress<'_>,
    ) -> Result<BackupReport, FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(running, options)?;
        let id = Guid::random().map_err(FolderError::host("/dev/urandom".as_ref(), "read"))?;
        match running {
            None => self.backup_closed(kind, id, options, out, progress),
            Some(disk) => self.backup_running(kind, id, disk, options, out, progress),
        }
    }

    fn backup_closed(
        &self,
        kind: Backup,
        id: Guid,
        options: &OpenOptions,
        out: &mut dyn Write,
        progress: OnProgress<'_>,
    ) -> Result<BackupReport, FolderError> {
        let disk = self.open_disk(options)?.disk;
        let fresh = DirtyBitmap::new(id.bytes(), disk.size_bytes(), GRANULARITY);
        let old = disk.swap_bitmap(Some(fresh));
        let chain = Chain::of(kind, id, old.as_ref());
        let written = self
            .needed(kind, old.as_ref())
            .and_then(|changed| write_backup(&disk, changed, chain, out, progress));
        if written.is_err() {
            disk.swap_bitmap(old);
        }
        disk.close()?;
        Ok(report(written?, chain))
    }

    fn backup_running(
        &mut self,
        kind: Backup,
        id: Guid,
        disk: &dyn Disk,
        options: &OpenOptions,
        out: &mut dyn Write,
        progress: OnProgress<'_>,
    ) -> Result<BackupReport, FolderError> {
        let fresh = DirtyBitmap::new(id.bytes(), disk.size_bytes(), GRANULARITY);
        let moment = Guid::random().map_err(FolderError::host("/dev/urandom".as_ref(), "read"))?;
        let new = NewSnapshot {
            id: moment,
            running: Some(disk),
            bitmap: BitmapChange::Replace(Some(fresh)),
            temporary: Some(Temporary::Snapshot),
        };
        let old = self.snapshot(new, options)?;
        let chain = Chain::of(kind, id, old.as_ref());
        let written = self.needed(kind, old.as_ref()).and_then(|changed| {
            let frozen = self.moment(moment, options)?;
            write_backup(&frozen, changed, chain, out, progress)
        });
        if written.is_err() {
            go_on_with(disk, old);
        }
        let deleted = self.delete(moment, Some(disk), options, &mut |_, _| true);
        let written = written?;
        deleted?;
        Ok(report(written, chain))
    }

    /// The disk as it was at a snapshot.
    fn moment(&self, snapshot: Guid, options: &OpenOptions) -> Result<ChainDisk, FolderError> {
        let options = OpenOptions {
            access: Access::ReadOnly,
            snapshot: Some(snapshot),
            pending: None,
            ..options.clone()
        };
        Ok(self.open_disk(&options)?.disk)
    }

    fn needed<'b>(
        &self,
        kind: Backup,
        bitmap: Option<&'b DirtyBitmap>,
    ) -> Result<Option<&'b Bitmap>, FolderError> {
        match (kind, bitmap) {
            (Backup::Full, _) => Ok(None),
            (Backup::Incremental, Some(bitmap)) => Ok(Some(&bitmap.bits)),
            (Backup::Incremental, None) => Err(self.refused(
                "there is no bitmap of changes, since no backup was made or the disk was not closed; \
                 make a full backup",
            )),
        }
    }
}

/// After a failure: what changed before the failed backup has still changed.
fn go_on_with(disk: &dyn Disk, old: Option<DirtyBitmap>) {
    let Some(old) = old else {
        disk.swap_bitmap(None);
        return;
    };
    // The old one takes part in everything from here on; then the newer one's bits are added.
    let Some(newer) = disk.swap_bitmap(Some(old)) else {
        return;
    };
    let unit = newer.bits.granularity_bytes();
    let mut at = 0;
    while let Some(block) = newer.bits.next(at) {
        disk.mark_changed(block * unit, unit);
        at = block + 1;
    }
}

/// Where a backup stands among others.
#[derive(Debug, Clone, Copy)]
struct Chain {
    next: Guid,
    since: Option<Guid>,
}

impl Chain {
    fn of(kind: Backup, next: Guid, old: Option<&DirtyBitmap>) -> Chain {
        let since = old.map(|bitmap| Guid::from_bytes(bitmap.id));
        Chain {
            next,
            since: since.filter(|_| kind == Backup::Incremental),
        }
    }

    /// The names, as bitmaps of a disk of this size: nothing has changed since this backup, and
    /// anything may have since the one before.
    fn bitmaps(&self, size_bytes: u64, cluster: usize) -> Vec<StoredBitmap> {
        let bits = size_bytes.div_ceil(GRANULARITY);
        let entries = usize::try_from(bits.div_ceil(cluster as u64 * 8)).unwrap_or(usize::MAX);
        let names = [(Some(self.next), 0), (self.since, 1)].into_iter();
        let bitmap = |(name, entry): (Option<Guid>, u64)| {
            Some(StoredBitmap {
                id: name?.bytes(),
                size_sectors: size_bytes / SECTOR,
                granularity_sectors: u32::try_from(GRANULARITY / SECTOR).unwrap_or_default(),
                table: vec![entry; entries],
            })
        };
        names.filter_map(bitmap).collect()
    }
}

fn report((clusters, bytes): (u64, u64), chain: Chain) -> BackupReport {
    BackupReport {
        clusters,
        bytes,
        next: chain.next,
        since: chain.since,
    }
}

/// Writes a disk as one expanded image: all that is not zero, or the clusters that changed. Gives the
/// number of clusters and of bytes.
///
/// # Errors
/// The disk can't be read, `out` refused, or it was called off.
fn write_backup(
    disk: &dyn Disk,
    changed: Option<&Bitmap>,
    chain: Chain,
    out: &mut dyn Write,
    progress: OnProgress<'_>,
) -> Result<(u64, u64), FolderError> {
    let unit = disk.cluster_bytes();
    let size = disk.size_bytes();
    let clusters = wanted(disk, changed)?;
    let mut header = Header::new(size.next_multiple_of(unit.into()), unit);
    if !clusters.is_empty() {
        header.flags = 0;
    }
    let area = header.area_bytes();
    let all = clusters.len() as u64;
    let data_end = area + all * u64::from(unit);
    let mut buf = vec![0; usize::try_from(unit).unwrap_or_default()];
    let names = chain.bitmaps(header.size_bytes(), buf.len());
    let names = encode_extension(&names, buf.len()).ok_or_else(|| {
        DiskError::refused("the backup", "its cluster is too small for so large a disk")
    })?;
    header.extension = data_end / SECTOR;
    header.mark = Mark::ClosedWithExtension;
    let mut table = header.encode().to_vec();
    table.resize(usize::try_from(area).unwrap_or_default(), 0);
    let first = u32::try_from(area / u64::from(unit)).unwrap_or(u32::MAX);
    for (place, cluster) in (first..).zip(&clusters) {
        let at = usize::try_from(64 + 4 * u64::from(*cluster)).unwrap_or_default();
        table[at..at + 4].copy_from_slice(&place.to_le_bytes());
    }
    let unwritten = |error| DiskError::io("the backup", "write", 0, error);
    out.write_all(&table).map_err(unwritten)?;
    for (done, cluster) in (0..).zip(&clusters) {
        if !progress(done, all) {
            return Err(DiskError::Cancelled {
                object: "the backup".to_owned(),
            }
            .into());
        }
        let start = u64::from(*cluster) * u64::from(unit);
        let len = usize::try_from(size - start).map_or(buf.len(), |left| left.min(buf.len()));
        buf[len..].fill(0);
        disk.read_at(&mut buf[..len], start)?;
        out.write_all(&buf).map_err(unwritten)?;
    }
    out.write_all(&names).map_err(unwritten)?;
    out.flush().map_err(unwritten)?;
    Ok((all, data_end + u64::from(unit)))
}

fn wanted(disk: &dyn Disk, changed: Option<&Bitmap>) -> Result<Vec<u32>, DiskError> {
    let unit = u64::from(disk.cluster_bytes());
    let size = disk.size_bytes();
    let mut clusters = Vec::new();
    for cluster in 0..size.div_ceil(unit) {
        let start = cluster * unit;
        let end = size.min(start + unit);
        let is_wanted = match changed {
            Some(bits) => bits.any(start..end),
            None => {
                let extents = disk.map(start, end - start)?;
                extents.iter().any(|extent| extent.kind == ExtentKind::Data)
            }
        };
        if is_wanted {
            clusters.push(u32::try_from(cluster).unwrap_or(u32::MAX));
        }
    }
    Ok(clusters)
}
