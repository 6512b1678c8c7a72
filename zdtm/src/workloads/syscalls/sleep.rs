//! Sleeping for a time.

use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};

use super::blocked::{
    again_when_interrupted, check_interruptions, note_interruption, wait_until_in,
};
use crate::{Stage, Workload, sys};

pub static NANOSLEEP: Workload = Workload::new(
    "syscalls/nanosleep",
    "a nanosleep that ends after the restore",
    |s| one_sleep(s, libc::SYS_nanosleep, sys::nanosleep),
);
pub static CLOCK_NANOSLEEP: Workload = Workload::new(
    "syscalls/clock-nanosleep",
    "a relative sleep on the monotonic clock",
    |s| {
        one_sleep(s, libc::SYS_clock_nanosleep, |time| {
            sys::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, time)
        })
    },
);
pub static ABSOLUTE: Workload = Workload::new(
    "syscalls/sleep-until",
    "sleeps until a time on two clocks",
    absolute,
);
pub static REPEATED: Workload = Workload::new(
    "syscalls/short-sleeps",
    "many short sleeps in a row",
    repeated,
);
pub static TIMEOUTS: Workload = Workload::new(
    "syscalls/timeouts",
    "poll and futex that run into their time",
    timeouts,
);

pub(super) const LONG: Duration = Duration::from_millis(2500);

type Sleep = fn(Duration) -> Result<(), (io::Error, Duration)>;

/// A thread that the verdict's signal cannot wake; returns once it sleeps in the call `nr`.
pub(super) fn undisturbed<T: Send + 'static>(
    nr: i64,
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<thread::JoinHandle<Result<T>>> {
    let (send, receive) = mpsc::channel();
    let handle = thread::spawn(move || {
        sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGTERM))?;
        send.send(sys::tid())?;
        drop(send);
        body()
    });
    wait_until_in(receive.recv()?, nr)?;
    Ok(handle)
}

pub(super) fn join<T>(handle: thread::JoinHandle<Result<T>>) -> Result<T> {
    handle
        .join()
        .map_err(|_| anyhow!("a thread panicked, see the log"))?
}

/// Sleeps for `time` altogether, however often the call comes back early, and checks that what it says
/// is left fits the clock.
fn sleep_out(sleep: Sleep, time: Duration) -> Result<()> {
    const SLACK: Duration = Duration::from_millis(50);
    let start = sys::clock(libc::CLOCK_MONOTONIC);
    let mut left = time;
    while let Err((error, now_left)) = sleep(left) {
        ensure!(
            error.raw_os_error() == Some(libc::EINTR),
            "the sleep failed: {error}"
        );
        note_interruption();
        ensure!(
            now_left <= left,
            "slept on {left:?} and {now_left:?} are left"
        );
        let passed = sys::clock(libc::CLOCK_MONOTONIC) - start;
        ensure!(
            now_left + passed + SLACK >= time,
            "after {passed:?} of {time:?}, {now_left:?} left"
        );
        left = now_left;
    }
    let passed = sys::clock(libc::CLOCK_MONOTONIC) - start;
    ensure!(
        passed + SLACK >= time,
        "slept {passed:?} instead of {time:?}"
    );
    Ok(())
}

fn one_sleep(stage: &Stage, nr: i64, sleep: Sleep) -> Result<()> {
    let sleeper = undisturbed(nr, move || sleep_out(sleep, LONG))?;
    stage.ready_and_wait()?;
    join(sleeper)?;
    check_interruptions(stage)
}

/// A sleep until a time restarts from its arguments: no EINTR, and never early.
fn absolute(stage: &Stage) -> Result<()> {
    let sleepers = [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME].map(|clock| {
        let until = sys::clock(clock) + LONG;
        undisturbed(libc::SYS_clock_nanosleep, move || {
            if let Err((error, _)) = sys::clock_nanosleep(clock, libc::TIMER_ABSTIME, until) {
                bail!("the sleep on clock {clock} failed: {error}");
            }
            let now = sys::clock(clock);
            ensure!(now >= until, "clock {clock}: woke {:?} early", until - now);
            Ok(())
        })
    });
    let sleepers = sleepers.into_iter().collect::<Result<Vec<_>>>()?;
    stage.ready_and_wait()?;
    sleepers.into_iter().try_for_each(join)
}

fn repeated(stage: &Stage) -> Result<()> {
    stage.ready()?;
    while !stage.stopping() {
        match sys::nanosleep(Duration::from_millis(3)) {
            Ok(()) => {}
            Err((error, _)) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err((error, _)) => bail!("the sleep failed: {error}"),
        }
    }
    Ok(())
}

/// What ends by its time ends with the right result and not early; interrupted, it is made again
/// with what is left.
fn timeouts(stage: &Stage) -> Result<()> {
    let poller = undisturbed(libc::SYS_poll, || {
        let (reader, _writer) = sys::pipe(0)?;
        let events = until_time(|left| sys::poll(&reader, libc::POLLIN, millis(left)))?;
        ensure!(events == 0, "poll gave {events:#x}");
        Ok(())
    })?;
    let waiter = undisturbed(libc::SYS_futex, || {
        let word = AtomicU32::new(0);
        until_time(|left| match sys::futex_wait(&word, 0, Some(left)) {
            Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => Ok(()),
            Ok(()) => Err(io::Error::other("woken by nobody")),
            Err(error) => Err(error),
        })
    })?;
    stage.ready_and_wait()?;
    join(poller).and_then(|()| join(waiter))?;
    check_interruptions(stage)
}

fn millis(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}

/// Makes a call that must take [`LONG`] altogether.
fn until_time<T>(call: impl Fn(Duration) -> io::Result<T>) -> Result<T> {
    let start = sys::clock(libc::CLOCK_MONOTONIC);
    let passed = || sys::clock(libc::CLOCK_MONOTONIC) - start;
    let result = again_when_interrupted(|| call(LONG.saturating_sub(passed())))?;
    let passed = passed() + Duration::from_millis(2);
    ensure!(passed >= LONG, "timed out after {passed:?} of {LONG:?}");
    Ok(result)
}
