//! Looking out for what comes within microseconds from another processor, rather than sleeping until it is there.
//!
//! To wake a processor that sleeps takes longer than most of what is waited for, the more so in a virtual machine, where
//! both sides go through the hypervisor (20 to 40 µs there). Where what is waited for needs the very processor on which
//! this thread looks out, or all are busy, looking out is in vain.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A place to look out from for one sort of things. Once that has been in vain, nobody does it any more.
#[derive(Debug, Default)]
pub struct Lookout {
    was_in_vain: AtomicBool,
}

impl Lookout {
    /// One that has not been used.
    pub const fn new() -> Lookout {
        Lookout {
            was_in_vain: AtomicBool::new(false),
        }
    }

    /// Looks until there is something, or for as long as the `limit`; None means that it is time to sleep.
    pub fn watch<T>(&self, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let begun = Instant::now();
        loop {
            let seen = look();
            if seen.is_some() || self.was_in_vain.load(Ordering::Relaxed) {
                return seen;
            }
            if begun.elapsed() >= limit {
                self.was_in_vain.store(true, Ordering::Relaxed);
                return None;
            }
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_looked_out_for_once() {
        let lookout = Lookout::new();
        let seen = lookout.watch(Duration::from_micros(10), || None::<()>);
        assert_eq!(seen, None);
        let mut looks = 0;
        let count = || {
            looks += 1;
            None::<()>
        };
        assert_eq!(lookout.watch(Duration::MAX, count), None);
        assert_eq!(looks, 1);
        assert_eq!(lookout.watch(Duration::ZERO, || Some(1)), Some(1));
    }
}
