//! Who takes the kernel's requests: the lane, or each thread of the crew for itself.
//!
//! Small requests cost what happens around them, and the lane has the least of that. Large ones cost the
//! copying of their bytes, which several processors do better than one.
//!
//! Only the lane changes to bulk; then the channel's reads wait, and the lane keeps away from it. Whoever
//! changes back makes them return at once before the lane may read again.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;

/// With more bytes per request on average the crew takes them.
const LARGE: u32 = 256 << 10;
/// With fewer the lane does.
const SMALL: u32 = 64 << 10;
/// The last request's share in the average.
const SHARE: u32 = 8;

/// Average size of requests, and who takes them.
#[derive(Debug, Default)]
pub(super) struct Bulk {
    average: AtomicU32,
    is_on: AtomicBool,
    change: Mutex<()>,
}

impl Bulk {
    /// Whether the crew takes them.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// Counts a request. Two at a time may count as one.
    pub fn count(&self, len_bytes: u32) {
        let average = self.average.load(Ordering::Relaxed);
        let average = average - average / SHARE + len_bytes / SHARE;
        self.average.store(average, Ordering::Relaxed);
    }

    /// Whether requests are so large that the crew should take them.
    pub fn is_wanted(&self) -> bool {
        self.average.load(Ordering::Relaxed) > LARGE
    }

    /// The lane's: lets the crew take requests. From here on the lane must not.
    pub fn begin(&self, channel: &OwnedFd) -> rustix::io::Result<()> {
        let _alone = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::fcntl_setfl(channel, OFlags::empty())?;
        self.is_on.store(true, Ordering::Release);
        Ok(())
    }

    /// Changes back if requests have become small. True if it did.
    pub fn end(&self, channel: &OwnedFd) -> rustix::io::Result<bool> {
        if self.average.load(Ordering::Relaxed) >= SMALL {
            return Ok(false);
        }
        let _alone = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::fcntl_setfl(channel, OFlags::NONBLOCK)?;
        Ok(self.is_on.swap(false, Ordering::AcqRel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_requests_are_the_crews_until_they_are_small() {
        let channel = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let waits = || {
            !rustix::fs::fcntl_getfl(&channel)
                .unwrap()
                .contains(OFlags::NONBLOCK)
        };
        let bulk = Bulk::default();
        let count = |len_bytes| (0..40).for_each(|_| bulk.count(len_bytes));
        count(4096);
        assert!(!bulk.is_wanted() && !bulk.is_on());
        count(1 << 20);
        assert!(bulk.is_wanted() && !bulk.is_on());
        bulk.begin(&channel).unwrap();
        assert!(bulk.is_on() && waits());
        assert!(!bulk.end(&channel).unwrap() && bulk.is_on());
        count(4096);
        assert!(bulk.end(&channel).unwrap() && !bulk.is_on() && !waits());
        assert!(!bulk.end(&channel).unwrap());
    }
}
