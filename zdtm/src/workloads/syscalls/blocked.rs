//! Calls that wait for something that comes only after the restore.

use std::fs::OpenOptions;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::{Stage, Workload, proc, sys};

pub static READ: Workload = Workload::new("syscalls/read", "read on an empty pipe", read);
pub static WRITE: Workload = Workload::new("syscalls/write", "write to a full pipe", write);
pub static WAIT4: Workload = Workload::new("syscalls/wait4", "wait4 for a running child", wait4);
pub static FUTEX: Workload = Workload::new("syscalls/futex", "futex wait without a time", futex);
pub static FUTEX_TIMED: Workload = Workload::new(
    "syscalls/futex-timed",
    "futex wait with a long time",
    futex_timed,
);
pub static POLL: Workload = Workload::new("syscalls/poll", "poll with a long time", poll);
pub static PPOLL: Workload = Workload::new("syscalls/ppoll", "ppoll without a time", ppoll);
pub static SELECT: Workload = Workload::new("syscalls/select", "select with a long time", select);
pub static OPEN: Workload = Workload::new(
    "syscalls/open",
    "open of a fifo that waits for a writer",
    open,
);

/// Lets a thread sleep in the call `nr` over the checkpoint, then does `release` and returns what the
/// call gave.
pub fn asleep_in<T: Send + 'static>(
    stage: &Stage,
    nr: i64,
    call: impl FnOnce() -> T + Send + 'static,
    release: impl FnOnce(i32) -> Result<()>,
) -> Result<T> {
    let (send, receive) = mpsc::channel();
    let handle = thread::spawn(move || {
        // The verdict's SIGTERM must not be what wakes it.
        let masked = sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGTERM));
        let _ = send.send(masked.map(|_| sys::tid()));
        call()
    });
    let tid = receive.recv()??;
    wait_until_in(tid, nr)?;
    stage.ready_and_wait()?;
    release(tid)?;
    handle
        .join()
        .map_err(|_| anyhow!("the thread panicked, see the log"))
}

/// Waits until a thread of this process sleeps in a call.
pub fn wait_until_in(tid: i32, nr: i64) -> Result<()> {
    let wanted = format!("{nr} ");
    for _ in 0..5000 {
        if proc::text("self", &format!("task/{tid}/syscall"))?.starts_with(&wanted) {
            return Ok(());
        }
        sys::pause_for(1);
    }
    bail!("thread {tid} does not get into call {nr}")
}

static INTERRUPTIONS: AtomicU32 = AtomicU32::new(0);

/// Counts one EINTR.
pub fn note_interruption() {
    INTERRUPTIONS.fetch_add(1, Ordering::SeqCst);
}

/// Makes a call again when it comes back with EINTR, as calls that restart from kernel state may in a
/// restored task; [`check_interruptions`] tells afterwards whether they might.
pub fn again_when_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {
                note_interruption();
            }
            result => return result,
        }
    }
}

/// Checks that a task that was never killed has not been interrupted at all.
pub fn check_interruptions(stage: &Stage) -> Result<()> {
    let count = INTERRUPTIONS.load(Ordering::SeqCst);
    let restored = stage.may_have_been_restored();
    ensure!(
        restored || count == 0,
        "EINTR came {count} times though the task just went on"
    );
    Ok(())
}

fn read(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let call = move || {
        let mut buffer = [0; 16];
        sys::read(&reader, &mut buffer).map(|count| buffer[..count].to_vec())
    };
    let release = |_| sys::write(&writer, b"hello").map(drop).map_err(Into::into);
    let bytes = asleep_in(stage, libc::SYS_read, call, release)?.context("read")?;
    ensure!(bytes == b"hello", "read gave {bytes:?}");
    Ok(())
}

fn write(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let size = usize::try_from(sys::fcntl(&writer, libc::F_GETPIPE_SZ, 0)?)?;
    ensure!(
        sys::write(&writer, &vec![1; size])? == size,
        "the pipe does not take its size"
    );
    let call = move || sys::write(&writer, b"last");
    let release = |_| {
        let bytes = sys::read_exact(&reader, size)?;
        ensure!(
            bytes.iter().all(|&byte| byte == 1),
            "the pipe's contents have changed"
        );
        Ok(())
    };
    let count = asleep_in(stage, libc::SYS_write, call, release)?.context("write")?;
    ensure!(count == 4, "write gave {count}");
    ensure!(
        sys::read_exact(&reader, 4)? == b"last",
        "the last bytes have changed"
    );
    Ok(())
}

fn wait4(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        sys::exit_now(33)
    })?;
    let pid = child.pid;
    let call = move || sys::wait_status(pid, libc::__WALL);
    let release = |_| sys::kill(pid, libc::SIGTERM).map_err(Into::into);
    let (found, status) = asleep_in(stage, libc::SYS_wait4, call, release)?.context("wait4")?;
    let exit = sys::Exit::from_status(status);
    ensure!(
        (found, exit) == (pid, sys::Exit::Code(33)),
        "wait4 gave {found}, {exit}"
    );
    Ok(())
}

static WORD: AtomicU32 = AtomicU32::new(0);

fn wake(_tid: i32) -> Result<()> {
    WORD.store(1, Ordering::SeqCst);
    let count = sys::futex_wake(&WORD, 1)?;
    ensure!(count <= 1, "woke {count}");
    Ok(())
}

fn futex(stage: &Stage) -> Result<()> {
    let call = || sys::futex_wait(&WORD, 0, None);
    asleep_in(stage, libc::SYS_futex, call, wake)?.context("futex wait")
}

fn futex_timed(stage: &Stage) -> Result<()> {
    let call = || {
        // Woken before it slept again: the word tells.
        let sleep = || match sys::futex_wait(&WORD, 0, Some(Duration::from_secs(100_000))) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
            result => result,
        };
        again_when_interrupted(sleep)
    };
    asleep_in(stage, libc::SYS_futex, call, wake)?.context("futex wait")?;
    check_interruptions(stage)
}

fn poll(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let call = move || {
        again_when_interrupted(|| sys::poll(&reader, libc::POLLIN, 100_000_000))
            .map(|events| (events, reader))
    };
    let release = |_| sys::write(&writer, b"x").map(drop).map_err(Into::into);
    let (events, _) = asleep_in(stage, libc::SYS_poll, call, release)?.context("poll")?;
    ensure!(events == libc::POLLIN, "poll gave {events:#x}");
    check_interruptions(stage)
}

fn ppoll(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let call = move || sys::ppoll(&reader, libc::POLLIN).map(|events| (events, reader));
    let release = |_| sys::write(&writer, b"x").map(drop).map_err(Into::into);
    let (events, _) = asleep_in(stage, libc::SYS_ppoll, call, release)?.context("ppoll")?;
    ensure!(events == libc::POLLIN, "ppoll gave {events:#x}");
    Ok(())
}

fn select(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let call = move || sys::select_readable(&reader, 100_000).map(|count| (count, reader));
    let release = |_| sys::write(&writer, b"x").map(drop).map_err(Into::into);
    let (count, _) = asleep_in(stage, libc::SYS_select, call, release)?.context("select")?;
    ensure!(count == 1, "select gave {count}");
    Ok(())
}

fn open(stage: &Stage) -> Result<()> {
    let path = stage.path("fifo");
    sys::mkfifo(&path)?;
    let (for_reader, for_writer) = (path.clone(), path);
    let call = move || sys::open(&for_reader, libc::O_RDONLY);
    let release = |_| {
        let writer = OpenOptions::new().write(true).open(&for_writer)?;
        sys::write(&writer, b"through")
            .map(drop)
            .map_err(Into::into)
    };
    let reader = asleep_in(stage, libc::SYS_openat, call, release)?.context("open")?;
    ensure!(
        sys::read_exact(&reader, 7)? == b"through",
        "the fifo gave something else"
    );
    Ok(())
}
