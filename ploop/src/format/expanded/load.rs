//! Reading header, BAT and extension from a file that may hold anything.

use super::extension::{self, ExtensionError, Leaf, StoredBitmap};
use super::header::{Header, Mark, SECTOR};
use super::survey::{Finding, Severity, Survey, survey};
use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::storage::Storage;

/// A longer BAT is nobody's: it would be 2 GiB.
const MAX_ENTRIES: u32 = (i32::MAX / 4).unsigned_abs();

/// A larger dirty bitmap is nobody's: it would be 256 MiB.
const MAX_BITS: u64 = 1 << 31;

/// What stands in a file before its first cluster.
pub struct Loaded {
    /// The header.
    pub header: Header,
    /// The BAT, as it stands in the file.
    pub bat: Vec<u32>,
    /// What the rules say.
    pub survey: Survey,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// Reads header and BAT, and holds them against the rules.
///
/// # Errors
/// There is no header, the BAT is cut off or too long, or the host refused.
pub fn load(storage: &dyn Storage) -> Result<Loaded, DiskError> {
    let failed = |error| DiskError::io(storage.name(), "read", 0, error);
    let file_bytes = storage.len_bytes().map_err(failed)?;
    if file_bytes < 64 {
        let what = format!("it has {file_bytes} bytes, and a header alone has 64");
        return Err(DiskError::corrupt(storage.name(), what));
    }
    let mut head = [0; 64];
    storage.read_at(&mut head, 0).map_err(failed)?;
    let header = Header::parse(&head)
        .map_err(|error| DiskError::corrupt(storage.name(), error.to_string()))?;
    if header.entries > MAX_ENTRIES || header.table_bytes() > file_bytes {
        let what = format!("its BAT of {} entries is cut off", header.entries);
        return Err(DiskError::corrupt(storage.name(), what));
    }
    let bat = words(storage, 64, header.entries)?;
    let slots_end = header.area_bytes().min(header.data_start_bytes());
    let room = slots_end
        .min(file_bytes)
        .saturating_sub(header.table_bytes())
        / 4;
    let room = u32::try_from(room).unwrap_or(0).min(MAX_ENTRIES);
    let beyond = words(storage, header.table_bytes(), room)?;
    let survey = survey(&header, &bat, &beyond, file_bytes);
    Ok(Loaded {
        header,
        bat,
        survey,
        file_bytes,
    })
}

/// Reads numbers, in steps, so that a hostile count takes no more memory than the file is long.
fn words(storage: &dyn Storage, offset: u64, count: u32) -> Result<Vec<u32>, DiskError> {
    let mut words = Vec::new();
    let mut left = usize::try_from(count).unwrap_or(usize::MAX);
    if words.try_reserve_exact(left).is_err() {
        let what = format!("there is no memory for {count} entries of the BAT");
        return Err(DiskError::refused(storage.name(), what));
    }
    let mut at = offset;
    let mut bytes = vec![0; left.min(1 << 18) * 4];
    while left > 0 {
        let now = left.min(1 << 18);
        let step = &mut bytes[..now * 4];
        storage
            .read_at(step, at)
            .map_err(|error| DiskError::io(storage.name(), "read", at, error))?;
        let word = |four: &[u8]| u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        words.extend(step.chunks_exact(4).map(word));
        at += step.len() as u64;
        left -= now;
    }
    Ok(words)
}

impl Loaded {
    /// Makes changes that never reached the file, and surveys anew; gives the file's BAT.
    pub fn apply(&mut self, changes: &[(u32, u32)]) -> Option<Vec<u32>> {
        if changes.is_empty() {
            return None;
        }
        let old = self.bat.clone();
        for (cluster, entry) in changes {
            let at = usize::try_from(*cluster).unwrap_or(usize::MAX);
            if let Some(slot) = self.bat.get_mut(at) {
                *slot = *entry;
            }
        }
        self.survey = survey(&self.header, &self.bat, &[], self.file_bytes);
        Some(old)
    }

    /// The findings that stand in the way of opening it, as one error.
    pub fn refuse(
        &self,
        name: &str,
        is_in_the_way: impl Fn(&Finding) -> bool,
    ) -> Result<(), DiskError> {
        let mut bad = self.survey.findings.iter().filter(|f| is_in_the_way(f));
        let Some(first) = bad.next() else {
            return Ok(());
        };
        let more = match bad.count() {
            0 => String::new(),
            count => format!(", and {count} more"),
        };
        let what = format!("{first}{more}; 'firn ploop check --repair' may mend it");
        Err(match first {
            Finding::NotClosed => DiskError::InUse {
                object: name.to_owned(),
                what,
            },
            _ => DiskError::corrupt(name, what),
        })
    }

    /// The bitmap that belongs to the data, if there is one.
    ///
    /// # Errors
    /// The extension is damaged, or the host refused.
    pub fn bitmap(&self, storage: &dyn Storage) -> Result<Option<DirtyBitmap>, DiskError> {
        match self.stored_bitmaps(storage)?.first() {
            Some(stored) => self.bits(storage, stored).map(Some),
            None => Ok(None),
        }
    }

    /// The frames of all bitmaps in the extension.
    ///
    /// # Errors
    /// The extension is damaged, or the host refused.
    pub fn stored_bitmaps(&self, storage: &dyn Storage) -> Result<Vec<StoredBitmap>, DiskError> {
        if self.header.mark != Mark::ClosedWithExtension || self.header.extension == 0 {
            return Ok(Vec::new());
        }
        let damaged = |error: ExtensionError| DiskError::corrupt(storage.name(), error.to_string());
        let cluster = self.cluster_at(storage, self.header.extension)?;
        extension::parse(&cluster).map_err(damaged)
    }

    fn bits(&self, storage: &dyn Storage, stored: &StoredBitmap) -> Result<DirtyBitmap, DiskError> {
        if stored.size_sectors != self.header.size_sectors {
            let what = format!(
                "its dirty bitmap is for {} sectors, the disk has {}",
                stored.size_sectors, self.header.size_sectors
            );
            return Err(DiskError::corrupt(storage.name(), what));
        }
        let granularity = u64::from(stored.granularity_sectors) * SECTOR;
        if self.header.size_bytes() / granularity > MAX_BITS {
            let what = format!("its dirty bitmap has more than {MAX_BITS} bits");
            return Err(DiskError::corrupt(storage.name(), what));
        }
        let bitmap = DirtyBitmap::new(stored.id, self.header.size_bytes(), granularity);
        let cluster = usize::try_from(self.header.cluster_bytes()).unwrap_or(usize::MAX);
        for (index, entry) in stored.table.iter().enumerate() {
            let leaf = match entry {
                0 => Leaf::Same(false),
                1 => Leaf::Same(true),
                sector => Leaf::Bits(self.cluster_at(storage, *sector)?),
            };
            extension::fill(&bitmap, index, cluster, &leaf);
        }
        Ok(bitmap)
    }

    /// A cluster of the extension: behind the data, and inside of the file.
    fn cluster_at(&self, storage: &dyn Storage, sector: u64) -> Result<Vec<u8>, DiskError> {
        let unit = u64::from(self.header.cluster_bytes());
        let inside = sector
            .checked_mul(SECTOR)
            .filter(|at| at.is_multiple_of(unit) && *at >= self.survey.end_bytes)
            .filter(|at| {
                at.checked_add(unit)
                    .is_some_and(|end| end <= self.file_bytes)
            });
        let Some(at) = inside else {
            let what = format!("its format extension points to sector {sector}");
            return Err(DiskError::corrupt(storage.name(), what));
        };
        let mut bytes = vec![0; usize::try_from(unit).unwrap_or_default()];
        storage
            .read_at(&mut bytes, at)
            .map_err(|error| DiskError::io(storage.name(), "read", at, error))?;
        Ok(bytes)
    }

    /// The worst of the findings.
    pub fn worst(&self) -> Option<Severity> {
        self.survey.findings.iter().map(Finding::severity).max()
    }
}
