//! Tasks stopped by SIGSTOP stay stopped, and go on at SIGCONT.

use std::sync::atomic::Ordering;
use std::thread;

use anyhow::{Result, ensure};

use crate::sys::{self, Region};
use crate::{Stage, Workload, proc};

pub static CHILD: Workload = Workload::new("tree/stopped", "a child stopped by SIGSTOP", |s| {
    stopped(s, 0)
});
pub static THREADS: Workload = Workload::new(
    "tree/stopped-threads",
    "a stopped child with four threads",
    |s| stopped(s, 4),
);

pub static TOLD: Workload = Workload::new(
    "tree/stop-told",
    "a stopped child whose stop its parent has waited for",
    |s| known(s, Known::Told),
);
pub static UNTOLD: Workload = Workload::new(
    "tree/stop-untold",
    "a child stopped by SIGTSTP whose stop its parent can still wait for",
    |s| known(s, Known::Untold),
);
pub static GOING_ON: Workload = Workload::new(
    "tree/continued-untold",
    "a child that goes on after a stop, for which its parent can still wait",
    |s| known(s, Known::GoingOn),
);

fn stopped(stage: &Stage, threads: usize) -> Result<()> {
    let shared = Region::shared(sys::PAGE)?;
    let counter = shared.word(0);
    let child = stage.child(|stage| {
        for _ in 0..threads {
            thread::spawn(crate::stop::wait);
        }
        stage.ready()?;
        while !stage.stopping() {
            counter.fetch_add(1, Ordering::SeqCst);
            sys::pause_for(1);
        }
        Ok(())
    })?;
    sys::kill(child.pid, libc::SIGSTOP)?;
    let (pid, status) = sys::wait_status(child.pid, libc::WUNTRACED)?;
    ensure!(
        pid == child.pid && libc::WIFSTOPPED(status),
        "the child did not stop"
    );
    let before = counter.load(Ordering::SeqCst);
    stage.ready_and_wait()?;
    let state = proc::stat(child.pid)?[3].clone();
    ensure!(state == "T", "the child was stopped, is in state {state}");
    let now = counter.load(Ordering::SeqCst);
    ensure!(
        now == before,
        "the stopped child has counted from {before} to {now}"
    );
    sys::kill(child.pid, libc::SIGCONT)?;
    while counter.load(Ordering::SeqCst) == before {
        sys::pause_for(1);
    }
    child.finish()
}

/// Three ways in which a child has stopped, and what its parent knows of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It has waited for the stop.
    Told,
    /// It could still wait for it.
    Untold,
    /// It could wait for the child's going on, having been told of the stop.
    GoingOn,
}

/// SIGCHLD is blocked, so that it stays pending where it was sent and shows where it was not.
fn known(stage: &Stage, known: Known) -> Result<()> {
    sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGCHLD))?;
    let child = stage.child(|stage| {
        // In a group of its own, as a job of a shell is; that of its parent is orphaned, where nobody stops.
        sys::setpgid(0, 0)?;
        stage.ready_and_wait()
    })?;
    let stop = libc::SIGTSTP;
    sys::kill(child.pid, stop)?;
    while proc::stat(child.pid)?[3] != "T" {
        sys::pause_for(1);
    }
    if known != Known::Untold {
        take_sigchld()?;
        expect_stop(child.pid, stop)?;
    }
    if known == Known::GoingOn {
        sys::kill(child.pid, libc::SIGCONT)?;
        while proc::stat(child.pid)?[3] == "T" {
            sys::pause_for(1);
        }
        take_sigchld()?;
    }
    let pending = sys::pending()?;
    stage.ready_and_wait()?;
    let found = sys::pending()?;
    ensure!(
        found == pending,
        "pending signals were {pending:#x}, are {found:#x}"
    );
    let all = libc::WUNTRACED | libc::WCONTINUED | libc::WNOHANG;
    if known == Known::Untold {
        expect_stop(child.pid, stop)?;
    }
    if known == Known::GoingOn {
        let (pid, status) = sys::wait_status(child.pid, all)?;
        ensure!(
            pid == child.pid && libc::WIFCONTINUED(status),
            "wait tells of {pid}: {status:#x}, not that the child goes on"
        );
    }
    let (pid, status) = sys::wait_status(child.pid, all)?;
    ensure!(pid == 0, "wait tells once more of the child: {status:#x}");
    sys::kill(child.pid, libc::SIGCONT)?;
    child.finish()
}

fn take_sigchld() -> Result<()> {
    let set = sys::bit(libc::SIGCHLD);
    while sys::pending()? & set == 0 {
        sys::pause_for(1);
    }
    sys::take_pending(set)?;
    Ok(())
}

fn expect_stop(child: i32, signal: i32) -> Result<()> {
    let (pid, status) = sys::wait_status(child, libc::WUNTRACED | libc::WNOHANG)?;
    let is_stop = libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == signal;
    ensure!(
        pid == child && is_stop,
        "wait tells of {pid}: {status:#x}, not of a stop by signal {signal}"
    );
    Ok(())
}
