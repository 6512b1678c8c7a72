//! What somebody waits for: mounting, snapshots, answers under load; and the server's memory.

use std::path::Path;

use anyhow::{Context, Result};
use firn_ploop::server::Registry;
use serde_json::Value;

use super::Bench;
use super::device::{Kind, TrialDir};
use super::fio::{Direction, Job, Load, Pattern};
use super::rows::{Aim, Row};

/// MiB written before a snapshot, through the page cache.
const WRITTEN_MIB: u64 = 64;

/// Mounting, snapshots.
pub fn commands(bench: &Bench) -> Result<Vec<Row>> {
    let (mut mounts, mut quiet, mut busy, mut umounts) = (vec![], vec![], vec![], vec![]);
    for _ in 0..bench.runs {
        bench.go_on()?;
        let dir = TrialDir(bench.dir.join("commands"));
        let (disk, target) = (dir.0.join("disk"), dir.0.join("mnt"));
        std::fs::create_dir_all(&target)?;
        let disk = disk.to_str().context("the directory is not UTF-8")?;
        let mountpoint = target.to_str().context("the directory is not UTF-8")?;
        bench
            .firn
            .ploop(&["init", "-s", "10G", "-t", "ext4", disk])?;
        mounts.push(bench.firn.timed(&["mount", "-m", mountpoint, disk])?);
        let timed = snapshots(bench, &target, disk);
        umounts.push(bench.firn.timed(&["umount", disk])?);
        let (first, second) = timed?;
        quiet.push(first);
        busy.push(second);
    }
    Ok(vec![
        Row::aimed("mount of an ext4 disk", &mounts, "ms", Aim::AtMost(100.0)),
        Row::aimed(
            "snapshot of a mounted disk",
            &quiet,
            "ms",
            Aim::AtMost(50.0),
        ),
        Row::told("snapshot under a writer of 200 MB/s", &busy, "ms"),
        Row::told("umount", &umounts, "ms"),
    ])
}

fn snapshots(bench: &Bench, target: &Path, disk: &str) -> Result<(f64, f64)> {
    let file = target.join("file");
    std::fs::write(&file, vec![7u8; usize::try_from(WRITTEN_MIB << 20)?])?;
    std::fs::File::open(&file)?.sync_all()?;
    let quiet = bench.firn.timed(&["snapshot", disk])?;
    let _writer = Load::writer(&target.join("load"), WRITTEN_MIB, 200)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    Ok((quiet, bench.firn.timed(&["snapshot", disk])?))
}

/// `ping` and `stat`, with and without load on the device.
pub fn answers(bench: &Bench) -> Result<Vec<Row>> {
    let kind = Kind::Ours { cluster_kib: 1024 };
    let attached = kind.attach(&bench.firn, &bench.dir.join("asked"), bench.size_mib)?;
    let disk = attached.ploop().context("our device has a disk")?;
    let disk = disk.to_str().context("the directory is not UTF-8")?;
    let fill = Job {
        name: "fill",
        pattern: Pattern::Sequential,
        direction: Direction::Write,
        once: true,
    };
    fill.run(&attached.device, bench.size_mib)?;
    let idle = (pings(bench, disk)?, stats(bench, disk)?);
    let load = Job {
        name: "load",
        pattern: Pattern::Random,
        once: false,
        ..fill
    };
    let _load = load.start(&attached.device, bench.size_mib)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    let busy = (pings(bench, disk)?, stats(bench, disk)?);
    Ok(vec![
        Row::told("ping, idle: mean", &[idle.0], "ms"),
        Row::told("ping, under random writes: mean", &[busy.0], "ms"),
        Row::told("stat, idle", &idle.1, "ms"),
        Row::told("stat, under random writes", &busy.1, "ms"),
    ])
}

fn pings(bench: &Bench, disk: &str) -> Result<f64> {
    let text = bench
        .firn
        .ploop(&["ping", "--json", "-c", "50", "-i", "10", disk])?;
    let report: Value = serde_json::from_str(&text)?;
    let mean = report.get("mean_us").and_then(Value::as_f64);
    Ok(mean.context("ping told no mean")? / 1e3)
}

fn stats(bench: &Bench, disk: &str) -> Result<Vec<f64>> {
    (0..10).map(|_| bench.firn.timed(&["stat", disk])).collect()
}

/// Memory of the two processes of a server, for a small disk and a large one. What does not grow with
/// the disk are mostly the threads' buffers.
pub fn memory(bench: &Bench) -> Result<Vec<Row>> {
    const SMALL_GIB: u32 = 100;
    const LARGE_GIB: u32 = 1100;
    let small = server_memory(bench, SMALL_GIB)?;
    let large = server_memory(bench, LARGE_GIB)?;
    let growth = (large - small) / f64::from(LARGE_GIB - SMALL_GIB) * 100.0;
    let what = "server's memory per 100 GiB of disk";
    Ok(vec![
        Row::aimed(what, &[growth], "MiB", Aim::AtMost(1.0)),
        Row::told("server's memory for a disk of 100 GiB", &[small], "MiB"),
        Row::told("server's memory for a disk of 1100 GiB", &[large], "MiB"),
    ])
}

/// MiB that are the server's own: no file's pages. The disk is written at places all over it.
fn server_memory(bench: &Bench, size_gib: u32) -> Result<f64> {
    bench.go_on()?;
    let kind = Kind::Ours { cluster_kib: 1024 };
    let size_mib = u64::from(size_gib) << 10;
    let attached = kind.attach(&bench.firn, &bench.dir.join("memory"), size_mib)?;
    let disk = attached.ploop().context("our device has a disk")?;
    let touch = Job {
        name: "touch",
        pattern: Pattern::Random,
        direction: Direction::Write,
        // A second of them would take the host 1 MiB for each: 20 GiB and more.
        once: true,
    };
    // Every write allocates a cluster, of which most stay holes of the host's file.
    touch.limited(&attached.device, size_mib, 256)?;
    let record = Registry::at(&bench.firn.run_dir).find_by(disk)?;
    let record = record.context("the disk is not served")?;
    let worker = firn_ploop::server::Client::connect(&record.control)?
        .stat()?
        .worker;
    Ok(own_mib(&worker.to_string())? + own_mib(&record.supervisor.to_string())?)
}

fn own_mib(pid: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssShmem:"))
        .filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<f64>().ok());
    Ok(kib.sum::<f64>() / 1024.0)
}
