//! Maps by the numbers of images.
//!
//! A restore looks up each of thousands of files a dozen times, and the standard hasher, made for texts, took more of it
//! than the opening of a file. Numbers are mixed by a wide multiplication here, with a seed of this process, so that
//! nobody can make an image whose numbers all fall into one place.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

/// A map by numbers, or by a few of them.
pub(super) type IdMap<K, V> = HashMap<K, V, Seed>;
/// A set of numbers, or of a few of them.
pub(super) type IdSet<K> = HashSet<K, Seed>;

/// Begins with the seed of this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seed(u64);

/// Mixes numbers.
#[derive(Debug)]
pub(super) struct IdHasher(u64);

/// Odd, and without a pattern: the fraction of the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

impl Default for Seed {
    fn default() -> Seed {
        static SEED: OnceLock<u64> = OnceLock::new();
        Seed(*SEED.get_or_init(|| RandomState::new().hash_one(FACTOR)))
    }
}

impl BuildHasher for Seed {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher(self.0)
    }
}

impl IdHasher {
    fn add(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * u128::from(FACTOR);
        let halves = product.to_le_bytes();
        let (low, high) = halves.split_at(8);
        let half = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        self.0 = (half(low) ^ half(high)).rotate_left(32);
    }
}

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.add(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.add(u64::from(number));
    }

    fn write_u32(&mut self, number: u32) {
        self.add(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.add(number);
    }

    fn write_i32(&mut self, number: i32) {
        self.add(u64::from(number.cast_unsigned()));
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(u64::from_ne_bytes(
            i64::try_from(number).unwrap_or(0).to_ne_bytes(),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_a_row_fall_into_different_places() {
        // One seed in some thousands is unlucky, so these are always the same.
        let seeds = [
            0x0123_4567_89ab_cdef,
            0x5be0_cd19_137e_2179,
            0xcbbb_9d5d_c105_9ed8,
        ];
        let steps = [1u64, 2, 64, 4096, 1 << 32];
        for (seed, step) in seeds
            .into_iter()
            .flat_map(|seed| steps.map(|step| (seed, step)))
        {
            let hash = |nth: u64| Seed(seed).hash_one((7i32, nth * step));
            // Maps take the low bits for the place and the highest seven to compare.
            let low: HashSet<u64> = (0..4096).map(|nth| hash(nth) % 4096).collect();
            let high: HashSet<u64> = (0..4096).map(|nth| hash(nth) >> 57).collect();
            assert!(low.len() > 2000, "{} places for step {step}", low.len());
            assert_eq!(high.len(), 128, "step {step}");
        }
    }

    #[test]
    fn what_was_put_in_is_found() {
        let map: IdMap<(u32, u32), u32> = (0..1000).map(|nth| ((nth, 1), nth)).collect();
        assert!((0..1000).all(|nth| map.get(&(nth, 1)) == Some(&nth)));
        let set: IdSet<u32> = (0..1000).collect();
        assert!(!set.contains(&1000) && set.contains(&999));
    }
}
