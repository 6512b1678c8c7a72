//! The programs that are dumped: one per case, run as `firn-bench workload NAME DIR`.
//!
//! Each one starts its own session, sets up exactly the objects of its case, writes `DIR/ready`
//! and then waits. None has a socket or a terminal, and all but `threads` have one thread.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::kernel;

/// Processes of the tree, the root included.
pub const PROCESSES: usize = 200;
/// Threads of the threaded process, the leader included.
pub const THREADS: usize = 500;
/// Open regular files.
pub const FILES: usize = 1000;
/// Open pipes (two descriptors each).
pub const PIPES: usize = 500;
/// Descriptors of the process with many, as far as the limit lets it.
pub const DESCRIPTORS: usize = 20_000;
/// Descriptors that every process of the sharing tree has.
pub const SHARED: usize = 5_000;
/// Mappings of the process with many, as far as the kernel lets it.
pub const MAPPINGS: usize = 128 << 10;
/// Processes of the large tree, the root included.
pub const LARGE_TREE: usize = 5_000;

/// What a workload process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// One process that sleeps.
    Idle,
    /// One process that notes the longest time it was kept from running.
    Spin,
    /// Random private anonymous memory.
    Memory,
    /// A tree of sleeping processes.
    Tree,
    /// One process with many sleeping threads.
    Threads,
    /// One process with many open files and pipes.
    Files,
    /// A tree of processes that all have the same open files.
    Shared,
    /// One process with many mappings.
    Mappings,
}

impl Workload {
    /// Processes that it consists of, once it is complete; `size` is what [`run`] was given.
    pub fn processes(self, size: usize) -> usize {
        match self {
            Workload::Tree => size,
            Workload::Shared => PROCESSES,
            _ => 1,
        }
    }
}

/// Becomes the workload; returns only on error. `size` is the number of the objects that the workload is made of:
/// MiB of memory, processes of a tree, threads, descriptors, mappings.
pub fn run(workload: Workload, dir: &Path, size: usize) -> Result<()> {
    kernel::close_inherited()?;
    kernel::new_session().context("cannot start a session")?;
    kernel::block_requests()?;
    match workload {
        Workload::Idle => ready(dir, "")?,
        Workload::Spin => spin(dir)?,
        Workload::Memory => memory(dir, size << 20)?,
        Workload::Tree => tree(dir, size)?,
        Workload::Threads => threads(dir, size)?,
        Workload::Files => {
            files(dir, size)?;
            ready(dir, "")?;
        }
        Workload::Shared => {
            files(dir, size)?;
            tree(dir, PROCESSES)?;
        }
        Workload::Mappings => {
            kernel::many_mappings(size)?;
            ready(dir, "")?;
        }
    }
    kernel::pause_for_ever()
}

/// Tells the bench that everything is set up; the text is for it to read.
fn ready(dir: &Path, text: &str) -> Result<()> {
    std::fs::write(dir.join("ready.new"), text)?;
    std::fs::rename(dir.join("ready.new"), dir.join("ready"))?;
    Ok(())
}

/// Reads the clock without pause and keeps the longest step in a shared file page.
fn spin(dir: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("gap"))?;
    let longest_ns = kernel::shared_word(&file)?;
    ready(dir, "")?;
    let start = Instant::now();
    let mut last = start.elapsed();
    loop {
        let now = start.elapsed();
        let step = u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX);
        longest_ns.fetch_max(step, Ordering::Relaxed);
        last = now;
    }
}

/// Fills memory with random words; on SIGUSR1 says in `DIR/checksum` whether they are still there.
fn memory(dir: &Path, len_bytes: usize) -> Result<()> {
    let words = kernel::fresh_memory(len_bytes)?;
    let mut random = Xorshift::new();
    words.iter_mut().for_each(|word| *word = random.next());
    ready(
        dir,
        &format!("{} {len_bytes}", words.as_ptr().expose_provenance()),
    )?;
    loop {
        kernel::wait_for_request()?;
        let mut random = Xorshift::new();
        let wrong = words.iter().filter(|word| **word != random.next()).count();
        std::fs::write(dir.join("checksum.new"), format!("{wrong}"))?;
        std::fs::rename(dir.join("checksum.new"), dir.join("checksum"))?;
    }
}

/// Marsaglia's generator: fast enough that filling memory is bound by the page faults.
pub struct Xorshift(u64);

impl Xorshift {
    /// The same row of numbers every time.
    pub fn new() -> Self {
        Xorshift(0x9e37_79b9_7f4a_7c15)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A root with ten children, which share the other processes among them.
fn tree(dir: &Path, processes: usize) -> Result<()> {
    const BRANCHES: usize = 10;
    let leaves = processes.saturating_sub(1 + BRANCHES);
    for branch in 0..BRANCHES {
        if kernel::fork()?.is_none() {
            let own = leaves / BRANCHES + usize::from(branch < leaves % BRANCHES);
            for _ in 0..own {
                if kernel::fork()?.is_none() {
                    kernel::pause_for_ever();
                }
            }
            kernel::pause_for_ever();
        }
    }
    ready(dir, "")
}

fn threads(dir: &Path, threads: usize) -> Result<()> {
    for _ in 1..threads {
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(|| kernel::pause_for_ever())?;
    }
    ready(dir, "")
}

/// Files with a few bytes at a position of their own, pipes with a few bytes inside; half of the descriptors each.
fn files(dir: &Path, descriptors: usize) -> Result<()> {
    kernel::raise_descriptor_limit()?;
    let mut open: Vec<OwnedFd> = Vec::new();
    for number in 0..descriptors.div_ceil(2) {
        let mut file = File::create_new(dir.join(format!("file-{number}")))?;
        writeln!(file, "file number {number}")?;
        file.seek(SeekFrom::Start(u64::try_from(number % 10)?))?;
        open.push(file.into());
    }
    for number in 0..descriptors / 4 {
        let (read, write) = kernel::pipe()?;
        let mut write = File::from(write);
        write!(write, "pipe number {number}")?;
        open.extend([read, write.into()]);
    }
    std::mem::forget(open);
    Ok(())
}
