//! Threads that sleep on futexes, and owners that die.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys::{self, FUTEX_TID, FUTEX_WAITERS, RobustMutex};
use crate::{Stage, Workload, proc};

pub static PLAIN: Workload = Workload::new(
    "task/futex",
    "threads that sleep on a futex, with and without a time limit",
    plain,
);
pub static PRIORITY: Workload = Workload::new(
    "task/futex-pi",
    "a queue for a futex that passes on priority",
    priority,
);
pub static ROBUST: Workload = Workload::new(
    "task/robust-mutex",
    "a thread that dies with a robust mutex",
    |s| robust(s, false),
);
pub static ROBUST_PRIORITY: Workload = Workload::new(
    "task/robust-mutex-pi",
    "a thread that dies with a robust mutex that passes on priority",
    |s| robust(s, true),
);

/// Waits until a thread sleeps in a futex call.
fn until_asleep(tid: i32) -> Result<()> {
    let futex = format!("{} ", libc::SYS_futex);
    while !proc::text(format!("{}/task/{tid}", sys::pid()), "syscall")?.starts_with(&futex) {
        sys::pause_for(1);
    }
    Ok(())
}

fn joined(threads: Vec<thread::JoinHandle<Result<()>>>) -> Result<()> {
    let mut all = threads.into_iter();
    all.try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
}

fn plain(stage: &Stage) -> Result<()> {
    let word = Arc::new(AtomicU32::new(7));
    let (send, receive) = mpsc::channel();
    let limits = [None, Some(Duration::from_secs(10_000)), None];
    let threads: Vec<_> = limits
        .into_iter()
        .map(|limit| {
            let (word, send) = (Arc::clone(&word), send.clone());
            thread::spawn(move || {
                // SIGTERM is for the main thread, so that no wait ends early.
                sys::mask(libc::SIG_BLOCK, u64::MAX)?;
                send.send(sys::tid())?;
                sys::futex_wait(&word, 7, limit).context("the wait ended by itself")
            })
        })
        .collect();
    for _ in &threads {
        until_asleep(receive.recv()?)?;
    }
    stage.ready_and_wait()?;
    let mut woken = 0;
    while woken < threads.len() {
        // A thread that is on its way back into the call is woken by the next round.
        woken += usize::try_from(sys::futex_wake(&word, 1)?)?;
    }
    joined(threads)
}

fn priority(stage: &Stage) -> Result<()> {
    let word = Arc::new(AtomicU32::new(0));
    sys::lock_pi(&word)?;
    let (send, receive) = mpsc::channel();
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (word, send) = (Arc::clone(&word), send.clone());
            thread::spawn(move || {
                sys::mask(libc::SIG_BLOCK, u64::MAX)?;
                let tid = sys::tid();
                send.send(tid)?;
                sys::lock_pi(&word).context("taking the futex")?;
                let owner = word.load(Ordering::SeqCst) & FUTEX_TID;
                ensure!(
                    owner == tid.unsigned_abs(),
                    "thread {tid} has it, the word says {owner}"
                );
                sys::unlock_pi(&word).context("handing the futex on")
            })
        })
        .collect();
    for _ in &threads {
        until_asleep(receive.recv()?)?;
    }
    let own = sys::tid().unsigned_abs();
    stage.ready_and_wait()?;
    let found = word.load(Ordering::SeqCst);
    ensure!(
        found == own | FUTEX_WAITERS,
        "the word is {found:#x}, the owner is {own:#x}"
    );
    sys::unlock_pi(&word).context("handing the futex on")?;
    joined(threads)?;
    let left = word.load(Ordering::SeqCst);
    ensure!(left & FUTEX_TID == 0, "the futex is still owned: {left:#x}");
    Ok(())
}

fn robust(stage: &Stage, inherit: bool) -> Result<()> {
    let mutex = RobustMutex::make(inherit);
    let (send, receive) = mpsc::channel();
    let owner = thread::spawn(move || -> Result<()> {
        ensure!(mutex.lock() == 0, "the mutex is not free");
        send.send(())?;
        crate::stop::wait();
        // Ends with the mutex locked.
        Ok(())
    });
    receive.recv()?;
    stage.ready_and_wait()?;
    let told = mutex.lock();
    ensure!(
        told == libc::EOWNERDEAD,
        "locking gave {told} after the owner's death"
    );
    mutex.unlock();
    joined(vec![owner])
}
