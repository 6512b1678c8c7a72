//! Which clusters of the file are in use, and what of the BAT is not in the file yet.

use std::collections::BTreeSet;

use super::header::HEADER_BYTES;
use super::survey::Used;

/// The BAT is written in blocks of so many bytes.
pub(super) const BLOCK: u64 = 4096;

/// Space of an image that is open for writing.
#[derive(Debug)]
pub(super) struct Space {
    /// One bit per cluster of the file.
    pub used: Used,
    /// No cluster below is free.
    hint: u32,
    /// Below lies the table, or what will be one: nothing there becomes free.
    pub floor: u32,
    /// The cluster behind the last that was ever used.
    pub end: u32,
    /// The cluster behind the file's last.
    pub reserved: u32,
    /// Free for use again once the BAT in the file does not lead there.
    pub freed: Vec<u32>,
    /// Blocks of the BAT that differ from the file.
    pub touched: BTreeSet<u64>,
    /// Size that the header will tell, in bytes.
    pub rounded_size: u64,
}

/// A cluster of the file that was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handed {
    pub index: u32,
    /// It may hold old bytes.
    pub is_old: bool,
}

impl Space {
    pub fn new(used: Used, rounded_size: u64) -> Space {
        let end = used.end();
        Space {
            used,
            hint: 0,
            floor: 0,
            end,
            reserved: end,
            freed: Vec::new(),
            touched: BTreeSet::new(),
            rounded_size,
        }
    }

    /// Hands out a free cluster, or one behind the end; None where entries can't count so far.
    pub fn take(&mut self) -> Option<Handed> {
        if let Some(index) = self.used.first_clear(self.hint, self.end) {
            self.hint = index + 1;
            self.used.set(index);
            return Some(Handed {
                index,
                is_old: true,
            });
        }
        self.hint = self.end;
        let index = self.end;
        // The last number means "none" to some kernels.
        if index >= u32::MAX - 1 {
            return None;
        }
        self.end += 1;
        self.hint = self.end;
        self.used.set(index);
        Some(Handed {
            index,
            is_old: false,
        })
    }

    /// Takes a cluster back.
    pub fn give_back(&mut self, index: u32) {
        if index < self.floor {
            return;
        }
        self.used.clear(index);
        self.hint = self.hint.min(index);
    }

    /// Remembers that the entry of a cluster of the disk has changed.
    pub fn touch(&mut self, cluster: u32) {
        self.touched.insert(entry_at(cluster) / BLOCK);
    }
}

/// Byte of the file where an entry stands.
pub(super) fn entry_at(cluster: u32) -> u64 {
    u64::from(HEADER_BYTES) + 4 * u64::from(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_come_before_the_end() {
        let mut used = Used::default();
        for index in [0, 1, 3, 64, 65] {
            used.set(index);
        }
        let mut space = Space::new(used, 0);
        assert_eq!(space.end, 66);
        assert_eq!(space.take().unwrap().index, 2);
        assert_eq!(space.take().unwrap().index, 4);
        for expected in 5..64 {
            let handed = space.take().unwrap();
            assert_eq!((handed.index, handed.is_old), (expected, true));
        }
        let handed = space.take().unwrap();
        assert_eq!((handed.index, handed.is_old, space.end), (66, false, 67));
        space.give_back(10);
        assert_eq!(space.take().unwrap().index, 10);
        space.floor = 11;
        space.give_back(10);
        space.give_back(11);
        assert_eq!(space.take().unwrap().index, 11);
        assert_eq!(space.take().unwrap().index, 67);
    }
}
