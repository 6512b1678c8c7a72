//! Work on many objects of one sort, shared out among a few threads.
//!
//! What can be told about tasks and descriptors from outside is told by /proc, one object at a time, and
//! the time goes into the kernel. So several threads ask at once. Nothing here may call ptrace, which
//! answers its tracer only.

use std::collections::VecDeque;
use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};

use firn_sys::{Pid, helpers, sched};

/// More than a few only wait for each other.
const MAX_WORKERS: usize = 4;
/// Items that are handed over at a time: one by one, the handing over would cost as much as the work.
const BATCH: usize = 16;

/// Number of threads that work at a time.
pub fn workers() -> usize {
    static WORKERS: OnceLock<usize> = OnceLock::new();
    *WORKERS.get_or_init(|| {
        // What may be used of them is not asked: the standard library reads five files of cgroups for that.
        let allowed = sched::sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let ones = allowed.iter().map(|word| word.count_ones());
        usize::try_from(ones.sum::<u32>()).map_or(1, |nr| nr.clamp(1, MAX_WORKERS))
    })
}

/// Does `work` for every item, with the help of other threads where there are more than `grain` items, and
/// returns the results in the order of the items.
///
/// `grain` is the number of items that is worth the start of a thread.
///
/// # Panics
/// If `work` does.
pub fn share_out<T: Sync, R: Send>(
    items: &[T],
    grain: usize,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let nr_workers = workers().min(items.len().div_ceil(grain.max(1)));
    if nr_workers <= 1 {
        return items.iter().map(work).collect();
    }
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let take_part = || {
        let mut own = Vec::new();
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(nth) else { break };
            own.push((nth, work(item)));
        }
        lock(&done).append(&mut own);
    };
    helpers::beside(nr_workers - 1, &take_part, take_part);
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_unstable_by_key(|(nth, _)| *nth);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Does two things at the same time, if another thread has time for the first of them.
///
/// # Panics
/// If one of them does.
pub fn both<A: Send, B>(aside: impl FnOnce() -> A + Send, here: impl FnOnce() -> B) -> (A, B) {
    let (aside, done) = (Mutex::new(Some(aside)), Mutex::new(None));
    let take = || {
        let work = lock(&aside).take();
        if let Some(work) = work {
            let result = work();
            *lock(&done) = Some(result);
        }
    };
    let helpers = usize::from(workers() > 1);
    let result = helpers::beside(helpers, &take, || {
        let result = here();
        take();
        result
    });
    let done = lock(&done).take();
    (done.expect("done here if not aside"), result)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Does `work` for every item, with the help of other threads where there are more than `grain` items, and
/// hands the results to `take` here, one by one in the order of the items, while the others work on.
///
/// No more than `ahead` results wait at a time, for those that hold something scarce.
///
/// # Errors
/// The first one of `take`; items that nobody has begun are left out then.
///
/// # Panics
/// If `work` or `take` does.
pub fn stream<T: Sync, R: Send, E>(
    items: &[T],
    grain: usize,
    ahead: usize,
    work: impl Fn(&T) -> R + Sync,
    mut take: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let nr_workers = workers().min(items.len().div_ceil(grain.max(1)));
    if nr_workers <= 1 {
        return items.iter().map(work).try_for_each(take);
    }
    // The batch that is being taken has left the belt and counts as well.
    let batch = (ahead / 4).clamp(1, BATCH);
    let batches: Vec<&[T]> = items.chunks(batch).collect();
    let work = |items: &[T]| items.iter().map(&work).collect::<Vec<R>>();
    let belt = Belt::new(batches.len(), (ahead / batch).saturating_sub(1).max(1));
    let help = || {
        let stop = StopBelt(&belt);
        while let Some(nth) = belt.claim() {
            belt.put(nth, work(batches[nth]));
        }
        mem::forget(stop);
    };
    helpers::beside(nr_workers - 1, &help, || {
        // However this ends, by an error of `take` or a panic: nobody goes on waiting.
        let _stop = StopBelt(&belt);
        while let Some(step) = belt.next_step() {
            match step {
                Step::Take(results) => results.into_iter().try_for_each(&mut take)?,
                Step::Work(nth) => belt.put(nth, work(batches[nth])),
            }
        }
        Ok(())
    })
}

/// Results on their way from those who work to the one who takes them.
struct Belt<R> {
    state: Mutex<BeltState<R>>,
    changed: Condvar,
    len: usize,
    ahead: usize,
}

struct BeltState<R> {
    /// The first item that nobody has begun.
    next: usize,
    /// The first item whose result was not taken.
    taken: usize,
    /// Results of the items from `taken` to `next`, as far as they are there.
    waiting: VecDeque<Option<R>>,
    stopped: bool,
}

/// What the taker does next.
enum Step<R> {
    Take(R),
    Work(usize),
}

impl<R> Belt<R> {
    fn new(len: usize, ahead: usize) -> Belt<R> {
        let state = BeltState {
            next: 0,
            taken: 0,
            waiting: VecDeque::new(),
            stopped: false,
        };
        Belt {
            state: Mutex::new(state),
            changed: Condvar::new(),
            len,
            ahead,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BeltState<R>> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, BeltState<R>>) -> MutexGuard<'a, BeltState<R>> {
        self.changed.wait(state).unwrap_or_else(|e| e.into_inner())
    }

    /// The next item to work on; waits while too many results do. None when no more is to be done.
    fn claim(&self) -> Option<usize> {
        let mut state = self.lock();
        while !state.stopped && state.next < self.len {
            if let Some(nth) = state.begin(self) {
                return Some(nth);
            }
            state = self.wait(state);
        }
        None
    }

    fn put(&self, nth: usize, result: R) {
        let mut state = self.lock();
        let place = nth - state.taken;
        state.waiting[place] = Some(result);
        self.changed.notify_all();
    }

    /// What the taker does next: it takes what is there, else works, else waits.
    fn next_step(&self) -> Option<Step<R>> {
        let mut state = self.lock();
        while !state.stopped && state.taken < self.len {
            if let Some(result) = state.waiting.front_mut().and_then(Option::take) {
                state.waiting.pop_front();
                state.taken += 1;
                self.changed.notify_all();
                return Some(Step::Take(result));
            }
            if let Some(nth) = state.begin(self) {
                return Some(Step::Work(nth));
            }
            state = self.wait(state);
        }
        None
    }
}

impl<R> BeltState<R> {
    /// Begins the next item, if there is one and not too many results wait.
    fn begin(&mut self, belt: &Belt<R>) -> Option<usize> {
        let nth = self.next;
        if nth >= belt.len || nth >= self.taken + belt.ahead {
            return None;
        }
        self.next += 1;
        self.waiting.push_back(None);
        Some(nth)
    }
}

/// Stops a belt when it goes out of scope.
struct StopBelt<'a, R>(&'a Belt<R>);

impl<R> Drop for StopBelt<'_, R> {
    fn drop(&mut self) {
        self.0.lock().stopped = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_stand_in_the_order_of_the_items() {
        let items: Vec<u64> = (0..1000).collect();
        for grain in [0, 1, 10, 10_000] {
            let doubled = share_out(&items, grain, |item| item * 2);
            assert!(doubled.iter().zip(&items).all(|(two, one)| *two == one * 2));
            assert_eq!(doubled.len(), items.len());
        }
        assert!(share_out(&[] as &[u64], 1, |item| *item).is_empty());
    }

    #[test]
    fn two_things_are_done_whoever_does_them() {
        for nth in 0..100 {
            let pair = both(|| nth + 1, || both(|| nth + 2, || nth + 3));
            assert_eq!(pair, (nth + 1, (nth + 2, nth + 3)));
        }
    }

    #[test]
    fn a_stream_keeps_the_order_and_few_results_wait() {
        let items: Vec<usize> = (0..2000).collect();
        for (grain, ahead) in [(1, 1), (1, 7), (10_000, 3), (10, 5000)] {
            let (begun, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let work = |item: &usize| {
                let waiting = begun.fetch_add(1, Ordering::SeqCst) - taken.load(Ordering::SeqCst);
                assert!(waiting <= ahead, "{waiting} wait");
                *item
            };
            let mut seen = Vec::new();
            let take = |item| {
                taken.fetch_add(1, Ordering::SeqCst);
                seen.push(item);
                Ok::<_, ()>(())
            };
            stream(&items, grain, ahead, work, take).expect("no error");
            assert_eq!(seen, items);
        }
    }

    #[test]
    fn a_stream_ends_with_the_first_error() {
        let items: Vec<usize> = (0..2000).collect();
        let take = |item: usize| if item == 100 { Err(item) } else { Ok(()) };
        assert_eq!(stream(&items, 1, 8, |item| *item, take), Err(100));
    }

    #[test]
    #[should_panic(expected = "not here")]
    fn a_stream_does_not_hang_when_a_worker_panics() {
        let here = std::thread::current().id();
        let work = |_: &u32| assert!(std::thread::current().id() == here, "not here");
        // The taker gives the others time to begin.
        let take = |()| {
            std::thread::sleep(std::time::Duration::from_micros(10));
            Ok::<_, ()>(())
        };
        let _ = stream(&vec![0; 100_000], 1, 8, work, take);
        assert!(workers() > 1, "not here: there is no other thread");
    }

    #[test]
    #[should_panic(expected = "the third")]
    fn a_panic_is_passed_on() {
        share_out(&[1, 2, 3, 4], 1, |item| assert!(*item != 3, "the third"));
    }
}
