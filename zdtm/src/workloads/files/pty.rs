//! Pairs of pseudo terminals with both sides inside.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use crate::{Stage, Workload, sys};

pub static PAIR: Workload = Workload::new(
    "files/pty",
    "a pair of terminals: settings, size, bytes that wait",
    pair,
);
pub static SESSION: Workload = Workload::new(
    "files/pty-session",
    "a session with a controlling terminal and a group in the foreground",
    session,
);
pub static PACKETS: Workload = Workload::new(
    "files/pty-packets",
    "a master in packet mode, and one without slave",
    packets,
);
pub static HUNG_UP: Workload =
    Workload::new("files/pty-hung-up", "a slave whose master is gone", hung_up);

fn pair(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    let slave = sys::terminal_slave(number)?;
    let mut settings = sys::terminal_settings(&slave)?;
    settings.c_lflag &= !libc::ECHO;
    settings.c_cc[libc::VINTR] = 7;
    sys::set_terminal(&slave, &settings)?;
    sys::set_window_size(&master, 33, 101)?;
    sys::write(&master, b"first\nsecond\n")?;
    sys::write(&slave, b"to the master\n")?;
    stage.ready_and_wait()?;
    let found = sys::terminal_settings(&slave)?;
    ensure!(
        found.c_lflag == settings.c_lflag && found.c_cc == settings.c_cc,
        "the settings have changed"
    );
    let size = sys::window_size(&slave)?;
    ensure!(size == (33, 101), "the window has {size:?}");
    for wanted in ["first\n", "second\n"] {
        let mut line = [0; 64];
        let count = sys::read(&slave, &mut line)?;
        let found = String::from_utf8_lossy(&line[..count]).into_owned();
        ensure!(found == wanted, "{wanted:?} waited, {found:?} came");
    }
    let found = sys::read_exact(&master, 15)?;
    ensure!(found == b"to the master\r\n", "{found:?} waited");
    sys::write(&slave, b"on")?;
    ensure!(
        sys::read_exact(&master, 2)? == b"on",
        "nothing goes through"
    );
    ensure!(
        sys::poll(&master, libc::POLLIN, 0)? == 0 && sys::poll(&slave, libc::POLLIN, 0)? == 0,
        "there is more"
    );
    Ok(())
}

static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_interrupt(_signal: i32) {
    INTERRUPTS.fetch_add(1, Ordering::SeqCst);
}

/// Waits for one interrupt.
fn await_interrupt() -> Result<()> {
    for _ in 0..2500 {
        if INTERRUPTS.load(Ordering::SeqCst) > 0 {
            return Ok(());
        }
        sys::pause_for(2);
    }
    anyhow::bail!("no interrupt came")
}

fn session(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    let leader = stage.child(move |stage| {
        sys::setsid()?;
        sys::set_action(libc::SIGTTOU, libc::SIG_IGN, 0)?;
        sys::set_action(libc::SIGHUP, libc::SIG_IGN, 0)?;
        sys::handle(libc::SIGINT, on_interrupt, 0)?;
        let slave = sys::terminal_slave(number)?;
        sys::take_terminal(&slave)?;
        let worker = stage.child(|stage| {
            sys::setpgid(0, 0)?;
            stage.ready_and_wait()?;
            await_interrupt()?;
            let terminal = sys::open("/dev/tty", libc::O_RDWR).context("opening /dev/tty")?;
            let group = sys::foreground(&terminal)?;
            ensure!(group == sys::pid(), "group {group} is in the foreground");
            Ok(())
        })?;
        sys::set_foreground(&slave, worker.pid)?;
        stage.ready_and_wait()?;
        let own = sys::session_of_terminal(&slave)?;
        ensure!(own == sys::pid(), "the terminal is of session {own}");
        let group = sys::foreground(&slave)?;
        ensure!(group == worker.pid, "group {group} is in the foreground");
        ensure!(
            INTERRUPTS.load(Ordering::SeqCst) == 0,
            "the background was interrupted"
        );
        worker.finish()
    })?;
    stage.ready_and_wait()?;
    // The key that interrupts the foreground.
    sys::write(&master, &[3])?;
    leader.finish()
}

fn packets(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    sys::set_packet_mode(&master)?;
    let slave = sys::terminal_slave(number)?;
    let (lone, lones_number) = sys::terminal_pair()?;
    stage.ready_and_wait()?;
    sys::write(&slave, b"abc")?;
    let found = sys::read_exact(&master, 4)?;
    ensure!(found == b"\0abc", "a packet is {found:?}");
    let its_slave = sys::terminal_slave(lones_number)?;
    sys::write(&its_slave, b"x")?;
    ensure!(sys::read_exact(&lone, 1)? == b"x", "nothing goes through");
    Ok(())
}

fn hung_up(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    let slave = sys::terminal_slave(number)?;
    drop(master);
    stage.ready_and_wait()?;
    ensure!(
        sys::read(&slave, &mut [0])? == 0,
        "there is something to read"
    );
    let error = sys::write(&slave, b"x")
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(error == Some(libc::EIO), "writing fails with {error:?}");
    Ok(())
}
