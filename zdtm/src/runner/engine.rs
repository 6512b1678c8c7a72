//! The engine under test, called as a user calls it.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::After;
use super::outside::OutsideObject;
use super::reaper::Reaper;
use crate::sys::{self, Exit};

/// The engine's program and the directory its output goes to.
#[derive(Debug)]
pub struct Engine {
    /// The program.
    pub program: PathBuf,
    /// A CRIU that dumps in its place.
    pub dumps_instead: Option<PathBuf>,
    /// A CRIU that restores in its place.
    pub restores_instead: Option<PathBuf>,
    /// Where its standard output and error are kept.
    pub output_dir: PathBuf,
    /// How long one call may take.
    pub timeout: Duration,
    /// Whether the tree is a job of a shell, which we play.
    pub shell_job: bool,
    /// More options for a dump.
    pub dump_options: &'static [&'static str],
    /// More options for a restore.
    pub restore_options: &'static [&'static str],
    /// Its limit of descriptors.
    pub descriptor_limit: Option<usize>,
}

/// What CRIU has to be told, and the engine knows by itself.
const CRIU_OPTIONS: [&str; 3] = ["--file-locks", "--link-remap", "--tcp-established"];
/// More of it for a dump.
const CRIU_DUMP_OPTIONS: [&str; 1] = ["--ghost-limit=1G"];
/// More of it for a restore.
const CRIU_RESTORE_OPTIONS: [&str; 1] = ["--skip-file-rwx-check"];

/// The number under which a restore gets the object that has a side outside.
const GIVEN: i32 = 100;

/// How one call of the engine went.
#[derive(Debug)]
pub struct Call {
    /// Exit code or signal.
    pub exit: Exit,
    /// Standard output and error.
    pub output: PathBuf,
    /// Its log in the images directory.
    pub log: PathBuf,
}

impl Engine {
    /// Dumps the tree of `pid` into `images`.
    pub fn dump(
        &self,
        reaper: &mut Reaper,
        pid: i32,
        images: &Path,
        after: After,
        outside: Option<&OutsideObject>,
    ) -> Result<Call> {
        let mut command = Command::new(self.dumps_instead.as_ref().unwrap_or(&self.program));
        command
            .args(["dump", "-t", &pid.to_string(), "-D"])
            .arg(images);
        command
            .args(["-o", "dump.log", "-v4"])
            .args(self.dump_options);
        if self.dumps_instead.is_some() {
            command.args(CRIU_OPTIONS).args(CRIU_DUMP_OPTIONS);
        }
        if let Some(outside) = outside {
            command.args(["--external", &outside.declared_key()?]);
        }
        match after {
            After::Kill => {}
            After::LeaveRunning => drop(command.arg("-R")),
            After::LeaveStopped => drop(command.arg("-s")),
        }
        self.call(reaper, command, images, "dump")
    }

    /// Restores from `images`, detached.
    pub fn restore(
        &self,
        reaper: &mut Reaper,
        images: &Path,
        pidfile: &Path,
        outside: Option<&mut OutsideObject>,
    ) -> Result<Call> {
        let mut command = Command::new(self.restores_instead.as_ref().unwrap_or(&self.program));
        command.args(["restore", "-D"]).arg(images);
        command
            .args(["-o", "restore.log", "-v4", "-d", "--pidfile"])
            .arg(pidfile)
            .args(self.restore_options);
        if self.restores_instead.is_some() {
            command.args(CRIU_OPTIONS).args(CRIU_RESTORE_OPTIONS);
        }
        if self.shell_job {
            command.arg("--shell-job");
        }
        if let Some(outside) = outside {
            let key = outside.key()?;
            outside.replace()?;
            let given = outside.inside()?;
            command.args(["--inherit-fd", &format!("fd[{GIVEN}]:{key}")]);
            let give = move || sys::dup_to(&given, GIVEN, 0).map(std::mem::forget);
            // SAFETY: the closure makes a system call only.
            unsafe { command.pre_exec(give) };
        }
        self.call(reaper, command, images, "restore")
    }

    fn call(
        &self,
        reaper: &mut Reaper,
        mut command: Command,
        images: &Path,
        verb: &str,
    ) -> Result<Call> {
        let tag = images
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let output = self.output_dir.join(format!("{verb}.{tag}.out"));
        let file = File::create(&output).context("making the engine's output file")?;
        let twin = file
            .try_clone()
            .context("making the engine's output file")?;
        // A shell's job finds its terminal again through the engine's own standard input.
        let own = if self.shell_job {
            Stdio::inherit()
        } else {
            Stdio::null()
        };
        command.stdin(own).stdout(file).stderr(twin);
        if let Some(limit) = self.descriptor_limit {
            let limit = u64::try_from(limit)?;
            let set = move || sys::set_limit(libc::RLIMIT_NOFILE, limit, limit);
            // SAFETY: the closure makes a system call only.
            unsafe { command.pre_exec(set) };
        }
        let pid = reaper.start(&mut command)?;
        let ended = reaper.until(verb, self.timeout, |reaper| reaper.end_of(pid));
        let Ok(exit) = ended else {
            let _ = sys::kill(pid, libc::SIGKILL);
            bail!(
                "{verb}: the engine was still busy after {} s",
                self.timeout.as_secs()
            );
        };
        let log = images.join(format!("{verb}.log"));
        Ok(Call { exit, output, log })
    }
}

impl Call {
    /// Makes a failed call an error that ends with the engine's last words.
    pub fn expect_success(&self, verb: &str) -> Result<()> {
        if self.exit == Exit::Code(0) {
            return Ok(());
        }
        bail!("{verb}: {}\n{}", self.exit, self.last_words())
    }

    /// What tells most of the output and the log, indented.
    pub fn last_words(&self) -> String {
        let mut text = String::new();
        for (name, path) in [("output", &self.output), ("log", &self.log)] {
            for line in telling_lines(&tail(path, usize::MAX)) {
                text.push_str(&format!("    {name}: {line}\n"));
            }
        }
        text
    }

    /// Everything the engine said, output and log.
    pub fn said(&self) -> String {
        let read = |path: &Path| std::fs::read(path).unwrap_or_default();
        let text = |path: &Path| String::from_utf8_lossy(&read(path)).into_owned();
        text(&self.output) + &text(&self.log)
    }
}

/// The last lines of a file; none when it cannot be read.
pub fn tail(path: &Path, count: usize) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}

/// Picks the last lines of a log that speak of errors, and its very last lines.
fn telling_lines(lines: &[String]) -> Vec<&String> {
    let speaks = |line: &str| line.contains("rror") || line.contains("ERR");
    let errors: Vec<usize> = (0..lines.len()).filter(|&at| speaks(&lines[at])).collect();
    let errors = &errors[errors.len().saturating_sub(6)..];
    let last = lines.len().saturating_sub(4);
    let wanted = (0..lines.len()).filter(|at| *at >= last || errors.contains(at));
    wanted.map(|at| &lines[at]).collect()
}

#[cfg(test)]
mod tests {
    use super::telling_lines;

    #[test]
    fn errors_far_up_and_the_end_are_both_told() {
        let mut lines = vec!["Error: no".to_owned()];
        lines.extend((0..50).map(|n| format!("line {n}")));
        let told = telling_lines(&lines);
        assert_eq!(
            told,
            ["Error: no", "line 46", "line 47", "line 48", "line 49"]
        );
        assert!(telling_lines(&[]).is_empty());
    }
}
