//! The 64 bytes that an expanded image begins with.
//!
//! All numbers are little endian.
//!
//! | offset | bytes | field |
//! |---:|---:|---|
//! | 0 | 16 | magic: `WithoutFreeSpace` is version 1, `WithouFreSpacExt` version 2 |
//! | 16 | 4 | always 2 |
//! | 20 | 4 | heads |
//! | 24 | 4 | cylinders |
//! | 28 | 4 | sectors of a cluster |
//! | 32 | 4 | entries of the BAT |
//! | 36 | 8 | sectors of the disk; version 1 has 4 bytes here and 4 to ignore |
//! | 44 | 4 | mark of use |
//! | 48 | 4 | sector where the clusters begin |
//! | 52 | 4 | flags: 1 means that no cluster is allocated, 2 that a conversion was cut off |
//! | 56 | 8 | sector of the format extension, 0 for none |
//!
//! The BAT follows: one u32 per cluster of the disk, 0 for none; in version 1 the sector where the
//! cluster lies in the file, in version 2 its number counted in clusters from the file's beginning.

/// Bytes of the header.
pub const HEADER_BYTES: u32 = 64;
/// Bytes of a sector, the unit of most fields.
pub const SECTOR: u64 = 512;
/// Smallest and largest cluster that is created.
pub const CLUSTER_RANGE: std::ops::RangeInclusive<u32> = (64 << 10)..=(64 << 20);
/// Cluster size of images that nobody asked another one for.
pub const DEFAULT_CLUSTER: u32 = 1 << 20;

const MAGIC_V1: &[u8; 16] = b"WithoutFreeSpace";
const MAGIC_V2: &[u8; 16] = b"WithouFreSpacExt";
/// Largest cluster, in sectors, that is read: 64 MiB.
const MAX_CLUSTER_SECTORS: u32 = 131_072;
const FORMAT_NUMBER: u32 = 2;
const DIRTY: u32 = 0x746F_6E59;
const CLOSED_V21: u32 = 0x312E_3276;

/// How the BAT counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Sectors; up to 2 TiB.
    V1,
    /// Clusters.
    V2,
}

/// What the mark of use says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Closed; a format extension is not to be trusted.
    Closed,
    /// Closed, and the format extension belongs to the data.
    ClosedWithExtension,
    /// Open for writing, or not closed when its writer ended.
    Dirty,
    /// A number that nobody writes.
    Unknown(u32),
}

impl Mark {
    fn parse(raw: u32) -> Mark {
        match raw {
            0 => Mark::Closed,
            CLOSED_V21 => Mark::ClosedWithExtension,
            DIRTY => Mark::Dirty,
            other => Mark::Unknown(other),
        }
    }

    fn raw(self) -> u32 {
        match self {
            Mark::Closed => 0,
            Mark::ClosedWithExtension => CLOSED_V21,
            Mark::Dirty => DIRTY,
            Mark::Unknown(raw) => raw,
        }
    }
}

/// Bit of the flags: no cluster is allocated.
pub const FLAG_EMPTY: u32 = 1;
/// Bit of the flags: a conversion between versions was cut off.
pub const FLAG_CONVERTING: u32 = 2;

/// The header's fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// How the BAT counts.
    pub version: Version,
    /// Geometry, which nobody uses.
    pub heads: u32,
    /// Geometry, which nobody uses.
    pub cylinders: u32,
    /// Sectors of a cluster: 1 to 131,072.
    pub cluster_sectors: u32,
    /// Entries of the BAT.
    pub entries: u32,
    /// Sectors of the disk.
    pub size_sectors: u64,
    /// Mark of use.
    pub mark: Mark,
    /// Sector where the clusters begin.
    pub data_start: u32,
    /// Flags.
    pub flags: u32,
    /// Sector of the format extension.
    pub extension: u64,
}

/// Why 64 bytes are no header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It does not begin as an expanded image does.
    #[error("it does not begin with the magic of an expanded image")]
    Magic,
    /// Another format number.
    #[error("its format number is {0}, not 2")]
    FormatNumber(u32),
    /// Clusters of a size that is not read.
    #[error("its clusters have {0} sectors, not 1 to 131072")]
    Cluster(u32),
    /// A disk that no number of clusters can hold.
    #[error("its size of {0} sectors is beyond what 2^32 clusters hold")]
    Size(u64),
}

impl Header {
    /// A header for a new image of version 2.
    pub fn new(size_bytes: u64, cluster_bytes: u32) -> Header {
        let size_sectors = size_bytes / SECTOR;
        let entries = size_bytes.div_ceil(cluster_bytes.into());
        let heads = 16;
        let cylinders = size_sectors / (u64::from(heads) * 32);
        let mut header = Header {
            version: Version::V2,
            heads,
            cylinders: u32::try_from(cylinders).unwrap_or(u32::MAX),
            cluster_sectors: cluster_bytes / 512,
            entries: u32::try_from(entries).unwrap_or(u32::MAX),
            size_sectors,
            mark: Mark::Closed,
            data_start: 0,
            flags: FLAG_EMPTY,
            extension: 0,
        };
        header.data_start = u32::try_from(header.area_bytes() / SECTOR).unwrap_or(u32::MAX);
        header
    }

    /// Reads the fields, and refuses what no rule can be applied to.
    ///
    /// # Errors
    /// The magic, the format number, or the cluster size is none, or the size is absurd.
    pub fn parse(bytes: &[u8; 64]) -> Result<Header, HeaderError> {
        let version = match &bytes[..16] {
            magic if magic == MAGIC_V1 => Version::V1,
            magic if magic == MAGIC_V2 => Version::V2,
            _ => return Err(HeaderError::Magic),
        };
        let number = word(bytes, 16);
        if number != FORMAT_NUMBER {
            return Err(HeaderError::FormatNumber(number));
        }
        let high = match version {
            Version::V1 => 0,
            Version::V2 => u64::from(word(bytes, 40)) << 32,
        };
        let header = Header {
            version,
            heads: word(bytes, 20),
            cylinders: word(bytes, 24),
            cluster_sectors: word(bytes, 28),
            entries: word(bytes, 32),
            size_sectors: u64::from(word(bytes, 36)) | high,
            mark: Mark::parse(word(bytes, 44)),
            data_start: word(bytes, 48),
            flags: word(bytes, 52),
            extension: u64::from(word(bytes, 56)) | u64::from(word(bytes, 60)) << 32,
        };
        if !(1..=MAX_CLUSTER_SECTORS).contains(&header.cluster_sectors) {
            return Err(HeaderError::Cluster(header.cluster_sectors));
        }
        if u32::try_from(header.wanted_entries()).is_err() {
            return Err(HeaderError::Size(header.size_sectors));
        }
        Ok(header)
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..16].copy_from_slice(match self.version {
            Version::V1 => MAGIC_V1,
            Version::V2 => MAGIC_V2,
        });
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(16, &FORMAT_NUMBER.to_le_bytes());
        put(20, &self.heads.to_le_bytes());
        put(24, &self.cylinders.to_le_bytes());
        put(28, &self.cluster_sectors.to_le_bytes());
        put(32, &self.entries.to_le_bytes());
        put(36, &self.size_sectors.to_le_bytes());
        put(44, &self.mark.raw().to_le_bytes());
        put(48, &self.data_start.to_le_bytes());
        put(52, &self.flags.to_le_bytes());
        put(56, &self.extension.to_le_bytes());
        bytes
    }

    /// Size of a cluster in bytes.
    pub fn cluster_bytes(&self) -> u32 {
        self.cluster_sectors * 512
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_sectors.saturating_mul(SECTOR)
    }

    /// Entries that the size asks for.
    pub fn wanted_entries(&self) -> u64 {
        self.size_sectors.div_ceil(self.cluster_sectors.into())
    }

    /// Bytes of header and BAT.
    pub fn table_bytes(&self) -> u64 {
        u64::from(HEADER_BYTES) + 4 * u64::from(self.entries)
    }

    /// Bytes of header and BAT, rounded up to whole clusters.
    pub fn area_bytes(&self) -> u64 {
        let unit = u64::from(self.cluster_bytes());
        self.table_bytes().div_ceil(unit) * unit
    }

    /// Byte where the clusters begin; version 1 may leave it out.
    pub fn data_start_bytes(&self) -> u64 {
        match (self.version, self.data_start) {
            (Version::V1, 0) => self.table_bytes().div_ceil(SECTOR) * SECTOR,
            (_, sectors) => u64::from(sectors) * SECTOR,
        }
    }

    /// Byte where the clusters begin in a file of so many bytes: where the header says so if that can
    /// be, else behind the BAT.
    pub fn effective_start(&self, file_bytes: u64) -> u64 {
        let start = self.data_start_bytes();
        match self.has_good_data_start() && start <= file_bytes {
            true => start,
            false => self.area_bytes(),
        }
    }

    /// Byte of the file that a BAT entry, which is not 0, points to.
    pub fn place(&self, entry: u32) -> u64 {
        match self.version {
            Version::V1 => u64::from(entry) * SECTOR,
            Version::V2 => u64::from(entry) * u64::from(self.cluster_bytes()),
        }
    }

    /// Whether data start is where the rules of its version allow it.
    pub fn has_good_data_start(&self) -> bool {
        let start = self.data_start_bytes();
        match self.version {
            Version::V1 => start >= self.table_bytes(),
            Version::V2 => {
                start.is_multiple_of(self.cluster_bytes().into()) && start >= self.area_bytes()
            }
        }
    }
}

fn word(bytes: &[u8; 64], at: usize) -> u32 {
    let four = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    u32::from_le_bytes(four)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `qemu-img create -f parallels` writes for 100 MiB.
    const SAMPLE: &str = "57697468 6f754672 65537061 63457874 02000000 10000000 90010000 00080000 \
                          64000000 00200300 00000000 00000000 00080000 00000000 00000000 00000000";

    fn sample() -> [u8; 64] {
        let hex: String = SAMPLE.split_whitespace().collect();
        std::array::from_fn(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
    }

    #[test]
    fn a_header_is_read_and_written_as_others_do() {
        let header = Header::parse(&sample()).unwrap();
        assert_eq!((header.version, header.mark), (Version::V2, Mark::Closed));
        assert_eq!((header.entries, header.size_bytes()), (100, 100 << 20));
        assert_eq!((header.heads, header.cylinders), (16, 400));
        assert_eq!(header.encode(), sample());
        let ours = Header::new(100 << 20, 1 << 20);
        assert_eq!(Header { flags: 0, ..ours }, header);
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let with = |at: usize, value: u32| {
            let mut bytes = sample();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            Header::parse(&bytes).unwrap_err()
        };
        assert_eq!(with(0, 0), HeaderError::Magic);
        assert_eq!(with(16, 3), HeaderError::FormatNumber(3));
        assert_eq!(with(28, 0), HeaderError::Cluster(0));
        assert_eq!(with(28, 131_073), HeaderError::Cluster(131_073));
        assert!(matches!(with(40, u32::MAX), HeaderError::Size(_)));
    }

    #[test]
    fn version_1_counts_in_sectors_and_has_a_short_size() {
        let mut bytes = sample();
        bytes[..16].copy_from_slice(MAGIC_V1);
        bytes[40..44].copy_from_slice(&7u32.to_le_bytes());
        bytes[48..52].copy_from_slice(&[0; 4]);
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.size_bytes(), 100 << 20);
        assert_eq!((header.data_start_bytes(), header.place(3)), (512, 1536));
        assert!(header.has_good_data_start());
    }
}
