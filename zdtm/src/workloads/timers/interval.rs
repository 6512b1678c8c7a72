//! The three interval timers of a process.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::{Stage, Workload, sys};

// A tick may be pending at the moment that is looked at.
pub static REAL: Workload = Workload::new("timers/real", "ITIMER_REAL goes on ticking", |s| {
    ticking(s, libc::ITIMER_REAL, libc::SIGALRM)
})
.moves(&["signals"]);
pub static VIRTUAL: Workload =
    Workload::new("timers/virtual", "ITIMER_VIRTUAL goes on ticking", |s| {
        ticking(s, libc::ITIMER_VIRTUAL, libc::SIGVTALRM)
    })
    .moves(&["signals"]);
pub static PROFILING: Workload =
    Workload::new("timers/profiling", "ITIMER_PROF goes on ticking", |s| {
        ticking(s, libc::ITIMER_PROF, libc::SIGPROF)
    })
    .moves(&["signals"]);
pub static ALARM: Workload = Workload::new(
    "timers/alarm",
    "an alarm that comes once, after the restore",
    alarm,
);
pub static SETTINGS: Workload = Workload::new(
    "timers/settings",
    "what is left and the interval, of all three",
    settings,
);
pub static EXPIRED: Workload = Workload::new(
    "timers/expired",
    "a timer that ran out with its signal blocked",
    expired,
);

static TICKS: AtomicU32 = AtomicU32::new(0);

extern "C" fn tick(_signal: i32) {
    TICKS.fetch_add(1, Ordering::SeqCst);
}

fn burn() {
    let mut sum = 0u64;
    for number in 0..10_000 {
        sum = black_box(sum + number);
    }
}

/// Burns CPU until `done`, since two of the timers only run then.
fn spin_until(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let start = sys::clock(libc::CLOCK_MONOTONIC);
    while !done() {
        burn();
        if sys::clock(libc::CLOCK_MONOTONIC) - start > Duration::from_secs(20) {
            bail!("{what} does not come");
        }
    }
    Ok(())
}

fn ticking(stage: &Stage, timer: i32, signal: i32) -> Result<()> {
    sys::handle(signal, tick, libc::SA_RESTART)?;
    let period = Duration::from_millis(20);
    sys::set_itimer(timer, period, period)?;
    spin_until("the first tick", || TICKS.load(Ordering::SeqCst) > 0)?;
    stage.ready()?;
    while !stage.stopping() {
        burn();
    }
    let before = TICKS.load(Ordering::SeqCst);
    spin_until("a tick", || TICKS.load(Ordering::SeqCst) >= before + 3)?;
    let (_, interval) = sys::itimer(timer)?;
    ensure!(
        interval == period,
        "the interval was {period:?}, is {interval:?}"
    );
    Ok(())
}

/// The alarm must come once, and not before its time on the clock of the living task.
fn alarm(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGALRM, tick, libc::SA_RESTART)?;
    let time = Duration::from_secs(2);
    let start = sys::clock(libc::CLOCK_MONOTONIC);
    sys::set_itimer(libc::ITIMER_REAL, time, Duration::ZERO)?;
    stage.ready_and_wait()?;
    spin_until("the alarm", || TICKS.load(Ordering::SeqCst) > 0)?;
    let passed = sys::clock(libc::CLOCK_MONOTONIC) - start + Duration::from_millis(50);
    ensure!(
        passed >= time,
        "the alarm of {time:?} came after {passed:?}"
    );
    let (left, interval) = sys::itimer(libc::ITIMER_REAL)?;
    ensure!(
        left + interval == Duration::ZERO,
        "the alarm is still set: {left:?}, {interval:?}"
    );
    Ok(())
}

fn settings(stage: &Stage) -> Result<()> {
    let timers = [
        (
            libc::ITIMER_REAL,
            Duration::from_secs(5000),
            Duration::from_micros(7_000_001),
        ),
        (
            libc::ITIMER_VIRTUAL,
            Duration::from_secs(6000),
            Duration::from_secs(3),
        ),
        (libc::ITIMER_PROF, Duration::from_secs(7000), Duration::ZERO),
    ];
    for (timer, value, interval) in timers {
        sys::set_itimer(timer, value, interval)?;
    }
    stage.ready_and_wait()?;
    for (timer, value, wanted) in timers {
        let (left, interval) = sys::itimer(timer)?;
        ensure!(
            interval == wanted,
            "timer {timer}: the interval was {wanted:?}, is {interval:?}"
        );
        let lost = value.saturating_sub(left);
        // Rounded up to the next tick at most.
        let grown = left.saturating_sub(value);
        ensure!(
            lost < Duration::from_secs(60) && grown < Duration::from_millis(20),
            "timer {timer}: {value:?} were left, {left:?} are"
        );
    }
    Ok(())
}

fn expired(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGALRM, tick, 0)?;
    sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGALRM))?;
    sys::set_itimer(libc::ITIMER_REAL, Duration::from_millis(1), Duration::ZERO)?;
    while sys::pending()? & sys::bit(libc::SIGALRM) == 0 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    ensure!(
        TICKS.load(Ordering::SeqCst) == 0,
        "the blocked signal has been delivered"
    );
    sys::mask(libc::SIG_UNBLOCK, sys::bit(libc::SIGALRM))?;
    let ticks = TICKS.load(Ordering::SeqCst);
    ensure!(ticks == 1, "the pending SIGALRM came {ticks} times");
    Ok(())
}
