//! Bitmaps of what was written, one bit per block of the disk.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit per block; set and cleared by several threads at once.
#[derive(Debug)]
pub struct Bitmap {
    granularity: u64,
    blocks: u64,
    words: Vec<AtomicU64>,
}

impl Bitmap {
    /// A clear bitmap for `size_bytes` in blocks of `granularity_bytes`.
    ///
    /// # Panics
    /// `granularity_bytes` is 0.
    pub fn new(size_bytes: u64, granularity_bytes: u64) -> Bitmap {
        let blocks = size_bytes.div_ceil(granularity_bytes);
        let words = usize::try_from(blocks.div_ceil(64)).expect("a bitmap fits in memory");
        Bitmap {
            granularity: granularity_bytes,
            blocks,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Bytes per bit.
    pub fn granularity_bytes(&self) -> u64 {
        self.granularity
    }

    /// Number of bits.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The blocks that a range of bytes touches.
    fn touched(&self, bytes: Range<u64>) -> Range<u64> {
        let end = bytes.end.div_ceil(self.granularity).min(self.blocks);
        (bytes.start / self.granularity).min(end)..end
    }

    fn word(&self, block: u64) -> (&AtomicU64, u64) {
        let index = usize::try_from(block / 64).expect("a bitmap fits in memory");
        (&self.words[index], 1 << (block % 64))
    }

    /// Sets the bits of all blocks that a range of bytes touches.
    pub fn set(&self, bytes: Range<u64>) {
        for block in self.touched(bytes) {
            let (word, bit) = self.word(block);
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Clears the bit of a block and tells whether it was set.
    pub fn take(&self, block: u64) -> bool {
        if block >= self.blocks {
            return false;
        }
        let (word, bit) = self.word(block);
        word.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// Whether any block that a range of bytes touches is set.
    pub fn any(&self, bytes: Range<u64>) -> bool {
        self.touched(bytes).any(|block| {
            let (word, bit) = self.word(block);
            word.load(Ordering::Acquire) & bit != 0
        })
    }

    /// The first set block at or after `block`.
    pub fn next(&self, block: u64) -> Option<u64> {
        let mut at = block;
        while at < self.blocks {
            let index = usize::try_from(at / 64).expect("a bitmap fits in memory");
            let rest = self.words[index].load(Ordering::Acquire) >> (at % 64);
            if rest != 0 {
                let found = at + u64::from(rest.trailing_zeros());
                return (found < self.blocks).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Acquire).count_ones());
        self.words.iter().map(ones).sum()
    }
}

/// A bitmap with a name, which lives in the image while the disk is closed.
#[derive(Debug)]
pub struct DirtyBitmap {
    /// Its UUID, as the file has it.
    pub id: [u8; 16],
    /// The bits: set means changed since the bitmap was begun.
    pub bits: Bitmap,
}

impl DirtyBitmap {
    /// A clear one.
    pub fn new(id: [u8; 16], size_bytes: u64, granularity_bytes: u64) -> DirtyBitmap {
        DirtyBitmap {
            id,
            bits: Bitmap::new(size_bytes, granularity_bytes),
        }
    }

    /// The same bits for a disk of another size; what was added counts as changed.
    pub fn resized(&self, old_bytes: u64, new_bytes: u64) -> DirtyBitmap {
        let resized = DirtyBitmap::new(self.id, new_bytes, self.bits.granularity);
        let unit = self.bits.granularity;
        let mut at = 0;
        while let Some(block) = self.bits.next(at) {
            resized.bits.set(block * unit..(block + 1) * unit);
            at = block + 1;
        }
        if new_bytes > old_bytes {
            resized.bits.set(old_bytes..new_bytes);
        }
        resized
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_found_taken_and_counted() {
        let bits = Bitmap::new(1000 * 4096 + 1, 4096);
        assert_eq!(bits.blocks(), 1001);
        bits.set(4095..4097);
        bits.set(4096 * 999..u64::MAX);
        assert_eq!(bits.count(), 4);
        assert_eq!(bits.next(2), Some(999));
        assert!(bits.any(0..1) && !bits.any(8192..4096 * 999));
        assert!(bits.take(1000) && !bits.take(1000) && !bits.take(5000));
        assert_eq!(bits.next(1000), None);
    }

    #[test]
    fn what_a_disk_gains_counts_as_changed() {
        let old = DirtyBitmap::new([7; 16], 1 << 20, 1 << 16);
        old.bits.set(0..1);
        let new = old.resized(1 << 20, 2 << 20);
        assert_eq!((new.id, new.bits.count()), ([7; 16], 17));
    }
}
