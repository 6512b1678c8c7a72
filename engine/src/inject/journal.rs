//! What has to be put back in tasks that a dump works in, in memory that outlives the process that does so.
//!
//! ```text
//! worker   notes each thread before it changes it, and crosses it out when it is as it was
//! front    waits for the worker; when it was killed, seizes the threads that are noted and puts them back,
//!          and sends the rest of a tree the signal that the others have got
//! ```
//!
//! Between the death of a tracer and the hands of the next, threads run. Each of them is at a place then
//! where this does no harm: asleep in a call, in the executor, or on a [`Landing`].
//!
//! Words of 64 bits:
//!
//! | word | what |
//! |---|---|
//! | 0 | when the last note was made, in ticks since the boot |
//! | 1 | threads noted |
//! | 2 | signal that all processes get, or 0 |
//! | 3 | how many processes |
//! | 4 | bytes of the name of a cgroup that is frozen, or 0 |
//! | 5 | the name |
//! | 512 + 64 n | the nth thread |
//! | behind | pids of the processes |
//! | behind | how many TCP connections are in repair mode, and length of the run id of the dump |
//! | behind | the run id, by which the network lock is found |
//! | behind | the connections: pid, descriptor, and whether the address may be used again |
//!
//! A note is written before it counts; later only words are changed in it that say more.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use firn_sys::mapping::SharedMapping;
use firn_sys::ptrace::{DispatchConfig, GeneralRegs};
use firn_sys::rlimit::Limited;
use firn_sys::{Pid, clock};

use crate::arch::regs::{self, NR_REGISTERS};
use crate::arch::{Abi, Landing};
use crate::task::status::Stat;

const WORD: usize = size_of::<u64>();
/// Threads, and processes, beyond these are not noted.
const CAPACITY: usize = 1 << 16;

/// As the kernel counts for /proc (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;

const WRITTEN: usize = 0;
const NR_NOTED: usize = 1;
const SIGNAL: usize = 2;
const NR_SIGNALLED: usize = 3;
const FROZEN_LEN: usize = 4;
const FROZEN: usize = 5;
const NOTES: usize = 512;
const NOTE: usize = 64;
const SIGNALLED: usize = NOTES + CAPACITY * NOTE;
const NR_CONNECTIONS: usize = SIGNALLED + CAPACITY;
const RUN_ID_LEN: usize = NR_CONNECTIONS + 1;
const RUN_ID: usize = RUN_ID_LEN + 1;
/// Longer than any that a lock is named by.
const RUN_ID_WORDS: usize = 8;
const CONNECTIONS: usize = RUN_ID + RUN_ID_WORDS;
const WORDS: usize = CONNECTIONS + CAPACITY;

/// In the word of a connection: its address may be used again (SO_REUSEADDR), which repair mode changes.
const REUSES_ADDRESS: u64 = 1 << 63;

/// Stands where a note begins with the thread's number.
const CROSSED_OUT: u64 = 0;
/// Words of a note before the registers.
const NR_NUMBERS: usize = 15;
const WORDS_OF_NOTE: usize = NR_NUMBERS + NR_REGISTERS;

const _: () = assert!(WORDS_OF_NOTE <= NOTE);

/// The notes of one dump.
#[derive(Debug, Clone)]
pub struct Journal(Arc<SharedMapping>);

impl Journal {
    /// Makes an empty one, which processes forked from this one share.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new() -> firn_sys::Result<Journal> {
        let memory = SharedMapping::sparse(WORDS * WORD)?;
        Ok(Journal(Arc::new(memory)))
    }

    /// Notes a thread that is about to be changed; None when there is no more room.
    pub(super) fn note(&self, thread: Noted) -> Option<Note> {
        let nr = self.word(NR_NOTED);
        let nth = usize::try_from(nr).ok().filter(|nth| *nth < CAPACITY)?;
        let note = Note {
            journal: self.clone(),
            at: NOTES + nth * NOTE,
            thread,
        };
        note.write();
        self.set(WRITTEN, ticks_since_boot());
        self.set(NR_NOTED, nr + 1);
        Some(note)
    }

    /// Forgets all threads, which are as they were.
    pub(super) fn clear(&self) {
        self.set(NR_NOTED, 0);
    }

    /// Notes that all these processes are about to get a signal.
    pub(crate) fn will_signal(&self, signal: i32, pids: impl Iterator<Item = Pid>) {
        let mut nr = 0;
        for (nth, pid) in pids.take(CAPACITY).enumerate() {
            self.set(SIGNALLED + nth, of_pid(pid));
            nr += 1;
        }
        self.set(WRITTEN, ticks_since_boot());
        self.set(NR_SIGNALLED, nr);
        self.set(SIGNAL, u64::from(signal.unsigned_abs()));
    }

    /// Notes that a cgroup is about to be frozen, by its directory; None that it is not any more.
    pub(crate) fn note_frozen(&self, group: Option<&Path>) {
        let name = group.map_or(&[][..], |path| path.as_os_str().as_bytes());
        if name.len() <= (NOTES - FROZEN) * WORD {
            self.0.write(FROZEN * WORD, name);
            self.set(FROZEN_LEN, u64::try_from(name.len()).unwrap_or(0));
        }
    }

    /// The directory of a cgroup that was frozen.
    pub(super) fn frozen(&self) -> Option<PathBuf> {
        let len = usize::try_from(self.word(FROZEN_LEN)).ok()?;
        let is_one = (1..=(NOTES - FROZEN) * WORD).contains(&len);
        is_one.then(|| OsString::from_vec(self.0.read(FROZEN * WORD, len)).into())
    }

    /// Notes that packets for TCP connections are about to be held off, under the name of a run, and these connections
    /// to go into repair mode.
    pub(crate) fn will_hold(
        &self,
        run_id: &str,
        connections: impl Iterator<Item = HeldConnection>,
    ) {
        let mut nr = 0;
        for (nth, connection) in connections.take(CAPACITY).enumerate() {
            self.set(CONNECTIONS + nth, connection.to_word());
            nr += 1;
        }
        let run_id = &run_id.as_bytes()[..run_id.len().min(RUN_ID_WORDS * WORD)];
        self.0.write(RUN_ID * WORD, run_id);
        self.set(WRITTEN, ticks_since_boot());
        self.set(NR_CONNECTIONS, nr);
        self.set(RUN_ID_LEN, u64::try_from(run_id.len()).unwrap_or(0));
    }

    /// Notes that all connections go on.
    pub(crate) fn hold_no_more(&self) {
        self.set(RUN_ID_LEN, 0);
    }

    /// The run that holds packets off, and the connections that may be in repair mode.
    pub(super) fn held(&self) -> Option<(String, Vec<HeldConnection>)> {
        let len = usize::try_from(self.word(RUN_ID_LEN)).ok()?;
        let is_one = (1..=RUN_ID_WORDS * WORD).contains(&len);
        let run_id = is_one.then(|| self.0.read(RUN_ID * WORD, len))?;
        let words = (0..self.count(NR_CONNECTIONS)).map(|nth| self.word(CONNECTIONS + nth));
        let connections = words.map(HeldConnection::from_word).collect();
        Some((String::from_utf8(run_id).ok()?, connections))
    }

    /// The signal that processes were about to get, and which.
    pub(super) fn signalled(&self) -> Option<(i32, Vec<Pid>)> {
        let signal = i32::try_from(self.word(SIGNAL)).ok().filter(|nr| *nr > 0)?;
        let pids = (0..self.count(NR_SIGNALLED)).map(|nth| pid_of(self.word(SIGNALLED + nth)));
        Some((signal, pids.collect()))
    }

    /// Threads that are not as they were.
    pub(super) fn noted(&self) -> Vec<Noted> {
        let notes = (0..self.count(NR_NOTED)).map(|nth| NOTES + nth * NOTE);
        let open = notes.filter(|at| self.word(*at) != CROSSED_OUT);
        open.map(|at| self.read(at)).collect()
    }

    /// Whether a task was there already when something was noted last.
    pub(super) fn knows(&self, tid: Pid) -> bool {
        Stat::read(tid).is_ok_and(|stat| stat.start_ticks <= self.word(WRITTEN))
    }

    fn count(&self, word: usize) -> usize {
        usize::try_from(self.word(word)).map_or(CAPACITY, |nr| nr.min(CAPACITY))
    }

    fn word(&self, nth: usize) -> u64 {
        self.0.long_word(nth * WORD).load(Ordering::Acquire)
    }

    fn set(&self, nth: usize, value: u64) {
        self.0.long_word(nth * WORD).store(value, Ordering::Release);
    }

    fn read(&self, at: usize) -> Noted {
        Noted::from_words(&std::array::from_fn(|nth| self.word(at + nth)))
    }
}

/// A TCP connection of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeldConnection {
    /// The task.
    pub pid: Pid,
    /// A descriptor of it.
    pub fd: i32,
    /// Whether its address may be used again (SO_REUSEADDR), before repair mode.
    pub reuses_address: bool,
}

impl HeldConnection {
    fn to_word(self) -> u64 {
        let flag = if self.reuses_address {
            REUSES_ADDRESS
        } else {
            0
        };
        of_pid(self.pid) | u64::from(self.fd.unsigned_abs()) << 32 | flag
    }

    fn from_word(word: u64) -> HeldConnection {
        let fd = (word & !REUSES_ADDRESS) >> 32;
        HeldConnection {
            pid: pid_of(word & u64::from(u32::MAX)),
            fd: i32::try_from(fd).unwrap_or(-1),
            reuses_address: word & REUSES_ADDRESS != 0,
        }
    }
}

/// A thread before it was changed, and where it was led.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noted {
    pub tid: Pid,
    /// Its process.
    pub pid: Pid,
    pub abi: Abi,
    pub regs: GeneralRegs,
    pub mask: u64,
    /// Syscall user dispatch, where it was on.
    pub dispatch: Option<DispatchConfig>,
    /// The instruction by which it makes calls, if it does.
    pub instruction: Option<u64>,
    /// Where it waits if nobody holds it after a call.
    pub landing: Option<Landing>,
    /// Address of the arena, once it is known.
    pub arena: Option<u64>,
    /// Length of the arena.
    pub arena_len: u64,
    /// A soft limit that is raised for a moment.
    pub limit: Option<(Limited, u64)>,
}

impl Noted {
    fn to_words(self) -> [u64; WORDS_OF_NOTE] {
        let dispatch = self.dispatch.unwrap_or_default();
        let landing = self.landing.map_or([0; 2], |landing| {
            [
                landing.address,
                u64::from(u16::from_le_bytes(landing.bytes)),
            ]
        });
        let (limit, soft) = match self.limit {
            None => (0, 0),
            Some((Limited::AddressSpace, soft)) => (1, soft),
            Some((Limited::LockedMemory, soft)) => (2, soft),
        };
        let numbers: [u64; NR_NUMBERS] = [
            of_pid(self.tid),
            of_pid(self.pid),
            u64::from(self.abi == Abi::Ia32),
            self.mask,
            dispatch.mode,
            dispatch.selector,
            dispatch.offset,
            dispatch.len,
            self.instruction.unwrap_or(0),
            landing[0],
            landing[1],
            self.arena.unwrap_or(0),
            self.arena_len,
            limit,
            soft,
        ];
        let mut words = [0; WORDS_OF_NOTE];
        words[..NR_NUMBERS].copy_from_slice(&numbers);
        words[NR_NUMBERS..].copy_from_slice(&regs::to_words(&self.regs));
        words
    }

    fn from_words(words: &[u64; WORDS_OF_NOTE]) -> Noted {
        let (numbers, registers) = words.split_at(NR_NUMBERS);
        let known = |nth: usize| Some(numbers[nth]).filter(|number| *number != 0);
        let landing = |address| {
            let bytes = u16::try_from(numbers[10]).ok()?;
            Landing::at(address, bytes.to_le_bytes())
        };
        Noted {
            tid: pid_of(numbers[0]),
            pid: pid_of(numbers[1]),
            abi: match numbers[2] {
                0 => Abi::Native,
                _ => Abi::Ia32,
            },
            mask: numbers[3],
            dispatch: known(4).map(|mode| DispatchConfig {
                mode,
                selector: numbers[5],
                offset: numbers[6],
                len: numbers[7],
            }),
            instruction: known(8),
            landing: known(9).and_then(landing),
            arena: known(11),
            arena_len: numbers[12],
            limit: match numbers[13] {
                1 => Some((Limited::AddressSpace, numbers[14])),
                2 => Some((Limited::LockedMemory, numbers[14])),
                _ => None,
            },
            regs: regs::from_words(registers.try_into().expect("as many as registers")),
        }
    }
}

fn ticks_since_boot() -> u64 {
    let (seconds, nanoseconds) = clock::boottime();
    seconds * TICKS_PER_SECOND + nanoseconds / (1_000_000_000 / TICKS_PER_SECOND)
}

fn of_pid(pid: Pid) -> u64 {
    u64::from(pid.to_image())
}

fn pid_of(word: u64) -> Pid {
    Pid::from_raw(i32::try_from(word).unwrap_or(0))
}

/// The note of one thread.
#[derive(Debug)]
pub(super) struct Note {
    journal: Journal,
    at: usize,
    thread: Noted,
}

impl Note {
    /// Adds what is known of the thread by now.
    pub fn add(&mut self, what: impl FnOnce(&mut Noted)) {
        what(&mut self.thread);
        self.write();
    }

    /// Crosses the thread out: it is as it was.
    pub fn cross_out(&self) {
        self.journal.set(self.at, CROSSED_OUT);
    }

    fn write(&self) {
        for (nth, word) in self.thread.to_words().into_iter().enumerate() {
            self.journal.set(self.at + nth, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use firn_proto::UserX86RegsEntry;

    use super::*;
    use crate::arch::restart::Resumption;

    fn thread(tid: i32) -> Noted {
        let image = UserX86RegsEntry {
            ip: 0x1234,
            sp: 0x7fff_0000,
            ..UserX86RegsEntry::default()
        };
        Noted {
            tid: Pid::from_raw(tid),
            pid: Pid::from_raw(7),
            abi: Abi::Ia32,
            regs: regs::from_image(&image, Resumption::AsStored),
            mask: 0x55,
            dispatch: None,
            instruction: None,
            landing: None,
            arena: None,
            arena_len: 0x3000,
            limit: None,
        }
    }

    #[test]
    fn what_is_noted_is_read_until_it_is_crossed_out() {
        let journal = Journal::new().unwrap();
        assert!(journal.noted().is_empty());
        let mut notes = [8, 9].map(|tid| journal.note(thread(tid)).unwrap());
        let landing = Landing::at(0x5000, [0x7e, 0xfe]).unwrap();
        notes[1].add(|noted| {
            noted.instruction = Some(0x4000);
            noted.landing = Some(landing);
            noted.limit = Some((Limited::LockedMemory, 0));
        });
        notes[1].add(|noted| noted.arena = Some(0x10_0000));
        notes[0].cross_out();
        let noted = journal.noted();
        assert_eq!(noted.len(), 1);
        let second = &noted[0];
        assert_eq!((second.tid.raw(), second.pid.raw()), (9, 7));
        assert_eq!((second.abi, second.mask), (Abi::Ia32, 0x55));
        assert_eq!((second.regs.rip, second.regs.rsp), (0x1234, 0x7fff_0000));
        assert_eq!(second.instruction, Some(0x4000));
        assert_eq!(second.landing, Some(landing));
        assert_eq!((second.arena, second.arena_len), (Some(0x10_0000), 0x3000));
        assert_eq!(second.limit, Some((Limited::LockedMemory, 0)));
        assert!(second.dispatch.is_none());
        journal.clear();
        assert!(journal.noted().is_empty());
    }

    #[test]
    fn those_that_get_a_signal_are_told() {
        let journal = Journal::new().unwrap();
        assert_eq!(journal.signalled(), None);
        journal.will_signal(9, [3, 4].into_iter().map(Pid::from_raw));
        let pids = [3, 4].map(Pid::from_raw).to_vec();
        assert_eq!(journal.signalled(), Some((9, pids)));
    }

    #[test]
    fn a_frozen_group_is_told_until_it_is_thawed() {
        let journal = Journal::new().unwrap();
        assert_eq!(journal.frozen(), None);
        let group = Path::new("/sys/fs/cgroup/a b");
        journal.note_frozen(Some(group));
        assert_eq!(journal.frozen().as_deref(), Some(group));
        journal.note_frozen(None);
        assert_eq!(journal.frozen(), None);
    }

    #[test]
    fn connections_are_told_while_they_are_held() {
        let journal = Journal::new().unwrap();
        assert_eq!(journal.held(), None);
        let connection = |pid, fd, reuses_address| HeldConnection {
            pid: Pid::from_raw(pid),
            fd,
            reuses_address,
        };
        let connections = vec![
            connection(4_194_303, i32::MAX, true),
            connection(7, 0, false),
        ];
        journal.will_hold("run", connections.iter().copied());
        assert_eq!(journal.held(), Some(("run".to_owned(), connections)));
        journal.hold_no_more();
        assert_eq!(journal.held(), None);
    }

    #[test]
    fn tasks_are_known_that_were_there() {
        let journal = Journal::new().unwrap();
        assert!(!journal.knows(Pid::this()));
        journal.will_signal(9, std::iter::empty());
        assert!(journal.knows(Pid::this()));
    }

    #[test]
    fn what_has_no_room_is_not_noted() {
        let journal = Journal::new().unwrap();
        journal.set(NR_NOTED, u64::try_from(CAPACITY).unwrap());
        assert!(journal.note(thread(8)).is_none());
    }
}
