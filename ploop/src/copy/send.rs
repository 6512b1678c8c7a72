//! The sender's algorithm.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::wire::{self, Hello};
use super::{Block, CopyError, CopySource, Sink, is_zero};

/// Sweeps over a frozen disk at most: the first finds what the freeze wrote out.
const FROZEN_SWEEPS: u32 = 2;
/// Rounds after the barrier at most.
const LAST_ROUNDS: u32 = 3;
/// Written ranges with a smaller gap are looked up in one map.
const MAP_GAP: u64 = 64 << 20;
/// Bytes of the disk whose map is asked for at once.
const MAP_STEP: u64 = 1 << 30;

/// How a copy is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOptions {
    /// Name of the copy; the same name continues one that broke off.
    pub session: String,
    /// Rounds before the freeze at most.
    pub max_rounds: u32,
    /// A round that finds less is the last before the freeze.
    pub small_enough_bytes: u64,
    /// A round has to find less than this part of the one before, in percent.
    pub shrink_percent: u64,
}

impl CopyOptions {
    /// The original's ten rounds; a round is small at 16 MiB.
    pub fn new(session: &str) -> CopyOptions {
        CopyOptions {
            session: session.to_owned(),
            max_rounds: 10,
            small_enough_bytes: 16 << 20,
            shrink_percent: 90,
        }
    }
}

/// Where a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyPhase {
    /// Everything, once.
    First,
    /// What was written meanwhile.
    Round,
    /// What is left, with all writers stopped.
    Frozen,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyProgress {
    /// Where.
    pub phase: CopyPhase,
    /// Bytes of the disk looked at in this phase.
    pub done_bytes: u64,
    /// And to look at.
    pub total_bytes: u64,
}

/// Why the rounds before the freeze ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Nothing or little was written.
    Small,
    /// They did not get shorter.
    NotShrinking,
    /// There were as many as there may be.
    TooMany,
}

/// One round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Bytes that were marked.
    pub found_bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// What came of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyReport {
    /// Pass 1: bytes of data sent.
    pub first_bytes: u64,
    /// How long it took.
    pub first_took: Duration,
    /// Bytes that were there already from an earlier try.
    pub resumed_bytes: u64,
    /// The rounds before the freeze.
    pub rounds: Vec<Round>,
    /// Why they ended.
    pub stop: Stop,
    /// From the end of the freeze command to the end mark's ack.
    pub frozen_took: Duration,
    /// Bytes sent in that time.
    pub frozen_bytes: u64,
    /// Bytes on the wire.
    pub sent_bytes: u64,
}

/// Copies a disk. `stop_writes` is called once, when the rest is small: after it nobody may write but
/// the file system's own write-out. On an error everything is as before, and the target keeps its
/// partial file.
///
/// # Errors
/// The source can't be read, the target not be written, or the source is written in spite of the
/// freeze.
pub fn copy(
    source: &mut dyn CopySource,
    sink: &mut dyn Sink,
    options: &CopyOptions,
    stop_writes: &mut dyn FnMut() -> Result<(), CopyError>,
    progress: &mut dyn FnMut(CopyProgress),
) -> Result<CopyReport, CopyError> {
    let mut sender = Sender {
        source,
        sink,
        progress,
        have: HashMap::new(),
        sent: 0,
        resumed: 0,
        is_tracking: false,
    };
    let outcome = sender.run(options, stop_writes);
    sender.source.thaw();
    if sender.is_tracking {
        // After a failure: nobody would ever read it.
        let _ = sender.source.untrack();
    }
    outcome
}

type Ranges = Vec<Range<u64>>;

struct Sender<'a> {
    source: &'a mut dyn CopySource,
    sink: &'a mut dyn Sink,
    progress: &'a mut dyn FnMut(CopyProgress),
    have: HashMap<u64, u64>,
    sent: u64,
    resumed: u64,
    is_tracking: bool,
}

impl Sender<'_> {
    fn run(
        &mut self,
        options: &CopyOptions,
        stop_writes: &mut dyn FnMut() -> Result<(), CopyError>,
    ) -> Result<CopyReport, CopyError> {
        let hello = Hello {
            version: wire::VERSION,
            session: options.session.clone(),
            size_bytes: self.source.size_bytes(),
            unit_bytes: self.source.unit_bytes(),
            hears: self.sink.hears(),
        };
        self.have = self.sink.begin(&hello)?;
        let begun = Instant::now();
        self.source.track()?;
        self.is_tracking = true;
        self.source.write_out()?;
        self.first_pass()?;
        let first_took = begun.elapsed();
        let first_bytes = std::mem::take(&mut self.sent);
        let (mut rounds, stop) = self.rounds(options)?;
        self.sink.barrier()?;
        // The barrier took time, in which more was written than a short round leaves.
        self.rounds_after_barrier(options, &mut rounds)?;
        stop_writes()?;
        let frozen = Instant::now();
        self.sent = 0;
        self.source.freeze()?;
        self.last_rounds()?;
        self.is_tracking = false;
        match self.source.untrack()? {
            0 => {}
            bytes => return Err(CopyError::StillWritten { bytes }),
        }
        self.sink.end()?;
        Ok(CopyReport {
            first_bytes,
            first_took,
            resumed_bytes: self.resumed,
            rounds,
            stop,
            frozen_took: frozen.elapsed(),
            frozen_bytes: self.sent,
            sent_bytes: self.sink.sent_bytes(),
        })
    }

    /// Sends everything that is not zeroes. The target is empty but for what `have` names.
    fn first_pass(&mut self) -> Result<(), CopyError> {
        let size = self.source.size_bytes();
        let mut at = 0;
        while at < size {
            let end = size.min(at + MAP_STEP);
            let data = self.source.data_in(at..end)?;
            let mut told = at;
            for range in data.iter().cloned().chain(std::iter::once(end..end)) {
                self.drop_stale(told..range.start)?;
                told = range.end;
            }
            let blocks: Vec<Block> = data.into_iter().flat_map(|it| self.blocks(it)).collect();
            self.source.expect(&blocks);
            for block in blocks {
                self.send_block(block, true)?;
                self.tell(CopyPhase::First, block.offset, size);
            }
            at = end;
            self.tell(CopyPhase::First, at, size);
        }
        self.have.clear();
        Ok(())
    }

    /// Blocks of an earlier try that the source holds no data for any more.
    fn drop_stale(&mut self, hole: Range<u64>) -> Result<(), CopyError> {
        if self.have.is_empty() {
            return Ok(());
        }
        let unit = u64::from(self.source.unit_bytes());
        for block in hole.start / unit..hole.end.div_ceil(unit) {
            if self.have.remove(&block).is_some() {
                let start = (block * unit).max(hole.start);
                let end = ((block + 1) * unit).min(hole.end);
                self.sink.zero(start, end - start)?;
            }
        }
        Ok(())
    }

    /// Cuts a range at the borders of the source's units.
    fn blocks(&self, range: Range<u64>) -> Vec<Block> {
        let unit = u64::from(self.source.unit_bytes());
        let end = range.end.min(self.source.size_bytes());
        let mut blocks = Vec::new();
        let mut offset = range.start;
        while offset < end {
            let next = ((offset / unit + 1) * unit).min(end);
            let len_bytes = usize::try_from(next - offset).unwrap_or(0);
            blocks.push(Block { offset, len_bytes });
            offset = next;
        }
        blocks
    }

    fn send_block(&mut self, block: Block, is_fresh: bool) -> Result<(), CopyError> {
        let at = block.offset;
        let bytes = self.source.fetch(block)?;
        let len = bytes.len() as u64;
        let had = self
            .have
            .remove(&(at / u64::from(self.source.unit_bytes())));
        if had == Some(wire::hash(&bytes, at)) {
            self.resumed += len;
        } else if !is_zero(&bytes) {
            self.sent += len;
            self.sink.data(at, bytes)?;
        } else if !is_fresh || had.is_some() {
            self.sink.zero(at, len)?;
        }
        Ok(())
    }

    fn rounds(&mut self, options: &CopyOptions) -> Result<(Vec<Round>, Stop), CopyError> {
        let mut rounds: Vec<Round> = Vec::new();
        loop {
            let before = rounds.last().map(|round| round.found_bytes);
            let found_bytes = self.round(&mut rounds)?;
            let is_shrinking = before.is_none_or(|before| {
                found_bytes <= before.saturating_mul(options.shrink_percent) / 100
            });
            let count = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
            let stop = if found_bytes <= options.small_enough_bytes {
                Stop::Small
            } else if !is_shrinking {
                Stop::NotShrinking
            } else if count >= options.max_rounds {
                Stop::TooMany
            } else {
                continue;
            };
            return Ok((rounds, stop));
        }
    }

    fn round(&mut self, rounds: &mut Vec<Round>) -> Result<u64, CopyError> {
        let begun = Instant::now();
        self.source.write_out()?;
        let found_bytes = self.sweep(CopyPhase::Round)?;
        rounds.push(Round {
            found_bytes,
            took: begun.elapsed(),
        });
        Ok(found_bytes)
    }

    fn rounds_after_barrier(
        &mut self,
        options: &CopyOptions,
        rounds: &mut Vec<Round>,
    ) -> Result<(), CopyError> {
        for _ in 0..LAST_ROUNDS {
            if self.round(rounds)? <= options.small_enough_bytes {
                break;
            }
        }
        Ok(())
    }

    fn last_rounds(&mut self) -> Result<(), CopyError> {
        for _ in 0..FROZEN_SWEEPS {
            if self.sweep(CopyPhase::Frozen)? == 0 {
                return Ok(());
            }
        }
        match self.sweep(CopyPhase::Frozen)? {
            0 => Ok(()),
            bytes => Err(CopyError::StillWritten { bytes }),
        }
    }

    /// Takes all marks and sends what they name. The marks are cleared before the first block is read.
    fn sweep(&mut self, phase: CopyPhase) -> Result<u64, CopyError> {
        let written = self.source.written()?;
        let total: u64 = written.iter().map(|range| range.end - range.start).sum();
        let (data, holes) = self.split(&written)?;
        for hole in holes {
            self.sink.zero(hole.start, hole.end - hole.start)?;
        }
        let blocks: Vec<Block> = data.into_iter().flat_map(|it| self.blocks(it)).collect();
        self.source.expect(&blocks);
        let mut done = 0;
        for block in blocks {
            self.send_block(block, false)?;
            done += block.len_bytes as u64;
            self.tell(phase, done, total);
        }
        Ok(total)
    }

    /// Splits written ranges into what may hold data and what is known to be zeroes.
    fn split(&mut self, written: &[Range<u64>]) -> Result<(Ranges, Ranges), CopyError> {
        let (mut data, mut holes) = (Vec::new(), Vec::new());
        let is_near = |a: &Range<u64>, b: &Range<u64>| b.start - a.end < MAP_GAP;
        for near in written.chunk_by(is_near) {
            let (Some(first), Some(last)) = (near.first(), near.last()) else {
                continue;
            };
            let known = self.source.data_in(first.start..last.end)?;
            let mut known = known.iter().peekable();
            for range in near {
                let mut at = range.start;
                while at < range.end {
                    // Parts before this range were passed by, or belong to a gap.
                    while known.next_if(|part| part.end <= at).is_some() {}
                    let part = known.peek().map_or(range.end..range.end, |part| {
                        part.start.clamp(at, range.end)..part.end.clamp(at, range.end)
                    });
                    if at < part.start {
                        holes.push(at..part.start);
                    }
                    if part.start < part.end {
                        data.push(part.clone());
                    }
                    at = part.end;
                }
            }
        }
        Ok((data, holes))
    }

    fn tell(&mut self, phase: CopyPhase, done_bytes: u64, total_bytes: u64) {
        (self.progress)(CopyProgress {
            phase,
            done_bytes,
            total_bytes,
        });
    }
}
