//! The arena as the coordinator sees it: loading programs, reading answers, waiting, failures.

use std::fmt;
use std::time::{Duration, Instant};

use firn_sys::lookout::Lookout;
use firn_sys::mapping::SharedMapping;
use firn_sys::{Errno, futex};

use super::build::{Data, ProgramId, Slot, Word};
use super::record::context;
use super::set::{CODE_SIZE, Placed, ProgramSet};

/// For programs that take no longer than a wake-up does.
static LOOKOUT: Lookout = Lookout::new();
/// As long as their end is looked out for.
const SOON: Duration = Duration::from_micros(200);
/// How often a waiting coordinator looks for failed or dead tasks, which wake nobody.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(5);

/// Failure to set up an arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The mapping could not be made at the chosen address.
    #[error("can't map the arena of {len} bytes at {address:#x}")]
    Map {
        /// Wanted address.
        address: u64,
        /// Size in bytes.
        len: usize,
        /// Cause.
        source: Errno,
    },
}

/// Which record of which program did not do what its rule asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ProgramFailure {
    /// The program's name, such as `task 4711`.
    pub program: String,
    /// Index of the record.
    pub record: usize,
    /// Number of records of the program.
    pub nr_records: usize,
    /// What the record is for.
    pub why: String,
    /// The call with its arguments.
    pub call: String,
    /// What the call returned.
    pub result: i64,
}

impl ProgramFailure {
    /// The errno, where the result is one.
    pub fn errno(&self) -> Option<Errno> {
        let errno = i32::try_from(self.result.checked_neg()?).ok()?;
        (1..4096).contains(&errno).then(|| Errno::from_raw(errno))
    }
}

impl fmt::Display for ProgramFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} failed: ", self.program, self.why)?;
        match self.errno() {
            Some(errno) => write!(f, "{errno}")?,
            None => write!(f, "unexpected result {}", self.result)?,
        }
        write!(
            f,
            " (record {} of {}: {})",
            self.record, self.nr_records, self.call
        )
    }
}

/// Increments of a word that are waited for one by one.
const FEW: u32 = 4;
/// Between two looks while more are missing.
const WHILE_MANY_RUN: Duration = Duration::from_micros(100);

/// How a wait on a word ended.
#[derive(Debug)]
pub enum WaitOutcome<E> {
    /// The word reached the value.
    Reached,
    /// A program stopped at a record.
    Failed(ProgramFailure),
    /// The liveness check said so.
    Dead(E),
    /// Nothing of it happened in time.
    TimedOut,
}

/// An arena mapped here, with its programs loaded.
#[derive(Debug)]
pub struct Arena {
    mapping: SharedMapping,
    placed: Placed,
    /// A limit of the task was raised for the moment in which it was mapped.
    pub had_no_room: bool,
}

impl Arena {
    /// Makes the arena of a restore: shared memory at its final address in this process, which every
    /// task forked from here inherits. The first page becomes executable.
    ///
    /// # Errors
    /// The address is taken here or memory is short.
    pub fn create(set: &ProgramSet, placed: Placed) -> Result<Arena, ArenaError> {
        let map = |source| ArenaError::Map {
            address: placed.base(),
            len: placed.len(),
            source,
        };
        let mut mapping = SharedMapping::anonymous_at(placed.base(), placed.len()).map_err(map)?;
        placed.load(set, |offset, bytes| mapping.write(offset, bytes));
        mapping.make_executable(CODE_SIZE).map_err(map)?;
        Ok(Arena::over(mapping, placed))
    }

    /// Takes over a shared mapping of zeros that stands at the placed address in a task, and loads the
    /// programs into it.
    pub fn attach(mapping: SharedMapping, set: &ProgramSet, placed: Placed) -> Arena {
        placed.load(set, |offset, bytes| mapping.write(offset, bytes));
        Arena::over(mapping, placed)
    }

    fn over(mapping: SharedMapping, placed: Placed) -> Arena {
        Arena {
            mapping,
            placed,
            had_no_room: false,
        }
    }

    /// Where everything stands.
    pub fn placed(&self) -> &Placed {
        &self.placed
    }

    /// A copy of a data range, such as an answer.
    pub fn read(&self, id: ProgramId, data: Data) -> Vec<u8> {
        self.mapping
            .read(self.placed.data_offset(id, data), data.len())
    }

    /// The result that a call left in its slot.
    pub fn slot(&self, id: ProgramId, slot: Slot) -> i64 {
        let bytes = self.mapping.read(self.placed.slot_offset(id, slot), 8);
        i64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// Writes into a data range before its program reads it.
    pub fn write(&self, id: ProgramId, data: Data, bytes: &[u8]) {
        assert!(bytes.len() <= data.len(), "bytes fit the data range");
        self.mapping.write(self.placed.data_offset(id, data), bytes);
    }

    /// Address in the tasks of a data range.
    pub fn address(&self, id: ProgramId, data: Data) -> u64 {
        self.placed.address(self.placed.data_offset(id, data))
    }

    /// Address in the tasks of a program's first record and of its context.
    pub fn entry(&self, id: ProgramId) -> (u64, u64) {
        (
            self.placed.address(self.placed.records_offset(id)),
            self.placed.address(self.placed.context_offset(id)),
        )
    }

    /// Present value of a word.
    pub fn load(&self, word: Word) -> u32 {
        self.mapping
            .word(self.placed.word_offset(word))
            .load(std::sync::atomic::Ordering::Acquire)
    }

    /// Increments a word and wakes its waiters.
    pub fn post(&self, word: Word) {
        let word = self.mapping.word(self.placed.word_offset(word));
        word.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        futex::wake_all(word);
    }

    /// Number of programs that have parked.
    pub fn nr_parked(&self) -> u32 {
        self.load_at(self.placed.parked_offset())
    }

    /// True once that program has parked.
    pub fn is_parked(&self, id: ProgramId) -> bool {
        let at = self.placed.context_offset(id) + context::STATE;
        self.load_at(at) == context::STATE_PARKED
    }

    fn load_at(&self, offset: usize) -> u32 {
        self.mapping
            .word(offset)
            .load(std::sync::atomic::Ordering::Acquire)
    }

    /// Sleeps until `word` is at least `value`, a program fails, `alive` reports a death, or `timeout`
    /// passes.
    pub fn wait<E>(
        &self,
        set: &ProgramSet,
        word: Word,
        value: u32,
        timeout: Duration,
        alive: impl FnMut() -> Result<(), E>,
    ) -> WaitOutcome<E> {
        self.wait_at(set, self.placed.word_offset(word), value, timeout, alive)
    }

    /// Like [`Arena::wait`] for the number of parked programs.
    pub fn wait_parked<E>(
        &self,
        set: &ProgramSet,
        value: u32,
        timeout: Duration,
        alive: impl FnMut() -> Result<(), E>,
    ) -> WaitOutcome<E> {
        self.wait_at(set, self.placed.parked_offset(), value, timeout, alive)
    }

    fn wait_at<E>(
        &self,
        set: &ProgramSet,
        offset: usize,
        value: u32,
        timeout: Duration,
        mut alive: impl FnMut() -> Result<(), E>,
    ) -> WaitOutcome<E> {
        let deadline = Instant::now() + timeout;
        let mut looked = Instant::now();
        // Whether it was there is seen below.
        let _ = LOOKOUT.watch(SOON, || (self.load_at(offset) >= value).then_some(()));
        loop {
            let seen = self.load_at(offset);
            if self.load_at(self.placed.failed_offset()) > 0
                && let Some(failure) = self.failure(set)
            {
                return WaitOutcome::Failed(failure);
            }
            if seen >= value {
                return WaitOutcome::Reached;
            }
            let slept_out = if value - seen > FEW {
                // Each of many that come would wake this thread, and it would take their processor.
                std::thread::sleep(WHILE_MANY_RUN);
                looked.elapsed() >= LIVENESS_INTERVAL
            } else {
                !futex::wait_timeout(self.mapping.word(offset), seen, LIVENESS_INTERVAL)
            };
            if slept_out {
                looked = Instant::now();
                if let Err(dead) = alive() {
                    return WaitOutcome::Dead(dead);
                }
                if Instant::now() >= deadline {
                    return WaitOutcome::TimedOut;
                }
            }
        }
    }

    /// The first failed program, in words.
    pub fn failure(&self, set: &ProgramSet) -> Option<ProgramFailure> {
        set.programs().find_map(|(id, program)| {
            let at = self.placed.context_offset(id);
            if self.load_at(at + context::STATE) != context::STATE_FAILED {
                return None;
            }
            let word = |offset| -> [u8; 8] {
                self.mapping
                    .read(at + offset, 8)
                    .try_into()
                    .expect("eight bytes")
            };
            let address = u64::from_le_bytes(word(context::RECORD));
            let nth = self
                .placed
                .find_record(set, address)
                .map_or(0, |(_, nth)| nth);
            Some(ProgramFailure {
                program: program.name().to_owned(),
                record: nth,
                nr_records: program.len(),
                why: program.why(nth).to_owned(),
                call: program.describe(nth),
                result: i64::from_le_bytes(word(context::RESULT)),
            })
        })
    }
}
