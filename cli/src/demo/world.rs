//! The programs of the demo's world.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::output::Failure;

/// Threads that count.
pub const COUNTERS: usize = 4;
/// Memory that the program fills and keeps checking.
const MEMORY_BYTES: usize = 16 << 20;
const PAGE: usize = 4096;
/// Pause between two ticks.
const TICK: Duration = Duration::from_millis(20);

/// The script that is the root of the world.
pub const SCRIPT: &str = include_str!("world.sh");

/// Which program of the world to be.
#[derive(Debug, Args)]
pub struct WorldArgs {
    role: Role,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    /// Starts a session and becomes the script.
    Start,
    /// Counts, writes the diary, speaks into the pipe.
    Count,
}

/// Plays the role, in the world's directory.
pub fn run(args: &WorldArgs) -> Result<u8, Failure> {
    match args.role {
        Role::Start => Err(start()),
        Role::Count => count(),
    }
}

fn start() -> Failure {
    if let Err(errno) = firn_sys::session::start() {
        return Failure::io("a session can't be started", &errno.into());
    }
    // Whatever this terminal or build tool has left open is no part of the world.
    if let Err(errno) = firn_sys::session::close_on_exec_from(3) {
        return Failure::io("inherited descriptors can't be kept out", &errno.into());
    }
    let firn = match std::env::current_exe() {
        Ok(path) => path,
        Err(error) => return Failure::io("firn does not find itself", &error),
    };
    let error = Command::new("/bin/sh")
        .arg("world.sh")
        .env("FIRN", firn)
        .exec();
    Failure::io("/bin/sh can't be run", &error)
}

fn count() -> Result<u8, Failure> {
    let failed = |error: std::io::Error| Failure::io("the world has ended", &error);
    let counters: Arc<[AtomicU64; COUNTERS]> = Arc::default();
    for index in 0..COUNTERS {
        let counters = Arc::clone(&counters);
        std::thread::spawn(move || {
            loop {
                counters[index].fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }
    let memory = fill();
    let mut diary = File::create("diary").map_err(failed)?;
    let mut pipe = std::io::stdout();
    for tick in 1u64.. {
        verify(&memory, tick)?;
        let threads: Vec<String> = counters
            .iter()
            .map(|counter| counter.load(Ordering::Relaxed).to_string())
            .collect();
        writeln!(diary, "{tick} {}", threads.join(" ")).map_err(failed)?;
        writeln!(pipe, "{tick}").map_err(failed)?;
        std::thread::sleep(TICK);
    }
    Ok(0)
}

fn fill() -> Vec<u8> {
    let mut memory = vec![0; MEMORY_BYTES];
    for (number, page) in memory.chunks_mut(PAGE).enumerate() {
        page.fill(mark(number));
    }
    memory
}

/// What a page is filled with; never zero, so that every page has to be saved.
fn mark(page: usize) -> u8 {
    u8::try_from(page % 255 + 1).expect("at most 255")
}

/// Looks at some pages each tick, all of them within half a second.
fn verify(memory: &[u8], tick: u64) -> Result<(), Failure> {
    let turn = usize::try_from(tick % 25).expect("less than 25");
    for (number, page) in memory.chunks(PAGE).enumerate().skip(turn).step_by(25) {
        if page.iter().any(|&byte| byte != mark(number)) {
            return Err(Failure::new(
                "bug",
                format!("page {number} of the world has changed"),
            ));
        }
    }
    Ok(())
}
