//! What the machine itself costs: the same bytes moved, the same tasks made, by bare calls.
//!
//! Each floor runs as `firn-bench floor ...` in a process of its own, so that its memory does not
//! count as the bench's (a child's peak memory starts at its parent's), and prints microseconds.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::kernel;
use crate::workload::PROCESSES;

/// Bytes per call of the copying floors: large enough to amortise the call, small enough to stay
/// in the cache between read and write.
const BATCH_BYTES: usize = 1 << 20;

/// The measured loops.
#[derive(Clone, Debug, Subcommand)]
pub enum Floor {
    /// One thread: process_vm_readv and write to a file.
    Read {
        /// Whose memory.
        pid: i32,
        /// Where it begins.
        address: usize,
        /// How much.
        len_bytes: usize,
        /// Where it goes.
        file: PathBuf,
    },
    /// One thread: preadv of a file into fresh memory.
    Fill {
        /// What is read.
        file: PathBuf,
    },
    /// Fork as many processes as the tree case has.
    Fork,
    /// Touch and give back memory, so that the next user of it does not pay the hypervisor for it.
    Recycle {
        /// How much.
        mib: usize,
    },
}

/// Runs the floor in this process and prints its microseconds.
pub fn run(floor: &Floor) -> Result<()> {
    let took = match floor {
        Floor::Read {
            pid,
            address,
            len_bytes,
            file,
        } => read(*pid, *address, *len_bytes, file)?,
        Floor::Fill { file } => fill(file)?,
        Floor::Fork => fork()?,
        Floor::Recycle { mib } => recycle(*mib)?,
    };
    println!("{}", took.as_micros());
    Ok(())
}

/// Runs the floor in a process of its own.
pub fn measure(arguments: &[&str]) -> Result<Duration> {
    let output = Command::new(std::env::current_exe()?)
        .arg("floor")
        .args(arguments)
        .output()?;
    if !output.status.success() {
        bail!(
            "floor {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(Duration::from_micros(
        text.trim().parse().context("a floor printed no number")?,
    ))
}

fn read(pid: i32, address: usize, len_bytes: usize, file: &Path) -> Result<Duration> {
    let mut out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(file)?;
    let mut buffer = vec![1; BATCH_BYTES];
    let start = Instant::now();
    let mut done = 0;
    while done < len_bytes {
        let want = BATCH_BYTES.min(len_bytes - done);
        let got = kernel::read_remote(pid, address + done, &mut buffer[..want])?;
        out.write_all(&buffer[..got])?;
        done += got;
    }
    Ok(start.elapsed())
}

fn fill(file: &Path) -> Result<Duration> {
    let file = File::open(file)?;
    let len_bytes = usize::try_from(file.metadata()?.len())?;
    let start = Instant::now();
    let words = kernel::fresh_memory(len_bytes)?;
    let mut done = 0;
    while done < len_bytes {
        let got = kernel::read_at(&file, &mut words[done / 8..], done)?;
        if got == 0 || got % 8 != 0 {
            bail!("the file ended or broke a word at byte {}", done + got);
        }
        done += got;
    }
    Ok(start.elapsed())
}

fn fork() -> Result<Duration> {
    let start = Instant::now();
    let mut children = Vec::with_capacity(PROCESSES);
    for _ in 0..PROCESSES {
        match kernel::fork()? {
            Some(pid) => children.push(pid),
            None => kernel::pause_for_ever(),
        }
    }
    let took = start.elapsed();
    for pid in children {
        kernel::kill(pid, libc::SIGKILL)?;
        kernel::wait_for(pid)?;
    }
    Ok(took)
}

fn recycle(mib: usize) -> Result<Duration> {
    let start = Instant::now();
    let words = kernel::fresh_memory(mib << 20)?;
    words.iter_mut().step_by(512).for_each(|word| *word = 1);
    Ok(start.elapsed())
}
