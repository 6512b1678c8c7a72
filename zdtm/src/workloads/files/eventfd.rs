//! Eventfds.

use std::io::ErrorKind;

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static COUNTERS: Workload = Workload::new(
    "files/eventfd",
    "eventfds: empty, counted, nearly full, shared with a child",
    counters,
);
pub static SEMAPHORE: Workload = Workload::new(
    "files/eventfd-semaphore",
    "an eventfd of which each read takes one",
    semaphore,
);

const FULL: u64 = u64::MAX - 1;

fn counters(stage: &Stage) -> Result<()> {
    let empty = sys::eventfd(0, libc::EFD_NONBLOCK)?;
    let counted = sys::eventfd(7, libc::EFD_CLOEXEC)?;
    let full = sys::eventfd(1, libc::EFD_NONBLOCK)?;
    sys::write(&full, &(FULL - 1).to_ne_bytes())?;
    let shared = sys::eventfd(0, 0)?;
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        sys::write(&shared, &5u64.to_ne_bytes())?;
        Ok(())
    })?;
    stage.ready_and_wait()?;
    let error = sys::read_number(&empty).expect_err("it was empty");
    ensure!(
        error.kind() == ErrorKind::WouldBlock,
        "the empty one: {error}"
    );
    let found = sys::read_number(&counted)?;
    ensure!(found == 7, "the counter was 7, is {found}");
    let more = sys::write(&full, &1u64.to_ne_bytes());
    ensure!(more.is_err(), "a full counter takes more");
    let found = sys::read_number(&full)?;
    ensure!(found == FULL, "the counter was {FULL}, is {found}");
    child.finish()?;
    let found = sys::read_number(&shared)?;
    ensure!(found == 5, "the child wrote 5, {found} came");
    Ok(())
}

fn semaphore(stage: &Stage) -> Result<()> {
    let fd = sys::eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK)?;
    stage.ready_and_wait()?;
    for _ in 0..3 {
        let found = sys::read_number(&fd)?;
        ensure!(found == 1, "a read took {found}");
    }
    ensure!(sys::read_number(&fd).is_err(), "there were more than 3");
    Ok(())
}
