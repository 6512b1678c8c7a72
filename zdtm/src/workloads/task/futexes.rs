//! Threads that sleep on futexes, and owners that die.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys::{self, FUTEX_TID, FUTEX_WAITERS, Region, RobustMutex};
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

pub static ROBUST_WAITED: Workload = Workload::new(
    "task/robust-mutex-waited",
    "threads that wait for robust mutexes whose owner dies",
    waited,
);
pub static ROBUST_KILLED: Workload = Workload::new(
    "task/robust-mutex-killed",
    "a process that is killed with a robust mutex that others share, which one waits for",
    killed,
);
pub static SEVERAL: Workload = Workload::new(
    "task/futex-waitv",
    "a thread that sleeps on several futexes, and a process on one that it shares",
    several,
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

fn waited(stage: &Stage) -> Result<()> {
    let mutexes = [false, true].map(RobustMutex::make);
    let (send, receive) = mpsc::channel();
    let locked = send.clone();
    let owner = thread::spawn(move || -> Result<()> {
        for mutex in mutexes {
            ensure!(mutex.lock() == 0, "the mutex is not free");
        }
        locked.send(0)?;
        crate::stop::wait();
        Ok(())
    });
    receive.recv()?;
    let wait_for = |mutex: &'static RobustMutex| {
        let send = send.clone();
        thread::spawn(move || -> Result<()> {
            sys::mask(libc::SIG_BLOCK, u64::MAX)?;
            send.send(sys::tid())?;
            let told = mutex.lock();
            ensure!(told == libc::EOWNERDEAD, "locking gave {told}");
            mutex.unlock();
            Ok(())
        })
    };
    let waiters = mutexes.map(wait_for);
    for _ in &waiters {
        until_asleep(receive.recv()?)?;
    }
    stage.ready_and_wait()?;
    joined(vec![owner])?;
    joined(waiters.into())
}

fn killed(stage: &Stage) -> Result<()> {
    let memory = Region::shared(sys::PAGE)?;
    let mutex = RobustMutex::make_shared(&memory);
    let owner = stage.child(move |stage| {
        ensure!(mutex.lock() == 0, "the mutex is not free");
        stage.ready_and_wait()
    })?;
    let waiter = stage.child(move |stage| {
        sys::mask(libc::SIG_BLOCK, u64::MAX)?;
        stage.ready()?;
        let told = mutex.lock();
        ensure!(told == libc::EOWNERDEAD, "locking gave {told}");
        mutex.unlock();
        Ok(())
    })?;
    let futex = format!("{} ", libc::SYS_futex);
    while !proc::text(waiter.pid, "syscall")?.starts_with(&futex) {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    sys::kill(owner.pid, libc::SIGKILL)?;
    let exit = sys::wait(owner.pid)?;
    ensure!(
        exit == sys::Exit::Signal(libc::SIGKILL),
        "the owner: {exit}"
    );
    waiter.reap()
}

fn several(stage: &Stage) -> Result<()> {
    let memory = Region::shared(sys::PAGE)?;
    let (send, receive) = mpsc::channel();
    let words = Arc::new([const { AtomicU32::new(0) }; 3]);
    let waited_for = Arc::clone(&words);
    let thread = thread::spawn(move || -> Result<()> {
        sys::mask(libc::SIG_BLOCK, u64::MAX)?;
        send.send(sys::tid())?;
        let woken = sys::futex_wait_any(&waited_for[..], 0).context("the wait")?;
        ensure!(woken == 2, "woken by word {woken}");
        Ok(())
    });
    let tid = receive.recv()?;
    let call = format!("{} ", libc::SYS_futex_waitv);
    while !proc::text(format!("{}/task/{tid}", sys::pid()), "syscall")?.starts_with(&call) {
        sys::pause_for(1);
    }
    let child = stage.child(|stage| {
        sys::mask(libc::SIG_BLOCK, u64::MAX)?;
        stage.ready()?;
        sys::futex_wait(memory.word(0), 0, None).context("the shared wait")
    })?;
    let futex = format!("{} ", libc::SYS_futex);
    while !proc::text(child.pid, "syscall")?.starts_with(&futex) {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    for word in [&words[2], memory.word(0)] {
        while sys::futex_wake(word, 1)? == 0 {
            sys::pause_for(1);
        }
    }
    joined(vec![thread])?;
    child.reap()
}
