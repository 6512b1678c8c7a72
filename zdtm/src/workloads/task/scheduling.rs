//! When, where and how much a thread may run; limits of what it may use.

use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, bail, ensure};

use crate::sys::{self, SchedAttr};
use crate::{Need, Stage, Workload};

pub static FAIR: Workload = Workload::new(
    "task/scheduling",
    "threads with nice values, batch and idle policy, slices, clamps, slack, I/O priority, affinity",
    |s| with_threads(s, FAIR_KINDS),
);
pub static REAL_TIME: Workload = Workload::new(
    "task/real-time",
    "threads with real-time policies, one of them not inherited",
    |s| with_threads(s, REAL_TIME_KINDS),
)
.needs(&[Need::Root]);
pub static LIMITS: Workload = Workload::new(
    "task/limits",
    "all limits, soft below hard, and the OOM score",
    limits,
);

pub static FULL: Workload = Workload::new(
    "task/full-address-space",
    "a soft limit of address space that is reached",
    full_address_space,
)
// Another user's limit is raised for a moment with CAP_SYS_RESOURCE only; without it a dump refuses that.
.needs(&[Need::Root]);
pub static LOCKED: Workload = Workload::new(
    "task/all-locked",
    "all memory locked, that to come too, and a soft limit of locked memory that is reached",
    all_locked,
)
// All of a debug build is more than an ordinary user may lock.
.needs(&[Need::Root]);

type Change = fn() -> Result<()>;

const FAIR_KINDS: &[Change] = &[
    || Ok(sys::set_sched(0, 0, 7, 0, [0; 3])?),
    || Ok(sys::set_sched(3, 0, 5, 0, [0; 3])?),
    || Ok(sys::set_sched(5, 0, 0, 0, [0; 3])?),
    || Ok(sys::set_sched(0, 1, 3, 0, [0; 3])?),
    // A slice of its own, Linux 6.12.
    || Ok(sys::set_sched(0, 0, 0, 0, [17_000_000, 0, 0])?),
    // Without CONFIG_UCLAMP_TASK there is nothing to set.
    || Ok(sys::set_clamps(100, 900).or_else(only_if_known)?),
    || Ok(sys::prctl(libc::PR_SET_TIMERSLACK, 12_345).map(drop)?),
    || Ok(sys::set_io_priority(2 << 13 | 7)?),
    || Ok(sys::set_io_priority(3 << 13)?),
    || {
        let last = sys::allowed_cpus()?.pop().unwrap_or(0);
        Ok(sys::run_on_cpu(last)?)
    },
];

const REAL_TIME_KINDS: &[Change] = &[
    || Ok(sys::set_sched(1, 0, 0, 7, [0; 3])?),
    || Ok(sys::set_sched(2, 1, 0, 3, [0; 3])?),
    || Ok(sys::set_sched(0, 0, -5, 0, [0; 3])?),
    || Ok(sys::set_io_priority(1 << 13 | 2)?),
];

fn only_if_known(error: std::io::Error) -> std::io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL) => Ok(()),
        _ => Err(error),
    }
}

/// Everything that is told about this thread's scheduling.
#[derive(Debug, PartialEq)]
struct Told {
    attr: SchedAttr,
    cpus: Vec<usize>,
    io_priority: u64,
    slack: u64,
}

fn told() -> Result<Told> {
    Ok(Told {
        attr: sys::sched_attr()?,
        cpus: sys::allowed_cpus()?,
        io_priority: sys::io_priority()?,
        slack: sys::prctl_with(i64::from(libc::PR_GET_TIMERSLACK), [0; 3])?,
    })
}

fn check(before: &Told) -> Result<()> {
    let after = told()?;
    ensure!(
        *before == after,
        "thread {}: was {before:?}, is {after:?}",
        sys::tid()
    );
    Ok(())
}

fn with_threads(stage: &Stage, kinds: &'static [Change]) -> Result<()> {
    let (send, receive) = mpsc::channel();
    let threads: Vec<_> = kinds
        .iter()
        .map(|change| {
            let send = send.clone();
            thread::spawn(move || -> Result<()> {
                let before = change().and_then(|()| told());
                send.send(before.as_ref().err().map(ToString::to_string))?;
                let before = before?;
                crate::stop::wait();
                check(&before)
            })
        })
        .collect();
    drop(send);
    for _ in &threads {
        if let Some(error) = receive.recv()? {
            bail!("a thread can't be as wanted: {error}");
        }
    }
    let own = told()?;
    stage.ready_and_wait()?;
    check(&own)?;
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}

/// Soft and hard limits, by resource number; what is higher than the present one is lowered to it.
const LIMITS_WANTED: [(u64, u64); 16] = [
    (100_000, 200_000),
    (1 << 40, 1 << 41),
    (1 << 42, 1 << 43),
    (8 << 20, 64 << 20),
    (0, 1 << 20),
    (1 << 41, 1 << 42),
    (4000, 5000),
    (300, 400),
    (1 << 20, 2 << 20),
    (1 << 45, 1 << 46),
    (11, 12),
    (500, 600),
    (10_000, 20_000),
    (3, 5),
    (2, 4),
    (1_000_000, 2_000_000),
];

fn limits(stage: &Stage) -> Result<()> {
    let mut wanted = Vec::new();
    for (resource, (soft, hard)) in (0u32..).zip(LIMITS_WANTED) {
        let (_, most) = sys::limit(resource)?;
        let (soft, hard) = (soft.min(most), hard.min(most));
        sys::set_limit(resource, soft, hard)?;
        wanted.push((soft, hard));
    }
    std::fs::write("/proc/self/oom_score_adj", "321")?;
    stage.ready_and_wait()?;
    for (resource, wanted) in (0u32..).zip(wanted) {
        let found = sys::limit(resource)?;
        ensure!(
            found == wanted,
            "limit {resource} was {wanted:?}, is {found:?}"
        );
    }
    let score = std::fs::read_to_string("/proc/self/oom_score_adj")?;
    ensure!(score.trim() == "321", "oom_score_adj was 321, is {score}");
    Ok(())
}

/// Bytes that a process has by a line of its status.
fn told_bytes(label: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(label));
    let number = line.and_then(|line| line.split_whitespace().next());
    let number: u64 = number.ok_or_else(|| anyhow!("no {label}"))?.parse()?;
    Ok(number << 10)
}

fn full_address_space(stage: &Stage) -> Result<()> {
    let (_, hard) = sys::limit(libc::RLIMIT_AS)?;
    let soft = told_bytes("VmSize:")?;
    sys::set_limit(libc::RLIMIT_AS, soft, hard)?;
    stage.ready_and_wait()?;
    let found = sys::limit(libc::RLIMIT_AS)?;
    ensure!(found == (soft, hard), "the limit was {soft}, is {found:?}");
    let size = told_bytes("VmSize:")?;
    ensure!(size <= soft, "{size} bytes with a limit of {soft}");
    Ok(())
}

fn all_locked(stage: &Stage) -> Result<()> {
    sys::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE)?;
    let (_, hard) = sys::limit(libc::RLIMIT_MEMLOCK)?;
    let soft = told_bytes("VmLck:")?.min(hard);
    sys::set_limit(libc::RLIMIT_MEMLOCK, soft, hard)?;
    stage.ready_and_wait()?;
    let found = sys::limit(libc::RLIMIT_MEMLOCK)?;
    ensure!(found == (soft, hard), "the limit was {soft}, is {found:?}");
    ensure!(told_bytes("VmLck:")? >= soft, "less is locked than was");
    Ok(())
}
