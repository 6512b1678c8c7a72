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
