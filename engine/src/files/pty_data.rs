//! What waits in pairs of pseudo terminals: bytes in both directions, and what a pair knows beside its
//! settings.
//!
//! Bytes can only be read by taking them out. They are written back at once, with processing switched off, so
//! that lines keep their ends and nothing is echoed. A restore writes them in the same way.
//!
//! - Input of whole lines is read line by line, where a line that the key for the end of a file has ended
//!   gets that key behind it; then what has been typed of a line, outside of line mode.
//! - A master in packet mode is read without it. What it has not told yet (news) is taken before, and done
//!   again while both sides are empty.
//! - Output that was stopped, by ^S or a call, has to go on while it is written back.
//! - A slave that nobody has open is opened for a moment. Closing it makes the master say that its other side is
//!   closed, so one that was never open stays shut, and with it what waits for it.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use firn_proto::{FirnTtyInfoEntry, TtyDataEntry, TtyInfoEntry};
use firn_sys::file::{self, O_NOCTTY, O_NONBLOCK, O_RDWR};
use firn_sys::tty::{self, Action, Ready, Termios, Wanted};
use firn_sys::{Errno, Result};

use super::dump::query;
use super::error::FileDumpError;
use super::open_file::OpenFile;
use super::pty::MASTER;
use super::tty::Sort;

/// More than all buffers of one direction hold.
const MAX_WAITING: usize = 1 << 17;
/// What a side keeps to be read; the rest is on its way.
const READ_BUFFER: usize = 4095;
/// The smallest buffer of what is on its way; a piece of this size is processed at once.
const PIECE: usize = 256;
/// How long the kernel may take to deliver some bytes.
const PATIENCE: Duration = Duration::from_secs(2);

const ICANON: u32 = 0o2;
const EXTPROC: u32 = 0o200_000;
const IXON: u32 = 0o2000;
const OPOST: u32 = 1;
/// ECHO, ECHOE, ECHOK, ECHONL, ISIG, IEXTEN, ECHOCTL, ECHOKE.
const PROCESSING: u32 = 0o10 | 0o20 | 0o40 | 0o100 | 0o1 | 0o100_000 | 0o1000 | 0o4000;
// Places of control characters.
const VERASE: usize = 2;
const VKILL: usize = 3;
const VEOF: usize = 4;
const VTIME: usize = 5;
const VMIN: usize = 6;
const VSTART: usize = 8;
const VSTOP: usize = 9;
const VEOL: usize = 11;
const VEOL2: usize = 16;
const CONTROL_S: u8 = 0x13;
// News of packet mode.
const FLUSH_READ: u8 = 1;
const FLUSH_WRITE: u8 = 2;
const START: u8 = 8;
const NO_STOP: u8 = 16;
const DO_STOP: u8 = 32;

/// The sides of pairs that a tree has, by the numbers of their descriptions.
#[derive(Debug, Default)]
pub(super) struct PtyContents {
    sides: HashMap<u32, OwnedFd>,
}

impl PtyContents {
    /// Notes one side of a pair.
    pub(super) fn add(
        &mut self,
        file: &OpenFile,
        fd: BorrowedFd<'_>,
        sort: Sort,
    ) -> std::result::Result<(), FileDumpError> {
        if let Sort::Master(_) | Sort::Slave(_) = sort {
            let copy = fd.try_clone_to_owned();
            let copy = copy.map_err(|error| query(file, "the terminal", error.into()))?;
            self.sides.entry(sort.info_id()).or_insert(copy);
        }
        Ok(())
    }

    /// Reads what waits in the pairs, which keep it, and completes their descriptions.
    pub(super) fn take(
        &self,
        infos: &mut BTreeMap<u32, TtyInfoEntry>,
    ) -> std::result::Result<Vec<TtyDataEntry>, FileDumpError> {
        let mut entries = Vec::new();
        for (&id, master) in self.sides.iter().filter(|(id, _)| *id & MASTER != 0) {
            let slave = self.sides.get(&(id - MASTER));
            let index = id / 2;
            let failed = |source| FileDumpError::Terminal { index, source };
            let Some(waiting) = Waiting::take(master, slave).map_err(failed)? else {
                tracing::debug!("nobody has opened the slave of terminal {index} yet");
                continue;
            };
            if let Some(info) = infos.get_mut(&id) {
                info.firn =
                    Some(waiting.state).filter(|state| *state != FirnTtyInfoEntry::default());
            }
            for (tty_id, data) in [(id - MASTER, waiting.input), (id, waiting.output)] {
                if !data.is_empty() {
                    entries.push(TtyDataEntry { tty_id, data });
                }
            }
        }
        entries.sort_by_key(|entry| entry.tty_id);
        Ok(entries)
    }
}

/// What waits in a pair.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Bytes for the slave.
    pub(super) input: Vec<u8>,
    /// Bytes for the master.
    pub(super) output: Vec<u8>,
    /// What the pair knows.
    pub(super) state: FirnTtyInfoEntry,
}

impl Waiting {
    /// Reads what waits in a pair, and puts it back; None where it can't be seen.
    fn take(master: &OwnedFd, slave: Option<&OwnedFd>) -> Result<Option<Waiting>> {
        let look = look(master)?;
        let slave = match slave {
            Some(slave) => once_more(slave)?,
            None if look.hung_up => match tty::peer(master) {
                // It was locked after it had been opened, and nobody has it.
                Err(Errno::EIO) => return Ok(None),
                slave => slave?,
            },
            None => return Ok(None),
        };
        let settings = tty::settings(&slave)?;
        let mut news = 0;
        let packets = tty::is_packet_mode(master)?;
        if packets {
            news = take_news(master, look)?;
            tty::set_packet_mode(master, false)?;
        }
        let taken = (|| -> Result<Waiting> {
            Ok(Waiting {
                input: take_input(&slave, &settings)?,
                output: drain(master)?,
                state: FirnTtyInfoEntry {
                    news: Some(news.into()).filter(|news| *news != 0),
                    stopped: let_go_on(&slave)?.map(Stop::to_image),
                    slave_closed: Some(look.hung_up).filter(|closed| *closed),
                },
            })
        })();
        if packets {
            tty::set_packet_mode(master, true)?;
        }
        let taken = taken?;
        taken.put_into(master, &slave, &settings)?;
        Ok(Some(taken))
    }

    /// Puts it into a pair that is new.
    pub(super) fn put(&self, master: &OwnedFd) -> Result<()> {
        let is_empty = self.input.is_empty() && self.output.is_empty();
        if is_empty && self.state == FirnTtyInfoEntry::default() {
            return Ok(());
        }
        let slave = tty::peer(master)?;
        let settings = tty::settings(&slave)?;
        self.put_into(master, &slave, &settings)
    }

    fn put_into(&self, master: &OwnedFd, slave: &OwnedFd, settings: &Termios) -> Result<()> {
        let news = u8::try_from(self.state.news.unwrap_or(0)).unwrap_or(0);
        if news != 0 && tty::is_packet_mode(master)? {
            make_news(slave, settings, news)?;
        }
        put_input(master, slave, settings, &self.input)?;
        put_output(master, slave, settings, &self.output)?;
        match Stop::from_image(self.state.stopped) {
            Some(stop) => stop_again(master, slave, settings, stop),
            None => Ok(()),
        }
    }
}

/// What the output of a slave is held by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Call,
    Key,
}

impl Stop {
    fn to_image(self) -> u32 {
        match self {
            Stop::Call => 1,
            Stop::Key => 2,
        }
    }

    fn from_image(number: Option<u32>) -> Option<Stop> {
        match number {
            Some(1) => Some(Stop::Call),
            Some(2) => Some(Stop::Key),
            _ => None,
        }
    }
}

fn look(fd: &OwnedFd) -> Result<Ready> {
    tty::ready(fd, Wanted::Anything, 0)
}

/// An open file of our own, which is non-blocking.
fn once_more(slave: &OwnedFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", slave.as_raw_fd());
    let flags = O_RDWR | O_NONBLOCK | O_NOCTTY;
    file::open(path.as_ref(), flags.cast_unsigned())
}

fn take_news(master: &OwnedFd, look: Ready) -> Result<u8> {
    let mut news = [0];
    if look.news {
        // News come before bytes, and alone.
        tty::read(master, &mut news)?;
    }
    Ok(news[0])
}

/// Reads all that waits for a side whose open file may block.
fn drain(fd: &OwnedFd) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    let mut chunk = [0; 4096];
    while data.len() < MAX_WAITING && look(fd)?.input {
        match tty::read(fd, &mut chunk) {
            Ok(0) | Err(Errno::EIO) => break,
            got => data.extend_from_slice(&chunk[..got?]),
        }
    }
    Ok(data)
}

fn is_by_lines(settings: &Termios) -> bool {
    settings.lflag & (ICANON | EXTPROC) == ICANON
}

/// Whether a byte ends a line, besides the key for the end of a file.
fn ends_line(settings: &Termios, byte: u8) -> bool {
    let keys = [settings.cc[VEOL], settings.cc[VEOL2]];
    byte == b'\n' || (byte != 0 && keys.contains(&byte))
}

fn take_input(slave: &OwnedFd, settings: &Termios) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    if is_by_lines(settings) {
        take_lines(slave, settings, &mut data)?;
    }
    let mut raw = Termios {
        lflag: settings.lflag & !ICANON,
        ..*settings
    };
    (raw.cc[VMIN], raw.cc[VTIME]) = (1, 0);
    if raw == *settings {
        data.extend(drain(slave)?);
        return Ok(data);
    }
    tty::set_settings(slave, &raw)?;
    let rest = drain(slave);
    tty::set_settings(slave, settings)?;
    data.extend(rest?);
    Ok(data)
}

fn take_lines(slave: &OwnedFd, settings: &Termios, data: &mut Vec<u8>) -> Result<()> {
    let mut line = [0; 4096];
    while data.len() < MAX_WAITING {
        let got = match tty::read(slave, &mut line) {
            Err(Errno::EAGAIN) => return Ok(()),
            got => &line[..got?],
        };
        data.extend_from_slice(got);
        if !got.last().is_some_and(|byte| ends_line(settings, *byte)) {
            data.push(settings.cc[VEOF]);
        }
    }
    Ok(())
}

/// Lets stopped output go on. Nothing waits for the master, so that only a stop keeps it from being written.
fn let_go_on(slave: &OwnedFd) -> Result<Option<Stop>> {
    let can_go_on = || -> Result<bool> { Ok(tty::ready(slave, Wanted::Output, 0)?.output) };
    if can_go_on()? {
        return Ok(None);
    }
    tty::act(slave, Action::StartOutput)?;
    if can_go_on()? {
        return Ok(Some(Stop::Call));
    }
    // A start undoes no more than a stop of its own kind.
    tty::act(slave, Action::StopOutput)?;
    tty::act(slave, Action::StartOutput)?;
    Ok(can_go_on()?.then_some(Stop::Key))
}

/// Stops output again; a master in packet mode may be told so once more.
fn stop_again(master: &OwnedFd, slave: &OwnedFd, settings: &Termios, stop: Stop) -> Result<()> {
    if stop == Stop::Call {
        return tty::act(slave, Action::StopOutput);
    }
    let mut quiet = quiet(settings);
    quiet.iflag |= IXON;
    if quiet.cc[VSTOP] == 0 {
        quiet.cc[VSTOP] = CONTROL_S;
    }
    with_settings(slave, settings, &quiet, || {
        tty::write(master, &[quiet.cc[VSTOP]])?;
        wait_until(|| Ok(!tty::ready(slave, Wanted::Output, 0)?.output))
    })
}

/// Has a master in packet mode get news again; both sides are empty.
fn make_news(slave: &OwnedFd, settings: &Termios, news: u8) -> Result<()> {
    for (bit, action) in [
        (FLUSH_READ, Action::FlushInput),
        (FLUSH_WRITE, Action::FlushOutput),
        (START, Action::StopOutput),
        (START, Action::StartOutput),
    ] {
        if news & bit != 0 {
            tty::act(slave, action)?;
        }
    }
    if news & (NO_STOP | DO_STOP) != 0 {
        let iflag = settings.iflag ^ IXON;
        let other = Termios { iflag, ..*settings };
        with_settings(slave, settings, &other, || Ok(()))?;
    }
    Ok(())
}

/// Settings under which input is kept as it comes, in lines where they are wanted.
fn quiet(settings: &Termios) -> Termios {
    let mut quiet = Termios {
        // Without it stopped output would go on, and packet mode would tell.
        iflag: settings.iflag & IXON,
        lflag: settings.lflag & !PROCESSING,
        ..*settings
    };
    (quiet.cc[VERASE], quiet.cc[VKILL]) = (0, 0);
    quiet
}

fn with_settings(
    slave: &OwnedFd,
    settings: &Termios,
    meanwhile: &Termios,
    act: impl FnOnce() -> Result<()>,
) -> Result<()> {
    tty::set_settings(slave, meanwhile)?;
    let done = act();
    tty::set_settings(slave, settings)?;
    done
}

/// Lets the slave have bytes as if they had just been read from the master's side.
fn put_input(master: &OwnedFd, slave: &OwnedFd, settings: &Termios, data: &[u8]) -> Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    let mut quiet = quiet(settings);
    let keys = [quiet.cc[VSTART], quiet.cc[VSTOP]];
    if data.iter().any(|byte| keys.contains(byte)) {
        quiet.iflag &= !IXON;
    }
    with_settings(slave, settings, &quiet, || {
        for piece in data.chunks(PIECE) {
            if tty::write(master, piece)? != piece.len() {
                return Err(Errno::EIO);
            }
        }
        let (expected, has_whole) = countable(settings, data);
        wait_until(|| match expected {
            // Looking makes the kernel deliver what it has; an end of file alone is seen, and not counted.
            0 => Ok(look(slave)?.input == has_whole),
            _ => Ok(tty::waiting(slave)? >= expected),
        })
    })
}

/// How many of the bytes the kernel counts once they are delivered: with lines, those of whole ones, and
/// whether there are such.
fn countable(settings: &Termios, data: &[u8]) -> (u64, bool) {
    let mut has_whole = true;
    let count = if is_by_lines(settings) {
        let is_eof = |byte: u8| byte != 0 && byte == settings.cc[VEOF];
        let is_end = |byte: &u8| ends_line(settings, *byte) || is_eof(*byte);
        let whole = data.iter().rposition(is_end).map_or(0, |last| last + 1);
        has_whole = whole > 0;
        data[..whole].iter().filter(|byte| !is_eof(**byte)).count()
    } else {
        data.len()
    };
    (
        u64::try_from(count.min(READ_BUFFER)).unwrap_or(0),
        has_whole,
    )
}

/// Lets the master have bytes as if the slave had written them.
///
/// As much fits as can have been there where the first of it has gone on to the place from which it is
/// read, and the rest comes in pieces of the smallest buffer.
fn put_output(master: &OwnedFd, slave: &OwnedFd, settings: &Termios, data: &[u8]) -> Result<()> {
    let oflag = settings.oflag & !OPOST;
    let quiet = Termios { oflag, ..*settings };
    let (first, rest) = data.split_at(data.len().min(READ_BUFFER));
    if data.is_empty() {
        return Ok(());
    }
    with_settings(slave, settings, &quiet, || {
        let mut left = write_pieces(slave, first)?.len();
        let expected = u64::try_from(first.len() - left).unwrap_or(0);
        wait_until(|| Ok(tty::waiting(master)? >= expected))?;
        left += match left {
            0 => write_pieces(slave, rest)?.len(),
            _ => rest.len(),
        };
        if left > 0 {
            tracing::warn!("the last {left} bytes that waited in a terminal did not fit in again");
        }
        Ok(())
    })
}

/// Writes while there is room; returns the rest.
fn write_pieces<'a>(slave: &OwnedFd, data: &'a [u8]) -> Result<&'a [u8]> {
    let mut left = data;
    while !left.is_empty() {
        let has_room = tty::ready(slave, Wanted::Output, 0)?.output;
        // Where there seems to be no room, one last buffer of any size may be had.
        let piece = if has_room {
            left.len().min(PIECE)
        } else {
            left.len()
        };
        match tty::write(slave, &left[..piece]) {
            Ok(0) | Err(Errno::EAGAIN) if has_room => {}
            Ok(0) | Err(Errno::EAGAIN) => break,
            written => left = left.get(written?..).unwrap_or_default(),
        }
    }
    Ok(left)
}

fn wait_until(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > PATIENCE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_lines() -> Termios {
        let mut settings = Termios {
            lflag: ICANON,
            ..Termios::default()
        };
        settings.cc[VEOF] = 4;
        settings
    }

    #[test]
    fn whole_lines_are_counted_without_ends_of_files() {
        assert_eq!(countable(&by_lines(), b"one\ntwo\nthr"), (8, true));
        assert_eq!(countable(&by_lines(), b"one\ntwo\x04\x04thr"), (7, true));
        assert_eq!(countable(&by_lines(), b"thr"), (0, false));
        assert_eq!(countable(&by_lines(), b"\x04"), (0, true));
        assert_eq!(countable(&Termios::default(), b"thr"), (3, true));
    }

    #[test]
    fn stops_survive_the_image() {
        for stop in [Stop::Call, Stop::Key] {
            assert_eq!(Stop::from_image(Some(stop.to_image())), Some(stop));
        }
        assert_eq!(Stop::from_image(None), None);
    }
}
