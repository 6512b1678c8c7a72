//! Moving a ring's counters to where they were. The kernel counts requests and completions, and lets nobody set the
//! counters, so it gets as many of them: requests that do nothing, with and without a completion, and
//! completions that come from another ring.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use firn_proto::FirnUringEntry;
use firn_sys::Errno;
use firn_sys::io_uring::{self, Params, request, setup};

use super::layout::{self, Layout, number};
use super::memory::Memory;

/// Requests a second, about; a ring with few entries takes longer.
const A_SECOND: u64 = 4_000_000;
/// This long a wait is said before, in seconds.
const MOMENT: u64 = 5;
/// More than this is refused: a restore would take more than ten minutes.
const MAX: u64 = 3 << 30;
const HELPER_ENTRIES: u32 = 256;
/// How long the thread that submits may take for one round.
const PATIENCE: Duration = Duration::from_secs(10);

/// What moves the counters of a new ring, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turns {
    /// Requests with a completion each.
    completed: u32,
    /// Requests without.
    silent: u32,
    /// Completions without a request.
    extra: u32,
}

impl Turns {
    /// For so many requests taken and completions put, each modulo 2^32.
    pub(super) fn to(taken: u32, completed: u32) -> Turns {
        let by_requests = Turns {
            completed,
            silent: taken.wrapping_sub(completed),
            extra: 0,
        };
        let by_completions = Turns {
            completed: taken,
            silent: 0,
            extra: completed.wrapping_sub(taken),
        };
        match by_requests.total() <= by_completions.total() {
            true => by_requests,
            false => by_completions,
        }
    }

    /// For the ring of an image, whose requests in flight come later.
    pub(super) fn of(ring: &FirnUringEntry) -> Turns {
        let in_flight = u32::try_from(ring.requests.len()).unwrap_or(u32::MAX);
        Turns::to(ring.sq_head.wrapping_sub(in_flight), first_repeated(ring))
    }

    /// Number of requests.
    pub(super) fn total(self) -> u64 {
        u64::from(self.completed) + u64::from(self.silent) + u64::from(self.extra)
    }
}

/// Index of the first completion that tells of what was told before, or of the one behind the last without any.
pub(super) fn first_repeated(ring: &FirnUringEntry) -> u32 {
    let told = ring.requests.iter().filter(|request| request.is_told());
    ring.cq_tail
        .wrapping_sub(u32::try_from(told.count()).unwrap_or(u32::MAX))
}

/// What is to be said of so many requests of rings: that a restore takes long.
pub(super) fn warning(total: u64) -> Option<String> {
    let seconds = total / A_SECOND;
    (seconds >= MOMENT).then(|| {
        format!("to restore an io_uring ring after {total} requests takes about {seconds} seconds")
    })
}

/// Whether it takes too long.
pub(super) fn is_too_many(total: u64) -> bool {
    total > MAX
}

impl Memory {
    /// Moves the counters of a new ring, whose memory this is.
    ///
    /// # Errors
    /// The kernel refuses one of the requests.
    pub(super) fn turn(&self, fd: &OwnedFd, turns: Turns) -> Result<(), Errno> {
        self.fill_with(request::NOP, 0);
        self.submit(fd, turns.completed)?;
        self.fill_with(request::NOP, request::SKIP_SUCCESS);
        self.submit(fd, turns.silent)?;
        if turns.extra == 0 {
            return Ok(());
        }
        self.receive(fd, turns.extra)
    }

    /// Has so many completions put into the ring by messages of another one.
    pub(super) fn receive(&self, fd: &OwnedFd, nr: u32) -> Result<(), Errno> {
        let shape = Layout::new(HELPER_ENTRIES, 2 * HELPER_ENTRIES, 0).expect("possible");
        let helper = io_uring::create(Params {
            sq_entries: HELPER_ENTRIES,
            ..Params::default()
        })?;
        if !shape.fits(&helper) {
            return Err(Errno::EINVAL);
        }
        let memory = Memory::map(&helper.fd, shape)?;
        memory.fill_with(request::MSG_RING, request::SKIP_SUCCESS);
        memory.fill_descriptors(fd.as_raw_fd());
        let mut left = nr;
        while left > 0 {
            let part = left.min(self.layout.cq_entries).min(HELPER_ENTRIES);
            let before = self.word(layout::CQ_TAIL);
            memory.submit(&helper.fd, part)?;
            if self.word(layout::CQ_TAIL).wrapping_sub(before) != part {
                return Err(Errno::EIO);
            }
            self.take_all();
            left -= part;
        }
        Ok(())
    }

    /// Has so many entries taken, and their completions with them. The tail may be far ahead: the kernel takes
    /// no more at once than there are entries.
    fn submit(&self, fd: &OwnedFd, nr: u32) -> Result<(), Errno> {
        if self.layout.has(setup::SQPOLL) {
            return self.submit_by_thread(fd, nr);
        }
        let tail = self.word(layout::SQ_TAIL).wrapping_add(nr);
        self.set_word(layout::SQ_TAIL, tail);
        let mut left = nr;
        while left > 0 {
            let taken = io_uring::submit(fd, left.min(self.layout.sq_entries))?;
            if taken == 0 || taken > left {
                return Err(Errno::EIO);
            }
            left -= taken;
            self.take_all();
        }
        Ok(())
    }

    /// The same where a thread of the kernel submits: it takes whatever it sees, and puts completions before it says
    /// so.
    fn submit_by_thread(&self, fd: &OwnedFd, nr: u32) -> Result<(), Errno> {
        let most = self.layout.sq_entries.min(self.layout.cq_entries);
        let (mut left, mut tail) = (nr, self.word(layout::SQ_TAIL));
        while left > 0 {
            let part = left.min(most);
            tail = tail.wrapping_add(part);
            self.set_word(layout::SQ_TAIL, tail);
            self.await_word(fd, |memory| memory.word(layout::SQ_HEAD) == tail)?;
            self.take_all();
            left -= part;
        }
        Ok(())
    }

    /// Wakes the thread that submits until something has come of it.
    fn await_word(&self, fd: &OwnedFd, is_done: impl Fn(&Memory) -> bool) -> Result<(), Errno> {
        let begun = Instant::now();
        while !is_done(self) {
            if self.is_asleep() {
                io_uring::wake(fd)?;
            }
            if begun.elapsed() > PATIENCE {
                return Err(Errno::ETIMEDOUT);
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits until the thread that submits sleeps, which it does after so many milliseconds: then nothing is taken
    /// that is put into the ring.
    pub(super) fn await_sleep(&self, idle: u32) -> Result<(), Errno> {
        let patience = PATIENCE + Duration::from_millis(u64::from(idle));
        let begun = Instant::now();
        while !self.is_asleep() {
            if begun.elapsed() > patience {
                return Err(Errno::ETIMEDOUT);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether the thread that submits sleeps.
    pub(super) fn is_asleep(&self) -> bool {
        const NEED_WAKEUP: u32 = 1;
        self.word(layout::SQ_FLAGS) & NEED_WAKEUP != 0
    }

    fn take_all(&self) {
        self.set_word(layout::CQ_HEAD, self.word(layout::CQ_TAIL));
    }

    /// Makes every entry such a request, in order.
    fn fill_with(&self, opcode: u8, flags: u8) {
        for nth in 0..self.layout.sq_entries {
            self.put_entry(nth, &[opcode, flags]);
        }
    }

    fn fill_descriptors(&self, fd: i32) {
        const FD: usize = 4;
        for nth in 0..self.layout.sq_entries {
            let at = self.layout.entry_len() * number(nth);
            self.entries.write(at + FD, &fd.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_way_is_taken() {
        let turns = |completed, silent, extra| Turns {
            completed,
            silent,
            extra,
        };
        assert_eq!(Turns::to(7, 7), turns(7, 0, 0));
        assert_eq!(Turns::to(9, 7), turns(7, 2, 0));
        assert_eq!(Turns::to(7, 9), turns(7, 0, 2));
        // The completions have gone round once more than the requests.
        assert_eq!(Turns::to(u32::MAX, 5), turns(5, u32::MAX - 5, 0));
        assert_eq!(Turns::to(5, u32::MAX).total(), u64::from(u32::MAX));
        assert_eq!(Turns::to(5, u32::MAX), turns(5, 0, u32::MAX - 5));
    }

    #[test]
    fn long_waits_are_announced() {
        assert_eq!(warning(1_000_000), None);
        assert!(warning(40_000_000).expect("long").contains("10 seconds"));
        assert!(is_too_many(u64::from(u32::MAX)) && !is_too_many(1 << 30));
    }
}
