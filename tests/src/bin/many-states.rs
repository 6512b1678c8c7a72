//! A program for the tests of failures: two processes with threads in all states that matter to somebody who leads them
//! elsewhere for a moment. Each checks that it was left as it was.
//!
//! `many-states FILE`: FILE always holds one number of 20 digits, which grows as long as all threads that run do so.
//! Threads that wait, in calls that never end, have names that begin with `waits`.

use std::fs::OpenOptions;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{NanosleepRelativeResult, nanosleep};
use rustix::time::Timespec;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let path = std::env::args().nth(1).ok_or("usage: many-states FILE")?;
    let is_child = path == "child";
    wait_in_calls()?;
    let computed = Arc::new(AtomicU64::new(0));
    let progress = Arc::clone(&computed);
    std::thread::Builder::new()
        .name("computes".to_owned())
        .spawn(move || compute(&progress))?;
    if is_child {
        // Its parent is never asked to reap it.
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let mut child = Command::new(std::env::current_exe()?)
        .arg("child")
        .spawn()?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    loop {
        let count = computed.load(Ordering::Relaxed);
        file.write_all_at(format!("{count:020}").as_bytes(), 0)?;
        if let Some(status) = child.try_wait()? {
            return Err(format!("the child has ended: {status}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Starts threads in calls that the kernel makes again by itself, each in its own way, when it has interrupted them.
fn wait_in_calls() -> Result<(), Failure> {
    let (nobody_writes, end) = rustix::pipe::pipe()?;
    let poll_this = nobody_writes.try_clone()?;
    start("waits-read", move || {
        let got = rustix::io::read(&nobody_writes, &mut [0u8; 1]);
        format!("read returned {got:?} of {end:?}")
    })?;
    start("waits-poll", move || {
        let mut fds = [PollFd::new(&poll_this, PollFlags::IN)];
        format!("poll returned {:?}", poll(&mut fds, None))
    })?;
    start("waits-sleep", || {
        let forever = Timespec {
            tv_sec: 1 << 30,
            tv_nsec: 0,
        };
        match nanosleep(&forever) {
            NanosleepRelativeResult::Ok => "a long sleep has ended".to_owned(),
            _ => "a sleep was interrupted".to_owned(),
        }
    })?;
    start("waits-futex", || {
        std::thread::park();
        "nobody unparks it".to_owned()
    })
}

/// Starts a thread that must never come to an end.
fn start(name: &str, wait: impl FnOnce() -> String + Send + 'static) -> Result<(), Failure> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(move || {
        let ended = wait();
        eprintln!("{ended}");
        std::process::abort();
    })?;
    Ok(())
}

/// Computes the same in registers for ever, and counts how often it was right.
fn compute(progress: &AtomicU64) {
    let once = || (0..5_000u64).fold(1, |value, nth| black_box(mix(value ^ nth)));
    let right = once();
    loop {
        let result = once();
        if result != right {
            eprintln!("computed {result:#x} instead of {right:#x}");
            std::process::abort();
        }
        progress.fetch_add(1, Ordering::Relaxed);
    }
}

fn mix(value: u64) -> u64 {
    (value ^ (value >> 9)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
