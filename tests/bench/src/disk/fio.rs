//! Runs fio on a device or in a directory.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How requests follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// In order.
    Sequential,
    /// Anywhere.
    Random,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device.
    Read,
    /// To it.
    Write,
}

/// One job. All are direct, eight requests at a time; writes end with a flush, which counts.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// What it is called.
    pub name: &'static str,
    /// Order.
    pub pattern: Pattern,
    /// Way.
    pub direction: Direction,
    /// Once over the whole device, instead of for [`SECONDS`].
    pub once: bool,
}

/// Length of a job that does not end by itself.
pub const SECONDS: u32 = 1;

/// Requests at a time.
pub const DEPTH: u32 = 8;

impl Job {
    /// Bytes of a request, as fio is told.
    pub fn block(&self) -> &'static str {
        match self.pattern {
            Pattern::Sequential => "1M",
            Pattern::Random => "4k",
        }
    }

    fn mode(&self) -> &'static str {
        match (self.pattern, self.direction) {
            (Pattern::Sequential, Direction::Read) => "read",
            (Pattern::Sequential, Direction::Write) => "write",
            (Pattern::Random, Direction::Read) => "randread",
            (Pattern::Random, Direction::Write) => "randwrite",
        }
    }

    fn command(&self, file: &Path, size_mib: u64) -> Command {
        let mut command = fio(self.name, file);
        command
            .arg("--direct=1")
            .arg("--ioengine=libaio")
            .arg(format!("--rw={}", self.mode()))
            .arg(format!("--bs={}", self.block()))
            .arg(format!("--iodepth={DEPTH}"))
            .arg(format!("--size={size_mib}M"));
        if !self.once {
            command.args(["--time_based", &format!("--runtime={SECONDS}")]);
        }
        if self.direction == Direction::Write {
            command.arg("--end_fsync=1");
        }
        command
    }

    /// Runs it; gives bytes per second, the final flush included.
    pub fn run(&self, device: &Path, size_mib: u64) -> Result<f64> {
        let output = self.command(device, size_mib).output().context(MISSING)?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            bail!("fio {}: {}", self.name, words.trim_end());
        }
        speed(&output.stdout).with_context(|| format!("fio {} told no speed", self.name))
    }

    /// Carries out so many requests.
    pub fn limited(&self, device: &Path, size_mib: u64, requests: u32) -> Result<()> {
        let mut command = self.command(device, size_mib);
        command.arg(format!("--number_ios={requests}"));
        let status = command.stdout(Stdio::null()).status().context(MISSING)?;
        match status.success() {
            true => Ok(()),
            false => bail!("fio {} ended with {status}", self.name),
        }
    }

    /// Starts it, for as long as the load lives.
    pub fn start(&self, device: &Path, size_mib: u64) -> Result<Load> {
        let mut command = self.command(device, size_mib);
        command.args(["--time_based", "--runtime=3600"]);
        Load::start(command)
    }
}

const MISSING: &str = "cannot run fio; install Debian's package fio";

fn fio(name: &str, file: &Path) -> Command {
    let mut command = Command::new("fio");
    command
        .arg(format!("--name={name}"))
        .arg(format!("--filename={}", file.display()))
        .args(["--output-format=json", "--thread"])
        .stdin(Stdio::null());
    command
}

/// The bytes moved over the time from the first request to the end of the flush.
fn speed(report: &[u8]) -> Option<f64> {
    // Warnings may come before the report.
    let start = report.iter().position(|byte| *byte == b'{')?;
    let report: Value = serde_json::from_slice(&report[start..]).ok()?;
    let job = report.get("jobs")?.get(0)?;
    let bytes: f64 = ["read", "write"]
        .iter()
        .filter_map(|way| job.get(way)?.get("io_bytes")?.as_f64())
        .sum();
    // fio's own speed leaves the flush at the end out.
    let millis = job.get("job_runtime")?.as_f64()?;
    (millis > 0.0).then_some(bytes / millis * 1e3)
}

/// A fio that runs until it is dropped.
pub struct Load(Child);

impl Load {
    fn start(mut command: Command) -> Result<Load> {
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(MISSING)?;
        Ok(Load(child))
    }

    /// Overwrites a file again and again through the page cache, with so many bytes per second.
    pub fn writer(file: &Path, size_mib: u64, mb_per_second: u32) -> Result<Load> {
        let mut command = fio("writer", file);
        command
            .args(["--ioengine=psync", "--rw=randwrite", "--bs=128k"])
            .arg(format!("--size={size_mib}M"))
            .arg(format!("--rate={mb_per_second}000000"))
            .args(["--time_based", "--runtime=3600"]);
        Load::start(command)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flush_counts() {
        let report = b"fio: note\n{\"jobs\":[{\"job_runtime\":2000,\"read\":{\"io_bytes\":0},\
            \"write\":{\"io_bytes\":4000,\"bw_bytes\":9999}}]}";
        assert_eq!(speed(report), Some(2000.0));
        assert_eq!(speed(b"{}"), None);
    }
}
