//! Who gets the signals of a descriptor.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static OWNERS: Workload = Workload::new(
    "files/owners",
    "F_SETOWN to a process, a group, a thread",
    owners,
);
pub static SIGNAL: Workload = Workload::new(
    "files/async",
    "O_ASYNC with a signal of its own, still sent",
    signal,
);

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_OWNER_TID: i32 = 0;
const F_OWNER_PID: i32 = 1;
const F_OWNER_PGRP: i32 = 2;

fn owners(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| stage.ready_and_wait())?;
    let (group, _) = sys::group_and_session();
    let wanted = [
        (F_OWNER_PID, sys::pid(), 0),
        (F_OWNER_PID, child.pid, 35),
        (F_OWNER_PGRP, group, libc::SIGUSR1),
        (F_OWNER_TID, sys::tid(), libc::SIGIO),
    ];
    let mut pipes: Vec<(OwnedFd, OwnedFd)> = Vec::new();
    for (kind, id, signal) in wanted {
        let (reader, writer) = sys::pipe(0)?;
        sys::set_owner(&reader, kind, id)?;
        sys::fcntl(&reader, F_SETSIG, i64::from(signal))?;
        pipes.push((reader, writer));
    }
    stage.ready_and_wait()?;
    for ((kind, id, signal), (reader, writer)) in wanted.into_iter().zip(&pipes) {
        let found = sys::owner(reader)?;
        ensure!(
            found == (kind, id),
            "the owner was {:?}, is {found:?}",
            (kind, id)
        );
        let found = sys::fcntl(reader, F_GETSIG, 0)?;
        ensure!(found == signal, "the signal was {signal}, is {found}");
        let found = sys::owner(writer)?;
        ensure!(found.1 == 0, "the writing end had no owner, has {found:?}");
    }
    child.finish()
}

static COUNT: AtomicU32 = AtomicU32::new(0);
static FD: AtomicI32 = AtomicI32::new(-1);

extern "C" fn note(_signal: i32, info: *const libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo to a handler that asked for one.
    let info = unsafe { &*info };
    // The value's place holds band and descriptor here: 8 bytes at 16, 4 at 24.
    FD.store(
        i32::try_from(sys::info_value(info) & 0xffff).unwrap_or(-2),
        Ordering::SeqCst,
    );
    COUNT.fetch_add(1, Ordering::SeqCst);
}

fn signal(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    sys::handle_info(37, note, libc::SA_RESTART)?;
    sys::set_owner(&reader, F_OWNER_PID, sys::pid())?;
    sys::fcntl(&reader, F_SETSIG, 37)?;
    sys::fcntl(
        &reader,
        libc::F_SETFL,
        i64::from(libc::O_ASYNC | libc::O_NONBLOCK),
    )?;
    stage.ready_and_wait()?;
    let flags = sys::fcntl(&reader, libc::F_GETFL, 0)?;
    ensure!(flags & libc::O_ASYNC != 0, "O_ASYNC is lost");
    ensure!(
        COUNT.load(Ordering::SeqCst) == 0,
        "a signal came before anything was written"
    );
    sys::write(&writer, b"x")?;
    let count = COUNT.load(Ordering::SeqCst);
    ensure!(count == 1, "{count} signals came for one write");
    let number = std::os::fd::AsRawFd::as_raw_fd(&reader);
    let found = FD.load(Ordering::SeqCst);
    ensure!(
        found == number,
        "the signal names descriptor {found}, not {number}"
    );
    Ok(())
}
