//! Runs one case: every engine in turn, round after round, so that all see the same machine.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::cases::{Case, FLOOR, Metric, QUARTER};
use crate::engine::{After, Engine};
use crate::workload::Workload;
use crate::{floors, kernel, tree};

/// Samples of one row, by metric, in the metric's unit.
pub type Samples = BTreeMap<Metric, Vec<f64>>;

/// All that one case gave.
#[derive(Serialize)]
pub struct Outcome {
    /// Which case.
    pub case: Case,
    /// Samples by row name.
    pub rows: BTreeMap<&'static str, Samples>,
    /// What went wrong, by row name; a row that failed is not tried again.
    pub failures: BTreeMap<&'static str, String>,
}

/// How the cases are run.
pub struct Plan {
    /// Contestants, ours first.
    pub engines: Vec<Engine>,
    /// Rounds that count; one more is run first to warm caches.
    pub runs: usize,
    /// Size of the memory case.
    pub memory_mib: usize,
    /// Directory on a tmpfs, for images and workload files.
    pub scratch: PathBuf,
}

impl Plan {
    /// Runs all rounds of one case.
    pub fn run(&self, case: Case) -> Outcome {
        let mut outcome = Outcome {
            case,
            rows: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        for round in 0..=self.runs {
            for turn in 0..self.engines.len() {
                let engine = &self.engines[(round + turn) % self.engines.len()];
                if outcome.failures.contains_key(engine.name) {
                    continue;
                }
                let trial = self.trial(engine, case, round);
                outcome.note(engine.name, round, trial.run());
            }
            if case.is_scaled() && !outcome.failures.contains_key(QUARTER) {
                let whole = self.trial(&self.engines[0], case, round);
                let size = whole.size / 4;
                outcome.note(QUARTER, round, Trial { size, ..whole }.run());
            }
            outcome.note(FLOOR, round, self.floor(case));
        }
        outcome
    }

    fn trial<'a>(&'a self, engine: &'a Engine, case: Case, round: usize) -> Trial<'a> {
        Trial {
            plan: self,
            engine,
            case,
            size: case.size(self.memory_mib),
            first: round == 0,
        }
    }

    /// The bare loops of the cases that have one.
    fn floor(&self, case: Case) -> Result<Vec<(Metric, f64)>> {
        match case {
            Case::B => self.memory_floor(),
            Case::C => Ok(vec![(Metric::Restore, millis(floors::measure(&["fork"])?))]),
            _ => Ok(Vec::new()),
        }
    }

    fn memory_floor(&self) -> Result<Vec<(Metric, f64)>> {
        let dir = Scratch::new(&self.scratch)?;
        let root = self.spawn(Workload::Memory, self.memory_mib, &dir.0)?;
        let place = std::fs::read_to_string(dir.0.join("ready"))?;
        let (address, len_bytes) = place
            .split_once(' ')
            .context("the workload gave no address")?;
        let copy = dir.0.join("copy");
        let copy = copy.to_str().context("scratch path is not UTF-8")?;
        self.recycle(Case::B)?;
        let read = floors::measure(&["read", &root.to_string(), address, len_bytes, copy]);
        tree::end(&tree::snapshot(root)?)?;
        let fill = floors::measure(&["fill", copy]);
        Ok(vec![
            (Metric::Dump, millis(read?)),
            (Metric::Restore, millis(fill?)),
        ])
    }

    /// Makes sure that memory which the hypervisor took back is paid for before the clock runs.
    fn recycle(&self, case: Case) -> Result<()> {
        if case == Case::B {
            floors::measure(&["recycle", &(self.memory_mib + 512).to_string()])?;
        }
        Ok(())
    }

    /// Starts a workload and waits until it is set up.
    fn spawn(&self, workload: Workload, size: usize, dir: &Path) -> Result<i32> {
        let name = format!("{workload:?}").to_lowercase();
        let out = std::fs::File::create(dir.join("out"))?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["workload", &name, "--size", &size.to_string()])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()?;
        let start = Instant::now();
        while !dir.join("ready").exists() {
            let ended = child.try_wait()?;
            ensure!(
                ended.is_none(),
                "the workload ended ({ended:?}): {}",
                std::fs::read_to_string(dir.join("out"))?
            );
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "the workload is not ready in 60 s"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        let root = i32::try_from(child.id())?;
        while tree::snapshot(root)?.len() < workload.processes(size) {
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "the workload's tree is not complete in 60 s"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        // Children of the workload have reached their sleep, and the machine is quiet.
        std::thread::sleep(Duration::from_millis(50));
        Ok(root)
    }
}

impl Outcome {
    /// Keeps what a round gave, unless it was the one that warms caches.
    fn note(&mut self, row: &'static str, round: usize, result: Result<Vec<(Metric, f64)>>) {
        match result {
            Ok(samples) if round > 0 => self.add(row, samples),
            Ok(_) => {}
            Err(error) => {
                self.failures.insert(row, format!("{error:#}"));
            }
        }
    }

    fn add(&mut self, row: &'static str, samples: Vec<(Metric, f64)>) {
        for (metric, value) in samples {
            self.rows
                .entry(row)
                .or_default()
                .entry(metric)
                .or_default()
                .push(value);
        }
    }
}

/// One engine's turn in one round.
struct Trial<'a> {
    plan: &'a Plan,
    engine: &'a Engine,
    case: Case,
    /// Objects of the workload.
    size: usize,
    first: bool,
}

impl Trial<'_> {
    fn run(&self) -> Result<Vec<(Metric, f64)>> {
        let mut samples = self.round_trip()?;
        if self.case == Case::A {
            samples.push((Metric::Pause, millis(self.pause()?)));
        }
        Ok(samples)
    }

    fn round_trip(&self) -> Result<Vec<(Metric, f64)>> {
        let dir = Scratch::new(&self.plan.scratch)?;
        let root = (self.plan).spawn(self.case.workload(), self.size, &dir.0)?;
        let before = tree::snapshot(root)?;
        let result = self.dump_and_restore(root, &before, &dir.0);
        tree::end(&before)?;
        result
    }

    fn dump_and_restore(
        &self,
        root: i32,
        before: &[tree::Process],
        dir: &Path,
    ) -> Result<Vec<(Metric, f64)>> {
        let images = dir.join("images");
        std::fs::create_dir(&images)?;
        self.plan.recycle(self.case)?;
        let (dump, frozen) = self.engine.dump(root, &images, After::Kill)?;
        tree::wait_until_gone(before).context("after the dump")?;
        let restore = self.engine.restore(&images)?;
        let after = tree::snapshot(root).context("after the restore")?;
        ensure!(
            after == before,
            "the restored tree differs: {after:?}, it was {before:?}"
        );
        if self.first && self.case == Case::B {
            check_memory(root, dir)?;
        }
        let peak_kib = u32::try_from(dump.peak_rss_kib.max(restore.peak_rss_kib))?;
        Ok(vec![
            (Metric::Dump, millis(dump.wall)),
            (Metric::Frozen, millis(frozen)),
            (Metric::Restore, millis(restore.wall)),
            (Metric::PeakRss, f64::from(peak_kib) / 1024.0),
        ])
    }

    /// The pause that a busy task sees in a dump which leaves it running. It is longer than the
    /// frozen time where the scheduler gives the engine the task's processor.
    fn pause(&self) -> Result<Duration> {
        let dir = Scratch::new(&self.plan.scratch)?;
        let gap = dir.0.join("gap");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&gap)?;
        file.set_len(4096)?;
        let longest_ns = kernel::shared_word(&file)?;
        let root = self.plan.spawn(Workload::Spin, 1, &dir.0)?;
        let before = tree::snapshot(root)?;
        let images = dir.0.join("images");
        std::fs::create_dir(&images)?;
        longest_ns.store(0, std::sync::atomic::Ordering::Relaxed);
        let dumped = self.engine.dump(root, &images, After::LeaveRunning);
        std::thread::sleep(Duration::from_millis(5));
        let pause = Duration::from_nanos(longest_ns.load(std::sync::atomic::Ordering::Relaxed));
        tree::end(&before)?;
        dumped.context("leaving it running")?;
        Ok(pause)
    }
}

/// Has the restored workload compare its memory with what it wrote.
fn check_memory(root: i32, dir: &Path) -> Result<()> {
    kernel::kill(root, libc::SIGUSR1)?;
    let start = Instant::now();
    let verdict = dir.join("checksum");
    while !verdict.exists() {
        ensure!(
            start.elapsed() < Duration::from_secs(60),
            "the restored workload does not answer"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let wrong = std::fs::read_to_string(verdict)?;
    ensure!(
        wrong == "0",
        "{wrong} words of memory are wrong after the restore"
    );
    Ok(())
}

/// A directory that is removed with all it holds.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let dir = parent.join("trial");
        std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover shows at once: the next trial cannot make its directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
