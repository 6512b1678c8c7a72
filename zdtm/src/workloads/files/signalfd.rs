//! Signalfds.

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static SIGNALFD: Workload = Workload::new(
    "files/signalfd",
    "a signalfd with a signal that waits, and a child that has it too",
    signalfd,
);

fn signalfd(stage: &Stage) -> Result<()> {
    let wanted = sys::bit(libc::SIGUSR1) | sys::bit(40);
    sys::mask(libc::SIG_BLOCK, wanted)?;
    let fd = sys::signalfd(wanted)?;
    sys::fcntl(&fd, libc::F_SETFL, i64::from(libc::O_NONBLOCK))?;
    let child = stage.child(|stage| {
        sys::queue_to_process(sys::pid(), 40, 17)?;
        stage.ready_and_wait()?;
        expect(&fd, 40)
    })?;
    sys::kill(sys::pid(), libc::SIGUSR1)?;
    stage.ready_and_wait()?;
    expect(&fd, libc::SIGUSR1)?;
    sys::kill(sys::pid(), libc::SIGUSR1)?;
    expect(&fd, libc::SIGUSR1)?;
    child.finish()
}

/// Expects exactly this signal.
fn expect(fd: &std::os::fd::OwnedFd, signal: i32) -> Result<()> {
    let info = sys::read_exact(fd, 128)?;
    let found = i32::from_ne_bytes(info[..4].try_into()?);
    ensure!(found == signal, "signal {signal} was pending, {found} came");
    ensure!(sys::read(fd, &mut [0; 128]).is_err(), "there is one more");
    Ok(())
}
