//! Benchmarks of `firn dump` and `firn restore` against CRIU and against bare kernel calls.
//!
//! `cargo run --release -p firn-bench -- [--criu PATH] [--case a,b] [--runs 5] [--json]`, as root.
//! Images lie on a tmpfs. Every round gives each engine a fresh workload in turn, and the ratios are
//! those of the medians within one run: absolute figures of two runs on a shared machine say little.
//! `firn-bench ploop` measures the disk in a file. The workloads and floors are modes of this same binary (`firn-bench workload idle DIR`).

mod cases;
mod disk;
mod engine;
mod floors;
mod kernel;
mod measure;
mod programs;
mod report;
mod tree;
mod workload;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use serde_json::json;

use cases::{CRIU, CRIU_CACHED, Case, FIRN};
use engine::Engine;
use measure::{Outcome, Plan};

/// Milliseconds within which `firn --version` must be back.
const VERSION_LIMIT_MS: f64 = 5.0;

/// Where in the scratch directory the tmpfs lies that CRIU sees at /run.
const CACHED_RUN: &str = "run";

/// Times dump and restore of nine workloads.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    options: Options,
}

/// Modes that the bench runs itself in.
#[derive(Subcommand)]
enum Part {
    /// Be the process that is dumped.
    Workload {
        /// Which one.
        kind: workload::Workload,
        /// Directory for its files.
        dir: PathBuf,
        /// Number of the objects that it is made of.
        #[arg(long, default_value_t = 200)]
        size: usize,
    },
    /// Compare one syscall program with the same calls injected one by one.
    Programs {
        /// Rounds that count
        #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u16).range(1..))]
        runs: u16,
    },
    /// Time the disk in a file against other devices, and its commands.
    Ploop {
        /// How.
        #[command(flatten)]
        options: disk::DiskOptions,
    },
    /// Run one bare loop and print its microseconds.
    Floor {
        /// Which one.
        #[command(subcommand)]
        floor: floors::Floor,
    },
}

#[derive(Args)]
struct Options {
    /// CRIU binary to compare with
    #[arg(long)]
    criu: Option<PathBuf>,
    /// Time CRIU also with its kernel cache, on a tmpfs that only this bench sees at /run
    #[arg(long, requires = "criu")]
    criu_cached_run: bool,
    /// Firn binary; by default the one beside this bench, built first
    #[arg(long)]
    firn: Option<PathBuf>,
    /// Cases to run
    #[arg(
        long,
        value_delimiter = ',',
        ignore_case = true,
        default_value = "a,b,c,d,e,f,g"
    )]
    case: Vec<Case>,
    /// Rounds that count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Size of the memory case
    #[arg(long, default_value_t = 2048)]
    memory_mib: usize,
    /// Directory on a tmpfs for images
    #[arg(long, default_value = "/dev/shm")]
    scratch: PathBuf,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Workload { kind, dir, size }) => workload::run(kind, &dir, size)?,
        Some(Part::Programs { runs }) => programs::run(runs)?,
        Some(Part::Ploop { options }) => return disk::run(&options),
        Some(Part::Floor { floor }) => floors::run(&floor)?,
        None => return bench(&cli.options),
    }
    Ok(ExitCode::SUCCESS)
}

fn bench(options: &Options) -> Result<ExitCode> {
    kernel::become_subreaper()?;
    let scratch = options
        .scratch
        .join(format!("firn-bench-{}", std::process::id()));
    std::fs::create_dir(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let result = run_cases(options, &scratch);
    if options.criu_cached_run {
        kernel::unmount(&scratch.join(CACHED_RUN))?;
    }
    std::fs::remove_dir_all(&scratch)?;
    result
}

fn run_cases(options: &Options, scratch: &Path) -> Result<ExitCode> {
    let plan = Plan {
        engines: engines(options, scratch)?,
        runs: usize::from(options.runs),
        memory_mib: options.memory_mib,
        scratch: scratch.to_owned(),
    };
    let mut good = true;
    let mut cases = Vec::new();
    for case in &options.case {
        let outcome = plan.run(*case);
        good &= outcome.is_good();
        let title = case.title(options.memory_mib);
        if options.json {
            cases.push(outcome.json(&title));
        } else {
            print_table(&outcome, &title, plan.runs);
        }
    }
    let version_ms = version_time(&plan.engines[0])?;
    good &= version_ms <= VERSION_LIMIT_MS;
    if options.json {
        let version = json!({"value": version_ms, "at_most": VERSION_LIMIT_MS});
        println!(
            "{:#}",
            json!({"runs": plan.runs, "cases": cases, "version_ms": version})
        );
    } else {
        let word = if version_ms <= VERSION_LIMIT_MS {
            "ok"
        } else {
            "MISS"
        };
        println!("firn --version: {version_ms:.2} ms, at most {VERSION_LIMIT_MS} {word}");
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print_table(outcome: &Outcome, title: &str, runs: usize) {
    let title = format!("{title}: medians of {runs}");
    println!("{}", outcome.table(&title));
}

fn engines(options: &Options, scratch: &Path) -> Result<Vec<Engine>> {
    let firn = match &options.firn {
        Some(path) => path.clone(),
        None => build_firn()?,
    };
    let mut engines = vec![Engine {
        name: FIRN,
        program: firn,
        run_dir: None,
    }];
    if let Some(program) = &options.criu {
        engines.push(Engine {
            name: CRIU,
            program: program.clone(),
            run_dir: None,
        });
        if options.criu_cached_run {
            let run_dir = scratch.join(CACHED_RUN);
            std::fs::create_dir(&run_dir)?;
            kernel::private_mounts().context("cannot make a mount namespace")?;
            kernel::mount_tmpfs(&run_dir)?;
            let run_dir = Some(run_dir);
            engines.push(Engine {
                name: CRIU_CACHED,
                program: program.clone(),
                run_dir,
            });
        }
    }
    Ok(engines)
}

/// Builds the release binary, so that no stale one is measured, and names it.
fn build_firn() -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("firn");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "-p", "firn"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        ensure!(build.status()?.success(), "cannot build firn");
    }
    ensure!(
        beside.exists(),
        "no firn beside {}: name it with --firn",
        beside.display()
    );
    Ok(beside)
}

fn version_time(firn: &Engine) -> Result<f64> {
    let mut samples = Vec::new();
    for _ in 0..21 {
        samples.push(firn.version()?.wall.as_secs_f64() * 1e3);
    }
    report::median(&samples).context("no samples")
}
