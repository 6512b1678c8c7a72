//! When to look for news instead of sleeping until they come.
//!
//! To fall asleep and be woken takes longer than many a disk's answer, above all in a virtual machine, whose
//! processors without work are given back to the host: 30 microseconds for whoever is woken, and half as
//! many for whoever wakes. As long as news come at a pace that makes it worth it, the next ones are looked for;
//! a disk that has little to do costs no processor time.

use std::time::{Duration, Instant};

/// News that are this far apart on average are looked for.
const CLOSE: Duration = Duration::from_micros(150);
/// So long; then they are waited for all the same.
const LOOKING: Duration = Duration::from_micros(100);
/// No gap counts for more, so that a pause is soon forgotten.
const LONGEST: Duration = Duration::from_millis(1);
/// The last gap's share in the average.
const SHARE: u32 = 8;

/// How closely news follow one another.
#[derive(Debug)]
pub(super) struct Pace {
    /// Average time from having nothing to do to the next news.
    gap: Duration,
    quiet_since: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            gap: LONGEST,
            quiet_since: None,
        }
    }
}

impl Pace {
    /// Something has come.
    pub fn has_news(&mut self) {
        if let Some(since) = self.quiet_since.take() {
            self.count(since.elapsed());
        }
    }

    /// Nothing has come: whether it is worth it to go on looking.
    pub fn looks_on(&mut self) -> bool {
        let since = *self.quiet_since.get_or_insert_with(Instant::now);
        self.is_close() && since.elapsed() < LOOKING
    }

    fn count(&mut self, gap: Duration) {
        self.gap = (self.gap * (SHARE - 1) + gap.min(LONGEST)) / SHARE;
    }

    fn is_close(&self) -> bool {
        self.gap < CLOSE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_closely_is_looked_for() {
        let mut pace = Pace::default();
        assert!(!pace.is_close());
        let near = Duration::from_micros(80);
        for _ in 0..40 {
            pace.count(near);
        }
        assert!(pace.is_close());
        pace.count(Duration::from_secs(3600));
        assert!(!pace.is_close());
        for _ in 0..40 {
            pace.count(near);
        }
        assert!(pace.is_close());
        // A request now and then, each with its answer soon after.
        for _ in 0..40 {
            pace.count(near);
            pace.count(LONGEST);
        }
        assert!(!pace.is_close());
    }
}
