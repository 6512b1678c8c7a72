//! A workload's process tree as /proc shows it: to compare before and after, and to end it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kernel;

/// What must be the same after a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    threads: Vec<i32>,
    descriptors: usize,
    command: Vec<u8>,
}

/// Lists the process and everything below it, parents first.
pub fn snapshot(root: i32) -> Result<Vec<Process>> {
    let mut found = Vec::new();
    let mut left = vec![root];
    while let Some(pid) = left.pop() {
        let process = Path::new("/proc").join(pid.to_string());
        let mut threads = numbers(&process.join("task"))?;
        threads.sort_unstable();
        let command = std::fs::read(process.join("comm"))?;
        let descriptors = std::fs::read_dir(process.join("fd"))?.count();
        for thread in &threads {
            let children = process
                .join("task")
                .join(thread.to_string())
                .join("children");
            let children = std::fs::read_to_string(children)?;
            left.extend(
                children
                    .split_ascii_whitespace()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            );
        }
        found.push(Process {
            pid,
            threads,
            descriptors,
            command,
        });
    }
    found.sort_unstable_by_key(|process| process.pid);
    Ok(found)
}

fn numbers(dir: &Path) -> Result<Vec<i32>> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

/// Kills the listed processes, if they are there, and waits until their pids are free.
pub fn end(tree: &[Process]) -> Result<()> {
    for process in tree {
        // A process that is gone already is as good as one killed.
        let _ = kernel::kill(process.pid, libc::SIGKILL);
    }
    wait_until_gone(tree)
}

/// Reaps until no listed process is left.
pub fn wait_until_gone(tree: &[Process]) -> Result<()> {
    let start = Instant::now();
    loop {
        kernel::reap_ended();
        let left = tree
            .iter()
            .find(|p| Path::new("/proc").join(p.pid.to_string()).exists());
        match left {
            None => return Ok(()),
            Some(process) if start.elapsed() > Duration::from_secs(10) => {
                bail!("process {} is still there after 10 s", process.pid)
            }
            Some(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
