//! Waits that the kernel had restarted once before the checkpoint, so that the task is in `restart_syscall`
//! and not in its own call.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::blocked::wait_until_in;
use crate::{Stage, Workload, sys};

pub static WAITS: Workload = Workload::new(
    "syscalls/restarted",
    "waits that a stop and a continuation had restarted before, which nothing ends early",
    waits,
);

/// Longer than any run.
const LONG: Duration = Duration::from_secs(100_000);

/// A thread that waits in a call, and word of its end.
struct Waiting {
    what: &'static str,
    tid: i32,
    ended: Receiver<String>,
}

impl Waiting {
    fn start(
        what: &'static str,
        call: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<Waiting> {
        let (send_tid, tid) = mpsc::channel();
        let (send, ended) = mpsc::channel();
        thread::spawn(move || {
            let _ = send_tid
                .send(sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGTERM)).map(|_| sys::tid()));
            let _ = send.send(format!("{:?}", call()));
        });
        let tid = tid.recv()??;
        Ok(Waiting { what, tid, ended })
    }

    fn still_waits(&self) -> Result<()> {
        match self.ended.recv_timeout(Duration::from_millis(50)) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(result) => bail!("{} ended with {result}", self.what),
            Err(RecvTimeoutError::Disconnected) => bail!("{}: its thread is gone", self.what),
        }
    }
}

fn waits(stage: &Stage) -> Result<()> {
    let (reader, _writer) = sys::pipe(0)?;
    let waiting = [
        Waiting::start("a sleep", || sys::sleep_by_libc(LONG))?,
        Waiting::start("a poll", move || {
            sys::poll(&reader, libc::POLLIN, 100_000_000).map(drop)
        })?,
    ];
    for (thread, nr) in waiting
        .iter()
        .zip([libc::SYS_clock_nanosleep, libc::SYS_poll])
    {
        wait_until_in(thread.tid, nr)?;
    }
    stop_and_continue()?;
    for thread in &waiting {
        wait_until_in(thread.tid, libc::SYS_restart_syscall)?;
    }
    stage.ready_and_wait()?;
    waiting.iter().try_for_each(Waiting::still_waits)
}

/// Lets another process stop this one for a moment.
fn stop_and_continue() -> Result<()> {
    const SCRIPT: &str = "kill -STOP $PPID; sleep 0.1; kill -CONT $PPID";
    let status = std::process::Command::new("sh")
        .args(["-c", SCRIPT])
        .status()
        .context("running sh")?;
    ensure!(status.success(), "sh: {status}");
    Ok(())
}
