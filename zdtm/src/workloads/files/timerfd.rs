//! Timerfds.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static CLOCKS: Workload = Workload::new(
    "files/timerfd",
    "timerfds of all clocks: what is left, intervals, a stopped one",
    clocks,
);
pub static TICKS: Workload = Workload::new(
    "files/timerfd-ticks",
    "timerfds that have expired and were not read",
    ticks,
);
pub static DAYTIME: Workload = Workload::new(
    "files/timerfd-absolute",
    "timerfds that are set for a time",
    absolute,
);

const LONG: Duration = Duration::from_secs(5000);
const CLOCKS_OF: [i32; 5] = [
    libc::CLOCK_REALTIME,
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_REALTIME_ALARM,
    libc::CLOCK_BOOTTIME_ALARM,
];

fn clocks(stage: &Stage) -> Result<()> {
    let mut timers: Vec<(i32, OwnedFd)> = Vec::new();
    for clock in CLOCKS_OF {
        // The alarm clocks need a clock that wakes the machine.
        match sys::timerfd(clock, libc::TFD_NONBLOCK) {
            Ok(timer) => {
                sys::set_timerfd(&timer, 0, LONG, Duration::from_secs(60))?;
                timers.push((clock, timer));
            }
            Err(_) if clock >= libc::CLOCK_REALTIME_ALARM => {}
            Err(error) => return Err(error.into()),
        }
    }
    let stopped = sys::timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK)?;
    stage.ready_and_wait()?;
    for (clock, timer) in &timers {
        let (left, interval) = sys::timerfd_left(timer)?;
        ensure!(
            left <= LONG && left > LONG - Duration::from_secs(300),
            "clock {clock}: {left:?} of {LONG:?} are left"
        );
        ensure!(
            interval == Duration::from_secs(60),
            "clock {clock}: the interval is {interval:?}"
        );
        ensure!(
            sys::read_number(timer).is_err(),
            "clock {clock} has expired"
        );
        sys::set_timerfd(timer, 0, Duration::from_millis(1), Duration::ZERO)?;
        ensure!(
            sys::poll(timer, libc::POLLIN, 5000)? != 0,
            "clock {clock} does not expire"
        );
    }
    let (left, _) = sys::timerfd_left(&stopped)?;
    ensure!(left.is_zero(), "the stopped one has {left:?} left");
    Ok(())
}

fn ticks(stage: &Stage) -> Result<()> {
    let once = sys::timerfd(libc::CLOCK_MONOTONIC, 0)?;
    sys::set_timerfd(&once, 0, Duration::from_millis(1), Duration::ZERO)?;
    let often = sys::timerfd(libc::CLOCK_MONOTONIC, 0)?;
    sys::set_timerfd(
        &often,
        0,
        Duration::from_millis(1),
        Duration::from_millis(1),
    )?;
    while sys::poll(&once, libc::POLLIN, 1000)? == 0 {}
    sys::pause_for(20);
    sys::set_timerfd(
        &often,
        0,
        Duration::from_millis(1),
        Duration::from_secs(1000),
    )?;
    while sys::poll(&often, libc::POLLIN, 1000)? == 0 {}
    stage.ready_and_wait()?;
    let found = sys::read_number(&once)?;
    ensure!(found == 1, "the first had expired once, now {found} times");
    let found = sys::read_number(&often)?;
    ensure!(found == 1, "the second had expired once, now {found} times");
    let (left, interval) = sys::timerfd_left(&often)?;
    ensure!(
        left > Duration::from_secs(600) && interval == Duration::from_secs(1000),
        "{left:?} of {interval:?} are left"
    );
    Ok(())
}

fn absolute(stage: &Stage) -> Result<()> {
    const FLAGS: i32 = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
    let daytime = sys::timerfd(libc::CLOCK_REALTIME, 0)?;
    let deadline = sys::clock(libc::CLOCK_REALTIME) + LONG;
    sys::set_timerfd(&daytime, FLAGS, deadline, Duration::ZERO)?;
    let uptime = sys::timerfd(libc::CLOCK_MONOTONIC, 0)?;
    let until = sys::clock(libc::CLOCK_MONOTONIC) + LONG;
    sys::set_timerfd(&uptime, libc::TFD_TIMER_ABSTIME, until, Duration::ZERO)?;
    stage.ready_and_wait()?;
    let (left, _) = sys::timerfd_left(&daytime)?;
    let due = sys::clock(libc::CLOCK_REALTIME) + left;
    let off = due.abs_diff(deadline);
    ensure!(
        off < Duration::from_millis(100),
        "the time is off by {off:?}"
    );
    let (left, _) = sys::timerfd_left(&uptime)?;
    ensure!(
        left <= LONG && left > LONG - Duration::from_secs(300),
        "{left:?} of {LONG:?} are left"
    );
    Ok(())
}
