//! Processes whose main thread has exited before the others: the pid stays, dead, and the others go on.

use std::fs::File;
use std::io::{Read, Seek};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, Exit, Region};
use crate::{Child, Stage, Workload, proc};

pub static PLAIN: Workload = Workload::new(
    "tree/exited-main-thread",
    "a process with children, files and timers whose main thread has exited",
    |stage| exited(stage, Twist::None),
);
pub static FILTERED: Workload = Workload::new(
    "tree/exited-main-thread-filtered",
    "the same with seccomp filters that its other threads share",
    |stage| exited(stage, Twist::Filter),
);
pub static STOPPED: Workload = Workload::new(
    "tree/exited-main-thread-stopped",
    "the same stopped by SIGSTOP",
    |stage| exited(stage, Twist::Stop),
);

/// How the main thread exits, and the last one too: which of them becomes the end of the process depends on
/// the kernel.
const CODE: i32 = 7;
const LONG: Duration = Duration::from_secs(3000);
const TEXT: &[u8] = b"written by the main thread";
const REFUSED: i64 = libc::SYS_sync;
const ERRNO: i32 = 71;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Twist {
    None,
    Filter,
    Stop,
}

fn exited(stage: &Stage, twist: Twist) -> Result<()> {
    let shared = Region::shared(sys::PAGE)?;
    let stands = shared.word(0);
    let process = stage.child(|stage| leave(stage, twist, stands))?;
    while stands.load(Ordering::SeqCst) < 2 {
        sys::pause_for(1);
    }
    let pid = process.pid;
    // Of the thread: that of the process shows how it was stopped in place of how its main thread ended.
    let stat = || proc::stat(format!("{pid}/task/{pid}"));
    let before = stat()?;
    ensure!(
        before[3] == "Z",
        "the main thread is in state {}",
        before[3]
    );
    let other = *proc::threads(pid)?.last().context("there is a thread")?;
    if twist == Twist::Stop {
        sys::kill(pid, libc::SIGSTOP)?;
        sys::wait_status(pid, libc::WUNTRACED)?;
    }
    stage.ready_and_wait()?;
    let after = stat()?;
    for field in [2, 3, 4, 5, 6, 38, 52] {
        let (was, is) = (&before[field], &after[field]);
        ensure!(was == is, "field {field} of stat was {was}, is {is}");
    }
    let status = proc::lines(pid, "status")?;
    let uid = status.get("Uid").map(String::as_str).unwrap_or_default();
    ensure!(!uid.is_empty(), "the dead main thread shows no ids");
    if twist == Twist::Stop {
        let state = proc::stat(other)?[3].clone();
        ensure!(
            state == "T",
            "thread {other} was stopped, is in state {state}"
        );
        sys::kill(pid, libc::SIGCONT)?;
    }
    sys::kill(pid, libc::SIGTERM)?;
    let exit = sys::wait(pid)?;
    ensure!(
        exit == Exit::Code(CODE),
        "the process: {exit}, but its main thread had exited with {CODE}; see the log"
    );
    Ok(())
}

/// What the main thread leaves to the other one.
struct Legacy {
    pid: i32,
    file: File,
    timer: i32,
    child: Child,
}

fn leave(stage: &Stage, twist: Twist, stands: &'static AtomicU32) -> Result<()> {
    let path = stage.path("legacy");
    std::fs::write(&path, TEXT)?;
    sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGUSR1))?;
    let child = stage.child(|stage| {
        let parent = sys::parent();
        stage.ready_and_wait()?;
        let found = sys::parent();
        ensure!(found == parent, "the parent was {parent}, is {found}");
        Ok(())
    })?;
    sys::kill(sys::pid(), libc::SIGUSR1)?;
    sys::set_itimer(libc::ITIMER_REAL, LONG, Duration::ZERO)?;
    let silent = sys::Notify {
        how: sys::SIGEV_NONE,
        signal: 0,
        value: 0,
        tid: 0,
    };
    let timer = sys::make_timer(libc::CLOCK_MONOTONIC, silent)?;
    sys::set_timer(timer, 0, LONG, Duration::ZERO)?;
    let legacy = Legacy {
        pid: sys::pid(),
        file: File::open(&path)?,
        timer,
        child,
    };
    thread::Builder::new()
        .name("stays".to_owned())
        .spawn(move || {
            let code = match legacy.stay(twist, stands) {
                Ok(()) => return thread_exit(),
                Err(error) => {
                    eprintln!("the thread that stays: {error:#}");
                    1
                }
            };
            sys::exit_now(code)
        })?;
    stage.ready()?;
    sys::call_plain(libc::SYS_exit, [CODE.into(), 0, 0, 0, 0, 0])?;
    Ok(())
}

/// Ends only this thread.
fn thread_exit() {
    let _ = sys::call_plain(libc::SYS_exit, [CODE.into(), 0, 0, 0, 0, 0]);
}

impl Legacy {
    fn stay(mut self, twist: Twist, stands: &'static AtomicU32) -> Result<()> {
        while proc::stat(self.pid)?[3] != "Z" {
            sys::pause_for(1);
        }
        // Its parent is this thread: it dies when that goes.
        let own = sys::fork()?;
        if own == 0 {
            let _ = sys::prctl(libc::PR_SET_PDEATHSIG, 9);
            crate::stop::wait();
            sys::exit_now(0);
        }
        if twist == Twist::Filter {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
            let filter = sys::filter(&[REFUSED], sys::fail_with(71));
            sys::install_filter(filter, 0)?;
        }
        // It inherits the filter, so that both share it.
        let second = thread::Builder::new()
            .name("stays, too".to_owned())
            .spawn(move || {
                stands.fetch_add(1, Ordering::SeqCst);
                crate::stop::wait();
            })?;
        let tid = sys::tid();
        stands.fetch_add(1, Ordering::SeqCst);
        crate::stop::wait();
        let found = (sys::pid(), sys::tid());
        let wanted = (self.pid, tid);
        ensure!(found == wanted, "ids were {wanted:?}, are {found:?}");
        self.check(twist)?;
        sys::kill(own, libc::SIGTERM)?;
        let exit = sys::wait(own)?;
        ensure!(exit == Exit::Code(0), "the child of the thread: {exit}");
        let _ = second.join();
        self.child.finish()
    }

    fn check(&mut self, twist: Twist) -> Result<()> {
        let mut text = Vec::new();
        self.file.rewind()?;
        self.file.read_to_end(&mut text)?;
        ensure!(text == TEXT, "the file holds other text");
        let pending = sys::pending()?;
        ensure!(
            pending == sys::bit(libc::SIGUSR1),
            "pending signals are {pending:#x}"
        );
        for (what, left) in [
            ("itimer", sys::itimer(libc::ITIMER_REAL)?.0),
            ("timer", sys::timer(self.timer)?.0),
        ] {
            ensure!(
                left > LONG / 2 && left <= LONG,
                "{left:?} of the {what} are left"
            );
        }
        if twist == Twist::Filter {
            let found = sys::errno_of(REFUSED);
            ensure!(found == ERRNO, "the filtered call gives errno {found}");
        }
        Ok(())
    }
}
