//! Terminals of a shell job: the job keeps its terminal's settings and gets another terminal.
//!
//! The other side of the terminal (an emulator, sshd) is outside the tree, so the restore opens the
//! terminal that it runs on itself, and gives it the line settings that the job had left. The size of the
//! window is that of the new terminal. A terminal is described once, however often it is open; each
//! descriptor's entry also points to one with the path.
//!
//! Control characters lie four to a word at the beginning of `c_cc`, of which readers want 19 words.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{
    FdTypes, FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType,
    WinsizeEntry,
};
use firn_sys::file::{O_NOCTTY, S_IFCHR};
use firn_sys::tty::{self, Termios};
use firn_sys::{Pid, Result};

use super::FileDumpOptions;
use super::dump::{DumpState, query};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};
use super::regular;

/// Majors of the pseudo terminals' slaves.
const PTS_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
/// /dev/tty.
const CTTY: (u32, u32) = (5, 0);
/// Number that stands for /dev/tty where pseudo terminals have theirs.
const CTTY_INDEX: u32 = 1006;
const NR_CC: usize = 19;

/// Slaves of pseudo terminals, and /dev/tty.
pub(super) struct Tty;

/// What images know about a terminal, by its number there.
#[derive(Debug, Default)]
pub(super) struct Terminals {
    infos: BTreeMap<u32, TtyInfoEntry>,
}

impl Terminals {
    /// Writes tty-info.
    pub(super) fn write(&self, images: &ImageSetWriter) -> std::result::Result<(), FileDumpError> {
        let infos: Vec<TtyInfoEntry> = self.infos.values().cloned().collect();
        Ok(images.write_all(ImageKind::TtyInfo, 0, &infos)?)
    }
}

impl FileKind for Tty {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Tty
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        index_of(file).is_some()
    }

    fn trouble(&self, file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
        if !options.shell_job {
            return Some(Trouble::new(
                "it is a terminal, whose other side is outside the tree",
                "add --shell-job to continue on the terminal of the restore, \
                 or start the program with its terminal closed (setsid, stdio from files)",
            ));
        }
        regular::path_trouble(file, options)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> std::result::Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        let regf_id = state.collected.new_id();
        let path = regular::dump(file, regf_id, dumping.fown, state.collected)?;
        state.collected.entries.push(path);
        let index = index_of(file).unwrap_or(0);
        // Odd numbers are the masters'.
        let tty_info_id = index * 2;
        let infos = &mut state.collected.terminals.infos;
        if let (false, Some(fd)) = (infos.contains_key(&tty_info_id), dumping.duplicate) {
            let info = describe(file, fd, tty_info_id, index)
                .map_err(|source| query(file, "the terminal", source))?;
            infos.insert(tty_info_id, info);
        }
        Ok(FileEntry {
            r#type: FdTypes::Tty.into(),
            id: dumping.id,
            tty: Some(TtyFileEntry {
                id: dumping.id,
                tty_info_id,
                flags: file.image_flags(),
                fown: dumping.fown,
                regf_id: Some(regf_id),
            }),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> std::result::Result<OwnedFd, FileRestoreError> {
        let tty = entry.tty.as_ref().ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "it has no member for a terminal")
        })?;
        if !opener.options.shell_job {
            return Err(no_terminal(
                "the tasks were on a terminal: add --shell-job to restore them on this one",
            ));
        }
        let info = opener.terminals.get(&tty.tty_info_id).ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "tty-info does not know its terminal")
        })?;
        let flags = tty.flags | O_NOCTTY.cast_unsigned();
        let fd = if info.r#type == i32::from(TtyType::Ctty) {
            open::open_path("/dev/tty".as_ref(), flags)?
        } else {
            own_terminal(flags)?
        };
        if let Some(termios) = &info.termios {
            let settings = from_image(termios, entry.id)?;
            tty::set_settings(&fd, &settings)
                .map_err(FileRestoreError::refused("set", "the terminal"))?;
        }
        Ok(fd)
    }
}

/// The terminal's number among those of its driver; None for anything else.
fn index_of(file: &OpenFile) -> Option<u32> {
    if file.stat.file_type() != S_IFCHR || file.is_path_only() || !file.link.starts_with(b"/") {
        return None;
    }
    let (major, minor) = file.stat.device();
    if (major, minor) == CTTY {
        return Some(CTTY_INDEX);
    }
    // Minors have 20 bits, so the first major has all the terminals there can be.
    PTS_MAJORS.contains(&major).then_some(minor)
}

fn describe(file: &OpenFile, fd: BorrowedFd<'_>, id: u32, index: u32) -> Result<TtyInfoEntry> {
    let is_ctty = index == CTTY_INDEX && file.stat.device() == CTTY;
    let settings = tty::settings(fd)?;
    let locked = tty::locked_settings(fd)?;
    let window = tty::window_size(fd)?;
    let rdev = low_half(file.stat.rdev);
    let holder = controlled_by(file.pid)?;
    let (sid, pgrp) = match holder {
        Some(holder) if is_ctty || holder.terminal == rdev => (holder.sid, holder.foreground),
        _ => (0, 0),
    };
    Ok(TtyInfoEntry {
        id,
        r#type: if is_ctty { TtyType::Ctty } else { TtyType::Pty }.into(),
        locked: false,
        exclusive: tty::is_exclusive(fd)?,
        packet_mode: false,
        sid,
        pgrp,
        rdev,
        termios: Some(to_image(&settings)),
        termios_locked: Some(to_image(&locked)),
        winsize: Some(WinsizeEntry {
            ws_row: window.rows.into(),
            ws_col: window.cols.into(),
            ws_xpixel: window.xpixel.into(),
            ws_ypixel: window.ypixel.into(),
        }),
        pty: (!is_ctty).then_some(TtyPtyEntry { index }),
        dev: Some(low_half(file.stat.dev)),
        uid: Some(file.stat.uid),
        gid: Some(file.stat.gid),
    })
}

fn low_half(device: u64) -> u32 {
    u32::try_from(device & 0xffff_ffff).expect("masked")
}

/// A task's controlling terminal.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    sid: u32,
    terminal: u32,
    foreground: u32,
}

fn controlled_by(pid: Pid) -> Result<Option<Holder>> {
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

fn to_image(settings: &Termios) -> TermiosEntry {
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

fn from_image(entry: &TermiosEntry, id: u32) -> std::result::Result<Termios, FileRestoreError> {
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

/// Opens the terminal that the restore runs on: the first of its standard streams that is one.
fn own_terminal(flags: u32) -> std::result::Result<OwnedFd, FileRestoreError> {
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = [input.as_fd(), output.as_fd(), error.as_fd()];
    match streams.into_iter().find(|stream| tty::is_terminal(stream)) {
        Some(stream) => open::reopen(stream, flags, "the terminal"),
        None => Err(no_terminal(
            "the tasks need a terminal and the restore has none: run it on a terminal",
        )),
    }
}

fn no_terminal(what: &str) -> FileRestoreError {
    FileRestoreError::Terminal { what: what.into() }
}

/// What tty-info holds.
pub(super) type TerminalInfos = BTreeMap<u32, TtyInfoEntry>;

/// Collects entries of tty-info by number.
pub(super) fn by_id(infos: Vec<TtyInfoEntry>) -> TerminalInfos {
    infos.into_iter().map(|info| (info.id, info)).collect()
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
