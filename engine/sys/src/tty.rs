//! Terminals.
//!
//! Source: man 2 ioctl_tty, man 3 termios.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::{Errno, Result, signal};

/// Line settings as the kernel keeps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Termios {
    /// Input modes.
    pub iflag: u32,
    /// Output modes.
    pub oflag: u32,
    /// Control modes.
    pub cflag: u32,
    /// Local modes.
    pub lflag: u32,
    /// Line discipline.
    pub line: u8,
    /// Control characters.
    pub cc: [u8; 19],
}

const _: () = assert!(size_of::<Termios>() == 36);

/// Size of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
    /// Width in pixels.
    pub xpixel: u16,
    /// Height in pixels.
    pub ypixel: u16,
}

fn get<T: Default>(fd: impl AsFd, request: libc::Ioctl) -> Result<T> {
    let mut value = T::default();
    // SAFETY: private to this module; each request fills exactly the type it is used with.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value) };
    Errno::check(i64::from(result))?;
    Ok(value)
}

/// Line settings.
///
/// # Errors
/// ENOTTY; EIO when it is hung up.
pub fn settings(fd: impl AsFd) -> Result<Termios> {
    get(fd, libc::TCGETS)
}

/// Which bits of the line settings are locked.
///
/// # Errors
/// ENOTTY, EIO.
pub fn locked_settings(fd: impl AsFd) -> Result<Termios> {
    get(fd, 0x5456)
}

/// Size of the window.
///
/// # Errors
/// ENOTTY, EIO.
pub fn window_size(fd: impl AsFd) -> Result<WindowSize> {
    get(fd, libc::TIOCGWINSZ)
}

/// True after TIOCEXCL.
///
/// # Errors
/// ENOTTY, EIO.
pub fn is_exclusive(fd: impl AsFd) -> Result<bool> {
    let value: i32 = get(fd, 0x8004_5440)?;
    Ok(value != 0)
}

/// True for a descriptor of a terminal.
pub fn is_terminal(fd: impl AsFd) -> bool {
    rustix::termios::isatty(fd)
}

/// `TIOCSCTTY`, for records.
pub const TIOCSCTTY: u32 = 0x540e;
/// `TIOCSPGRP`, for records.
pub const TIOCSPGRP: u32 = 0x5410;

fn set<T>(fd: impl AsFd, request: libc::Ioctl, value: T) -> Result<()> {
    let _blocked = signal::block_all();
    // SAFETY: private to this module; each request reads exactly the type it is used with.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw const value) };
    Errno::check(i64::from(result)).map(drop)
}

/// Number of the pair that a master belongs to.
///
/// # Errors
/// ENOTTY for anything else.
pub fn pair_index(master: impl AsFd) -> Result<u32> {
    get(master, 0x8004_5430)
}

/// Whether the slave can't be opened.
///
/// # Errors
/// ENOTTY for anything but a master.
pub fn is_locked(master: impl AsFd) -> Result<bool> {
    let value: i32 = get(master, 0x8004_5439)?;
    Ok(value != 0)
}

/// Lets the slave be opened, or not.
///
/// # Errors
/// ENOTTY for anything but a master.
pub fn set_locked(master: impl AsFd, locked: bool) -> Result<()> {
    set(master, 0x4004_5431, i32::from(locked))
}

/// Whether the master reads packets.
///
/// # Errors
/// ENOTTY for anything but a master.
pub fn is_packet_mode(master: impl AsFd) -> Result<bool> {
    let value: i32 = get(master, 0x8004_5438)?;
    Ok(value != 0)
}

/// Lets the master read packets, or bytes.
///
/// # Errors
/// ENOTTY for anything but a master.
pub fn set_packet_mode(master: impl AsFd, packets: bool) -> Result<()> {
    set(master, 0x5420, i32::from(packets))
}

/// What a terminal is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// Something can be read.
    pub input: bool,
    /// Something can be written: there is room, and the output has not been stopped.
    pub output: bool,
    /// A change of state waits to be told by a master in packet mode.
    pub news: bool,
    /// The other side is closed.
    pub hung_up: bool,
}

/// Tells what a terminal is ready for, within some milliseconds, once the kernel has delivered what was written
/// last if nothing else waits to be read.
///
/// # Errors
/// EINTR.
pub fn ready(fd: impl AsFd, events: Wanted, milliseconds: i32) -> Result<Ready> {
    let mut polled = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: match events {
            Wanted::Anything => libc::POLLIN | libc::POLLOUT | libc::POLLPRI,
            Wanted::Output => libc::POLLOUT,
        },
        revents: 0,
    };
    // SAFETY: one structure, which lives through the call.
    let result = unsafe { libc::poll(&raw mut polled, 1, milliseconds) };
    Errno::check(i64::from(result))?;
    let has = |event| polled.revents & event != 0;
    Ok(Ready {
        input: has(libc::POLLIN),
        output: has(libc::POLLOUT),
        news: has(libc::POLLPRI),
        hung_up: has(libc::POLLHUP),
    })
}

/// What [`ready`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Whatever comes.
    Anything,
    /// Room.
    Output,
}

/// Opens the slave of a master, wherever its filesystem is mounted; it is non-blocking and controls nobody.
///
/// # Errors
/// EIO when the slave is locked.
pub fn peer(master: impl AsFd) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags and gives a new descriptor.
    let result = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), 0x5441, flags) };
    let fd = Errno::check(i64::from(result))?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What [`act`] does to a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Throws away what has not been read.
    FlushInput,
    /// Throws away what has been written and not read by the other side.
    FlushOutput,
    /// Stops what is written.
    StopOutput,
    /// Lets it go on, if [`Action::StopOutput`] has stopped it.
    StartOutput,
}

/// Does what tcflush and tcflow do.
///
/// # Errors
/// ENOTTY, EIO.
pub fn act(fd: impl AsFd, action: Action) -> Result<()> {
    const TCXONC: libc::Ioctl = 0x540a;
    const TCFLSH: libc::Ioctl = 0x540b;
    let (request, number) = match action {
        Action::FlushInput => (TCFLSH, 0),
        Action::FlushOutput => (TCFLSH, 1),
        Action::StopOutput => (TCXONC, 0),
        Action::StartOutput => (TCXONC, 1),
    };
    let _blocked = signal::block_all();
    // SAFETY: both take a number.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, number) };
    Errno::check(i64::from(result)).map(drop)
}

/// Session that the terminal controls; a master is asked about its slave.
///
/// # Errors
/// ENOTTY when there is none.
pub fn session(fd: impl AsFd) -> Result<u32> {
    let sid: i32 = get(fd, 0x5429)?;
    u32::try_from(sid).map_err(|_| Errno::ENOTTY)
}

/// Process group in the foreground; a master is asked about its slave.
///
/// # Errors
/// ENOTTY when there is none.
pub fn foreground(fd: impl AsFd) -> Result<u32> {
    let group: i32 = get(fd, 0x540f)?;
    u32::try_from(group).map_err(|_| Errno::ENOTTY)
}

/// Sets the size of the window.
///
/// # Errors
/// ENOTTY, EIO.
pub fn set_window_size(fd: impl AsFd, size: WindowSize) -> Result<()> {
    set(fd, libc::TIOCSWINSZ, size)
}

/// Sets which bits of the line settings are locked.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub fn set_locked_settings(fd: impl AsFd, settings: &Termios) -> Result<()> {
    set(fd, 0x5457, *settings)
}

/// Lets nobody else open the terminal.
///
/// # Errors
/// ENOTTY.
pub fn set_exclusive(fd: impl AsFd) -> Result<()> {
    // SAFETY: the request takes no argument.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), 0x540c) };
    Errno::check(i64::from(result)).map(drop)
}

/// Number of bytes that wait to be read; with lines, those of whole lines.
///
/// # Errors
/// ENOTTY, EIO.
pub fn waiting(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::io::ioctl_fionread(fd)?)
}

/// Reads what waits.
///
/// # Errors
/// EAGAIN when it is non-blocking and nothing waits, EIO.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> Result<usize> {
    Ok(rustix::io::read(fd, buffer)?)
}

/// Writes bytes; returns how many.
///
/// # Errors
/// EAGAIN, EIO.
pub fn write(fd: impl AsFd, bytes: &[u8]) -> Result<usize> {
    let _blocked = signal::block_all();
    Ok(rustix::io::write(fd, bytes)?)
}

/// Sets the line settings at once, also from a background process group.
///
/// # Errors
/// ENOTTY, EIO.
pub fn set_settings(fd: impl AsFd, settings: &Termios) -> Result<()> {
    // A background group is stopped by SIGTTOU, unless the signal is blocked.
    let _blocked = signal::block_all();
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: TCSETS reads a kernel termios, which the reference is.
    let result = unsafe { libc::ioctl(fd, libc::TCSETS, std::ptr::from_ref(settings)) };
    Errno::check(i64::from(result)).map(drop)
}
