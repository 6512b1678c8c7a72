//! Making a new, empty image.

use super::header::{CLUSTER_RANGE, FLAG_EMPTY, Header};
use crate::DiskError;
use crate::storage::Storage;

/// Whether the space of all clusters is taken at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// The image grows as it is written.
    None,
    /// Every cluster has its place, in order.
    Full,
}

/// Writes an image of version 2 into an empty file. It is closed; the caller opens it.
///
/// # Errors
/// The cluster is no power of two from 64 KiB to 64 MiB, the size is no multiple of it or too much for
/// it, or the host refused.
pub fn create(
    storage: &dyn Storage,
    size_bytes: u64,
    cluster_bytes: u32,
    preallocation: Preallocation,
) -> Result<(), DiskError> {
    let name = storage.name();
    if !cluster_bytes.is_power_of_two() || !CLUSTER_RANGE.contains(&cluster_bytes) {
        let what =
            format!("{cluster_bytes} bytes are no cluster: a power of two from 64K to 64M is");
        return Err(DiskError::refused(name, what));
    }
    let unit = u64::from(cluster_bytes);
    if !size_bytes.is_multiple_of(unit) || size_bytes == 0 {
        let what = format!("{size_bytes} bytes are no number of clusters of {cluster_bytes}");
        return Err(DiskError::refused(name, what));
    }
    // The entries of the BAT count clusters of the file, of which the BAT itself takes some.
    let entries = size_bytes / unit;
    if entries > u64::from(u32::MAX / 8) {
        let what = format!("{size_bytes} bytes are too many for clusters of {cluster_bytes}");
        return Err(DiskError::refused(name, what));
    }
    let mut header = Header::new(size_bytes, cluster_bytes);
    let area = header.area_bytes();
    let failed = |action| move |error| DiskError::io(name, action, 0, error);
    storage.allocate(0..area).map_err(failed("write"))?;
    if preallocation == Preallocation::Full {
        header.flags &= !FLAG_EMPTY;
        storage
            .allocate(area..area + size_bytes)
            .map_err(failed("write"))?;
        let first = u32::try_from(area / unit).unwrap_or(u32::MAX);
        let bat: Vec<u8> = (first..first + header.entries)
            .flat_map(u32::to_le_bytes)
            .collect();
        storage.write_at(&bat, 64).map_err(failed("write"))?;
        storage.sync().map_err(failed("sync"))?;
    }
    storage
        .write_at(&header.encode(), 0)
        .map_err(failed("write"))?;
    storage.sync().map_err(failed("sync"))
}
