//! Work on many objects of one sort, shared out among a few threads.
//!
//! What can be told about tasks and descriptors from outside is told by /proc, one object at a time, and
//! the time goes into the kernel. So several threads ask at once. Nothing here may call ptrace, which
//! answers its tracer only.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// More than a few only wait for each other.
const MAX_WORKERS: usize = 4;

/// Number of threads that work at a time.
pub fn workers() -> usize {
    static WORKERS: OnceLock<usize> = OnceLock::new();
    *WORKERS.get_or_init(|| {
        let processors = std::thread::available_parallelism();
        processors.map_or(1, usize::from).min(MAX_WORKERS)
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
    let next = AtomicUsize::new(0);
    let take_part = || {
        let mut done = Vec::new();
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(nth) else {
                return done;
            };
            done.push((nth, work(item)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..nr_workers).map(|_| scope.spawn(take_part)).collect();
        let mut done = take_part();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(nth, _)| *nth);
    done.into_iter().map(|(_, result)| result).collect()
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
    #[should_panic(expected = "the third")]
    fn a_panic_is_passed_on() {
        share_out(&[1, 2, 3, 4], 1, |item| assert!(*item != 3, "the third"));
    }
}
