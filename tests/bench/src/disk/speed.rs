//! How fast the devices are, job by job, side by side.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use firn_ploop::server::{Client, Registry};
use firn_ploop::tracker::{Begin, ListenerSpec, Trackers};

use super::Bench;
use super::device::{Attached, Kind, has_qemu};
use super::fio::{Direction, Job, Pattern};
use super::rows::{Aim, Row};

const JOBS: [Job; 5] = [
    job(
        "sequential write, new",
        Pattern::Sequential,
        Direction::Write,
        true,
    ),
    job(
        "sequential write, again",
        Pattern::Sequential,
        Direction::Write,
        false,
    ),
    job(
        "sequential read",
        Pattern::Sequential,
        Direction::Read,
        false,
    ),
    job("random write", Pattern::Random, Direction::Write, false),
    job("random read", Pattern::Random, Direction::Read, false),
];

const fn job(name: &'static str, pattern: Pattern, direction: Direction, once: bool) -> Job {
    Job {
        name,
        pattern,
        direction,
        once,
    }
}

/// Clusters unless told otherwise, and the alternative.
const OURS: Kind = Kind::Ours { cluster_kib: 1024 };
const FINER: Kind = Kind::Ours { cluster_kib: 256 };

/// Listeners of the tracker must not cost more of the writes' speed.
const TRACKER_SHARE: f64 = 0.03;

/// Bytes per second, by job and contestant, round by round.
type Samples = BTreeMap<(usize, String), Vec<f64>>;

/// Our device against a plain loop device and against QEMU's.
pub fn devices(bench: &Bench) -> Result<Vec<Row>> {
    let mut kinds = vec![Kind::Plain, OURS, FINER];
    if has_qemu() {
        kinds.push(Kind::Qemu);
    } else {
        eprintln!("qemu-storage-daemon is not installed: its rows are left out");
    }
    let mut samples = Samples::new();
    for round in 0..bench.runs {
        let attached = kinds
            .iter()
            .map(|kind| {
                let dir = bench.dir.join(kind.name().replace(' ', "-"));
                kind.attach(&bench.firn, &dir, bench.size_mib)
            })
            .collect::<Result<Vec<Attached<'_>>>>()?;
        for (number, job) in JOBS.iter().enumerate() {
            for turn in 0..kinds.len() {
                bench.go_on()?;
                let at = (round + turn) % kinds.len();
                let speed = job.run(&attached[at].device, bench.size_mib)?;
                let key = (number, kinds[at].name());
                samples.entry(key).or_default().push(speed);
            }
        }
    }
    Ok(JOBS
        .iter()
        .enumerate()
        .flat_map(|(number, job)| rows_of(&samples, number, job, &kinds))
        .collect())
}

fn rows_of(samples: &Samples, number: usize, job: &Job, kinds: &[Kind]) -> Vec<Row> {
    let of = |kind: Kind| {
        let found = samples.get(&(number, kind.name()));
        found.map_or(&[][..], |found| &found[..])
    };
    let name = job.name;
    let mut rows: Vec<Row> = kinds
        .iter()
        .map(|kind| {
            let (scale, unit) = match job.pattern {
                Pattern::Sequential => (1e6, "MB/s"),
                Pattern::Random => (4096e3, "kIOPS"),
            };
            let scaled: Vec<f64> = of(*kind).iter().map(|speed| speed / scale).collect();
            Row::told(format!("{name}: {}", kind.name()), &scaled, unit)
        })
        .collect();
    let least = match job.pattern {
        Pattern::Sequential => 0.85,
        Pattern::Random => 0.7,
    };
    let against = |kind: Kind, other: Kind, aim| {
        let what = format!("{name}: {} / {}", kind.name(), other.name());
        Row::ratio(what, of(kind), of(other), aim)
    };
    rows.push(against(OURS, Kind::Plain, Aim::AtLeast(least)));
    rows.push(against(FINER, Kind::Plain, Aim::None));
    if kinds.contains(&Kind::Qemu) {
        rows.push(against(OURS, Kind::Qemu, Aim::AtLeast(1.0)));
    }
    rows
}

/// What the write tracker costs: with a listener against without, and, since what a tracker that
/// nobody listens to costs is far below the noise of any device, its share of a request's time.
pub fn tracker(bench: &Bench) -> Result<Vec<Row>> {
    let dir = bench.dir.join("tracked");
    let attached = OURS.attach(&bench.firn, &dir, bench.size_mib)?;
    let disk = attached.ploop().context("our device has a disk")?;
    let registry = Registry::at(&bench.firn.run_dir);
    let record = registry.find_by(disk)?.context("the disk is not served")?;
    let mut client = Client::connect(&record.control)?;
    let mut rows = Vec::new();
    JOBS[0].run(&attached.device, bench.size_mib)?;
    for job in [&JOBS[1], &JOBS[3]] {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for round in 0..2 * bench.runs {
            for listened in [round % 2 == 0, round % 2 != 0] {
                bench.go_on()?;
                let spec = listener();
                if listened {
                    client.tracker_start(&spec, Begin::Clean)?;
                }
                let speed = job.run(&attached.device, bench.size_mib);
                if listened {
                    client.tracker_stop(&spec.name)?;
                }
                let samples = if listened { &mut with } else { &mut without };
                samples.push(speed?);
            }
        }
        let what = format!("{}: with a listener / without", job.name);
        let aim = Aim::AtLeast(1.0 - TRACKER_SHARE);
        rows.push(Row::ratio(what, &with, &without, aim));
        rows.extend(shares(job, &without));
    }
    Ok(rows)
}

fn listener() -> ListenerSpec {
    ListenerSpec {
        name: "bench".to_owned(),
        unit_bytes: 1 << 20,
    }
}

/// Time of one mark as a share of the time that a request took.
fn shares(job: &Job, speeds: &[f64]) -> Vec<Row> {
    let request_bytes: u32 = match job.pattern {
        Pattern::Sequential => 1 << 20,
        Pattern::Random => 4 << 10,
    };
    let row = |what: &str, listens| {
        let mark = mark_seconds(request_bytes.into(), listens);
        let share: Vec<f64> = speeds
            .iter()
            .map(|speed| 100.0 * mark / (f64::from(request_bytes) / speed))
            .collect();
        let what = format!("{}: one mark, {what}", job.name);
        Row::aimed(what, &share, "%", Aim::AtMost(100.0 * TRACKER_SHARE))
    };
    vec![row("no listener", false), row("one listener", true)]
}

fn mark_seconds(request_bytes: u64, listens: bool) -> f64 {
    const MARKS: u32 = 2_000_000;
    let size = 1 << 40;
    let trackers = Trackers::new(size);
    if listens {
        let started = trackers.start(listener(), Begin::Clean);
        started.expect("a new tracker has room for a listener");
    }
    let begun = std::time::Instant::now();
    let mut at = 0u64;
    for _ in 0..MARKS {
        let at_now = std::hint::black_box(at % (size - request_bytes));
        trackers.mark(at_now..at_now + request_bytes);
        at = at.wrapping_add(request_bytes);
    }
    begun.elapsed().as_secs_f64() / f64::from(MARKS)
}
