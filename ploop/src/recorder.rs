//! A file in memory that remembers how it came to be, so that a crash can be played at every step.
//!
//! Between two syncs a disk writes in any order, or not at all, sector by sector: what a crash leaves
//! is everything up to a sync, and any part of what came after.

use std::cmp::Ordering;
use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::storage::Storage;

const SECTOR: usize = 512;

/// A change of the bytes.
#[derive(Debug, Clone)]
pub enum Change {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// Zeroes.
    Zero(Range<u64>),
    /// A new length.
    Len(u64),
    /// Everything before is durable.
    Sync,
}

/// Counts the changes of several files, so that one moment cuts all of them.
pub type Clock = Arc<AtomicUsize>;

/// A file's bytes when recording began, and the changes since, each with its moment.
#[derive(Debug, Clone, Default)]
pub struct Recording {
    start: Vec<u8>,
    changes: Vec<(usize, Change)>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    log: Option<(Clock, Recording)>,
    limit: Option<u64>,
}

/// Bytes in memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct MemoryFile {
    state: Arc<Mutex<State>>,
}

impl MemoryFile {
    /// A file with these bytes.
    pub fn of(bytes: Vec<u8>) -> MemoryFile {
        let file = MemoryFile::default();
        file.state().bytes = bytes;
        file
    }

    /// Lets it grow to so many bytes and no further: a full file system.
    pub fn limit(&self, bytes: u64) {
        self.state().limit = Some(bytes);
    }

    /// Starts to remember changes, at moments of this clock.
    pub fn record(&self, clock: &Clock) {
        let mut state = self.state();
        let recording = Recording {
            start: state.bytes.clone(),
            changes: Vec::new(),
        };
        state.log = Some((Arc::clone(clock), recording));
    }

    /// What was remembered.
    pub fn recording(&self) -> Recording {
        let state = self.state();
        let log = state.log.as_ref();
        log.map(|(_, recording)| recording.clone())
            .unwrap_or_default()
    }

    /// The bytes as they are.
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.state();
        let reach = match &change {
            Change::Write(at, bytes) => at + bytes.len() as u64,
            Change::Zero(range) => range.end,
            Change::Len(len) => *len,
            Change::Sync => 0,
        };
        if state.limit.is_some_and(|limit| reach > limit) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        apply(&mut state.bytes, &change);
        if let Some((clock, recording)) = &mut state.log {
            let moment = clock.fetch_add(1, SeqCst);
            recording.changes.push((moment, change));
        }
        Ok(())
    }
}

/// What of a change happens as a whole or not at all.
fn pieces(change: &Change) -> Box<dyn Iterator<Item = Change> + '_> {
    match change {
        Change::Write(offset, new) => {
            let sectors = new.chunks(SECTOR).enumerate();
            Box::new(sectors.map(move |(at, sector)| {
                Change::Write(offset + (at * SECTOR) as u64, sector.to_vec())
            }))
        }
        Change::Zero(range) => Box::new(range.clone().step_by(SECTOR).map(move |start| {
            let end = range.end.min(start + SECTOR as u64);
            Change::Zero(start..end)
        })),
        other => Box::new(std::iter::once(other.clone())),
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    match change {
        Change::Write(offset, new) => {
            let end = at(*offset) + new.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at(*offset)..end].copy_from_slice(new);
        }
        Change::Zero(range) => {
            if bytes.len() < at(range.end) {
                bytes.resize(at(range.end), 0);
            }
            bytes[at(range.start)..at(range.end)].fill(0);
        }
        Change::Len(len) => bytes.resize(at(*len), 0),
        Change::Sync => {}
    }
}

impl Recording {
    /// What a crash before `moment` leaves: all up to the last sync before it, and of what came later
    /// each sector for which `survives` answers true.
    pub fn after_crash(&self, moment: usize, mut survives: impl FnMut() -> bool) -> Vec<u8> {
        let steps: Vec<&Change> = self
            .changes
            .iter()
            .take_while(|(at, _)| *at < moment)
            .map(|(_, change)| change)
            .collect();
        let last_sync = steps.iter().rposition(|c| matches!(c, Change::Sync));
        let safe = last_sync.map_or(0, |at| at + 1);
        let mut bytes = self.start.clone();
        for change in &steps[..safe] {
            apply(&mut bytes, change);
        }
        for piece in steps[safe..].iter().flat_map(|change| pieces(change)) {
            if survives() {
                apply(&mut bytes, &piece);
            }
        }
        bytes
    }

    /// What a crash in the middle of the change at `moment` leaves, if nothing was put off: all before it,
    /// and the first `sectors` of it.
    pub fn torn(&self, moment: usize, sectors: usize) -> Vec<u8> {
        let mut bytes = self.start.clone();
        for (at, change) in &self.changes {
            match at.cmp(&moment) {
                Ordering::Less => apply(&mut bytes, change),
                Ordering::Equal => {
                    let first = pieces(change).take(sectors);
                    first.for_each(|piece| apply(&mut bytes, &piece));
                }
                Ordering::Greater => break,
            }
        }
        bytes
    }

    /// Sectors of the change at `moment`, if it is one of this file's.
    pub fn sectors_at(&self, moment: usize) -> usize {
        let change = self.changes.iter().find(|(at, _)| *at == moment);
        change.map_or(0, |(_, change)| pieces(change).count())
    }
}

impl Storage for MemoryFile {
    fn name(&self) -> &str {
        "memory"
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.state().bytes.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = state
            .bytes
            .get(start..)
            .and_then(|rest| rest.get(..buf.len()));
        let there = there.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(there);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write(offset, buf.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Change::Sync)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Len(len))
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        match self.len_bytes()? < range.end {
            true => self.set_len(range.end),
            false => Ok(()),
        }
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.change(Change::Zero(range))
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.change(Change::Zero(range))
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len_bytes()?;
        Ok((offset < len).then_some(offset..len))
    }
}
