//! The runner: takes workloads through freeze, kill, restore and verdict, and judges from outside too.
//!
//! ```text
//! run (queue.rs)          picks workloads, N at once, prints a line each and the counts
//!  └─ case (case.rs)      one instance, in a process and pid namespace of its own (isolate.rs):
//!      start ─ ready ─ [look ─ dump ─ look ─ restore ─ look ─ compare] × rounds ─ SIGTERM ─ verdict
//! ```
//!
//! A case is a process of its own because restored tasks get exactly the pids they had: in a fresh
//! pid namespace no other case can have taken them, and whatever goes wrong, the end of the namespace
//! takes every task of it along.

pub mod case;
mod compare;
mod engine;
mod huge_pages;
mod isolate;
pub mod outside;
mod queue;
mod reaper;
mod snapshot;

pub use queue::{Options, Totals, run, select};

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::{Workload, proc, sys};

/// What a dump does with the tree once it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Kills it; a restore follows.
    Kill,
    /// Lets it run on (`-R`).
    LeaveRunning,
    /// Leaves it stopped (`-s`); the runner continues it.
    LeaveStopped,
}

/// How a case is to be played.
#[derive(Debug, Clone, Args)]
pub struct Play {
    /// The engine's program [default: `firn` beside this program]
    #[arg(long, value_name = "PATH")]
    pub engine: Option<PathBuf>,
    /// A CRIU that dumps, restores or does both in the engine's place: it needs --no-compare, for it does
    /// not keep all that the comparison sees
    #[arg(long, value_name = "PATH", requires = "no_compare")]
    pub criu: Option<PathBuf>,
    /// What CRIU does
    #[arg(long, value_name = "WHAT", requires = "criu", default_value = "both")]
    pub criu_does: CriuDoes,
    /// Start, wait, verify, without any checkpoint
    #[arg(long)]
    pub no_checkpoint: bool,
    /// Dump with -R: the tree is not killed and must be exactly as before
    #[arg(long)]
    pub leave_running: bool,
    /// Dump with -s: the tree must stand still, is continued and must be exactly as before
    #[arg(long, conflicts_with = "leave_running")]
    pub leave_stopped: bool,
    /// Run the workloads as this ordinary user, who is also the group; those that need root are skipped
    #[arg(long, value_name = "UID")]
    pub uid: Option<u32>,
    /// How often one instance is dumped (and restored) in a row
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub rounds: u32,
    /// Leave out the comparison of the tree from outside, before and after
    #[arg(long)]
    pub no_compare: bool,
    /// Run in the namespaces of the runner instead of one pid namespace per case
    #[arg(long)]
    pub host: bool,
    /// How long one step may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub step_timeout: u64,
}

/// The part of CRIU, where it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CriuDoes {
    /// It dumps, and the engine restores.
    Dump,
    /// The engine dumps, and it restores.
    Restore,
    /// It dumps and restores: what it can't carry through alone says nothing of the images.
    Both,
}

impl CriuDoes {
    /// The word on the command line.
    fn word(self) -> OsString {
        let value = self.to_possible_value().expect("no value is skipped");
        value.get_name().into()
    }
}

impl Play {
    /// What a dump does with the tree.
    pub fn after(&self) -> After {
        match (self.leave_running, self.leave_stopped) {
            (true, _) => After::LeaveRunning,
            (_, true) => After::LeaveStopped,
            _ => After::Kill,
        }
    }

    /// Finds the engine's program, `None` when no checkpoint is wanted.
    ///
    /// **Errors** when there is none, with the command that makes it.
    pub fn find_engine(&self) -> Result<Option<PathBuf>> {
        if self.no_checkpoint {
            return Ok(None);
        }
        let engine = match &self.engine {
            Some(path) => path.clone(),
            None => env::current_exe()
                .context("finding our own program")?
                .with_file_name("firn"),
        };
        ensure!(
            engine.is_file(),
            "no engine at {}: build it with `cargo build -p firn`, or name one with --engine PATH",
            engine.display()
        );
        Ok(Some(engine.canonicalize().context("finding the engine")?))
    }

    /// The CRIU that does `part`, if it does.
    fn criu_for(&self, part: CriuDoes) -> Option<PathBuf> {
        let does = self.criu_does == part || self.criu_does == CriuDoes::Both;
        let criu = self.criu.as_ref().filter(|_| does)?;
        Some(criu.canonicalize().unwrap_or_else(|_| criu.clone()))
    }

    /// How long a step of that workload may take.
    fn timeout(&self, workload: &Workload) -> Duration {
        const TIMES_LONGER: u64 = 10;
        let factor = if workload.heavy { TIMES_LONGER } else { 1 };
        Duration::from_secs(self.step_timeout * factor)
    }

    /// The flags that make the same value again in another process.
    fn to_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        if let Some(engine) = &self.engine {
            arguments.extend(["--engine".into(), engine.into()]);
        }
        if let Some(criu) = &self.criu {
            arguments.extend(["--criu".into(), criu.into()]);
            arguments.extend(["--criu-does".into(), self.criu_does.word()]);
        }
        let flags = [
            ("--no-checkpoint", self.no_checkpoint),
            ("--leave-running", self.leave_running),
            ("--leave-stopped", self.leave_stopped),
            ("--no-compare", self.no_compare),
            ("--host", self.host),
        ];
        arguments.extend(
            flags
                .iter()
                .filter(|(_, on)| *on)
                .map(|(flag, _)| flag.into()),
        );
        if let Some(uid) = self.uid {
            arguments.extend(["--uid".into(), uid.to_string().into()]);
        }
        let numbers = [
            ("--rounds", u64::from(self.rounds)),
            ("--step-timeout", self.step_timeout),
        ];
        for (flag, number) in numbers {
            arguments.extend([flag.into(), number.to_string().into()]);
        }
        arguments
    }

    /// More than all steps of a case can take together.
    fn case_timeout(&self, workload: &Workload) -> Duration {
        self.timeout(workload) * (3 * self.rounds + 3)
    }
}

/// Plays a case and leaves its outcome in a file; the body of the runner's inner processes.
///
/// With namespaces of its own this runs twice: outside, where it makes them, and inside as pid 1.
pub fn play_case(workload: &Workload, play: &Play, dir: &Path) -> Result<()> {
    if !play.host && sys::pid() != 1 {
        let status = isolate::run_as_init(env::args_os().skip(1))?;
        ensure!(status.success(), "{status}");
        return Ok(());
    }
    if !play.host {
        isolate::mount_proc().context("mounting /proc")?;
        isolate::mount_terminals().context("mounting /dev/pts")?;
    }
    let verdict = case::play(workload, play, dir);
    let text = match &verdict {
        Ok(()) => "pass".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    fs::write(queue::outcome_file(dir), text).context("writing the outcome")?;
    if verdict.is_err() {
        bail!("failed");
    }
    Ok(())
}

/// Kills a process and all that descend from it, until none is left but zombies.
fn end_tree(root: i32) {
    for _ in 0..200 {
        let alive: Vec<i32> = proc::tree(root)
            .unwrap_or_default()
            .into_iter()
            .filter(|pid| proc::stat(pid).is_ok_and(|stat| stat[3] != "Z"))
            .collect();
        if alive.is_empty() {
            return;
        }
        // Children first, so that none is handed on to somebody else before it is seen.
        for &pid in alive.iter().rev() {
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        sys::pause_for(10);
    }
}
