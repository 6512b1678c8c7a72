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
