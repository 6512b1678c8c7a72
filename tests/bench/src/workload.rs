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
}

impl Workload {
    /// Processes that it consists of, once it is complete.
    pub fn processes(self) -> usize {
        match self {
            Workload::Tree => PROCESSES,
            _ => 1,
        }
    }
}

/// Becomes the workload; returns only on error.
pub fn run(workload: Workload, dir: &Path, memory_mib: usize) -> Result<()> {
    kernel::close_inherited()?;
    kernel::new_session().context("cannot start a session")?;
    kernel::block_requests()?;
    match workload {
        Workload::Idle => ready(dir, "")?,
        Workload::Spin => spin(dir)?,
        Workload::Memory => memory(dir, memory_mib << 20)?,
        Workload::Tree => tree(dir)?,
        Workload::Threads => threads(dir)?,
        Workload::Files => files(dir)?,
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
fn tree(dir: &Path) -> Result<()> {
    const BRANCHES: usize = 10;
    let leaves = PROCESSES - 1 - BRANCHES;
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

fn threads(dir: &Path) -> Result<()> {
    for _ in 1..THREADS {
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(|| kernel::pause_for_ever())?;
    }
    ready(dir, "")
}

/// Files with a few bytes at a position of their own, pipes with a few bytes inside.
fn files(dir: &Path) -> Result<()> {
    kernel::raise_descriptor_limit()?;
    let mut open: Vec<OwnedFd> = Vec::new();
    for number in 0..FILES {
        let mut file = File::create_new(dir.join(format!("file-{number}")))?;
        writeln!(file, "file number {number}")?;
        file.seek(SeekFrom::Start(u64::try_from(number % 10)?))?;
        open.push(file.into());
    }
    for number in 0..PIPES {
        let (read, write) = kernel::pipe()?;
        let mut write = File::from(write);
        write!(write, "pipe number {number}")?;
        open.extend([read, write.into()]);
    }
    ready(dir, "")?;
    std::mem::forget(open);
    Ok(())
}
