//! What images say about a terminal: settings, window, session.
//!
//! Control characters lie four to a word at the beginning of `c_cc`, of which readers want 19 words.

use std::os::fd::{AsFd, BorrowedFd};

use firn_proto::{TermiosEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry};
use firn_sys::tty::{self, Termios, WindowSize};
use firn_sys::{Errno, Pid, Result};

use super::error::FileRestoreError;
use super::open_file::OpenFile;
use super::tty::Sort;

const NR_CC: usize = 19;

/// Describes a terminal; one that was hung up has no settings any more.
pub(super) fn describe(
    file: &OpenFile,
    fd: BorrowedFd<'_>,
    id: u32,
    sort: Sort,
) -> Result<TtyInfoEntry> {
    let (terminal, index) = match sort {
        Sort::Master(index) | Sort::Slave(index) => (TtyType::Pty, Some(index)),
        Sort::Controlling => (TtyType::Ctty, None),
        Sort::Console => (TtyType::Console, None),
        Sort::External(_) => (TtyType::ExtTty, None),
    };
    let rdev = low_half(file.stat.rdev);
    let mut info = TtyInfoEntry {
        id,
        r#type: terminal.into(),
        rdev,
        pty: index.map(|index| TtyPtyEntry { index }),
        dev: Some(low_half(file.stat.dev)),
        uid: Some(file.stat.uid),
        gid: Some(file.stat.gid),
        ..TtyInfoEntry::default()
    };
    let settings = match tty::settings(fd) {
        Err(Errno::EIO) => return Ok(info),
        settings => settings?,
    };
    if let Sort::Master(_) = sort {
        // The master is asked about the other side.
        info.sid = tty::session(fd).unwrap_or(0);
        info.pgrp = tty::foreground(fd).unwrap_or(0);
        info.locked = tty::is_locked(fd)?;
        info.packet_mode = tty::is_packet_mode(fd)?;
    } else if let Some(holder) = controlled_by(file.pid)?
        && (matches!(sort, Sort::Controlling) || holder.terminal == rdev)
    {
        (info.sid, info.pgrp) = (holder.sid, holder.foreground);
    }
    let window = tty::window_size(fd)?;
    info.exclusive = tty::is_exclusive(fd)?;
    info.termios = Some(to_image(&settings));
    info.termios_locked = Some(to_image(&tty::locked_settings(fd)?));
    info.winsize = Some(WinsizeEntry {
        ws_row: window.rows.into(),
        ws_col: window.cols.into(),
        ws_xpixel: window.xpixel.into(),
        ws_ypixel: window.ypixel.into(),
    });
    Ok(info)
}

/// Gives a terminal its settings and the size of its window.
pub(super) fn apply(
    fd: impl AsFd,
    info: &TtyInfoEntry,
    id: u32,
) -> std::result::Result<(), FileRestoreError> {
    let refused = || FileRestoreError::refused("set", format!("terminal {id}"));
    if let Some(locked) = &info.termios_locked {
        let locked = from_image(locked, id)?;
        if tty::locked_settings(&fd).map_err(refused())? != locked {
            tty::set_locked_settings(&fd, &locked).map_err(refused())?;
        }
    }
    if let Some(termios) = &info.termios {
        tty::set_settings(&fd, &from_image(termios, id)?).map_err(refused())?;
    }
    if let Some(window) = &info.winsize {
        let cell = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let window = WindowSize {
            rows: cell(window.ws_row),
            cols: cell(window.ws_col),
            xpixel: cell(window.ws_xpixel),
            ypixel: cell(window.ws_ypixel),
        };
        tty::set_window_size(&fd, window).map_err(refused())?;
    }
    if info.exclusive {
        tty::set_exclusive(&fd).map_err(refused())?;
    }
    Ok(())
}

fn low_half(device: u64) -> u32 {
    u32::try_from(device & 0xffff_ffff).expect("masked")
}

/// A task's controlling terminal.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) sid: u32,
    pub(super) terminal: u32,
    pub(super) foreground: u32,
}

/// The controlling terminal of a task.
pub(super) fn controlled_by(pid: Pid) -> Result<Option<Holder>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    Ok(parse_holder(&stat))
}

/// Source: man 5 proc_pid_stat, fields 6 to 8.
fn parse_holder(stat: &str) -> Option<Holder> {
    // The name in brackets may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(3);
    let mut next = || fields.next()?.parse::<i64>().ok();
    let (sid, terminal, foreground) = (next()?, next()?, next()?);
    Some(Holder {
        sid: u32::try_from(sid).ok()?,
        terminal: u32::try_from(terminal).ok().filter(|tty| *tty != 0)?,
        foreground: u32::try_from(foreground).unwrap_or(0),
    })
}

/// The settings as images have them.
pub(super) fn to_image(settings: &Termios) -> TermiosEntry {
    let mut cc = vec![0; NR_CC];
    for (word, bytes) in cc.iter_mut().zip(settings.cc.chunks(4)) {
        let mut packed = [0; 4];
        packed[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(packed);
    }
    TermiosEntry {
        c_iflag: settings.iflag,
        c_oflag: settings.oflag,
        c_cflag: settings.cflag,
        c_lflag: settings.lflag,
        c_line: settings.line.into(),
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: cc,
    }
}

/// The settings that an image has.
pub(super) fn from_image(
    entry: &TermiosEntry,
    id: u32,
) -> std::result::Result<Termios, FileRestoreError> {
    let line = u8::try_from(entry.c_line).ok();
    let (Some(line), true) = (line, entry.c_cc.len() >= NR_CC) else {
        return Err(FileRestoreError::corrupt(
            id,
            "its terminal's settings are not complete",
        ));
    };
    let mut cc = [0; NR_CC];
    let bytes = entry.c_cc.iter().flat_map(|word| word.to_le_bytes());
    cc.iter_mut()
        .zip(bytes)
        .for_each(|(place, byte)| *place = byte);
    Ok(Termios {
        iflag: entry.c_iflag,
        oflag: entry.c_oflag,
        cflag: entry.c_cflag,
        lflag: entry.c_lflag,
        line,
        cc,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_image() {
        let settings = Termios {
            iflag: 0x500,
            oflag: 5,
            cflag: 0xbf,
            lflag: 0x8a3b,
            line: 0,
            cc: std::array::from_fn(|i| u8::try_from(i + 1).expect("small")),
        };
        let entry = to_image(&settings);
        assert_eq!((entry.c_cc.len(), entry.c_cc[0]), (19, 0x0403_0201));
        assert_eq!(from_image(&entry, 1).expect("complete"), settings);
        let short = TermiosEntry {
            c_cc: vec![0; 18],
            ..entry
        };
        assert!(from_image(&short, 1).is_err());
    }

    #[test]
    fn the_controlling_terminal_is_in_stat() {
        let stat = "4711 (a) b) S 1 4711 4710 34816 4712 4194304 0 0";
        let expected = Holder {
            sid: 4710,
            terminal: 34816,
            foreground: 4712,
        };
        assert_eq!(parse_holder(stat), Some(expected));
        assert_eq!(parse_holder("1 (init) S 0 1 1 0 -1 4194560"), None);
    }
}
