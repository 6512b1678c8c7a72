//! Timerfds of all clocks: what is left until they expire, their interval, expirations not yet read.
//!
//! The time that is left passes only while the tasks run, as in CRIU. A timer that was set for a time of
//! day keeps that time: its deadline has a field of ours. All are set when everything else is there.

use std::os::fd::{AsFd, OwnedFd};

use firn_proto::{FdTypes, FileEntry, FirnTimerfdEntry, TimerfdEntry};
use firn_sys::timerfd::{self, ABSOLUTE, CANCEL_ON_SET, Time};

use super::anonymous::Anonymous;
use super::dump::{DumpState, fd_of, query};
use super::error::{FileDumpError, FileRestoreError};
use super::fdinfo::FdInfo;
use super::kind::Dumping;
use super::open::{self, Opener};
use super::open_file::OpenFile;

const REALTIME: i32 = 0;
const BOOTTIME: i32 = 7;
const REALTIME_ALARM: i32 = 8;
const BOOTTIME_ALARM: i32 = 9;
const NANOS: i64 = 1_000_000_000;

/// Timers to be read.
pub(super) struct Timerfd;

impl Anonymous for Timerfd {
    type Record = TimerfdEntry;
    const FD_TYPE: FdTypes = FdTypes::Timerfd;
    const LINK: &'static str = "[timerfd]";
    const NAME: &'static str = "a timerfd";

    fn describe(
        dumping: &Dumping<'_>,
        _: &mut DumpState<'_>,
    ) -> Result<TimerfdEntry, FileDumpError> {
        let read_again = restart(dumping)?;
        let file = read_again.as_ref().unwrap_or(dumping.file);
        let clockid: u32 = file.field("clockid", |text| text.parse().ok())?;
        let settime_flags =
            file.field("settime flags", |text| u32::from_str_radix(text, 8).ok())?;
        let (vsec, vnsec) = file.field("it_value", parse_time)?;
        let (isec, insec) = file.field("it_interval", parse_time)?;
        let mut entry = TimerfdEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            clockid,
            ticks: file.field("ticks", |text| text.parse().ok())?,
            settime_flags,
            vsec,
            vnsec,
            isec,
            insec,
            firn: None,
        };
        if let (Some(clock @ REALTIME), true) = (clock_of(&entry), is_absolute(&entry))
            && (vsec, vnsec) != (0, 0)
        {
            let now = timerfd::now(clock).map_err(|source| query(file, "the clock", source))?;
            let deadline = sum(now, (seconds(vsec), seconds(vnsec)));
            entry.firn = Some(FirnTimerfdEntry {
                sec: Some(deadline.0),
                nsec: Some(deadline.1),
            });
        }
        Ok(entry)
    }

    fn make(timer: &TimerfdEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let clock = i32::try_from(timer.clockid)
            .map_err(|_| FileRestoreError::corrupt(timer.id, "it has an impossible clock"))?;
        let fd =
            timerfd::create(clock).map_err(FileRestoreError::refused("create", "a timerfd"))?;
        open::set_flags(&fd, timer.flags, "a timerfd")?;
        Ok(fd)
    }

    fn record(entry: &FileEntry) -> Option<&TimerfdEntry> {
        entry.tfd.as_deref()
    }

    fn put(record: TimerfdEntry, entry: &mut FileEntry) {
        entry.tfd = Some(Box::new(record));
    }
}

/// A periodic timer that has expired stands still until it is read or asked, and does not say when it is due
/// again. Asking lets it go on and count what it has missed, which nobody can tell from its having run.
fn restart(dumping: &Dumping<'_>) -> Result<Option<OpenFile>, FileDumpError> {
    let file = dumping.file;
    let is_zero = |key| file.field(key, parse_time).map(|time| time == (0, 0));
    let (Some(fd), Some(number)) = (dumping.duplicate, fd_of(file)) else {
        return Ok(None);
    };
    if !is_zero("it_value")? || is_zero("it_interval")? {
        return Ok(None);
    }
    timerfd::ask(fd).map_err(|source| query(file, "the timer", source))?;
    let path = format!("/proc/{}/fdinfo/{number}", file.pid);
    let text = std::fs::read(path).map_err(|error| query(file, "the timer", error.into()))?;
    let info = FdInfo::parse(&text).map_err(|_| file.unexpected("it_value"))?;
    let file = file.clone();
    Ok(Some(OpenFile { info, ..file }))
}

/// Sets a timer and what has expired already.
pub(super) fn start(fd: impl AsFd, timer: &TimerfdEntry) -> Result<(), FileRestoreError> {
    let refused = |action| FileRestoreError::refused(action, format!("timerfd {}", timer.id));
    let left = (seconds(timer.vsec), seconds(timer.vnsec));
    let interval = (seconds(timer.isec), seconds(timer.insec));
    // CRIU writes no time for a periodic timer that has expired and was not read.
    let left = match left {
        (0, 0) if timer.ticks > 0 => interval,
        left => left,
    };
    if left != (0, 0) {
        let mut first = left;
        if is_absolute(timer) {
            let deadline = timer.firn.as_ref().and_then(|f| Some((f.sec?, f.nsec?)));
            first = match (deadline, clock_of(timer)) {
                (Some(deadline), _) => deadline,
                (None, Some(clock)) => {
                    let now = timerfd::now(clock).map_err(refused("read the clock of"))?;
                    sum(now, left)
                }
                (None, None) => {
                    return Err(FileRestoreError::corrupt(
                        timer.id,
                        "it has an unknown clock",
                    ));
                }
            };
        }
        let flags = timer.settime_flags & (ABSOLUTE | CANCEL_ON_SET);
        timerfd::set(&fd, first, interval, flags).map_err(refused("set"))?;
    }
    // Setting the timer has taken them away.
    if timer.ticks > 0 {
        timerfd::set_ticks(&fd, timer.ticks).map_err(refused("set the ticks of"))?;
    }
    Ok(())
}

fn is_absolute(timer: &TimerfdEntry) -> bool {
    timer.settime_flags & ABSOLUTE != 0
}

/// The clock whose time the timer's is compared with.
fn clock_of(timer: &TimerfdEntry) -> Option<i32> {
    match i32::try_from(timer.clockid).ok()? {
        REALTIME_ALARM => Some(REALTIME),
        BOOTTIME_ALARM => Some(BOOTTIME),
        clock => Some(clock),
    }
}

/// Parses `(seconds, nanoseconds)`.
fn parse_time(text: &str) -> Option<(u64, u64)> {
    let (sec, nsec) = text
        .strip_prefix('(')?
        .strip_suffix(')')?
        .split_once(", ")?;
    Some((sec.parse().ok()?, nsec.parse().ok()?))
}

fn seconds(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn sum(a: Time, b: Time) -> Time {
    let nanos = a.1.saturating_add(b.1);
    let sec = a.0.saturating_add(b.0).saturating_add(nanos / NANOS);
    (sec, nanos % NANOS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_added() {
        assert_eq!(parse_time("(99, 999967769)"), Some((99, 999_967_769)));
        assert_eq!(parse_time("99"), None);
        assert_eq!(sum((1, 600_000_000), (2, 500_000_000)), (4, 100_000_000));
        assert_eq!(sum((i64::MAX, 0), (1, 0)), (i64::MAX, 0));
    }
}
