//! A copy of a disk that is written: how long the writer stands still, against rsync.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Bench;
use super::device::TrialDir;
use super::fio::Load;
use super::rows::{Aim, Row};
use crate::kernel;

/// Files of the tree that is copied.
const FILES: usize = 4000;
/// Bytes of each.
const FILE_BYTES: usize = 128 << 10;
/// MiB of the file that the writer overwrites.
const WRITTEN_MIB: u64 = 256;
/// MB per second of the writer.
const WRITER_RATE: u32 = 200;

/// How long each thing took, in ms.
#[derive(Default)]
struct Times {
    frozen: Vec<f64>,
    whole: Vec<f64>,
    frozen_mib: Vec<f64>,
    first_rsync: Vec<f64>,
    second_rsync: Vec<f64>,
}

/// Copies with both sizes of clusters, and with rsync.
pub fn copies(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cluster_kib in [1024, 256] {
        let mut times = Times::default();
        for _ in 0..bench.runs.div_ceil(2) {
            round(bench, cluster_kib, &mut times)?;
        }
        let head = format!("copy, clusters of {cluster_kib} KiB");
        let aim = match cluster_kib {
            1024 => Aim::AtMost(0.1),
            _ => Aim::None,
        };
        let frozen = format!("{head}: frozen / rsync");
        let second = format!("{head}: frozen / second rsync");
        rows.extend([
            Row::told(format!("{head}: all"), &times.whole, "ms"),
            Row::told(format!("{head}: frozen"), &times.frozen, "ms"),
            Row::told(format!("{head}: sent frozen"), &times.frozen_mib, "MiB"),
            Row::told(format!("{head}: rsync"), &times.first_rsync, "ms"),
            Row::told(format!("{head}: second rsync"), &times.second_rsync, "ms"),
            Row::ratio(frozen, &times.frozen, &times.first_rsync, aim),
            Row::ratio(second, &times.frozen, &times.second_rsync, Aim::None),
        ]);
    }
    Ok(rows)
}

fn round(bench: &Bench, cluster_kib: u32, times: &mut Times) -> Result<()> {
    bench.go_on()?;
    let dir = TrialDir(bench.dir.join("copies"));
    let (disk, target) = (dir.0.join("disk"), dir.0.join("mnt"));
    std::fs::create_dir_all(&target)?;
    let disk = disk.to_str().context("the directory is not UTF-8")?;
    let mountpoint = target.to_str().context("the directory is not UTF-8")?;
    let cluster = format!("{cluster_kib}K");
    let firn = &bench.firn;
    firn.ploop(&["init", "-s", "3G", "-t", "ext4", "-b", &cluster, disk])?;
    firn.ploop(&["mount", "-m", mountpoint, disk])?;
    let done = measure(bench, disk, &target, &dir.0, times);
    firn.ploop(&["umount", disk])?;
    done
}

fn measure(bench: &Bench, disk: &str, mounted: &Path, dir: &Path, times: &mut Times) -> Result<()> {
    fill(&mounted.join("tree"))?;
    let written = mounted.join("written");
    {
        let writer = Load::writer(&written, WRITTEN_MIB, WRITER_RATE)?;
        settle(&written)?;
        let report = copy(bench, disk, &dir.join("copy.hds"), writer.pid())?;
        let field = |name: &str| report.get(name).and_then(Value::as_f64);
        times
            .frozen
            .push(field("frozen_ms").context("copy told no frozen time")?);
        let bytes = field("frozen_bytes").context("copy told no size")?;
        times.frozen_mib.push(bytes / f64::from(1 << 20));
        times.whole.push(field("all_ms").unwrap_or_default());
    }
    std::fs::remove_file(dir.join("copy.hds"))?;
    let writer = Load::writer(&written, WRITTEN_MIB, WRITER_RATE)?;
    settle(&written)?;
    let copy = dir.join("rsync");
    times.first_rsync.push(rsync(mounted, &copy)?);
    kernel::kill(i32::try_from(writer.pid())?, libc::SIGSTOP)?;
    times.second_rsync.push(rsync(mounted, &copy)?);
    Ok(())
}

/// Makes the tree, with bytes that neither repeat nor pack.
fn fill(tree: &Path) -> Result<()> {
    let mut random = crate::workload::Xorshift::new();
    for number in 0..FILES {
        let dir = tree.join(format!("{}", number / 100));
        std::fs::create_dir_all(&dir)?;
        let bytes: Vec<u8> = (0..FILE_BYTES / 8)
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        std::fs::write(dir.join(format!("file-{number}")), bytes)?;
    }
    Ok(())
}

/// Waits until the writer has laid its file out and goes at its pace.
fn settle(written: &Path) -> Result<()> {
    let begun = Instant::now();
    while std::fs::metadata(written).map_or(0, |file| file.len()) < WRITTEN_MIB << 20 {
        ensure!(
            begun.elapsed() < Duration::from_secs(30),
            "the writer has no file in 30 s"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(1));
    Ok(())
}

/// Copies into a file; the writer is stopped when the copy asks for it.
fn copy(bench: &Bench, disk: &str, file: &Path, writer: u32) -> Result<Value> {
    let file = file.to_str().context("the directory is not UTF-8")?;
    let stop = format!("kill -STOP {writer}");
    let begun = Instant::now();
    let text = bench
        .firn
        .ploop(&["copy", "--json", "-s", disk, "-d", file, "-F", &stop])?;
    let mut report: Value = serde_json::from_str(&text)?;
    report["all_ms"] = (begun.elapsed().as_secs_f64() * 1e3).into();
    Ok(report)
}

/// Copies a directory's contents; ms. Files that vanish or change meanwhile are no failure.
fn rsync(from: &Path, to: &PathBuf) -> Result<f64> {
    let begun = Instant::now();
    let status = Command::new("rsync")
        .args(["-aHX", "--numeric-ids", "--delete"])
        .arg(from.join(""))
        .arg(to)
        .status()
        .context("cannot run rsync; install Debian's package rsync")?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    let vanished = status.code() == Some(24);
    ensure!(status.success() || vanished, "rsync ended with {status}");
    Ok(took)
}
