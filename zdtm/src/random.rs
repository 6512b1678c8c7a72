//! Numbers by chance that are the same whenever the seed is, so that a failure comes again.

use anyhow::{Context, Result};

/// xorshift64*.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Small seeds are too much alike, so they are spread.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The seed in `FIRN_ZDTM_SEED`, to look further than the usual run does, or else 1; and its numbers.
    pub fn chosen() -> Result<(u64, Random)> {
        let seed = match std::env::var("FIRN_ZDTM_SEED") {
            Ok(seed) => seed.parse().context("FIRN_ZDTM_SEED is no number")?,
            Err(_) => 1,
        };
        Ok((seed, Random::new(seed)))
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below a limit that is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 33) % limit
    }

    /// An index of something that is not empty.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("below a length")
    }
}
