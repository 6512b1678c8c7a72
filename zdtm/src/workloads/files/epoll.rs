//! Epoll sets.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static TARGETS: Workload = Workload::new(
    "files/epoll",
    "an epoll set with targets of several kinds, shared with a child",
    targets,
);
pub static NESTED: Workload =
    Workload::new("files/epoll-nested", "epoll sets in epoll sets", nested);
pub static MOVED: Workload = Workload::new(
    "files/epoll-moved",
    "targets whose numbers were closed or given to other files",
    moved,
);
pub static EDGES: Workload = Workload::new(
    "files/epoll-edges",
    "edges that were reported are not reported again, others are",
    edges,
);
pub static SIGNALS: Workload = Workload::new(
    "files/epoll-signalfd",
    "an epoll set that watches a signalfd",
    signals,
);
pub static MANY: Workload =
    Workload::new("files/epoll-many", "an epoll set with 200 targets", many);

const ADD: i32 = libc::EPOLL_CTL_ADD;
const MODIFY: i32 = libc::EPOLL_CTL_MOD;
const IN: u32 = 1;
const OUT: u32 = 4;
const EDGE: u32 = 1 << 31;
const ONE_SHOT: u32 = 1 << 30;

fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}

/// Expects exactly these data, in this order, to be ready.
fn expect(set: &OwnedFd, wanted: &[u64], when: &str) -> Result<()> {
    let events = sys::epoll_wait(set, if wanted.is_empty() { 0 } else { 2000 })?;
    let found: Vec<u64> = events.iter().map(|(_, data)| *data).collect();
    ensure!(
        found == wanted,
        "{when}: {wanted:?} were ready, {found:?} are"
    );
    Ok(())
}

fn targets(stage: &Stage) -> Result<()> {
    let set = sys::epoll()?;
    let (reader, writer) = sys::pipe(0)?;
    let counter = sys::eventfd(1, 0)?;
    let timer = sys::timerfd(libc::CLOCK_MONOTONIC, 0)?;
    sys::epoll_control(&set, ADD, number(&reader), IN, u64::MAX)?;
    sys::epoll_control(&set, ADD, number(&writer), OUT, 2)?;
    sys::epoll_control(&set, ADD, number(&counter), IN, 3)?;
    sys::epoll_control(&set, ADD, number(&timer), IN, 4)?;
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        expect(&set, &[2, 3], "in the child")
    })?;
    stage.ready_and_wait()?;
    child.finish()?;
    expect(&set, &[2, 3], "at first")?;
    sys::write(&writer, b"x")?;
    expect(&set, &[2, 3, u64::MAX], "with a byte in the pipe")?;
    sys::read_number(&counter)?;
    sys::epoll_control(&set, MODIFY, number(&writer), 0, 2)?;
    expect(&set, &[u64::MAX], "after two of them were changed")
}

fn nested(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let inner = sys::epoll()?;
    let outer = sys::epoll()?;
    let outermost = sys::epoll()?;
    sys::epoll_control(&outermost, ADD, number(&outer), IN, 1)?;
    sys::epoll_control(&outer, ADD, number(&inner), IN, 2)?;
    sys::epoll_control(&inner, ADD, number(&reader), IN, 3)?;
    stage.ready_and_wait()?;
    expect(&outermost, &[], "before")?;
    sys::write(&writer, b"x")?;
    expect(&outermost, &[1], "outermost")?;
    expect(&outer, &[2], "outer")?;
    expect(&inner, &[3], "inner")?;
    sys::read_exact(&reader, 1)?;
    expect(&outermost, &[], "after")
}

fn moved(stage: &Stage) -> Result<()> {
    let set = sys::epoll()?;
    // A number that is closed, while the file lives on under another one.
    let (reader, writer) = sys::pipe(0)?;
    let closed = number(&reader);
    sys::epoll_control(&set, ADD, closed, IN, 1)?;
    let reader_now = sys::dup_to(&reader, 200, 0)?;
    drop(reader);
    // A number that another file, which is watched as well, has now.
    let (second, second_writer) = sys::pipe(0)?;
    ensure!(
        number(&second) == closed,
        "the lowest number is taken first"
    );
    sys::epoll_control(&set, ADD, closed, IN, 2)?;
    // One that only the child still has.
    let (third, third_writer) = sys::pipe(0)?;
    let thirds = number(&third);
    sys::epoll_control(&set, ADD, thirds, IN, 3)?;
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        ensure!(sys::poll(&third, libc::POLLIN, 0)? != 0, "nothing to read");
        Ok(())
    })?;
    drop(third);
    stage.ready_and_wait()?;
    expect(&set, &[], "before")?;
    sys::write(&writer, b"x")?;
    expect(&set, &[1], "the first")?;
    sys::write(&second_writer, b"x")?;
    expect(&set, &[1, 2], "and the second")?;
    sys::write(&third_writer, b"x")?;
    expect(&set, &[1, 2, 3], "and the third")?;
    sys::read_exact(&reader_now, 1)?;
    // The number means the second one, as before.
    sys::epoll_control(&set, MODIFY, closed, 0, 2)?;
    expect(&set, &[3], "after the second was changed")?;
    child.finish()
}

fn edges(stage: &Stage) -> Result<()> {
    let told = sys::epoll()?;
    let (reader, writer) = sys::pipe(0)?;
    sys::write(&writer, b"x")?;
    sys::epoll_control(&told, ADD, number(&reader), IN | EDGE, 1)?;
    expect(&told, &[1], "the edge")?;
    let untold = sys::epoll()?;
    let counter = sys::eventfd(2, 0)?;
    sys::epoll_control(&untold, ADD, number(&counter), IN | EDGE, 2)?;
    let once = sys::epoll()?;
    let (late, late_writer) = sys::pipe(0)?;
    sys::epoll_control(&once, ADD, number(&late), IN | ONE_SHOT, 3)?;
    stage.ready_and_wait()?;
    expect(&told, &[], "an edge that was reported")?;
    expect(&untold, &[2], "an edge that was not")?;
    sys::write(&writer, b"y")?;
    expect(&told, &[1], "a new edge")?;
    sys::write(&late_writer, b"x")?;
    expect(&once, &[3], "one shot")?;
    expect(&once, &[], "no second shot")
}

fn signals(stage: &Stage) -> Result<()> {
    let wanted = sys::bit(libc::SIGUSR1);
    sys::mask(libc::SIG_BLOCK, wanted)?;
    let signals = sys::signalfd(wanted)?;
    let set = sys::epoll()?;
    sys::epoll_control(&set, ADD, number(&signals), IN, 1)?;
    sys::kill(sys::pid(), libc::SIGUSR1)?;
    stage.ready_and_wait()?;
    expect(&set, &[1], "with a signal that waits")?;
    let info = sys::read_exact(&signals, 128)?;
    let signal = u32::from_ne_bytes(info[..4].try_into()?);
    ensure!(
        signal == libc::SIGUSR1.cast_unsigned(),
        "signal {signal} came"
    );
    expect(&set, &[], "without one")?;
    sys::kill(sys::pid(), libc::SIGUSR1)?;
    expect(&set, &[1], "with a new one")
}

fn many(stage: &Stage) -> Result<()> {
    let set = sys::epoll()?;
    let mut counters = Vec::new();
    for nth in 0..200 {
        let counter = sys::eventfd(0, 0)?;
        sys::epoll_control(&set, ADD, number(&counter), IN, nth)?;
        counters.push(counter);
    }
    stage.ready_and_wait()?;
    for (nth, counter) in (0..).zip(&counters) {
        expect(&set, &[], "before")?;
        sys::write(counter, &1u64.to_ne_bytes())?;
        expect(&set, &[nth], "after")?;
        sys::read_number(counter)?;
    }
    Ok(())
}
