//! Asynchronous I/O contexts of io_setup.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};

use super::TYPES;
use crate::sys::{AioContext, PAGE, Region};
use crate::{Need, Stage, Workload, sys};

pub static WAITING: Workload = Workload::new(
    "requests/aio",
    "an asynchronous I/O context with events that nobody has taken yet",
    waiting,
);
pub static WRAPPED: Workload = Workload::new(
    "requests/aio-wrapped",
    "a ring of events that goes on at its beginning",
    wrapped,
);
pub static SEVERAL: Workload = Workload::new(
    "requests/aio-several",
    "contexts of several sizes, one destroyed between them, and two tasks",
    several,
);
pub static IN_FLIGHT: Workload = Workload::new(
    "requests/aio-in-flight",
    "direct reads that may be under way at any moment, counted one by one",
    in_flight,
)
.moves(&["state", "syscall"]);
pub static FULL: Workload = Workload::new(
    "requests/aio-full",
    "a context that takes no more requests, because nobody has taken events",
    full,
);
pub static COPIED: Workload = Workload::new(
    "requests/aio-copied",
    "a child with the ring of its parent's context, which is no context there",
    |stage| {
        let _context = AioContext::new(8)?;
        let child = stage.child(Stage::ready_and_wait)?;
        stage.ready_and_wait()?;
        child.finish()
    },
)
.refused(&["copy that fork left", "io_destroy"]);

pub static POLLING: Workload = Workload::new(
    "requests/aio-polling",
    "a context with a request that waits for a pipe",
    |stage| {
        let (reader, _writer) = sys::pipe(0)?;
        let context = AioContext::new(8)?;
        ensure!(context.poll(&reader, 7)? == 1, "the request was not taken");
        stage.ready_and_wait()
    },
)
.needs(&[Need::Root, TYPES])
.refused(&["IOCB_CMD_POLL", "io_cancel"]);

/// A file with a known beginning, and memory to read it into.
fn file(stage: &Stage) -> Result<(OwnedFd, Region)> {
    let path = stage.path("data");
    std::fs::write(&path, [7; PAGE]).context("writing the file")?;
    Ok((sys::open(&path, libc::O_RDWR)?, Region::anon(PAGE)?))
}

fn expect(context: &AioContext, values: impl Iterator<Item = u64>) -> Result<()> {
    let values: Vec<u64> = values.collect();
    let mut taken = Vec::new();
    while taken.len() < values.len() {
        let more = context.take(0)?;
        ensure!(
            !more.is_empty(),
            "{} events of {}",
            taken.len(),
            values.len()
        );
        taken.extend(more);
    }
    let len = i64::try_from(PAGE)?;
    let expected: Vec<(u64, i64)> = values.into_iter().map(|value| (value, len)).collect();
    ensure!(taken == expected, "events {taken:?}, expected {expected:?}");
    Ok(())
}

fn ask(context: &AioContext, fd: &OwnedFd, memory: Region, values: &[u64]) -> Result<()> {
    let taken = context.read(fd, memory, values)?;
    ensure!(
        usize::try_from(taken)? == values.len(),
        "{taken} requests of {} were taken",
        values.len()
    );
    Ok(())
}

fn waiting(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let context = AioContext::new(32)?;
    ask(&context, &fd, memory, &[1, 2, 3, 4, 5])?;
    ensure!(context.take(0)?.len() == 5, "five reads of a small file");
    ask(&context, &fd, memory, &[6, 7, 8])?;
    let ring = context.ring();
    stage.ready_and_wait()?;
    ensure!(
        context.ring() == ring,
        "{ring:?} became {:?}",
        context.ring()
    );
    expect(&context, 6..=8)?;
    memory.put(0, &[0; PAGE]);
    ask(&context, &fd, memory, &[9, 10])?;
    expect(&context, 9..=10)?;
    ensure!(memory.get(0, PAGE) == [7; PAGE], "the read brought nothing");
    Ok(context.destroy()?)
}

fn wrapped(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let context = AioContext::new(8)?;
    let [nr, ..] = context.ring();
    // Once round, and to three before the end.
    let mut next = 0u64;
    while next < u64::from(2 * nr - 3) {
        ask(&context, &fd, memory, &[next])?;
        expect(&context, next..=next)?;
        next += 1;
    }
    ask(&context, &fd, memory, &[100, 101, 102, 103, 104, 105, 106])?;
    let ring = context.ring();
    ensure!(ring == [nr, nr - 3, 4], "the ring stands at {ring:?}");
    stage.ready_and_wait()?;
    ensure!(
        context.ring() == ring,
        "{ring:?} became {:?}",
        context.ring()
    );
    expect(&context, 100..=106)?;
    for round in 0..u64::from(2 * nr) {
        ask(&context, &fd, memory, &[round])?;
        expect(&context, round..=round)?;
    }
    Ok(context.destroy()?)
}

fn several(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let child = stage.child(|stage| {
        let own = AioContext::new(700)?;
        ask(&own, &fd, memory, &[5, 6])?;
        stage.ready_and_wait()?;
        expect(&own, 5..=6)?;
        Ok(own.destroy()?)
    })?;
    let contexts = [1, 100, 300, 3000].map(AioContext::new);
    let [first, gone, second, third] = contexts;
    let (first, second, third) = (first?, second?, third?);
    gone?.destroy()?;
    for (context, count) in [(&first, 3), (&second, 40), (&third, 60)] {
        let values: Vec<u64> = (0..count).collect();
        ask(context, &fd, memory, &values)?;
    }
    stage.ready_and_wait()?;
    for (context, count) in [(&first, 3), (&second, 40), (&third, 60)] {
        expect(context, 0..count)?;
        ask(context, &fd, memory, &[count])?;
        expect(context, count..=count)?;
    }
    child.finish()?;
    [first, second, third]
        .into_iter()
        .try_for_each(|context| Ok(context.destroy()?))
}

/// The dump comes at any moment: every request that was taken has exactly one event, before or after it.
fn in_flight(stage: &Stage) -> Result<()> {
    let path = stage.path("data");
    std::fs::write(&path, [7; 16 * PAGE]).context("writing the file")?;
    // Not every file system has direct I/O; without it requests end at once, which is fine as well.
    let fd = sys::open(&path, libc::O_RDONLY | libc::O_DIRECT)
        .or_else(|_| sys::open(&path, libc::O_RDONLY))?;
    let memory = Region::anon(16 * PAGE)?;
    let context = AioContext::new(64)?;
    let (mut asked, mut next) = (0u64, 0u64);
    stage.ready()?;
    loop {
        let stopping = stage.stopping();
        while !stopping && asked - next < 32 {
            asked += context.read(&fd, memory, &[asked])?;
        }
        let mut taken: Vec<u64> = context.take(0)?.iter().map(|(value, _)| *value).collect();
        next += u64::try_from(taken.len())?;
        taken.sort_unstable();
        ensure!(
            taken.windows(2).all(|two| two[0] != two[1]),
            "an event came twice: {taken:?}"
        );
        if stopping && next == asked {
            break;
        }
        if taken.is_empty() {
            sys::pause_for(1);
        }
    }
    Ok(context.destroy()?)
}

fn full(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let context = AioContext::new(16)?;
    let mut taken = 0u64;
    while let Ok(1) = context.read(&fd, memory, &[taken]) {
        taken += 1;
    }
    ensure!(taken >= 16, "only {taken} requests were taken");
    stage.ready_and_wait()?;
    expect(&context, 0..taken)?;
    ask(&context, &fd, memory, &[1000])?;
    expect(&context, 1000..=1000)
}
