//! Threads that help for a moment, and are kept for the next time.
//!
//! What they are wanted for often takes less time than the making of a thread. And a new or woken thread may be put
//! on the very processor of whoever wants its help, although another one is idle (seen with two processors and
//! SIS_UTIL, which looks for no idle one where half of them is all that is busy): there it begins when the other one
//! sleeps. So a helper is woken on another processor than that of its master.
//!
//! ```text
//! idle ── given ── at work ── done ── idle        a helper that is idle for long ends
//!            └──── taken back, since all was done before it began ──┘
//! ```
//!
//! Source: linux kernel/sched/fair.c, select_idle_cpu; man 2 sched_setaffinity.

use std::any::Any;
use std::mem;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::sched;
use crate::{Pid, task};

/// How long an idle helper waits for something to do.
const LINGER: Duration = Duration::from_millis(250);
/// Helpers of all callers of this process at a time; whoever finds none does all alone.
const MOST: usize = 8;

/// Those that are idle.
static IDLE: Mutex<Vec<Arc<Helper>>> = Mutex::new(Vec::new());
/// All that live.
static ALIVE: AtomicUsize = AtomicUsize::new(0);

/// Number of helpers that live, at work or idle.
pub fn nr_alive() -> usize {
    ALIVE.load(Ordering::Relaxed)
}

type Work = &'static (dyn Fn() + Sync);
type Panic = Box<dyn Any + Send>;

/// Does `work` on up to `nr` other threads while `here` is done on this one, and returns when all is done. A thread
/// that has not begun when `here` is done does not begin any more, and there may be none at all: what must be done
/// has to be done by `here` in that case.
///
/// # Panics
/// If `work` or `here` does.
pub fn beside<R>(nr: usize, work: &(dyn Fn() + Sync), here: impl FnOnce() -> R) -> R {
    // SAFETY: only the lifetime differs. No helper uses the reference after `Party` has ended, which it does in this
    // very function, by its Drop where `here` panics.
    let work = unsafe { mem::transmute::<&(dyn Fn() + Sync), Work>(work) };
    let mut party = Party(Vec::new());
    while party.0.len() < nr
        && let Some(helper) = Helper::give(work)
    {
        party.0.push(helper);
    }
    let result = here();
    match party.end() {
        Some(panic) => panic::resume_unwind(panic),
        None => result,
    }
}

/// Helpers that have something to do.
struct Party(Vec<Arc<Helper>>);

impl Party {
    /// Waits until nobody is at work.
    fn end(&mut self) -> Option<Panic> {
        let mut first = None;
        for helper in self.0.drain(..) {
            let panic = helper.end();
            first = first.or(panic);
            lock(&IDLE).push(helper);
        }
        first
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.end();
    }
}

enum State {
    Idle,
    Given(Work),
    AtWork,
    Done(Option<Panic>),
}

struct Helper {
    state: Mutex<State>,
    changed: Condvar,
    seat: Seat,
}

impl Helper {
    /// Wakes an idle helper or makes one; None where there are enough, or no more can be made.
    fn give(work: Work) -> Option<Arc<Helper>> {
        let idle = lock(&IDLE).pop();
        if let Some(helper) = idle {
            *lock(&helper.state) = State::Given(work);
            helper.seat.wake_apart(|| helper.changed.notify_all());
            return Some(helper);
        }
        let helper = Arc::new(Helper {
            state: Mutex::new(State::Given(work)),
            changed: Condvar::new(),
            seat: Seat::default(),
        });
        if ALIVE.fetch_add(1, Ordering::Relaxed) >= MOST {
            ALIVE.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let its = Arc::clone(&helper);
        let named = thread::Builder::new().name("firn-helper".to_owned());
        match named.spawn(move || its.live()) {
            Ok(thread) => {
                sched::start_apart(thread.as_pthread_t());
                Some(helper)
            }
            Err(_) => {
                ALIVE.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }

    fn live(&self) {
        while let Some(work) = self.next() {
            let result = panic::catch_unwind(AssertUnwindSafe(work));
            self.seat.take();
            *lock(&self.state) = State::Done(result.err());
            self.changed.notify_all();
        }
        ALIVE.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits for something to do; None when it has been idle for long.
    fn next(&self) -> Option<Work> {
        let mut state = lock(&self.state);
        loop {
            if let State::Given(work) = *state {
                *state = State::AtWork;
                return Some(work);
            }
            let waited = self.changed.wait_timeout(state, LINGER);
            let (again, timeout) = waited.unwrap_or_else(|e| e.into_inner());
            state = again;
            if timeout.timed_out() {
                drop(state);
                let mut idle = lock(&IDLE);
                // Whoever has taken it from there will give it something.
                if let Some(at) = idle.iter().position(|helper| std::ptr::eq(&**helper, self)) {
                    idle.swap_remove(at);
                    return None;
                }
                drop(idle);
                state = lock(&self.state);
            }
        }
    }

    /// Takes back what it has not begun, or waits until it has done it.
    fn end(&self) -> Option<Panic> {
        let mut state = lock(&self.state);
        loop {
            match mem::replace(&mut *state, State::Idle) {
                State::Idle | State::Given(_) => return None,
                State::Done(panic) => return panic,
                State::AtWork => *state = State::AtWork,
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// Where a thread was when it began to wait, for whoever wakes it.
#[derive(Debug)]
pub struct Seat {
    tid: AtomicI32,
    cpu: AtomicI32,
}

impl Default for Seat {
    fn default() -> Seat {
        Seat {
            tid: AtomicI32::new(0),
            cpu: AtomicI32::new(-1),
        }
    }
}

impl Seat {
    /// Notes where the calling thread is, which is about to wait.
    pub fn take(&self) {
        self.tid.store(task::gettid().raw(), Ordering::Relaxed);
        self.cpu
            .store(sched::current_cpu().unwrap_or(-1), Ordering::Relaxed);
    }

    /// Wakes the thread by `wake`, on another processor than the caller's if it was there and may run elsewhere.
    pub fn wake_apart<R>(&self, wake: impl FnOnce() -> R) -> R {
        let cpu = self.cpu.load(Ordering::Relaxed);
        if cpu < 0 || sched::current_cpu() != Some(cpu) {
            return wake();
        }
        let tid = Pid::from_raw(self.tid.load(Ordering::Relaxed));
        sched::kept_off(tid, cpu, wake)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_take_part_and_end_before_the_call_does() {
        for round in 0..200 {
            let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let take_part = || {
                while next.fetch_add(1, Ordering::Relaxed) < 100 {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            };
            beside(round % 4, &take_part, take_part);
            assert_eq!(done.load(Ordering::Relaxed), 100);
        }
    }

    #[test]
    fn helpers_have_helpers() {
        let done = AtomicUsize::new(0);
        let leaf = || {
            done.fetch_add(1, Ordering::Relaxed);
        };
        let branch = || beside(3, &leaf, leaf);
        beside(3, &branch, branch);
        assert!(done.load(Ordering::Relaxed) >= 1);
    }

    #[test]
    fn a_panic_of_a_helper_is_passed_on_and_helpers_go_on() {
        let begun = AtomicUsize::new(0);
        let fails = || {
            begun.fetch_add(1, Ordering::SeqCst);
            panic!("as it should");
        };
        let until_begun = || {
            // Where no helper can be had there is nothing to be seen.
            for _ in 0..1000 {
                if begun.load(Ordering::SeqCst) > 0 {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
        };
        let result = panic::catch_unwind(|| beside(1, &fails, until_begun));
        assert_eq!(result.is_err(), begun.load(Ordering::SeqCst) > 0);
        all_take_part_and_end_before_the_call_does();
    }

    #[test]
    fn a_panic_here_waits_for_the_helpers() {
        let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let slow = || {
            begun.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(20));
            ended.fetch_add(1, Ordering::SeqCst);
        };
        let result = panic::catch_unwind(|| beside(2, &slow, || panic!("as it should")));
        assert!(result.is_err());
        assert_eq!(begun.load(Ordering::SeqCst), ended.load(Ordering::SeqCst));
    }

    #[test]
    fn a_thread_that_was_woken_apart_may_run_everywhere_again() {
        let me = Pid::from_raw(0);
        let before = sched::sched_getaffinity(me).expect("own mask");
        let seat = Seat::default();
        seat.take();
        // The caller itself: kept off its processor, it moves to another one where there is one.
        seat.wake_apart(|| ());
        assert_eq!(sched::sched_getaffinity(me).expect("own mask"), before);
    }
}
