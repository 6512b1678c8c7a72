//! System V semaphores that the kernel changes back when a process ends (SEM_UNDO). The runner gives each case an
//! ipc namespace, which the tasks share with whoever dumps them.

use std::sync::Barrier;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::{Stage, Workload, sys};

pub static UNDO: Workload = Workload::new(
    "task/semaphores",
    "semaphores taken and given with SEM_UNDO, by a task and by a thread, and a task that waits for one",
    undo,
);
pub static OF_THREAD: Workload = Workload::new(
    "refusals/semaphores-of-thread",
    "a thread with changes of semaphores to undo of its own",
    of_thread,
)
.refused(&["SEM_UNDO", "only some of its threads"]);
pub static SHARED: Workload = Workload::new(
    "refusals/semaphores-shared",
    "two processes that share changes of semaphores to undo (CLONE_SYSVSEM)",
    shared,
)
.refused(&["SEM_UNDO", "other processes"]);
pub static CUT_OFF: Workload = Workload::new(
    "refusals/semaphores-cut-off",
    "a semaphore that would fall below zero if what was given with SEM_UNDO were taken back",
    cut_off,
)
.refused(&["semaphore 0 of System V semaphore set", "cut off"]);

/// More than one call changes at once.
const MANY: u16 = 75;
const LOCK: u16 = 0;

fn undo(stage: &Stage) -> Result<()> {
    let (first, second) = (sys::semaphores(MANY.into())?, sys::semaphores(2)?);
    let all: Vec<(u16, i16)> = (0..MANY).map(|number| (number, 7)).collect();
    sys::change_semaphores(first, &all, 0)?;
    sys::change_semaphores(second, &[(LOCK, 1), (1, 1)], 0)?;
    let free = (values(first, MANY)?, values(second, 2)?);
    let taker = stage.child(|stage| {
        let take = |(number, _): &(u16, i16)| (*number, if number % 2 == 0 { -2 } else { 3 });
        let changes: Vec<(u16, i16)> = all.iter().map(take).collect();
        for some in changes.chunks(30) {
            sys::change_semaphores(first, some, libc::SEM_UNDO)?;
        }
        // Given back: nothing is left to undo.
        sys::change_semaphores(first, &[(1, -3)], libc::SEM_UNDO)?;
        stage.ready_and_wait()
    })?;
    let holder = stage.child(|stage| holder(stage, second))?;
    let waiter = stage.child(|stage| waiter(stage, second))?;
    let held = (values(first, MANY)?, values(second, 2)?);
    ensure!(held.0[..2] == [5, 7] && held.1 == [0, 1], "{held:?}");
    stage.ready_and_wait()?;
    let now = (values(first, MANY)?, values(second, 2)?);
    ensure!(held == now, "the values were {held:?}, are {now:?}");
    taker.finish().context("the one that took many")?;
    let now = values(first, MANY)?;
    ensure!(now == free.0, "not undone: {now:?}");
    // Its end lets the other one have it, whose end gives it back.
    holder.finish().context("the one with threads")?;
    waiter.reap().context("the one that waited")?;
    let now = values(second, 2)?;
    ensure!(now == free.1, "not undone: {now:?}");
    sys::remove_semaphores(first)?;
    Ok(sys::remove_semaphores(second)?)
}

fn values(id: i32, len: u16) -> Result<Vec<i32>> {
    sys::semaphore_values(id, len).context("reading the values")
}

/// One thread takes the lock, for all of them, and ends; another one stays.
fn holder(stage: &Stage, id: i32) -> Result<()> {
    let over = Barrier::new(2);
    thread::scope(|scope| {
        let stays = scope.spawn(|| over.wait());
        let take = move || sys::change_semaphores(id, &[(LOCK, -1)], libc::SEM_UNDO);
        scope.spawn(take).join().expect("it does not panic")?;
        stage.ready_and_wait()?;
        over.wait();
        stays.join().expect("it does not panic");
        Ok(())
    })
}

/// Waits for the lock; what interrupts it gives EINTR, as the manual says.
fn waiter(stage: &Stage, id: i32) -> Result<()> {
    stage.ready()?;
    loop {
        match sys::change_semaphores(id, &[(LOCK, -1)], libc::SEM_UNDO) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            done => {
                done.context("waiting for the lock")?;
                ensure!(values(id, 2)? == [0, 1], "not taken");
                return Ok(());
            }
        }
    }
}

fn of_thread(stage: &Stage) -> Result<()> {
    let id = sys::semaphores(1)?;
    sys::change_semaphores(id, &[(LOCK, 1)], 0)?;
    let (taken, over) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        let own = scope.spawn(|| {
            let done = sys::unshare(libc::CLONE_SYSVSEM)
                .and_then(|()| sys::change_semaphores(id, &[(LOCK, -1)], libc::SEM_UNDO));
            taken.wait();
            over.wait();
            done
        });
        taken.wait();
        stage.ready_and_wait()?;
        over.wait();
        Ok::<_, anyhow::Error>(own.join().expect("it does not panic")?)
    })?;
    Ok(sys::remove_semaphores(id)?)
}

fn shared(stage: &Stage) -> Result<()> {
    let id = sys::semaphores(1)?;
    sys::change_semaphores(id, &[(LOCK, 3)], 0)?;
    // SAFETY: the memory is the child's own.
    let child = unsafe { sys::clone_process(libc::CLONE_SYSVSEM) }?;
    if child == 0 {
        loop {
            let _ = sys::call_plain(libc::SYS_pause, [0; 6]);
        }
    }
    sys::change_semaphores(id, &[(LOCK, -1)], libc::SEM_UNDO)?;
    stage.ready_and_wait()?;
    sys::kill(child, libc::SIGKILL)?;
    sys::wait(child)?;
    ensure!(values(id, 1)? == [2], "undone before the last has ended");
    Ok(sys::remove_semaphores(id)?)
}

fn cut_off(stage: &Stage) -> Result<()> {
    let id = sys::semaphores(1)?;
    sys::change_semaphores(id, &[(LOCK, 1)], libc::SEM_UNDO)?;
    sys::change_semaphores(id, &[(LOCK, -1)], 0)?;
    stage.ready_and_wait()?;
    ensure!(values(id, 1)? == [0], "changed");
    Ok(sys::remove_semaphores(id)?)
}
