//! What `madvise` and `mlock` have said about mappings.

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Need, Stage, Workload, proc};

pub static FLAGS: Workload = Workload::new(
    "memory/advice",
    "every lasting advice, with its flag",
    flags,
);
pub static WIPE_ON_FORK: Workload = Workload::new(
    "memory/fork-advice",
    "advice that shows at the next fork",
    fork_advice,
);
pub static GUARDS: Workload = Workload::new(
    "memory/guards",
    "guard regions inside mappings, by MADV_GUARD_INSTALL",
    guards,
)
.needs(&[Need::GuardRegions]);
pub static LOCKED: Workload = Workload::new(
    "memory/locked",
    "memory locked by mlock, at once and on fault",
    locked,
);
pub static LOCK_ALL: Workload = Workload::new(
    "memory/lock-all",
    "mlockall for what is mapped later",
    lock_all,
);

/// Advice and the flag that shows it.
const ADVICE: [(i32, &str); 8] = [
    (libc::MADV_RANDOM, "rr"),
    (libc::MADV_SEQUENTIAL, "sr"),
    (libc::MADV_DONTFORK, "dc"),
    (libc::MADV_DONTDUMP, "dd"),
    (libc::MADV_HUGEPAGE, "hg"),
    (libc::MADV_NOHUGEPAGE, "nh"),
    (libc::MADV_WIPEONFORK, "wf"),
    (libc::MADV_MERGEABLE, "mg"),
];

fn flags(stage: &Stage) -> Result<()> {
    let mut regions = Vec::new();
    for (seed, (advice, flag)) in (1..).zip(ADVICE) {
        let region = Region::anon(4 * PAGE)?;
        region.part(0, 2 * PAGE).fill(seed);
        // Keeps neighbours with the same flags from becoming one VMA.
        Region::anon(PAGE)?.protect(libc::PROT_NONE)?;
        region
            .advise(advice)
            .with_context(|| format!("advice {advice}"))?;
        let details = proc::details_at(region.addr)?;
        ensure!(
            details.has_flag(flag),
            "advice {advice} does not show as {flag}"
        );
        regions.push((seed, region, flag));
    }
    stage.ready_and_wait()?;
    for (seed, region, flag) in regions {
        let details = proc::details_at(region.addr)?;
        ensure!(
            details.has_flag(flag),
            "the flag {flag} is lost: {:?}",
            details.lines["VmFlags"]
        );
        ensure!(
            details.vma.end == region.end(),
            "the VMA with {flag} has grown together"
        );
        region.part(0, 2 * PAGE).check(seed)?;
        region.part(2 * PAGE, 2 * PAGE).check_zero()?;
    }
    Ok(())
}

fn fork_advice(stage: &Stage) -> Result<()> {
    let (wiped, kept) = (Region::anon(PAGE)?, Region::anon(2 * PAGE)?);
    let absent = Region::anon(3 * PAGE)?;
    for region in [wiped, kept, absent] {
        region.fill(7);
    }
    wiped.advise(libc::MADV_WIPEONFORK)?;
    absent.advise(libc::MADV_DONTFORK)?;
    stage.ready_and_wait()?;
    stage
        .child(|stage| {
            stage.ready()?;
            wiped.check_zero().context("wiped on fork")?;
            kept.check(7).context("inherited")?;
            let there = proc::vma_at(absent.addr)?;
            ensure!(
                there.is_none(),
                "what is not for children is in one: {there:?}"
            );
            Ok(())
        })?
        .reap()?;
    [wiped, kept, absent]
        .into_iter()
        .try_for_each(|region| region.check(7))
}

/// Touching a guard kills: children try, one page each.
fn guards(stage: &Stage) -> Result<()> {
    let region = Region::anon(16 * PAGE)?;
    region.part(0, 4 * PAGE).fill(8);
    region.part(8 * PAGE, 8 * PAGE).fill(9);
    region
        .part(4 * PAGE, 2 * PAGE)
        .advise(sys::MADV_GUARD_INSTALL)?;
    region
        .part(15 * PAGE, PAGE)
        .advise(sys::MADV_GUARD_INSTALL)?;
    stage.ready_and_wait()?;
    for page in 0..16 {
        let pid = sys::fork()?;
        if pid == 0 {
            let _ = sys::set_action(libc::SIGSEGV, libc::SIG_DFL, 0);
            let byte = region.get(page * PAGE, 1);
            sys::exit_now(i32::from(byte.is_empty()));
        }
        let exit = sys::wait(pid)?;
        let guarded = matches!(page, 4 | 5 | 15);
        let wanted = if guarded {
            sys::Exit::Signal(libc::SIGSEGV)
        } else {
            sys::Exit::Code(0)
        };
        ensure!(
            exit == wanted,
            "reading page {page}: {exit}, should be {wanted}"
        );
    }
    region.part(0, 4 * PAGE).check(8)?;
    region.part(8 * PAGE, 7 * PAGE).check(9)
}

fn locked(stage: &Stage) -> Result<()> {
    const ON_FAULT: u32 = 1;
    let (now, later) = (Region::anon(16 * PAGE)?, Region::anon(20 * PAGE)?);
    now.fill(10);
    now.part(0, 8 * PAGE).lock(0).context("mlock")?;
    later.part(0, 4 * PAGE).fill(11);
    later.lock(ON_FAULT).context("mlock2")?;
    let amount = || Ok::<_, anyhow::Error>(proc::lines("self", "status")?.get("VmLck").cloned());
    let before = amount()?;
    stage.ready_and_wait()?;
    let after = amount()?;
    ensure!(before == after, "{before:?} were locked, {after:?} are");
    let details = proc::details_at(now.addr)?;
    ensure!(details.has_flag("lo"), "the lock is lost");
    ensure!(
        details.vma.end == now.addr + 8 * PAGE,
        "the lock has spread: {:?}",
        details.vma
    );
    let details = proc::details_at(later.addr)?;
    ensure!(details.has_flag("lo"), "the lock on fault is lost");
    let resident = details.bytes("Rss");
    ensure!(
        resident == 4 * PAGE as u64,
        "the lock on fault has brought in {resident} bytes"
    );
    now.check(10)?;
    later.part(0, 4 * PAGE).check(11)?;
    later.part(4 * PAGE, 16 * PAGE).check_zero()
}

/// Small: the limit is 8 MiB, and everything mapped counts.
fn lock_all(stage: &Stage) -> Result<()> {
    let region = Region::anon(4 * PAGE)?;
    region.fill(12);
    sys::mlockall(libc::MCL_FUTURE)?;
    let before = Region::anon(4 * PAGE)?;
    stage.ready_and_wait()?;
    ensure!(
        proc::details_at(before.addr)?.has_flag("lo"),
        "a lock is lost"
    );
    ensure!(
        !proc::details_at(region.addr)?.has_flag("lo"),
        "what was not locked is"
    );
    region.check(12)?;
    let new = Region::anon(8 * PAGE)?;
    ensure!(
        proc::details_at(new.addr)?.has_flag("lo"),
        "new memory is not locked any more"
    );
    Ok(())
}
