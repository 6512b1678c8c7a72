//! Sleeps and waits of whose time only the kernel knows what is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;
use std::{io, mem};

use anyhow::{Context, Result, bail, ensure};

use super::sleep::{LONG, join, undisturbed};
use crate::{Need, Stage, Workload, proc, sys};

pub static SLEEP: Workload = Workload::new(
    "syscalls/sleep-untold",
    "a sleep without a place for what is left of it",
    |s| rest(s, libc::SYS_clock_nanosleep, sys::sleep_by_libc),
)
.needs(&[Need::File("/sys/kernel/btf/vmlinux")])
.moves(ENDING);
pub static POLL: Workload = Workload::new(
    "syscalls/poll-rest",
    "a poll that runs into its time, with all registers kept",
    |s| rest(s, libc::SYS_poll, poll_in_vain),
)
.needs(&[Need::File("/sys/kernel/btf/vmlinux")])
.moves(ENDING);
pub static FUTEX: Workload = Workload::new(
    "syscalls/futex-rest",
    "a futex wait that runs into its time",
    |s| rest(s, libc::SYS_futex, wait_in_vain),
)
.needs(&[Need::File("/sys/kernel/btf/vmlinux")])
.moves(ENDING);
pub static READY: Workload = Workload::new(
    "syscalls/poll-woken",
    "polls and futex waits with a time that something ends before",
    woken,
);
pub static STOPPED: Workload = Workload::new(
    "syscalls/stopped-waits",
    "a stopped child that was in a poll with a time, and goes on with it",
    stopped,
);

/// The call may end between two looks at the tree.
const ENDING: &[&str] = &["syscall"];

/// Waits without end as far as a run is concerned.
const FOR_EVER: Duration = Duration::from_secs(100_000);

/// What is left is not the whole time: counted is the time that the process has lived, which a busy machine
/// makes shorter at most.
fn rest(stage: &Stage, nr: i64, call: fn(Duration) -> io::Result<()>) -> Result<()> {
    const TICK: Duration = Duration::from_millis(10);
    const BEFORE_MS: u64 = 1500;
    let ticks = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&ticks);
    thread::spawn(move || {
        loop {
            thread::sleep(TICK);
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let sleeper = undisturbed(nr, move || {
        let begun = sys::clock(libc::CLOCK_MONOTONIC);
        call(LONG)?;
        let passed = sys::clock(libc::CLOCK_MONOTONIC) - begun;
        let lived = TICK * ticks.load(Ordering::Relaxed);
        // It is to be there when the tree is looked at.
        crate::stop::wait();
        Ok((passed, lived))
    })?;
    sys::pause_for(BEFORE_MS);
    stage.ready_and_wait()?;
    let (passed, lived) = join(sleeper)?;
    ensure!(passed >= LONG, "{passed:?} instead of {LONG:?}");
    ensure!(
        lived < LONG + Duration::from_millis(BEFORE_MS / 2),
        "lived {lived:?} in a call of {LONG:?}"
    );
    Ok(())
}

fn poll_in_vain(time: Duration) -> io::Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let millis = i32::try_from(time.as_millis()).map_err(io::Error::other)?;
    let (result, third) = sys::poll_and_third_argument(&reader, libc::POLLIN, millis);
    // Descriptors stay what they are, too.
    mem::forget((reader, writer));
    match (result, third) {
        (0, third) if third == i64::from(millis) => Ok(()),
        _ => Err(io::Error::other(format!(
            "poll gave {result}, and its third argument has become {third}"
        ))),
    }
}

fn wait_in_vain(time: Duration) -> io::Result<()> {
    let word = AtomicU32::new(0);
    match sys::futex_wait(&word, 0, Some(time)) {
        Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => Ok(()),
        Ok(()) => Err(io::Error::other("woken by nobody")),
        Err(error) => Err(error),
    }
}

fn woken(stage: &Stage) -> Result<()> {
    let word = Arc::new(AtomicU32::new(0));
    let (reader, writer) = sys::pipe(0)?;
    let poller = undisturbed(libc::SYS_poll, move || {
        let millis = i32::try_from(FOR_EVER.as_millis())?;
        let events = sys::poll(&reader, libc::POLLIN, millis).context("poll")?;
        Ok((events, reader))
    })?;
    let waited_for = Arc::clone(&word);
    let waiter = undisturbed(libc::SYS_futex, move || {
        sys::futex_wait(&waited_for, 0, Some(FOR_EVER)).context("the futex wait")
    })?;
    stage.ready_and_wait()?;
    sys::write(&writer, b"x")?;
    let (events, _) = join(poller)?;
    ensure!(events == libc::POLLIN, "poll gave {events:#x}");
    while sys::futex_wake(&word, 1)? == 0 {
        // It is on its way back into the call.
        sys::pause_for(1);
    }
    join(waiter)
}

fn stopped(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let child = stage.child(|stage| {
        stage.ready()?;
        let millis = i32::try_from(FOR_EVER.as_millis())?;
        let events = sys::poll(&reader, libc::POLLIN, millis).context("poll")?;
        ensure!(events == libc::POLLIN, "poll gave {events:#x}");
        Ok(())
    })?;
    let call = format!("{} ", libc::SYS_poll);
    while !proc::text(child.pid.to_string(), "syscall")?.starts_with(&call) {
        sys::pause_for(1);
    }
    sys::kill(child.pid, libc::SIGSTOP)?;
    sys::wait_status(child.pid, libc::WUNTRACED)?;
    stage.ready_and_wait()?;
    sys::kill(child.pid, libc::SIGCONT)?;
    sys::pause_for(20);
    if proc::stat(child.pid)?[3] == "Z" {
        child.reap()?;
        bail!("the poll ended early");
    }
    sys::write(&writer, b"x")?;
    child.reap()
}
