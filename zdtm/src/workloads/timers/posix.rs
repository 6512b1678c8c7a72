//! POSIX timers: ids, settings, what they notify, overruns.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys::{self, Notify, SIGEV_NONE, SIGEV_SIGNAL, SIGEV_THREAD_ID};
use crate::{Stage, Workload};

pub static SETTINGS: Workload = Workload::new(
    "timers/posix-settings",
    "timers on all clocks, with gaps between their ids",
    settings,
);
pub static TICKS: Workload = Workload::new(
    "timers/posix-ticks",
    "timers that notify a process and two threads, one on its CPU clock",
    ticks,
)
.moves(&["signals"]);
pub static OVERRUN: Workload = Workload::new(
    "timers/posix-overrun",
    "overruns of the last signal, of process and thread",
    overrun,
);
pub static PENDING: Workload = Workload::new(
    "timers/posix-pending",
    "a timer that ran out with its signal blocked",
    pending,
);
pub static FOREIGN_CLOCK: Workload = Workload::new(
    "refusals/timer-on-a-threads-clock",
    "a timer on the CPU clock of one of two threads, with nothing that tells which",
    |stage| {
        let (send, receive) = mpsc::channel();
        let other = thread::spawn(move || {
            let _ = send.send(());
            crate::stop::wait();
        });
        receive.recv()?;
        let notify = Notify {
            how: SIGEV_SIGNAL,
            signal: 40,
            value: 0,
            tid: 0,
        };
        sys::make_timer(libc::CLOCK_THREAD_CPUTIME_ID, notify)?;
        stage.ready_and_wait()?;
        other.join().map_err(|_| anyhow!("a thread panicked"))
    },
)
.refused(&["posix timer 0", "clock"]);

/// Clocks as the kernel numbers them: realtime, monotonic, CPU of process and thread, boottime, and the
/// CPU clocks as libc writes them.
const CLOCKS: [i32; 7] = [0, 1, 2, 3, 7, -6, -2];

fn settings(stage: &Stage) -> Result<()> {
    let silent = Notify {
        how: SIGEV_NONE,
        signal: 0,
        value: 0,
        tid: 0,
    };
    let mut timers = Vec::new();
    for (nth, clock) in (0u32..).zip(CLOCKS) {
        let skipped = sys::make_timer(1, silent)?;
        let notify = Notify {
            how: SIGEV_SIGNAL,
            signal: 40,
            value: u64::from(nth) << 40,
            tid: 0,
        };
        let id = sys::make_timer(clock, notify).with_context(|| format!("clock {clock}"))?;
        sys::delete_timer(skipped)?;
        let value = Duration::from_secs(5000 + u64::from(nth));
        let interval = Duration::from_millis(u64::from(nth) * 1111);
        sys::set_timer(id, 0, value, interval)?;
        timers.push((id, skipped, value, interval));
    }
    let unset = sys::make_timer(1, silent)?;
    stage.ready_and_wait()?;
    for (id, skipped, value, wanted) in timers {
        let (left, interval) = sys::timer(id).with_context(|| format!("timer {id}"))?;
        ensure!(
            interval == wanted,
            "timer {id}: interval {interval:?}, was {wanted:?}"
        );
        let lost = value.saturating_sub(left);
        ensure!(
            lost < Duration::from_secs(120) && left <= value + Duration::from_millis(20),
            "timer {id}: {value:?} were left, {left:?} are"
        );
        ensure!(
            sys::timer(skipped).is_err(),
            "timer {skipped} is there again"
        );
    }
    let (left, interval) = sys::timer(unset)?;
    ensure!(
        left + interval == Duration::ZERO,
        "a timer that was not set runs"
    );
    Ok(())
}

static TICKS_OF: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
static TAKEN_BY: [AtomicI32; 3] = [const { AtomicI32::new(0) }; 3];

extern "C" fn on_tick(_: i32, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo.
    let value = sys::info_value(unsafe { &*info });
    let nth = usize::try_from(value & 0xff).unwrap_or(0);
    if let Some(ticks) = TICKS_OF.get(nth).filter(|_| value >> 8 == 0x00ab_cdef_0123) {
        ticks.fetch_add(1, Ordering::SeqCst);
        TAKEN_BY[nth].store(sys::tid(), Ordering::SeqCst);
    }
}

fn tick_of(nth: usize, how: i32, tid: i32) -> Notify {
    Notify {
        how,
        signal: 40 + i32::try_from(nth).unwrap_or(0),
        value: 0x00ab_cdef_0123 << 8 | nth as u64,
        tid,
    }
}

/// Spins until three more ticks of a kind have come.
fn three_more(nth: usize) -> Result<()> {
    let before = TICKS_OF[nth].load(Ordering::SeqCst);
    let start = sys::clock(libc::CLOCK_MONOTONIC);
    while TICKS_OF[nth].load(Ordering::SeqCst) < before + 3 {
        let passed = sys::clock(libc::CLOCK_MONOTONIC) - start;
        ensure!(
            passed < Duration::from_secs(30),
            "ticks of kind {nth} do not come"
        );
    }
    Ok(())
}

fn ticks(stage: &Stage) -> Result<()> {
    let period = Duration::from_millis(15);
    for signal in 40..43 {
        sys::handle_info(signal, on_tick, libc::SA_RESTART)?;
    }
    let (send, receive) = mpsc::channel();
    let threads: Vec<_> = [
        (1usize, libc::CLOCK_MONOTONIC),
        (2, libc::CLOCK_THREAD_CPUTIME_ID),
    ]
    .into_iter()
    .map(|(nth, clock)| {
        let send = send.clone();
        thread::spawn(move || -> Result<()> {
            let tid = sys::tid();
            let id = sys::make_timer(clock, tick_of(nth, SIGEV_THREAD_ID, tid))?;
            sys::set_timer(id, 0, period, period)?;
            three_more(nth)?;
            send.send(())?;
            while !crate::stop::requested() {
                std::hint::spin_loop();
            }
            three_more(nth)?;
            let by = TAKEN_BY[nth].load(Ordering::SeqCst);
            ensure!(by == tid, "thread {by} took the ticks of thread {tid}");
            let (_, interval) = sys::timer(id)?;
            ensure!(interval == period, "the interval is {interval:?}");
            Ok(())
        })
    })
    .collect();
    let id = sys::make_timer(libc::CLOCK_MONOTONIC, tick_of(0, SIGEV_SIGNAL, 0))?;
    sys::set_timer(id, 0, period, period)?;
    three_more(0)?;
    threads.iter().try_for_each(|_| receive.recv())?;
    stage.ready_and_wait()?;
    three_more(0)?;
    sys::delete_timer(id)?;
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}

/// Starts a timer as if it had run for `missed` and a half intervals, and takes its signal.
fn late_timer(how: i32, tid: i32, signal: i32, missed: u32) -> Result<i32> {
    let notify = Notify {
        how,
        signal,
        value: 5,
        tid,
    };
    let id = sys::make_timer(libc::CLOCK_MONOTONIC, notify)?;
    let now = sys::clock(libc::CLOCK_MONOTONIC);
    let interval = now / (missed + 2);
    let first = now - interval * missed - interval / 2;
    sys::set_timer(id, libc::TIMER_ABSTIME, first, interval)?;
    let (taken, code, _) = sys::wait_for(sys::bit(signal))?;
    ensure!(
        (taken, code) == (signal, libc::SI_TIMER),
        "took signal {taken}, code {code}"
    );
    Ok(id)
}

fn check_late(id: i32, missed: u64, before: (Duration, Duration)) -> Result<()> {
    let overruns = sys::overruns(id)?;
    ensure!(
        overruns == missed,
        "timer {id}: {missed} overruns, now {overruns}"
    );
    let (left, interval) = sys::timer(id)?;
    ensure!(
        interval == before.1,
        "timer {id}: interval {interval:?}, was {:?}",
        before.1
    );
    let lost = before.0.saturating_sub(left);
    ensure!(
        left <= before.0 && lost < Duration::from_secs(120),
        "timer {id}: {left:?} left"
    );
    Ok(())
}

fn overrun(stage: &Stage) -> Result<()> {
    // In both threads.
    sys::mask(libc::SIG_BLOCK, sys::bit(41) | sys::bit(42))?;
    let (send, receive) = mpsc::channel();
    let thread = thread::spawn(move || -> Result<()> {
        let id = late_timer(SIGEV_THREAD_ID, sys::tid(), 41, 3)?;
        let before = sys::timer(id)?;
        ensure!(sys::overruns(id)? == 3, "the overruns don't come about");
        send.send(())?;
        crate::stop::wait();
        check_late(id, 3, before)
    });
    receive.recv()?;
    let id = late_timer(SIGEV_SIGNAL, 0, 42, 2)?;
    let before = sys::timer(id)?;
    stage.ready_and_wait()?;
    check_late(id, 2, before)?;
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

fn pending(stage: &Stage) -> Result<()> {
    sys::mask(libc::SIG_BLOCK, sys::bit(43))?;
    let notify = Notify {
        how: SIGEV_SIGNAL,
        signal: 43,
        value: 0xdead_beef_0000_0001,
        tid: 0,
    };
    let id = sys::make_timer(libc::CLOCK_MONOTONIC, notify)?;
    sys::set_timer(id, 0, Duration::from_millis(1), Duration::ZERO)?;
    while sys::pending()? & sys::bit(43) == 0 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    let taken = sys::take_pending(sys::bit(43)).context("taking the timer's signal")?;
    let wanted = (43, libc::SI_TIMER, 0xdead_beef_0000_0001);
    ensure!(taken == wanted, "took {taken:x?}, was {wanted:x?}");
    ensure!(
        sys::take_pending(sys::bit(43)).is_err(),
        "the signal came twice"
    );
    let (left, interval) = sys::timer(id)?;
    ensure!(left + interval == Duration::ZERO, "the timer is set again");
    Ok(())
}
