//! Terminals.
//!
//! Source: man 2 ioctl_tty, man 3 termios.

use std::os::fd::{AsFd, AsRawFd};

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
