//! One contestant: a `firn` or `criu` binary, and the timing of its commands.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use firn_proto::{Message, StatsEntry};

use crate::kernel;

/// A dump and restore program with CRIU's command line.
pub struct Engine {
    /// Column name.
    pub name: &'static str,
    /// The binary.
    pub program: PathBuf,
    /// Directory shown at /run while the engine runs; CRIU keeps what it found out about the
    /// kernel there, but only on a tmpfs.
    pub run_dir: Option<PathBuf>,
}

/// One finished command.
pub struct Timed {
    /// From before the spawn until the exit was seen.
    pub wall: Duration,
    /// Peak resident size in KiB.
    pub peak_rss_kib: u64,
}

/// Whether the tasks survive their dump.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Killed.
    Kill,
    /// Left running.
    LeaveRunning,
}

impl Engine {
    /// Dumps the tree below `pid`; returns the command's figures and how long tasks were frozen.
    pub fn dump(&self, pid: i32, images: &Path, after: After) -> Result<(Timed, Duration)> {
        let mut command = self.command("dump", images);
        command.args(["-t", &pid.to_string(), "-o", "dump.log"]);
        if after == After::LeaveRunning {
            command.arg("-R");
        }
        let timed = self.time(command, &images.join("dump.log"))?;
        Ok((timed, frozen_time(images)?))
    }

    /// Restores detached.
    pub fn restore(&self, images: &Path) -> Result<Timed> {
        let mut command = self.command("restore", images);
        command.args(["-d", "-o", "restore.log"]);
        self.time(command, &images.join("restore.log"))
    }

    /// Asks for the version, which shows what starting up costs.
    pub fn version(&self) -> Result<Timed> {
        let mut command = Command::new(&self.program);
        command.arg("--version");
        self.time(command, Path::new("/dev/null"))
    }

    fn command(&self, action: &str, images: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(action).arg("-D").arg(images);
        command
    }

    fn time(&self, mut command: Command, log: &Path) -> Result<Timed> {
        if let Some(dir) = &self.run_dir {
            kernel::bind(dir, Path::new("/run")).context("cannot put a tmpfs on /run")?;
        }
        let timed = time(&mut command, log);
        if self.run_dir.is_some() {
            kernel::unmount(Path::new("/run"))?;
        }
        timed.with_context(|| format!("{} failed: {command:?}", self.name))
    }
}

fn time(command: &mut Command, log: &Path) -> Result<Timed> {
    let errors = log.with_extension("stderr");
    let errors_file = if log.starts_with("/dev") && log.ends_with("null") {
        Stdio::null()
    } else {
        File::create(&errors)?.into()
    };
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors_file);
    let start = Instant::now();
    let child = command.spawn()?;
    let ended = kernel::wait_for(i32::try_from(child.id())?)?;
    let wall = start.elapsed();
    if ended.status != 0 {
        bail!(
            "wait status {:#x}: {}",
            ended.status,
            last_words(&errors, log)
        );
    }
    Ok(Timed {
        wall,
        peak_rss_kib: ended.peak_rss_kib,
    })
}

/// The last line that the failed command left for its user, else the last one of its log.
fn last_words(errors: &Path, log: &Path) -> String {
    [errors, log]
        .iter()
        .filter_map(|path| std::fs::read(path).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .find_map(|text| {
            text.lines()
                .rfind(|line| !line.trim().is_empty())
                .map(str::to_owned)
        })
        .unwrap_or_else(|| "it said nothing".to_owned())
}

/// Reads the frozen time out of `stats-dump`, which both engines write.
fn frozen_time(images: &Path) -> Result<Duration> {
    let path = images.join("stats-dump");
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // Two magics and the length of the only message.
    let message = bytes.get(12..).context("stats-dump is too short")?;
    let stats = StatsEntry::decode(message).context("cannot decode stats-dump")?;
    let dump = stats.dump.context("stats-dump holds no dump statistics")?;
    Ok(Duration::from_micros(u64::from(dump.frozen_time)))
}
