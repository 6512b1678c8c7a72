//! Checking an image, and mending what can be mended.

use super::header::{FLAG_CONVERTING, FLAG_EMPTY, Header, Mark, SECTOR, Version};
use super::load::{Loaded, load};
use super::survey::{Finding, Severity};
use crate::DiskError;
use crate::storage::Storage;

/// Whether findings are mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing is written.
    No,
    /// Whatever has a remedy gets it.
    Yes,
}

/// What checking came to.
#[derive(Debug)]
pub struct Checked {
    /// The header as it was found.
    pub header: Header,
    /// All that was found.
    pub findings: Vec<Finding>,
    /// What of it is still so.
    pub left: Vec<Finding>,
    /// Clusters of the disk whose bytes are lost: they pointed nowhere, and read as zeroes now.
    pub lost: Vec<u32>,
    /// Clusters that have a place.
    pub allocated: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Checked {
    /// The worst of what is left.
    pub fn worst(&self) -> Option<Severity> {
        self.left.iter().map(Finding::severity).max()
    }
}

/// Checks an image that nobody has open, and mends it where asked.
///
/// # Errors
/// It is no expanded image, its BAT is cut off, or the host refused.
pub fn check(storage: &dyn Storage, repair: Repair) -> Result<Checked, DiskError> {
    check_telling(storage, repair, &mut |_, _| {})
}

/// Like [`check`]; `progress` is told the findings that are mended and all of them.
///
/// # Errors
/// As `check`.
pub fn check_telling(
    storage: &dyn Storage,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Checked, DiskError> {
    let loaded = examined(storage)?;
    let mut checked = Checked {
        header: loaded.header.clone(),
        left: loaded.survey.findings.clone(),
        findings: loaded.survey.findings.clone(),
        lost: Vec::new(),
        allocated: loaded.survey.allocated,
        file_bytes: loaded.file_bytes,
    };
    if repair == Repair::No || loaded.worst().is_none() {
        return Ok(checked);
    }
    let hopeless = |finding: &Finding| matches!(finding, Finding::Converting);
    if checked.findings.iter().any(hopeless) || lacks_room(&loaded) {
        return Ok(checked);
    }
    let mut mending = Mending::new(storage, loaded);
    mending.run(progress)?;
    checked.lost = mending.lost;
    checked.left = examined(storage)?.survey.findings;
    Ok(checked)
}

/// Header, BAT and extension against the rules.
fn examined(storage: &dyn Storage) -> Result<Loaded, DiskError> {
    let mut loaded = load(storage)?;
    match loaded.bitmap(storage) {
        Ok(None) if loaded.header.mark != Mark::ClosedWithExtension => {}
        Ok(_) => {
            let unit = u64::from(loaded.header.cluster_bytes());
            let end = match loaded.header.extension {
                0 => loaded.survey.end_bytes,
                sector => sector.saturating_mul(SECTOR).saturating_add(unit),
            };
            let clusters = loaded.file_bytes.saturating_sub(end) / unit;
            if clusters > 0 {
                loaded.survey.findings.push(Finding::TailLeak { clusters });
            }
        }
        Err(DiskError::Corrupt { what, .. }) => {
            loaded.survey.findings.push(Finding::Extension(what));
        }
        Err(other) => return Err(other),
    }
    Ok(loaded)
}

/// A BAT that is too short can become longer only where the clusters leave room.
fn lacks_room(loaded: &Loaded) -> bool {
    let header = &loaded.header;
    let needed = 64 + 4 * header.wanted_entries();
    let room = header.effective_start(loaded.file_bytes);
    u64::from(header.entries) < header.wanted_entries() && needed > room
}

struct Mending<'a> {
    storage: &'a dyn Storage,
    header: Header,
    bat: Vec<u32>,
    findings: Vec<Finding>,
    end_bytes: u64,
    data_start: u64,
    lost: Vec<u32>,
}

impl<'a> Mending<'a> {
    fn new(storage: &'a dyn Storage, loaded: Loaded) -> Mending<'a> {
        let data_start = loaded.header.effective_start(loaded.file_bytes);
        Mending {
            storage,
            header: loaded.header,
            bat: loaded.bat,
            findings: loaded.survey.findings,
            end_bytes: loaded.survey.end_bytes,
            data_start,
            lost: Vec::new(),
        }
    }

    fn run(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), DiskError> {
        // Nobody may take it for whole while it is half mended.
        self.header.mark = Mark::Dirty;
        self.header.extension = 0;
        self.put(&self.header.encode(), 0)?;
        self.sync()?;
        // The last cluster may be cut off; what it lacks are zeroes.
        self.resize(self.end_bytes)?;
        let findings = std::mem::take(&mut self.findings);
        for (number, finding) in (1..).zip(&findings) {
            self.mend_entry(finding)?;
            progress(number, findings.len() as u64);
        }
        self.bat.resize(
            usize::try_from(self.header.wanted_entries()).unwrap_or(0),
            0,
        );
        self.sync()?;
        self.write_bat()?;
        self.finish()
    }

    fn mend_entry(&mut self, finding: &Finding) -> Result<(), DiskError> {
        match finding {
            Finding::BelowData { cluster, .. }
            | Finding::BeyondEnd { cluster, .. }
            | Finding::Misaligned { cluster, .. } => {
                self.lost.push(*cluster);
                self.set(*cluster, 0);
            }
            Finding::DoubleUse { cluster, entry } => {
                let mut bytes = vec![0; usize::try_from(self.unit()).unwrap_or_default()];
                let from = self.header.place(*entry);
                self.storage
                    .read_at(&mut bytes, from)
                    .map_err(|error| DiskError::io(self.storage.name(), "read", from, error))?;
                let to = self.end_bytes;
                self.put(&bytes, to)?;
                self.end_bytes += self.unit();
                let place = match self.header.version {
                    Version::V1 => to / SECTOR,
                    Version::V2 => to / self.unit(),
                };
                let full = "it has as many clusters as entries can count";
                let place = u32::try_from(place)
                    .map_err(|_| DiskError::refused(self.storage.name(), full))?;
                self.set(*cluster, place);
            }
            _ => {}
        }
        Ok(())
    }

    fn write_bat(&mut self) -> Result<(), DiskError> {
        let mut bytes: Vec<u8> = self.bat.iter().flat_map(|e| e.to_le_bytes()).collect();
        // What stands between the BAT and the first cluster becomes zeroes.
        let room = self.data_start.saturating_sub(64);
        bytes.resize(usize::try_from(room).unwrap_or(bytes.len()), 0);
        self.put(&bytes, 64)?;
        self.sync()
    }

    fn finish(&mut self) -> Result<(), DiskError> {
        self.header.entries = u32::try_from(self.bat.len()).unwrap_or(u32::MAX);
        if self.header.data_start_bytes() != self.data_start {
            self.header.data_start = u32::try_from(self.data_start / SECTOR).unwrap_or(u32::MAX);
        }
        self.header.flags &= !(FLAG_EMPTY | FLAG_CONVERTING);
        if self.bat.iter().all(|entry| *entry == 0) {
            self.header.flags |= FLAG_EMPTY;
        }
        // A lost cluster may have been the last one.
        self.resize(self.end())?;
        self.put(&self.header.encode(), 0)?;
        self.sync()?;
        self.header.mark = Mark::Closed;
        self.put(&self.header.encode(), 0)?;
        self.sync()
    }

    fn end(&self) -> u64 {
        let places = self.bat.iter().filter(|entry| **entry != 0);
        let last = places.map(|entry| self.header.place(*entry) + self.unit());
        last.max().unwrap_or(0).max(self.data_start)
    }

    fn unit(&self) -> u64 {
        self.header.cluster_bytes().into()
    }

    fn set(&mut self, cluster: u32, entry: u32) {
        if let Some(slot) = usize::try_from(cluster)
            .ok()
            .and_then(|at| self.bat.get_mut(at))
        {
            *slot = entry;
        }
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<(), DiskError> {
        self.storage
            .write_at(bytes, at)
            .map_err(|error| DiskError::io(self.storage.name(), "write", at, error))
    }

    fn resize(&self, len: u64) -> Result<(), DiskError> {
        self.storage
            .set_len(len)
            .map_err(|error| DiskError::io(self.storage.name(), "write", len, error))
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.storage
            .sync()
            .map_err(|error| DiskError::io(self.storage.name(), "sync", 0, error))
    }
}
