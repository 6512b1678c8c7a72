//! The format extension: where a dirty bitmap lives while the image is closed.
//!
//! One cluster behind the data, which the header points to:
//!
//! | offset | bytes | field |
//! |---:|---:|---|
//! | 0 | 8 | magic |
//! | 8 | 16 | MD5 of the rest of the cluster |
//! | 24 | | features, one after another, until one whose magic is 0 |
//!
//! A feature is its magic (8), flags (8: 1 must be understood, 2 must be kept), length (4), zero (4),
//! and the data, padded to 8. The dirty bitmap's data are the disk's size in sectors (8), its id (16),
//! sectors per bit (4), number of entries (4), and the entries: 0 for a cluster of clear bits, 1 for one
//! of set bits, otherwise the sector of a cluster that holds the bits, lowest bit first.

use super::header::SECTOR;
use super::md5::md5;
use crate::bitmap::DirtyBitmap;

const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
const BITMAP: u64 = 0x2038_5FAE_252C_B34A;
const MUST_UNDERSTAND: u64 = 1;
const MUST_KEEP: u64 = 2;
const PROLOGUE: usize = 24;
const FEATURE: usize = 24;
const BITMAP_FIELDS: usize = 32;

/// Why an extension is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExtensionError {
    /// It does not begin as one.
    #[error("the format extension has no magic")]
    Magic,
    /// Torn or changed.
    #[error("the format extension's checksum is wrong")]
    Checksum,
    /// A length or number leads outside.
    #[error("the format extension is cut off or absurd: {0}")]
    Shape(&'static str),
    /// A feature that forbids being ignored.
    #[error("the format extension has feature {0:#018x}, which is not known and may not be lost")]
    Unknown(u64),
}

/// A bitmap as the file has it: its frame, and where the bits are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its UUID.
    pub id: [u8; 16],
    /// Sectors of the disk.
    pub size_sectors: u64,
    /// Sectors per bit.
    pub granularity_sectors: u32,
    /// 0, 1, or the sector of a cluster of bits.
    pub table: Vec<u64>,
}

/// Reads an extension cluster: its bitmaps.
///
/// # Errors
/// It is damaged, or has a feature that may not be ignored.
pub fn parse(cluster: &[u8]) -> Result<Vec<StoredBitmap>, ExtensionError> {
    if cluster.len() < PROLOGUE || long(cluster, 0) != Some(MAGIC) {
        return Err(ExtensionError::Magic);
    }
    if md5(&cluster[PROLOGUE..]) != cluster[8..PROLOGUE] {
        return Err(ExtensionError::Checksum);
    }
    let mut at = PROLOGUE;
    let mut found = Vec::new();
    while let Some(magic) = long(cluster, at).filter(|magic| *magic != 0) {
        let flags = long(cluster, at + 8).ok_or(ExtensionError::Shape("a feature's frame"))?;
        let len = int(cluster, at + 16).ok_or(ExtensionError::Shape("a feature's frame"))?;
        let len = usize::try_from(len).map_err(|_| ExtensionError::Shape("a feature's length"))?;
        let data = cluster
            .get(at + FEATURE..)
            .and_then(|rest| rest.get(..len))
            .ok_or(ExtensionError::Shape("a feature's length"))?;
        match magic {
            BITMAP => found.push(bitmap(data, cluster.len())?),
            _ if flags & (MUST_UNDERSTAND | MUST_KEEP) != 0 => {
                return Err(ExtensionError::Unknown(magic));
            }
            _ => {}
        }
        at += FEATURE + len.next_multiple_of(8);
    }
    Ok(found)
}

fn bitmap(data: &[u8], cluster: usize) -> Result<StoredBitmap, ExtensionError> {
    let short = ExtensionError::Shape("the bitmap's frame");
    let (Some(size_sectors), Some(granularity_sectors), Some(entries)) =
        (long(data, 0), int(data, 24), int(data, 28))
    else {
        return Err(short);
    };
    if !granularity_sectors.is_power_of_two() {
        return Err(ExtensionError::Shape("the bitmap's granularity"));
    }
    let bits = size_sectors.div_ceil(granularity_sectors.into());
    if u64::from(entries) != bits.div_ceil(cluster as u64 * 8) {
        return Err(ExtensionError::Shape("the bitmap's number of entries"));
    }
    let rest = &data[BITMAP_FIELDS..];
    if rest.len() as u64 != u64::from(entries) * 8 {
        return Err(ExtensionError::Shape("the bitmap's length"));
    }
    let table = (0..rest.len()).step_by(8).filter_map(|at| long(rest, at));
    let mut id = [0; 16];
    id.copy_from_slice(&data[8..24]);
    Ok(StoredBitmap {
        id,
        size_sectors,
        granularity_sectors,
        table: table.collect(),
    })
}

/// Makes an extension cluster; None where the tables are too long for one.
pub fn encode(bitmaps: &[StoredBitmap], cluster: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend([0; 16]);
    for stored in bitmaps {
        let len = BITMAP_FIELDS + stored.table.len() * 8;
        bytes.extend(BITMAP.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(u32::try_from(len).ok()?.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(stored.size_sectors.to_le_bytes());
        bytes.extend(stored.id);
        bytes.extend(stored.granularity_sectors.to_le_bytes());
        bytes.extend(u32::try_from(stored.table.len()).ok()?.to_le_bytes());
        bytes.extend(stored.table.iter().flat_map(|entry| entry.to_le_bytes()));
    }
    if bytes.len() > cluster {
        return None;
    }
    bytes.resize(cluster, 0);
    let digest = md5(&bytes[PROLOGUE..]);
    bytes[8..PROLOGUE].copy_from_slice(&digest);
    Some(bytes)
}

/// The bits of one entry's cluster, or None where all are equal to the bool.
pub(super) enum Leaf {
    /// All clear or all set.
    Same(bool),
    /// A cluster of bits.
    Bits(Vec<u8>),
}

/// The bits of entry `index`, for the file.
pub(super) fn leaf(bitmap: &DirtyBitmap, index: usize, cluster: usize) -> Leaf {
    let per_leaf = cluster as u64 * 8;
    let first = index as u64 * per_leaf;
    let last = (first + per_leaf).min(bitmap.bits.blocks());
    let mut bytes = vec![0; cluster];
    let mut count = 0;
    let mut at = first;
    while let Some(block) = bitmap.bits.next(at).filter(|block| *block < last) {
        let bit = usize::try_from(block - first).unwrap_or_default();
        bytes[bit / 8] |= 1 << (bit % 8);
        count += 1;
        at = block + 1;
    }
    match count {
        0 => Leaf::Same(false),
        all if all == last - first => Leaf::Same(true),
        _ => Leaf::Bits(bytes),
    }
}

/// Puts the bits of entry `index` into a bitmap.
pub(super) fn fill(bitmap: &DirtyBitmap, index: usize, cluster: usize, leaf: &Leaf) {
    let unit = bitmap.bits.granularity_bytes();
    let per_leaf = cluster as u64 * 8;
    let first = index as u64 * per_leaf;
    let bytes = match leaf {
        Leaf::Same(false) => return,
        Leaf::Same(true) => return bitmap.bits.set(first * unit..(first + per_leaf) * unit),
        Leaf::Bits(bytes) => bytes,
    };
    for (at, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
        for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
            let block = first + at as u64 * 8 + bit;
            bitmap.bits.set(block * unit..(block + 1) * unit);
        }
    }
}

/// Number of table entries that a bitmap needs.
pub(super) fn table_len(bitmap: &DirtyBitmap, cluster: usize) -> usize {
    let leaves = bitmap.bits.blocks().div_ceil(cluster as u64 * 8);
    usize::try_from(leaves).unwrap_or(usize::MAX)
}

/// Bits of a granularity in sectors; None where the bitmap's is no multiple of a sector.
pub(super) fn granularity_sectors(bitmap: &DirtyBitmap) -> Option<u32> {
    u32::try_from(bitmap.bits.granularity_bytes() / SECTOR)
        .ok()
        .filter(|sectors| sectors.is_power_of_two())
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let eight = bytes.get(at..)?.get(..8)?;
    Some(u64::from_le_bytes(eight.try_into().ok()?))
}

fn int(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..)?.get(..4)?;
    Some(u32::from_le_bytes(four.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> StoredBitmap {
        StoredBitmap {
            id: [9; 16],
            size_sectors: 1 << 20,
            granularity_sectors: 128,
            table: vec![1],
        }
    }

    #[test]
    fn an_extension_comes_back_and_a_torn_one_does_not() {
        let two = [
            stored(),
            StoredBitmap {
                id: [8; 16],
                ..stored()
            },
        ];
        let bytes = encode(&two, 4096).unwrap();
        assert_eq!(parse(&bytes), Ok(two.to_vec()));
        for at in [0, 10, 24, 60, 4095] {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert!(parse(&torn).is_err(), "byte {at}");
        }
        let mut long = stored();
        long.table = vec![1; 4096];
        assert!(encode(&[long], 4096).is_none());
    }

    #[test]
    fn a_feature_that_may_not_be_lost_is_refused() {
        let mut bytes = encode(&[stored()], 4096).unwrap();
        let end = PROLOGUE + FEATURE + BITMAP_FIELDS + 8;
        bytes[end] = 5;
        let seal = |bytes: &mut Vec<u8>| {
            let digest = md5(&bytes[PROLOGUE..]);
            bytes[8..PROLOGUE].copy_from_slice(&digest);
        };
        seal(&mut bytes);
        assert_eq!(parse(&bytes), Ok(vec![stored()]));
        bytes[end + 8] = 2;
        seal(&mut bytes);
        assert_eq!(parse(&bytes), Err(ExtensionError::Unknown(5)));
    }
}
