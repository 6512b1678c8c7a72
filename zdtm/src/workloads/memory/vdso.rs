//! The kernel's code in every task, and the data beside it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sys::{self, Region};
use crate::{Stage, Workload, proc};

pub static CALLS: Workload = Workload::new(
    "memory/vdso",
    "clocks and CPU number by vdso calls, all the time",
    calls,
);
pub static PLACE: Workload = Workload::new(
    "memory/vdso-place",
    "the vdso and its data stay where they were",
    place,
);
pub static MOVED: Workload = Workload::new(
    "memory/vdso-moved",
    "a vdso that the program has moved",
    moved,
);
pub static UNMAPPED: Workload = Workload::new(
    "memory/vdso-unmapped",
    "a task that has unmapped its vdso",
    unmapped,
);

/// Checks that a vdso clock and the same clock by a system call agree.
fn check_clock(clock: i32) -> Result<()> {
    let before = sys::clock_by_call(clock)?;
    let by_vdso = sys::clock(clock);
    let after = sys::clock_by_call(clock)?;
    // Coarse clocks stand still between ticks.
    let slack = Duration::from_millis(20);
    ensure!(
        by_vdso + slack >= before && by_vdso <= after + slack,
        "clock {clock}: {by_vdso:?} by vdso, between {before:?} and {after:?} by call"
    );
    Ok(())
}

fn check_all() -> Result<()> {
    const CLOCKS: [i32; 6] = [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_MONOTONIC_RAW,
        libc::CLOCK_REALTIME_COARSE,
        libc::CLOCK_MONOTONIC_COARSE,
        libc::CLOCK_BOOTTIME,
    ];
    CLOCKS.into_iter().try_for_each(check_clock)?;
    let cpus = sys::allowed_cpus()?;
    let cpu = sys::cpu();
    ensure!(
        cpus.contains(&cpu),
        "getcpu says {cpu}, allowed are {cpus:?}"
    );
    Ok(())
}

fn calls(stage: &Stage) -> Result<()> {
    stage.ready()?;
    let mut last = Instant::now();
    while !stage.stopping() {
        for _ in 0..1000 {
            let now = Instant::now();
            ensure!(
                now >= last,
                "the monotonic clock went back by {:?}",
                last - now
            );
            last = now;
        }
        check_all()?;
    }
    check_all()
}

fn kernel_areas() -> Result<Vec<proc::Vma>> {
    let named = |vma: &proc::Vma| vma.path.starts_with("[v") && vma.path != "[vsyscall]";
    Ok(proc::maps("self")?.into_iter().filter(named).collect())
}

fn place(stage: &Stage) -> Result<()> {
    let before = kernel_areas()?;
    stage.ready_and_wait()?;
    let after = kernel_areas()?;
    ensure!(before == after, "the areas were {before:?}, are {after:?}");
    check_all()
}

/// Moves all of it together, as the code finds its data by distance.
fn moved(stage: &Stage) -> Result<()> {
    let old = kernel_areas()?;
    let (Some(first), Some(last)) = (old.first(), old.last()) else {
        bail!("no vdso")
    };
    let len = last.end - first.start;
    let room = Region::anon(len + (4 << 20))?;
    room.unmap()?;
    for vma in &old {
        let area = Region {
            addr: vma.start,
            len: vma.end - vma.start,
        };
        let target = room.addr + (2 << 20) + (vma.start - first.start);
        area.move_to(target)
            .with_context(|| format!("moving {}", vma.path))?;
    }
    let before = kernel_areas()?;
    ensure!(before != old, "nothing has moved");
    let function = sys::vdso_function(&before, "__vdso_clock_gettime")?;
    let check = || -> Result<()> {
        let by_vdso = sys::call_clock_function(function, libc::CLOCK_MONOTONIC)?;
        let by_call = sys::clock_by_call(libc::CLOCK_MONOTONIC)?;
        ensure!(
            by_vdso <= by_call,
            "the moved vdso says {by_vdso:?}, the kernel {by_call:?}"
        );
        ensure!(
            by_call - by_vdso < Duration::from_secs(5),
            "the moved vdso's clock stands"
        );
        Ok(())
    };
    check().context("before")?;
    // From here on only raw calls: libc still has the old addresses.
    stage.ready()?;
    stage.wait();
    let after = kernel_areas()?;
    ensure!(before == after, "the areas were {before:?}, are {after:?}");
    check()
}

fn unmapped(stage: &Stage) -> Result<()> {
    for vma in kernel_areas()? {
        Region {
            addr: vma.start,
            len: vma.end - vma.start,
        }
        .unmap()?;
    }
    stage.ready()?;
    stage.wait();
    let now = kernel_areas()?;
    ensure!(now.is_empty(), "the unmapped areas are back: {now:?}");
    Ok(())
}
