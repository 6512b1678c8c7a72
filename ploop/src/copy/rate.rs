//! A limit of bytes per second.

use std::time::{Duration, Instant};

/// Lets bytes through at a rate, after a burst of a tenth of a second.
#[derive(Debug)]
pub struct Rate {
    bytes_per_second: u64,
    begun: Instant,
    passed: u64,
}

impl Rate {
    /// A limit; 0 is none.
    pub fn new(bytes_per_second: u64) -> Rate {
        Rate {
            bytes_per_second,
            begun: Instant::now(),
            passed: 0,
        }
    }

    /// Waits until so many more bytes may pass.
    pub fn pass(&mut self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        self.passed = self.passed.saturating_add(bytes);
        let due = self.due();
        let elapsed = self.begun.elapsed();
        if due > elapsed {
            std::thread::sleep(due - elapsed);
        } else if elapsed - due > Duration::from_secs(1) {
            // A pause earns no more than a second's burst.
            self.begun = Instant::now();
            self.passed = 0;
        }
    }

    fn due(&self) -> Duration {
        let nanos = u128::from(self.passed) * 1_000_000_000 / u128::from(self.bytes_per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_holds_and_none_does_not_wait() {
        let begun = Instant::now();
        Rate::new(0).pass(u64::MAX);
        let mut rate = Rate::new(1_000_000);
        for _ in 0..10 {
            rate.pass(10_000);
        }
        assert!(begun.elapsed() >= Duration::from_millis(100));
    }
}
