//! Runs conformance workloads: `firn-zdtm run`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use zdtm::runner::{self, Options, Play};
use zdtm::{Stage, workloads};

/// Conformance workloads for checkpoint and restore, and their runner.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start workloads, dump, kill and restore them, and collect their verdicts
    Run(Run),
    /// Be one workload: makes DIR/ready, waits for SIGTERM, writes DIR/result
    Workload(Single),
    /// Play one workload in an empty directory
    #[command(hide = true)]
    Case(Case),
}

#[derive(Debug, Args)]
struct Run {
    /// Only workloads whose name has this in it, or matches it with `*` for any text
    #[arg(long = "test", value_name = "PATTERN")]
    tests: Vec<String>,
    /// Start each workload this many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    iterations: u32,
    /// Play this many workloads at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    parallel: usize,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
    /// Keep logs and images of passed workloads too
    #[arg(long)]
    keep: bool,
    /// Print names and what they hold, and run nothing
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    play: Play,
}

#[derive(Debug, Args)]
struct Single {
    /// The workload's name
    name: String,
    /// The instance's directory
    #[arg(long)]
    dir: PathBuf,
}

#[derive(Debug, Args)]
struct Case {
    #[command(flatten)]
    single: Single,
    #[command(flatten)]
    play: Play,
}

fn main() -> ExitCode {
    match act(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("firn-zdtm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(run) if run.list => list(&run),
        Command::Run(run) => run_all(run),
        Command::Workload(Single { name, dir }) => {
            let workload = workloads::find(&name).with_context(|| format!("no workload {name}"))?;
            Ok(ExitCode::from(Stage::perform(workload, &dir)))
        }
        Command::Case(Case {
            single: Single { name, dir },
            play,
        }) => {
            let workload = workloads::find(&name).with_context(|| format!("no workload {name}"))?;
            runner::play_case(workload, &play, &dir)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn list(run: &Run) -> Result<ExitCode> {
    for workload in runner::select(&run.tests) {
        println!("{:<28} {}", workload.name, workload.about);
    }
    Ok(ExitCode::SUCCESS)
}

fn run_all(run: Run) -> Result<ExitCode> {
    let Run {
        tests,
        iterations,
        parallel,
        keep_going,
        keep,
        play,
        ..
    } = run;
    let options = Options {
        patterns: tests,
        iterations,
        parallel,
        keep_going,
        keep,
        play,
    };
    let totals = runner::run(&options)?;
    println!("{totals}");
    Ok(if totals.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
