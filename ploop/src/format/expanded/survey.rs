//! The rules that header and BAT are held against: opening refuses what checking reports.

use std::fmt;

use super::header::{FLAG_CONVERTING, FLAG_EMPTY, Header, Mark, Version};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Space is lost, no data.
    Leak,
    /// A rule is broken.
    Damage,
}

/// A broken rule, or something worth knowing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The mark of use says that it was not closed.
    NotClosed,
    /// The mark of use is a number that nobody writes.
    UnknownMark(u32),
    /// A conversion between versions was cut off.
    Converting,
    /// The file does not end with a whole cluster.
    Length {
        /// Bytes of the file.
        bytes: u64,
    },
    /// Clusters begin where the rules do not allow it.
    DataStart {
        /// The sector in the header.
        sector: u32,
        /// The sector that follows from the BAT's length.
        wanted: u64,
    },
    /// The BAT is longer or shorter than the size asks for.
    Entries {
        /// Entries in the header.
        entries: u32,
        /// Entries that the size asks for.
        wanted: u64,
    },
    /// The disk's size is no multiple of the cluster.
    Size {
        /// Sectors of the disk.
        sectors: u64,
    },
    /// An entry points into header or BAT.
    BelowData {
        /// Cluster of the disk.
        cluster: u32,
        /// Its entry.
        entry: u32,
    },
    /// An entry points behind the file's end.
    BeyondEnd {
        /// Cluster of the disk.
        cluster: u32,
        /// Its entry.
        entry: u32,
    },
    /// An entry of version 1 does not point to the beginning of a cluster.
    Misaligned {
        /// Cluster of the disk.
        cluster: u32,
        /// Its entry.
        entry: u32,
    },
    /// Two entries point to the same place.
    DoubleUse {
        /// Cluster of the disk, the later one.
        cluster: u32,
        /// Its entry.
        entry: u32,
    },
    /// Something stands between the last entry and the first cluster.
    SlotBeyond {
        /// Its place, counted like an entry.
        slot: u32,
    },
    /// Clusters at the end belong to nothing.
    TailLeak {
        /// How many.
        clusters: u64,
    },
    /// Clusters in the middle belong to nothing.
    Holes {
        /// How many.
        clusters: u64,
    },
    /// The flag of an empty image is set, and there are clusters.
    EmptyFlag,
    /// The pointer to an extension belongs to an older state of the data.
    StaleExtension,
    /// The extension can't be used; why.
    Extension(String),
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Finding::Size { .. } | Finding::Holes { .. } | Finding::EmptyFlag => Severity::Note,
            Finding::StaleExtension => Severity::Note,
            Finding::TailLeak { .. } => Severity::Leak,
            _ => Severity::Damage,
        }
    }

    /// A word for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Finding::NotClosed => "not-closed",
            Finding::UnknownMark(_) => "unknown-mark",
            Finding::Converting => "converting",
            Finding::Length { .. } => "length",
            Finding::DataStart { .. } => "data-start",
            Finding::Entries { .. } => "entries",
            Finding::Size { .. } => "size",
            Finding::BelowData { .. } => "below-data",
            Finding::BeyondEnd { .. } => "beyond-end",
            Finding::Misaligned { .. } => "misaligned",
            Finding::DoubleUse { .. } => "double-use",
            Finding::SlotBeyond { .. } => "slot-beyond",
            Finding::TailLeak { .. } => "tail-leak",
            Finding::Holes { .. } => "holes",
            Finding::EmptyFlag => "empty-flag",
            Finding::StaleExtension => "stale-extension",
            Finding::Extension(_) => "extension",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::NotClosed => write!(out, "it was not closed"),
            Finding::UnknownMark(raw) => {
                write!(out, "its mark of use is {raw:#010x}, which nobody writes")
            }
            Finding::Converting => write!(out, "a conversion of its version was cut off"),
            Finding::Length { bytes } => {
                write!(
                    out,
                    "its length of {bytes} bytes is not a whole number of clusters"
                )
            }
            Finding::DataStart { sector, wanted } => write!(
                out,
                "its clusters begin at sector {sector}, and the BAT asks for {wanted}"
            ),
            Finding::Entries { entries, wanted } => write!(
                out,
                "its BAT has {entries} entries, and the size asks for {wanted}"
            ),
            Finding::Size { sectors } => write!(
                out,
                "its size of {sectors} sectors is not a whole number of clusters"
            ),
            Finding::BelowData { cluster, entry } => {
                of_entry(out, *cluster, "points into header or BAT", *entry)
            }
            Finding::BeyondEnd { cluster, entry } => {
                of_entry(out, *cluster, "points behind the file's end", *entry)
            }
            Finding::Misaligned { cluster, entry } => of_entry(
                out,
                *cluster,
                "does not point to the beginning of one",
                *entry,
            ),
            Finding::DoubleUse { cluster, entry } => {
                of_entry(out, *cluster, "points to where another one points", *entry)
            }
            Finding::SlotBeyond { slot } => {
                write!(out, "slot {slot} behind the BAT's end is not 0")
            }
            Finding::TailLeak { clusters } => {
                write!(out, "{clusters} clusters at the end belong to nothing")
            }
            Finding::Holes { clusters } => {
                write!(out, "{clusters} clusters in the middle are free")
            }
            Finding::EmptyFlag => write!(out, "it is flagged as empty, and is not"),
            Finding::StaleExtension => {
                write!(out, "its extension belongs to an older state of the data")
            }
            Finding::Extension(why) => write!(out, "{why}"),
        }
    }
}

fn of_entry(out: &mut fmt::Formatter<'_>, cluster: u32, what: &str, entry: u32) -> fmt::Result {
    write!(out, "cluster {cluster} {what} (entry {entry})")
}

/// One bit for each cluster of the file.
#[derive(Debug, Default)]
pub struct Used {
    words: Vec<u64>,
}

impl Used {
    /// Whether a cluster is used.
    pub fn has(&self, index: u32) -> bool {
        let (word, bit) = split(index);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// Sets a cluster's bit; false where it was set.
    pub fn set(&mut self, index: u32) -> bool {
        let (word, bit) = split(index);
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        let was = self.words[word] & bit != 0;
        self.words[word] |= bit;
        !was
    }

    /// Clears a cluster's bit.
    pub fn clear(&mut self, index: u32) {
        let (word, bit) = split(index);
        if let Some(bits) = self.words.get_mut(word) {
            *bits &= !bit;
        }
    }

    /// The first clear bit from `from` on and below `end`.
    pub fn first_clear(&self, from: u32, end: u32) -> Option<u32> {
        let mut at = from;
        while at < end {
            let (word, _) = split(at);
            let bits = self.words.get(word).copied().unwrap_or(0);
            if bits == u64::MAX {
                at = (at / 64 + 1).saturating_mul(64);
                continue;
            }
            if !self.has(at) {
                return Some(at);
            }
            at += 1;
        }
        None
    }

    /// The cluster behind the last used one.
    pub fn end(&self) -> u32 {
        let last = self.words.iter().rposition(|bits| *bits != 0);
        last.map_or(0, |word| {
            let bits = self.words[word];
            let index = u32::try_from(word).unwrap_or(u32::MAX / 64) * 64;
            index + (64 - bits.leading_zeros())
        })
    }
}

fn split(index: u32) -> (usize, u64) {
    let word = usize::try_from(index / 64).expect("32 bits fit in an address");
    (word, 1 << (index % 64))
}

/// What the rules say of an image.
#[derive(Debug, Default)]
pub struct Survey {
    /// All that was found, by the order of the rules.
    pub findings: Vec<Finding>,
    /// Clusters of the file that are in use, header and BAT included; of version 2 only.
    pub used: Used,
    /// Clusters that have a place.
    pub allocated: u64,
    /// Byte behind the last used cluster.
    pub end_bytes: u64,
}

/// Holds header and BAT against the rules. `beyond` are the slots from the BAT's end to the first
/// cluster.
pub fn survey(header: &Header, bat: &[u32], beyond: &[u32], file_bytes: u64) -> Survey {
    let mut survey = Survey::default();
    of_header(header, file_bytes, &mut survey.findings);
    of_entries(header, bat, file_bytes, &mut survey);
    for (at, _) in beyond.iter().enumerate().filter(|(_, slot)| **slot != 0) {
        let slot = header.entries + u32::try_from(at).unwrap_or(u32::MAX);
        survey.findings.push(Finding::SlotBeyond { slot });
    }
    of_space(header, file_bytes, &mut survey);
    survey
}

fn of_header(header: &Header, file_bytes: u64, findings: &mut Vec<Finding>) {
    match header.mark {
        Mark::Dirty => findings.push(Finding::NotClosed),
        Mark::Unknown(raw) => findings.push(Finding::UnknownMark(raw)),
        Mark::Closed | Mark::ClosedWithExtension => {}
    }
    if header.flags & FLAG_CONVERTING != 0 {
        findings.push(Finding::Converting);
    }
    if header.mark != Mark::ClosedWithExtension && header.extension != 0 {
        findings.push(Finding::StaleExtension);
    }
    let wanted = header.wanted_entries();
    if u64::from(header.entries) != wanted {
        let entries = header.entries;
        findings.push(Finding::Entries { entries, wanted });
    }
    if !header
        .size_sectors
        .is_multiple_of(header.cluster_sectors.into())
    {
        let sectors = header.size_sectors;
        findings.push(Finding::Size { sectors });
    }
    let start = header.data_start_bytes();
    if !header.has_good_data_start() || start > file_bytes {
        findings.push(Finding::DataStart {
            sector: header.data_start,
            wanted: header.area_bytes() / 512,
        });
    }
    if !tail_of(header, file_bytes).is_multiple_of(header.cluster_bytes().into()) {
        findings.push(Finding::Length { bytes: file_bytes });
    }
}

/// Bytes behind the file's beginning (version 2) or the first cluster (version 1).
fn tail_of(header: &Header, file_bytes: u64) -> u64 {
    match header.version {
        Version::V1 => file_bytes.saturating_sub(header.effective_start(file_bytes)),
        Version::V2 => file_bytes,
    }
}

fn of_entries(header: &Header, bat: &[u32], file_bytes: u64, survey: &mut Survey) {
    let unit = u64::from(header.cluster_bytes());
    // A wrong data start is mended by the BAT's length, so entries are held against that.
    let start = header.effective_start(file_bytes);
    let origin = match header.version {
        Version::V1 => start,
        Version::V2 => 0,
    };
    for index in 0..u32::try_from((start - origin) / unit).unwrap_or(0) {
        survey.used.set(index);
    }
    survey.end_bytes = start;
    for (at, entry) in bat.iter().copied().enumerate().filter(|(_, e)| *e != 0) {
        let cluster = u32::try_from(at).unwrap_or(u32::MAX);
        let place = header.place(entry);
        survey.allocated += 1;
        let finding = if place < start {
            Finding::BelowData { cluster, entry }
        } else if !(place - origin).is_multiple_of(unit) {
            Finding::Misaligned { cluster, entry }
        } else if place >= file_bytes {
            Finding::BeyondEnd { cluster, entry }
        } else {
            survey.end_bytes = survey.end_bytes.max(place + unit);
            let index = u32::try_from((place - origin) / unit).unwrap_or(u32::MAX);
            if survey.used.set(index) {
                continue;
            }
            Finding::DoubleUse { cluster, entry }
        };
        survey.findings.push(finding);
    }
    if header.flags & FLAG_EMPTY != 0 && survey.allocated > 0 {
        survey.findings.push(Finding::EmptyFlag);
    }
}

fn of_space(header: &Header, file_bytes: u64, survey: &mut Survey) {
    let unit = u64::from(header.cluster_bytes());
    let clusters = file_bytes.saturating_sub(survey.end_bytes) / unit;
    // An extension that belongs to the data is no leak.
    if clusters > 0 && header.mark != Mark::ClosedWithExtension {
        survey.findings.push(Finding::TailLeak { clusters });
    }
    let origin = match header.version {
        Version::V1 => header.effective_start(file_bytes),
        Version::V2 => 0,
    };
    let all = survey.end_bytes.saturating_sub(origin) / unit;
    let ones: u32 = survey.used.words.iter().map(|bits| bits.count_ones()).sum();
    let clusters = all.saturating_sub(ones.into());
    if clusters > 0 {
        survey.findings.push(Finding::Holes { clusters });
    }
}
