//! Which inodes have locks, told by /proc/locks for all files of the system at once.
//!
//! A reader of it waits for a grace period of RCU, 3 to 16 ms, for which no stopped tree should wait. One that comes
//! soon after another reader does not wait (10 to 30 us); so a thread reads it time and again from the survey on,
//! until it is no longer wanted.
//!
//! Only the first pid namespace sees all locks: elsewhere those are left out whose taker is outside or gone, though
//! their open file lives on, so that the list is no use there.
//!
//! Source: linux fs/locks.c, locks_start, locks_show, locks_translate_pid; kernel/rcu/sync.c.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use firn_sys::{Pid, procfs};

use super::locks;

/// Between two readings; within it nobody has to wait.
const INTERVAL: Duration = Duration::from_millis(2);
/// After that long without a reading the next one may have to wait.
const STALE: Duration = Duration::from_millis(8);
/// What /proc/PID/ns/pid says of the first namespace. Source: linux include/linux/proc_ns.h, PROC_PID_INIT_INO.
const FIRST_NAMESPACE: &str = "pid:[4026531836]";

/// A thread that keeps /proc/locks quick to read; it ends soon after this is dropped.
#[derive(Debug)]
pub struct LockWatch {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last_read: Option<Instant>,
    is_over: bool,
}

impl LockWatch {
    /// Begins to read; None where the list would not be complete.
    pub fn begin() -> Option<LockWatch> {
        if !sees_all() {
            return None;
        }
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let named = std::thread::Builder::new().name("firn-locks".to_owned());
        named.spawn(move || theirs.keep_reading()).ok()?;
        Some(LockWatch { shared })
    }

    /// Waits until the list can be read quickly, or for so long.
    pub fn wait(&self, at_most: Duration) {
        let waits = |state: &mut State| state.last_read.is_none() && !state.is_over;
        let state = self.shared.lock();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, at_most, waits);
        drop(waited);
    }

    /// The numbers of all inodes with locks at this moment; None if it would take long to find out, or can't be.
    pub fn locked_inodes(&self) -> Option<HashSet<u64>> {
        let last_read = self.shared.lock().last_read?;
        if last_read.elapsed() > STALE {
            return None;
        }
        let text = procfs::read_to_string("/proc/locks").ok()?;
        Some(locks::inodes_of(&text))
    }
}

impl Drop for LockWatch {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn keep_reading(&self) {
        loop {
            let is_read = procfs::read("/proc/locks").is_ok();
            let mut state = self.lock();
            state.is_over |= !is_read;
            if state.is_over {
                self.changed.notify_all();
                return;
            }
            state.last_read = Some(Instant::now());
            self.changed.notify_all();
            let goes_on = |state: &mut State| !state.is_over;
            let rested = self.changed.wait_timeout_while(state, INTERVAL, goes_on);
            drop(rested);
        }
    }
}

/// Whether both this process and its /proc are of the first pid namespace.
fn sees_all() -> bool {
    let leads_to = |link: &str, target: &str| {
        std::fs::read_link(link).is_ok_and(|there| there.as_os_str() == target)
    };
    leads_to("/proc/self/ns/pid", FIRST_NAMESPACE)
        && leads_to("/proc/self", &Pid::this().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_seen_by_its_inode() {
        use std::os::unix::fs::MetadataExt;
        let Some(watch) = LockWatch::begin() else {
            eprintln!("not in the first pid namespace: /proc/locks is not complete here");
            return;
        };
        let file = std::fs::File::open("/proc/self/exe").expect("own executable");
        file.lock_shared().expect("a lock");
        watch.wait(Duration::from_secs(60));
        let found = watch.locked_inodes().expect("it was read just now");
        assert!(found.contains(&file.metadata().expect("open").ino()));
    }
}
