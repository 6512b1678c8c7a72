//! What rings are made with, and rings that have completed more or less than was asked of them.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};

use super::ring::{SEEN, file, turn, use_ring};
use crate::sys::{self, Region, Request, Ring};
use crate::{Stage, Workload};

pub static SUBMIT_ALL: Workload = Workload::new(
    "requests/uring-submit-all",
    "rings that go on behind an entry that fails, and rings that don't",
    submit_all,
)
.needs(SEEN);
pub static OWNED: Workload = Workload::new(
    "requests/uring-single-issuer",
    "rings that belong to one thread, and do their work when it asks for it",
    owned,
)
.needs(SEEN);
pub static DISABLED: Workload = Workload::new(
    "requests/uring-disabled",
    "a ring that is not enabled yet",
    disabled,
)
.needs(SEEN);
pub static MULTISHOT: Workload = Workload::new(
    "requests/uring-multishot",
    "an idle ring whose request has completed many times",
    multishot,
)
.needs(SEEN);

/// How many of two entries are taken, the first of which fails.
fn taken_of_two(ring: &mut Ring) -> Result<u32> {
    let bad = Request {
        opcode: 255,
        value: 1,
        ..Request::default()
    };
    ring.put(&bad);
    ring.put(&Request {
        value: 2,
        ..Request::default()
    });
    let taken = ring.submit(0)?;
    let mut done = ring.take();
    if taken == 1 {
        ring.submit(1)?;
        done.extend(ring.take());
    }
    ensure!(done == [(1, -22), (2, 0)], "completions {done:?}");
    Ok(taken)
}

fn submit_all(stage: &Stage) -> Result<()> {
    let mut plain = Ring::new(8, None, 0)?;
    let flags = sys::SUBMIT_ALL | sys::COOP_TASKRUN | sys::TASKRUN_FLAG;
    let mut all = Ring::new(8, None, flags)?;
    ensure!(taken_of_two(&mut plain)? == 1, "the first ring went on");
    ensure!(taken_of_two(&mut all)? == 2, "the second ring stopped");
    stage.ready_and_wait()?;
    ensure!(taken_of_two(&mut plain)? == 1, "the first ring goes on now");
    ensure!(taken_of_two(&mut all)? == 2, "the second ring stops now");
    Ok(())
}

fn owned(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut single = Ring::new(8, None, sys::SINGLE_ISSUER)?;
    let flags = sys::SINGLE_ISSUER | sys::DEFER_TASKRUN | sys::SUBMIT_ALL;
    let mut deferred = Ring::new(16, None, flags)?;
    turn(&mut single, 9)?;
    turn(&mut deferred, 21)?;
    stage.ready_and_wait()?;
    use_ring(&mut single, &fd, memory, 3)?;
    use_ring(&mut deferred, &fd, memory, 4)?;
    ensure!(taken_of_two(&mut deferred)? == 2, "SUBMIT_ALL is lost");
    Ok(())
}

fn disabled(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut ring = Ring::new(8, None, sys::R_DISABLED)?;
    ring.put(&Request::default());
    stage.ready_and_wait()?;
    let refused = ring.submit(0).err().and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EBADFD), "it is enabled: {refused:?}");
    let nothing = Region { addr: 0, len: 0 };
    ring.register(12, nothing, 0).context("enabling it")?;
    ring.submit(1)?;
    ensure!(ring.take() == [(0, 0)], "the entry that waited");
    use_ring(&mut ring, &fd, memory, 3)
}

fn multishot(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let (reader, writer) = sys::pipe(0)?;
    let mut ring = Ring::new(8, None, 0)?;
    ring.put(&Request {
        opcode: sys::POLL_ADD,
        fd: reader.as_raw_fd(),
        len: sys::POLL_MULTI,
        value: 5,
        ..Request::default()
    });
    ring.submit(0)?;
    for _ in 0..20 {
        sys::write(&writer, b"x")?;
        ring.submit(1)?;
        ensure!(ring.take() == [(5, 1)], "the pipe can be read");
    }
    ring.put(&Request {
        opcode: sys::POLL_REMOVE,
        addr: 5,
        value: 6,
        ..Request::default()
    });
    ring.submit(2)?;
    let mut done = ring.take();
    done.sort_unstable();
    ensure!(done == [(5, -libc::ECANCELED), (6, 0)], "{done:?}");
    let indices = ring.indices();
    ensure!(indices[3] > indices[0], "as many completions as requests");
    stage.ready_and_wait()?;
    ensure!(
        ring.indices() == indices,
        "{indices:?} became {:?}",
        ring.indices()
    );
    use_ring(&mut ring, &fd, memory, 7)?;
    turn(&mut ring, 30)
}
