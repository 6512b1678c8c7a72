//! Objects whose other side is outside of the tree.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, ensure};

use crate::runner::outside::BEFORE_DUMP;
use crate::{OUTSIDE_WORDS, Outside, Stage, Workload, sys};

pub static PIPE: Workload = Workload::new(
    "files/external-pipe",
    "a pipe whose writing end is outside, shared with a child",
    pipe,
)
.outside(Outside::Pipe)
// It is opened once more, which shows in its flags (O_LARGEFILE).
.moves(&["fd"]);
pub static TERMINAL: Workload = Workload::new(
    "files/external-terminal",
    "a terminal whose master is outside, without echo",
    terminal,
)
.outside(Outside::Terminal);
pub static FILE: Workload = Workload::new(
    "files/external-file",
    "a file in whose place the restore is given another one",
    file,
)
.outside(Outside::File)
.moves(&["fd"]);
pub static SOCKET: Workload = Workload::new(
    "files/external-socket",
    "a unix socket whose peer is outside, which the restore is given, shared with a child",
    pipe,
)
.outside(Outside::Socket);
pub static CONNECTION: Workload = Workload::new(
    "files/external-connection",
    "a TCP connection in whose place the restore is given another one, shared with a child",
    pipe,
)
.outside(Outside::Connection);
pub static UNDECLARED: Workload = Workload::new(
    "files/external-undeclared",
    "a pipe whose other end is outside, which the dump is not told",
    undeclared,
)
.refused(&[
    "outside the tree holds an end",
    "process",
    "--external",
    "--inherit-fd",
]);

fn input() -> BorrowedFd<'static> {
    sys::borrow(0)
}

fn expect_words() -> Result<()> {
    let read = sys::read_exact(input(), OUTSIDE_WORDS.len())?;
    let text = String::from_utf8_lossy(&read);
    ensure!(read == OUTSIDE_WORDS, "read `{text}` from outside");
    Ok(())
}

fn pipe(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| stage.ready_and_wait())?;
    stage.ready_and_wait()?;
    let same = sys::same_open_file(sys::pid(), 0, child.pid, 0)?;
    ensure!(same, "the child's end is another open file");
    child.finish()?;
    expect_words()
}

fn terminal(stage: &Stage) -> Result<()> {
    let mut settings = sys::terminal_settings(input())?;
    settings.c_lflag &= !libc::ECHO;
    settings.c_cc[libc::VKILL] = b'!';
    sys::set_terminal(input(), &settings)?;
    stage.ready_and_wait()?;
    let after = sys::terminal_settings(input())?;
    ensure!(
        after.c_lflag == settings.c_lflag && after.c_cc == settings.c_cc,
        "the settings were lost"
    );
    expect_words()
}

fn file(stage: &Stage) -> Result<()> {
    let start = sys::read_exact(input(), BEFORE_DUMP.len())?;
    ensure!(start == BEFORE_DUMP, "the file begins otherwise");
    stage.ready_and_wait()?;
    expect_words()
}

/// The other end's holder is nobody's child any more, so it belongs to the runner.
fn undeclared(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let middle = sys::fork()?;
    if middle == 0 {
        if sys::fork()? == 0 {
            let _ = sys::setsid();
            drop(writer);
            // Until the workload has closed its end.
            let _ = sys::read(&reader, &mut [0]);
        }
        sys::exit_now(0);
    }
    drop(reader);
    sys::wait(middle).context("waiting for the fork")?;
    stage.ready_and_wait()?;
    drop(writer);
    Ok(())
}
