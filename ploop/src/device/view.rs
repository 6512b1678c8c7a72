//! The part of a disk that its device shows.

use serde::{Deserialize, Serialize};

use crate::guest::Partition;

/// Less than this behind a partition is the backup of the table.
const TAIL: u64 = 1 << 20;

/// The part of a disk that its device shows: all of it, or a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// First byte.
    pub offset: u64,
    /// Bytes that are shown; None is all that follow, however far the disk grows.
    pub limit: Option<u64>,
}

impl View {
    /// All of a disk.
    pub const WHOLE: View = View {
        offset: 0,
        limit: None,
    };

    /// A partition of a disk of that size. One that goes to the end gets no limit, so that it can grow with
    /// the disk.
    pub fn of(partition: &Partition, disk_bytes: u64) -> View {
        let end = partition.offset.saturating_add(partition.len_bytes);
        View {
            offset: partition.offset,
            limit: (disk_bytes.saturating_sub(end) >= TAIL).then_some(partition.len_bytes),
        }
    }

    /// Bytes shown of a disk of that size.
    pub fn len_bytes(&self, disk_bytes: u64) -> u64 {
        let rest = disk_bytes.saturating_sub(self.offset);
        self.limit.map_or(rest, |limit| limit.min(rest))
    }

    /// Where a range of the device lies on a disk of that size; None where it is not all inside.
    pub fn place(&self, offset: u64, len_bytes: u64, disk_bytes: u64) -> Option<u64> {
        let end = offset.checked_add(len_bytes)?;
        (end <= self.len_bytes(disk_bytes)).then(|| self.offset + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_to_the_end_grows_with_the_disk() {
        let partition = Partition {
            offset: 1 << 20,
            len_bytes: (9 << 20) - 4096,
        };
        let view = View::of(&partition, 10 << 20);
        assert_eq!(view.limit, None);
        assert_eq!(view.len_bytes(20 << 20), 19 << 20);
        assert_eq!(view.place(512, 512, 10 << 20), Some((1 << 20) + 512));
        assert_eq!(view.place((9 << 20) - 512, 513, 10 << 20), None);
        assert_eq!(view.place(u64::MAX, 2, 10 << 20), None);
        let short = View::of(&partition, 12 << 20);
        assert_eq!(short.len_bytes(20 << 20), partition.len_bytes);
    }
}
