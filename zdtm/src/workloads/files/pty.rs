//! Pairs of pseudo terminals with both sides inside.

use std::os::fd::OwnedFd;
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
pub static WAITING: Workload = Workload::new(
    "files/pty-waiting",
    "bytes that wait in a master in packet mode, and in one whose slave was closed",
    waiting,
);
pub static TYPED: Workload = Workload::new(
    "files/pty-typed",
    "lines, an end of file and the beginning of a line that wait for a slave",
    typed,
);
pub static LONG: Workload = Workload::new(
    "files/pty-long",
    "more bytes than a terminal's buffer holds, which keep their order",
    long,
);
pub static STOPPED: Workload = Workload::new(
    "files/pty-stopped",
    "output that was stopped by a key, and by a call, with bytes that wait",
    stopped,
);
pub static NEWS: Workload = Workload::new(
    "files/pty-news",
    "a master in packet mode that has not told of a flush",
    news,
);
pub static CLOSED: Workload = Workload::new(
    "files/pty-closed",
    "a master whose slave was closed, and one whose slave was never open",
    closed,
);
pub static HUNG_UP: Workload =
    Workload::new("files/pty-hung-up", "a slave whose master is gone", hung_up);

/// TIOCPKT_FLUSHREAD.
const FLUSH_READ: u8 = 1;

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
        expect_line(&slave, wanted)?;
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

fn waiting(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    sys::set_packet_mode(&master)?;
    let slave = sys::terminal_slave(number)?;
    sys::write(&slave, b"packet")?;
    let (lone, lones_number) = sys::terminal_pair()?;
    let its_slave = sys::terminal_slave(lones_number)?;
    sys::write(&its_slave, b"left behind")?;
    drop(its_slave);
    stage.ready_and_wait()?;
    let found = sys::read_exact(&master, 7)?;
    ensure!(found == b"\0packet", "{found:?} waited");
    let found = sys::read_exact(&lone, 11)?;
    ensure!(found == b"left behind", "{found:?} was left");
    expect_hung_up(&lone)?;
    sys::write(&slave, b"abc")?;
    let found = sys::read_exact(&master, 4)?;
    ensure!(found == b"\0abc", "a packet is {found:?}");
    Ok(())
}

/// A master whose slave is closed gives an error, not a wait.
fn expect_hung_up(master: &OwnedFd) -> Result<()> {
    let ready = sys::poll(master, libc::POLLIN, 0)?;
    ensure!(ready & libc::POLLHUP != 0, "the other side is open");
    let errno = sys::read(master, &mut [0])
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(errno == Some(libc::EIO), "reading ended with {errno:?}");
    Ok(())
}

fn expect_line(slave: &OwnedFd, wanted: &str) -> Result<()> {
    let mut line = [0; 64];
    let count = sys::read(slave, &mut line)?;
    let found = String::from_utf8_lossy(&line[..count]).into_owned();
    ensure!(found == wanted, "{wanted:?} waited, {found:?} came");
    Ok(())
}

fn typed(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    let slave = sys::terminal_slave(number)?;
    // The key for the end of a file: once behind some text, once alone.
    let keys = b"first\nno end\x04\x04last\nbegun";
    sys::write(&master, keys)?;
    // The echo shows the beginning of a line, and shows nothing twice.
    let echo = b"first\r\nno endlast\r\nbegun";
    let found = sys::read_exact(&master, echo.len())?;
    ensure!(found == echo, "{found:?} was shown");
    stage.ready_and_wait()?;
    ensure!(
        sys::poll(&master, libc::POLLIN, 0)? == 0,
        "it is shown again"
    );
    for wanted in ["first\n", "no end", "", "last\n"] {
        expect_line(&slave, wanted)?;
    }
    ensure!(
        sys::poll(&slave, libc::POLLIN, 0)? == 0,
        "the last line has an end"
    );
    // One of its letters is taken back.
    sys::write(&master, b"\x7f it\n")?;
    expect_line(&slave, "begu it\n")
}

fn long(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    let slave = sys::open(
        format!("/dev/pts/{number}"),
        libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK,
    )?;
    let mut written = Vec::new();
    while written.len() < 1 << 16 {
        let line = format!("line {:08}", written.len());
        match sys::write(&slave, line.as_bytes()) {
            Ok(count) => written.extend_from_slice(&line.as_bytes()[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(written.len() > 5000, "{} bytes fit", written.len());
    stage.ready_and_wait()?;
    let found = sys::read_exact(&master, written.len())?;
    let differs = found
        .iter()
        .zip(&written)
        .position(|(got, want)| got != want);
    ensure!(differs.is_none(), "other bytes come from {differs:?} on");
    ensure!(sys::poll(&master, libc::POLLIN, 0)? == 0, "there is more");
    Ok(())
}

fn stopped(stage: &Stage) -> Result<()> {
    let pair = || -> Result<(OwnedFd, OwnedFd)> {
        let (master, number) = sys::terminal_pair()?;
        let slave = sys::terminal_slave(number)?;
        sys::write(&slave, b"before")?;
        Ok((master, slave))
    };
    let (by_key, keys_slave) = pair()?;
    sys::write(&by_key, b"\x13")?;
    let (by_call, calls_slave) = pair()?;
    sys::stop_output(&calls_slave, true)?;
    let is_stopped = |slave: &OwnedFd| -> Result<bool> {
        // The key takes its way through the kernel.
        for _ in 0..1000 {
            if sys::poll(slave, libc::POLLOUT, 0)? == 0 {
                return Ok(true);
            }
            sys::pause_for(1);
        }
        Ok(false)
    };
    ensure!(is_stopped(&keys_slave)?, "the key does not stop it");
    ensure!(is_stopped(&calls_slave)?, "the call does not stop it");
    stage.ready_and_wait()?;
    ensure!(is_stopped(&keys_slave)?, "one goes on without a key");
    ensure!(is_stopped(&calls_slave)?, "one goes on without a call");
    // A key undoes a key's stop, and no call's.
    for (master, slave) in [(&by_key, &keys_slave), (&by_call, &calls_slave)] {
        let found = sys::read_exact(master, 6)?;
        ensure!(found == b"before", "{found:?} waited");
        sys::write(master, b"\x11")?;
        let goes_on = sys::poll(slave, libc::POLLOUT, 200)? != 0;
        ensure!(
            goes_on == std::ptr::eq(master, &by_key),
            "it goes on: {goes_on}"
        );
    }
    sys::stop_output(&calls_slave, false)?;
    sys::write(&calls_slave, b"after")?;
    ensure!(
        sys::read_exact(&by_call, 5)? == b"after",
        "nothing goes through"
    );
    Ok(())
}

fn news(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    sys::set_packet_mode(&master)?;
    let slave = sys::terminal_slave(number)?;
    sys::flush_terminal(&slave)?;
    sys::write(&slave, b"bytes")?;
    stage.ready_and_wait()?;
    let found = sys::read_exact(&master, 1)?;
    ensure!(found == [FLUSH_READ], "the news are {found:?}");
    let found = sys::read_exact(&master, 6)?;
    ensure!(found == b"\0bytes", "{found:?} waited");
    ensure!(sys::poll(&master, libc::POLLIN, 0)? == 0, "there is more");
    Ok(())
}

fn closed(stage: &Stage) -> Result<()> {
    let (master, number) = sys::terminal_pair()?;
    drop(sys::terminal_slave(number)?);
    let (fresh, freshs_number) = sys::terminal_pair()?;
    stage.ready_and_wait()?;
    expect_hung_up(&master)?;
    ensure!(sys::poll(&fresh, libc::POLLIN, 0)? == 0, "it was closed");
    let slave = sys::terminal_slave(freshs_number)?;
    sys::write(&slave, b"x")?;
    ensure!(sys::read_exact(&fresh, 1)? == b"x", "nothing goes through");
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
