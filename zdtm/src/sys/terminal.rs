//! Terminals.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::check;

/// Makes this process the leader of a session on a new pseudo terminal, which becomes its standard
/// input, and returns the master end.
pub fn lead_session_on_new_terminal() -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    let master = options.open("/dev/ptmx")?;
    let (mut unlock, mut number) = (0i32, 0u32);
    // SAFETY: both ioctls take the address of an int that lives through the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw mut unlock) })?;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) })?;
    super::setsid()?;
    // The first terminal that a session leader opens becomes the session's.
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/dev/pts/{number}"))?;
    std::mem::forget(super::dup_to(&slave, 0, 0)?);
    Ok(master.into())
}

/// Reads the settings of a terminal.
pub fn terminal_settings(fd: impl AsFd) -> io::Result<libc::termios> {
    // SAFETY: an all-zero termios is a valid one.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the settings live through the call.
    check(unsafe { libc::tcgetattr(fd.as_fd().as_raw_fd(), &raw mut settings) })?;
    Ok(settings)
}

/// Changes the settings of a terminal.
pub fn set_terminal(fd: impl AsFd, settings: &libc::termios) -> io::Result<()> {
    let number = fd.as_fd().as_raw_fd();
    // SAFETY: the settings live through the call.
    check(unsafe { libc::tcsetattr(number, libc::TCSANOW, std::ptr::from_ref(settings)) }).map(drop)
}

/// The session that a terminal belongs to.
pub fn session_of_terminal(fd: impl AsFd) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::tcgetsid(fd.as_fd().as_raw_fd()) })
}

/// Makes a pair of pseudo terminals, unlocked: the master and the number of the slave.
pub fn terminal_pair() -> io::Result<(OwnedFd, u32)> {
    let master = super::open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY)?;
    let (mut unlock, mut number) = (0i32, 0u32);
    // SAFETY: both ioctls take the address of an int that lives through the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw mut unlock) })?;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) })?;
    Ok((master, number))
}

/// Opens a slave, which controls nobody by that.
pub fn terminal_slave(number: u32) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY;
    super::open(format!("/dev/pts/{number}"), flags)
}

/// Makes a terminal the controlling one of this session, which this process leads.
pub fn take_terminal(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: a number only.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// The group in the foreground.
pub fn foreground(fd: impl AsFd) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::tcgetpgrp(fd.as_fd().as_raw_fd()) })
}

/// Puts a group into the foreground.
pub fn set_foreground(fd: impl AsFd, group: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::tcsetpgrp(fd.as_fd().as_raw_fd(), group) }).map(drop)
}

/// Rows and columns.
pub fn window_size(fd: impl AsFd) -> io::Result<(u16, u16)> {
    let mut size = [0u16; 4];
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: four u16 are a struct winsize.
    check(unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, size.as_mut_ptr()) })?;
    Ok((size[0], size[1]))
}

/// Sets rows and columns.
pub fn set_window_size(fd: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = [rows, columns, 0, 0];
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: four u16 are a struct winsize.
    check(unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, size.as_ptr()) }).map(drop)
}

/// Lets a master read packets.
pub fn set_packet_mode(fd: impl AsFd) -> io::Result<()> {
    let on = 1i32;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the int lives through the call.
    check(unsafe { libc::ioctl(fd, libc::TIOCPKT, &raw const on) }).map(drop)
}

/// Stops what is written to a terminal, or lets it go on.
pub fn stop_output(fd: impl AsFd, stop: bool) -> io::Result<()> {
    let action = if stop { libc::TCOOFF } else { libc::TCOON };
    // SAFETY: numbers only.
    check(unsafe { libc::tcflow(fd.as_fd().as_raw_fd(), action) }).map(drop)
}

/// Throws away what waits to be read from a terminal.
pub fn flush_terminal(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::tcflush(fd.as_fd().as_raw_fd(), libc::TCIFLUSH) }).map(drop)
}
