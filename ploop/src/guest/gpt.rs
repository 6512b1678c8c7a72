//! The partition table of a disk: a GPT with one partition, as the original makes it.
//!
//! ```text
//! sector 0      protective MBR
//! sector 1      header: "EFI PART", revision, size 92, crc, own place, backup's place, first and last
//!               usable sector, disk's UUID, place, number and size of the entries, their crc
//! sectors 2-33  128 entries of 128 bytes: type UUID, own UUID, first, last sector, attributes, name
//! ...           the partition, from the first whole cluster on
//! last 33       the entries once more, and the header once more as the very last sector
//! ```
//!
//! Source: UEFI specification 2.10, chapter 5

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::Disk;

const SECTOR: u64 = 512;
const ENTRIES: u32 = 128;
const ENTRY_SIZE: u32 = 128;
const ENTRY_SECTORS: u64 = 32;
const HEADER_SIZE: u32 = 92;
/// Largest table of entries that is read.
const MAX_TABLE: u64 = 1 << 20;

/// Linux file system data: 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is stored.
const LINUX_DATA: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

/// Where a table is read and written: a device's file, or a served disk itself.
pub trait Place {
    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The host refused.
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// The host refused.
    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes it durable.
    ///
    /// # Errors
    /// The host refused.
    fn sync(&self) -> io::Result<()>;
}

impl Place for File {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A disk that this process has open.
pub struct OpenDisk<'a>(pub &'a dyn Disk);

impl Place for OpenDisk<'_> {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset).map_err(io::Error::other)
    }

    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset).map_err(io::Error::other)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.flush().map_err(io::Error::other)
    }
}

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u64,
}

/// Where the one partition of a disk of this size goes.
pub fn layout(size_bytes: u64, cluster_bytes: u64) -> Option<Partition> {
    let first = (34 * SECTOR).next_multiple_of(cluster_bytes.max(4096));
    let end = size_bytes.checked_sub((ENTRY_SECTORS + 1) * SECTOR)?;
    let end = end - end % 4096;
    (end > first).then(|| Partition {
        offset: first,
        len_bytes: end - first,
    })
}

/// Writes the table for one partition that takes the whole disk. `random` becomes the UUIDs.
///
/// # Errors
/// The disk is too small or can't be written.
pub fn create(
    disk: &dyn Place,
    size_bytes: u64,
    cluster_bytes: u64,
    random: [u8; 32],
) -> io::Result<Partition> {
    let partition = layout(size_bytes, cluster_bytes)
        .ok_or_else(|| io::Error::other("the disk is too small for a partition table"))?;
    let mut entry = LINUX_DATA.to_vec();
    entry.extend(uuid(&random[16..]));
    entry.extend((partition.offset / SECTOR).to_le_bytes());
    let last = (partition.offset + partition.len_bytes) / SECTOR - 1;
    entry.extend(last.to_le_bytes());
    entry.extend([0; 8]);
    entry.extend("primary".encode_utf16().flat_map(u16::to_le_bytes));
    let mut table = vec![0; (ENTRIES * ENTRY_SIZE) as usize];
    table[..entry.len()].copy_from_slice(&entry);
    write(disk, size_bytes, &uuid(&random[..16]), &table)?;
    Ok(partition)
}

/// A random UUID of version 4, from 16 random bytes.
fn uuid(random: &[u8]) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(random);
    id[7] = id[7] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

fn write(disk: &dyn Place, size_bytes: u64, disk_id: &[u8; 16], table: &[u8]) -> io::Result<()> {
    let last = size_bytes / SECTOR - 1;
    let place = |own: u64, other: u64, entries: u64| {
        header(own, other, entries, last, disk_id, crc32(table))
    };
    disk.write(table, (last - ENTRY_SECTORS) * SECTOR)?;
    disk.write(&place(last, 1, last - ENTRY_SECTORS), last * SECTOR)?;
    disk.write(table, 2 * SECTOR)?;
    disk.write(&place(1, last, 2), SECTOR)?;
    disk.write(&protective_mbr(last), 0)?;
    disk.sync()
}

fn header(own: u64, other: u64, entries: u64, last: u64, id: &[u8; 16], crc: u32) -> [u8; 512] {
    let mut out = [0; 512];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(b"EFI PART");
    put(&0x0001_0000u32.to_le_bytes());
    put(&HEADER_SIZE.to_le_bytes());
    put(&[0; 8]);
    put(&own.to_le_bytes());
    put(&other.to_le_bytes());
    put(&34u64.to_le_bytes());
    put(&(last - ENTRY_SECTORS - 1).to_le_bytes());
    put(id);
    put(&entries.to_le_bytes());
    put(&ENTRIES.to_le_bytes());
    put(&ENTRY_SIZE.to_le_bytes());
    put(&crc.to_le_bytes());
    let crc = crc32(&out[..HEADER_SIZE as usize]);
    out[16..20].copy_from_slice(&crc.to_le_bytes());
    out
}

fn protective_mbr(last: u64) -> [u8; 512] {
    let mut out = [0; 512];
    let sectors = u32::try_from(last).unwrap_or(u32::MAX);
    let entry = [0x00, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff];
    out[446..454].copy_from_slice(&entry);
    out[454..458].copy_from_slice(&1u32.to_le_bytes());
    out[458..462].copy_from_slice(&sectors.to_le_bytes());
    out[510..].copy_from_slice(&[0x55, 0xaa]);
    out
}

struct Table {
    disk_id: [u8; 16],
    entries: Vec<u8>,
    entry_size: usize,
}

/// Reads the table, or None where there is none.
fn read(disk: &dyn Place, size_bytes: u64) -> io::Result<Option<Table>> {
    let mut head = [0; 512];
    if size_bytes < 68 * SECTOR {
        return Ok(None);
    }
    disk.read(&mut head, SECTOR)?;
    if &head[..8] != b"EFI PART" {
        return Ok(None);
    }
    let u32_at =
        |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let mut plain = head;
    plain[16..20].fill(0);
    let place = u64::from_le_bytes(head[72..80].try_into().unwrap_or_default());
    let entry_size = u32_at(84);
    let len = u64::from(u32_at(80)) * u64::from(entry_size);
    let is_sane = u32_at(12) == HEADER_SIZE
        && crc32(&plain[..HEADER_SIZE as usize]) == u32_at(16)
        && entry_size >= ENTRY_SIZE
        && len <= MAX_TABLE;
    if !is_sane {
        return Err(io::Error::other("the partition table is damaged"));
    }
    let mut entries = vec![0; usize::try_from(len).unwrap_or(0)];
    let place = place
        .checked_mul(SECTOR)
        .ok_or(io::ErrorKind::InvalidData)?;
    disk.read(&mut entries, place)?;
    if crc32(&entries) != u32_at(88) {
        return Err(io::Error::other("the partition table is damaged"));
    }
    let mut disk_id = [0; 16];
    disk_id.copy_from_slice(&head[56..72]);
    Ok(Some(Table {
        disk_id,
        entries,
        entry_size: entry_size as usize,
    }))
}

/// The first partition, or None where the disk has no table.
///
/// # Errors
/// The table is damaged or names a place outside of the disk.
pub fn first_partition(disk: &dyn Place, size_bytes: u64) -> io::Result<Option<Partition>> {
    let Some(table) = read(disk, size_bytes)? else {
        return Ok(None);
    };
    let used = |entry: &&[u8]| entry[..16] != [0; 16];
    let Some(entry) = table.entries.chunks_exact(table.entry_size).find(used) else {
        return Ok(None);
    };
    let number = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap_or_default());
    let (first, last) = (number(32), number(40));
    if first < 2 || last < first || last >= size_bytes / SECTOR {
        return Err(io::Error::other("the partition lies outside of the disk"));
    }
    Ok(Some(Partition {
        offset: first * SECTOR,
        len_bytes: (last - first + 1) * SECTOR,
    }))
}

/// Fits the table to a disk's new size: the backup goes to its end, and the one partition ends there.
/// None where the disk has no table.
///
/// # Errors
/// There are several partitions, the table is damaged, or the disk can't be written.
pub fn fit(disk: &dyn Place, size_bytes: u64) -> io::Result<Option<Partition>> {
    let Some(mut table) = read(disk, size_bytes)? else {
        return Ok(None);
    };
    let mut used = table
        .entries
        .chunks_exact_mut(table.entry_size)
        .filter(|entry| entry[..16] != [0; 16]);
    let (Some(entry), None) = (used.next(), used.next()) else {
        return Err(io::Error::other(
            "only a disk with one partition can be resized",
        ));
    };
    let first = u64::from_le_bytes(entry[32..40].try_into().unwrap_or_default());
    let end = size_bytes - (ENTRY_SECTORS + 1) * SECTOR;
    let last = (end - end % 4096) / SECTOR - 1;
    if last < first {
        return Err(io::Error::other("the disk is too small for its partition"));
    }
    entry[40..48].copy_from_slice(&last.to_le_bytes());
    table.entries.resize((ENTRIES * ENTRY_SIZE) as usize, 0);
    write(disk, size_bytes, &table.disk_id, &table.entries)?;
    first_partition(disk, size_bytes)
}

/// CRC-32 as in Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        let mut crc = crc ^ u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1));
        }
        crc
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn disk(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_table_is_written_read_and_grown() {
        let file = disk(64 * MIB);
        let made = create(&file, 64 * MIB, MIB, [7; 32]).unwrap();
        assert_eq!(made.offset, MIB);
        assert_eq!(made.len_bytes % 4096, 0);
        assert_eq!(first_partition(&file, 64 * MIB).unwrap(), Some(made));
        file.set_len(100 * MIB).unwrap();
        let grown = fit(&file, 100 * MIB).unwrap().unwrap();
        assert_eq!(grown.offset, MIB);
        assert!(grown.len_bytes > 98 * MIB);
    }

    #[test]
    fn no_table_and_a_damaged_one_are_told_apart() {
        let file = disk(16 * MIB);
        assert_eq!(first_partition(&file, 16 * MIB).unwrap(), None);
        create(&file, 16 * MIB, MIB, [1; 32]).unwrap();
        file.write_all_at(b"x", 2 * SECTOR + 40).unwrap();
        assert!(first_partition(&file, 16 * MIB).is_err());
        assert!(create(&file, MIB, MIB, [1; 32]).is_err());
    }
}
