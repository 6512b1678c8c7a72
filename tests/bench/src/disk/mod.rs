//! The disk in a file: its device against a plain loop device and QEMU's, and what takes time.
//!
//! `firn-bench ploop [--dir DIR] [--size-mib 768] [--runs 5] [--part ...]`, as root, with fio and rsync.
//! All files lie on the same file system. The contestants of a job take turns, round after round, and
//! a ratio is the median of the rounds' ratios.

mod copying;
mod device;
mod fio;
mod rows;
mod speed;
mod waits;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use firn_sys::signal::TerminationFlag;
use serde_json::json;

use device::{Firn, TrialDir};
use rows::{Group, Row};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Reading and writing against other devices.
    Devices,
    /// What the write tracker costs.
    Tracker,
    /// Mounting and snapshots.
    Commands,
    /// `ping` and `stat` under load.
    Answers,
    /// The server's memory.
    Memory,
    /// `copy` against rsync.
    Copy,
}

impl Part {
    fn title(self) -> &'static str {
        match self {
            Part::Devices => "devices: direct I/O with fio, 8 requests at a time, flush included",
            Part::Tracker => "write tracker",
            Part::Commands => "commands",
            Part::Answers => "answers under load",
            Part::Memory => "memory",
            Part::Copy => "copy under a writer of 200 MB/s",
        }
    }

    fn run(self, bench: &Bench) -> Result<Vec<Row>> {
        bench.go_on()?;
        match self {
            Part::Devices => speed::devices(bench),
            Part::Tracker => speed::tracker(bench),
            Part::Commands => waits::commands(bench),
            Part::Answers => waits::answers(bench),
            Part::Memory => waits::memory(bench),
            Part::Copy => copying::copies(bench),
        }
    }
}

/// Options of the disk's bench.
#[derive(Args)]
pub struct DiskOptions {
    /// Directory of a file system with direct I/O, for the images
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Firn binary; by default the one beside this bench, built first
    #[arg(long)]
    firn: Option<PathBuf>,
    /// Size of each device
    #[arg(long, default_value_t = 768, value_parser = clap::value_parser!(u64).range(64..))]
    size_mib: u64,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// What is measured
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "devices,tracker,commands,answers,memory,copy"
    )]
    part: Vec<Part>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// What all parts use.
pub struct Bench {
    firn: Firn,
    dir: PathBuf,
    size_mib: u64,
    runs: usize,
    told_to_end: Arc<AtomicBool>,
}

impl Bench {
    /// Asked before each step that takes long: what is mounted and attached goes with the error.
    ///
    /// # Errors
    /// A signal wants the bench to end.
    fn go_on(&self) -> Result<()> {
        let told = self.told_to_end.load(Ordering::Relaxed);
        ensure!(!told, "a signal ended the bench");
        Ok(())
    }
}

/// Measures, prints, and fails when an aim is missed.
pub fn run(options: &DiskOptions) -> Result<ExitCode> {
    let program = match &options.firn {
        Some(path) => path.clone(),
        None => crate::build_firn()?,
    };
    let name = format!("firn-bench-disk-{}", std::process::id());
    let dir = TrialDir(options.dir.join(name));
    let run_dir = dir.0.join("run");
    std::fs::create_dir_all(&run_dir)
        .with_context(|| format!("cannot make {}", run_dir.display()))?;
    let told_to_end = Arc::new(AtomicBool::new(false));
    let _signals = TerminationFlag::install(Arc::clone(&told_to_end))
        .context("cannot hear of signals that end it")?;
    let bench = Bench {
        firn: Firn { program, run_dir },
        dir: dir.0.clone(),
        size_mib: options.size_mib,
        runs: usize::from(options.runs),
        told_to_end,
    };
    let groups: Vec<Group> = options
        .part
        .iter()
        .map(|part| {
            let group = group(*part, &bench);
            if !options.json {
                println!("{}", group.text());
            }
            group
        })
        .collect();
    if options.json {
        let groups: Vec<_> = groups.iter().map(Group::json).collect();
        println!("{:#}", json!({"runs": options.runs, "groups": groups}));
    }
    Ok(match groups.iter().all(Group::is_good) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn group(part: Part, bench: &Bench) -> Group {
    let result = part.run(bench);
    let failure = result.as_ref().err().map(|error| format!("{error:#}"));
    Group {
        title: format!("{}: medians of {} rounds", part.title(), bench.runs),
        rows: result.unwrap_or_default(),
        failure,
    }
}
