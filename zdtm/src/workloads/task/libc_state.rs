//! What libc has told the kernel about a thread, and keeps in its thread-local memory.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, PAGE, Region, RobustList};
use crate::{Stage, Workload};

pub static JOIN: Workload = Workload::new(
    "task/join",
    "joining threads, by the address the kernel clears",
    join,
);
pub static ROBUST: Workload = Workload::new(
    "task/robust-list",
    "a robust futex whose owner dies afterwards",
    robust,
);
pub static TLS: Workload = Workload::new(
    "task/locks-and-locals",
    "mutexes, condition variables and thread-locals",
    tls,
);

/// One thread joins eight others; it sleeps on the word that the kernel clears when one ends.
fn join(stage: &Stage) -> Result<()> {
    let done = Arc::new(AtomicU32::new(0));
    let started = Arc::new(Barrier::new(10));
    let handles: Vec<_> = (0..8)
        .map(|_| {
            let (done, started) = (Arc::clone(&done), Arc::clone(&started));
            thread::spawn(move || {
                started.wait();
                crate::stop::wait();
                done.fetch_add(1, Ordering::SeqCst);
            })
        })
        .collect();
    let in_joiner = Arc::clone(&started);
    let joiner = thread::spawn(move || {
        in_joiner.wait();
        handles
            .into_iter()
            .filter_map(|handle| handle.join().ok())
            .count()
    });
    started.wait();
    stage.ready_and_wait()?;
    let joined = joiner.join().map_err(|_| anyhow!("the joiner panicked"))?;
    ensure!(joined == 8, "{joined} of 8 threads could be joined");
    let done = done.load(Ordering::SeqCst);
    ensure!(done == 8, "{done} of 8 threads have done their work");
    Ok(())
}

/// A task that ends with a lock held must have it marked, by the list that the kernel walks.
fn robust(stage: &Stage) -> Result<()> {
    const OWNER_DIED: u32 = 0x4000_0000;
    let shared = Region::shared(PAGE)?;
    let lock = shared.word(64);
    let child = stage.child(|stage| {
        let list = RobustList::install(shared.part(0, 64), 64)?;
        lock.store(sys::tid().unsigned_abs(), Ordering::SeqCst);
        let before = sys::robust_list()?;
        stage.ready_and_wait()?;
        let after = sys::robust_list()?;
        ensure!(
            before == after,
            "the robust list was {before:x?}, is {after:x?}"
        );
        ensure!(
            after.0 == list.head(),
            "the robust list is not the one that was set"
        );
        // Ends with the lock held.
        Ok(())
    })?;
    let own = sys::robust_list()?;
    stage.ready_and_wait()?;
    ensure!(
        sys::robust_list()? == own,
        "libc's robust list was {own:x?}"
    );
    child.finish()?;
    let word = lock.load(Ordering::SeqCst);
    ensure!(
        word & OWNER_DIED != 0,
        "the dead owner's lock is {word:#x}, not marked"
    );
    Ok(())
}

thread_local! {
    static PLAIN: Cell<u32> = const { Cell::new(0) };
    static WITH_DROP: RefCell<String> = const { RefCell::new(String::new()) };
}

fn tls(stage: &Stage) -> Result<()> {
    let pair = Arc::new((Mutex::new(0u32), Condvar::new()));
    let barrier = Arc::new(Barrier::new(5));
    let handles: Vec<_> = (1..5u32)
        .map(|index| {
            let (pair, barrier) = (Arc::clone(&pair), Arc::clone(&barrier));
            thread::spawn(move || -> Result<()> {
                PLAIN.set(index);
                WITH_DROP.with_borrow_mut(|text| text.push_str(&"x".repeat(100 * index as usize)));
                barrier.wait();
                let (mutex, condition) = &*pair;
                let mut turn = mutex.lock().map_err(|_| anyhow!("poisoned"))?;
                while *turn != index {
                    turn = condition.wait(turn).map_err(|_| anyhow!("poisoned"))?;
                }
                *turn += 1;
                condition.notify_all();
                ensure!(
                    PLAIN.get() == index,
                    "a thread-local was {index}, is {}",
                    PLAIN.get()
                );
                let length = WITH_DROP.with_borrow(String::len);
                ensure!(
                    length == 100 * index as usize,
                    "a thread-local text has {length} letters"
                );
                Ok(())
            })
        })
        .collect();
    barrier.wait();
    stage.ready_and_wait()?;
    *pair.0.lock().map_err(|_| anyhow!("poisoned"))? = 1;
    pair.1.notify_all();
    for handle in handles {
        handle.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    let turn = *pair.0.lock().map_err(|_| anyhow!("poisoned"))?;
    ensure!(turn == 5, "the last turn is {turn}");
    Ok(())
}
