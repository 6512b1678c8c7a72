//! The header of a qcow2 image, big endian.
//!
//! | offset | bytes | field |
//! |---:|---:|---|
//! | 0 | 4 | magic `QFI\xfb` |
//! | 4 | 4 | version: 2 or 3 |
//! | 8 | 12 | name of a backing file: offset, length |
//! | 20 | 4 | bits of the cluster size |
//! | 24 | 8 | size in bytes |
//! | 32 | 4 | encryption |
//! | 36 | 12 | L1 table: entries, offset |
//! | 48 | 12 | refcount table: offset, clusters |
//! | 60 | 12 | internal snapshots: number, offset |
//! | 72 | 24 | features (version 3): incompatible, compatible, autoclear |
//! | 96 | 8 | bits of a refcount (as a power of two), length of the header |
//!
//! Source: QEMU docs/interop/qcow2

/// Bytes of the header that is written.
pub(super) const HEADER_BYTES: usize = 104;
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Incompatible feature: refcounts may be wrong.
pub(super) const DIRTY: u64 = 1;
/// Incompatible feature: tables are known to be wrong.
pub(super) const CORRUPT: u64 = 2;

/// The fields that matter here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    pub size_bytes: u64,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcounts_offset: u64,
    pub refcounts_clusters: u32,
    pub snapshots: u32,
    pub incompatible: u64,
    pub refcount_order: u32,
}

impl Header {
    /// Reads the fields; the message says what can't be handled.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, String> {
        if bytes[..4] != MAGIC {
            return Err("it does not begin as a qcow2 image".to_owned());
        }
        let version = int(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(format!("its version is {version}, not 2 or 3"));
        }
        if long(bytes, 8) != 0 {
            return Err("it names a backing file; a descriptor names the chain here".to_owned());
        }
        if int(bytes, 32) != 0 {
            return Err("it is encrypted".to_owned());
        }
        let is_3 = version == 3;
        let header = Header {
            version,
            cluster_bits: int(bytes, 20),
            size_bytes: long(bytes, 24),
            l1_entries: int(bytes, 36),
            l1_offset: long(bytes, 40),
            refcounts_offset: long(bytes, 48),
            refcounts_clusters: int(bytes, 56),
            snapshots: int(bytes, 60),
            incompatible: if is_3 { long(bytes, 72) } else { 0 },
            refcount_order: if is_3 { int(bytes, 96) } else { 4 },
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), String> {
        let unknown = self.incompatible & !(DIRTY | CORRUPT);
        if unknown != 0 {
            return Err(format!(
                "it has features {unknown:#x}, which are not known here"
            ));
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(format!("its clusters have 2^{} bytes", self.cluster_bits));
        }
        if self.refcount_order != 4 {
            return Err(format!(
                "its refcounts have 2^{} bits, not 16",
                self.refcount_order
            ));
        }
        let unit = self.cluster_bytes();
        if u64::from(self.l1_entries) < self.wanted_l1() || self.l1_entries > 1 << 22 {
            return Err(format!("its L1 table has {} entries", self.l1_entries));
        }
        if u32::try_from(self.size_bytes.div_ceil(unit)).is_err() {
            return Err(format!(
                "its size of {} bytes is too large",
                self.size_bytes
            ));
        }
        for offset in [self.l1_offset, self.refcounts_offset] {
            if offset == 0 || !offset.is_multiple_of(unit) {
                return Err(format!("a table stands at byte {offset}"));
            }
        }
        Ok(())
    }

    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// L1 entries that the size asks for.
    pub fn wanted_l1(&self) -> u64 {
        let clusters = self.size_bytes.div_ceil(self.cluster_bytes());
        clusters.div_ceil(self.l2_entries())
    }

    /// The bytes, always of version 3.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(4, &3u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size_bytes.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcounts_offset.to_be_bytes());
        put(56, &self.refcounts_clusters.to_be_bytes());
        put(72, &self.incompatible.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        bytes
    }
}

fn int(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(int(bytes, at)) << 32 | u64::from(int(bytes, at + 4))
}
