//! Building a program: records with symbolic arguments, data, slots.

use std::borrow::Cow;

use super::record::{FLAG_IA32, FLAG_RETRY, Op, Rule};

/// Number of a program in its [`ProgramSet`](super::ProgramSet).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProgramId(pub(super) u32);

/// Number of a 32-bit futex word in the arena, shared by all programs of the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Word(pub(super) u32);

/// A range of the program's own data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    pub(super) offset: usize,
    pub(super) len: usize,
}

impl Data {
    /// A reference to the bytes from `offset` on.
    ///
    /// # Panics
    /// If `offset` lies outside the range: the caller built the range itself.
    pub fn at(self, offset: usize) -> Data {
        assert!(offset <= self.len, "offset inside the data range");
        Data {
            offset: self.offset + offset,
            len: self.len - offset,
        }
    }

    /// Length in bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// True for a range of no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// The place that keeps one call's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(pub(super) u16);

/// One argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// The value itself.
    Imm(u64),
    /// The address of bytes of the program's data.
    Data(Data),
    /// The result of an earlier call.
    Slot(Slot),
    /// The address of a word of the arena.
    Word(Word),
    /// The address of the arena, which is that of a page.
    Arena,
    /// The 64-bit value that bytes of the program's data hold when the record runs.
    Held(Data),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Arg::Imm(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Arg::Imm(u64::from(value))
    }
}

impl From<i32> for Arg {
    /// Sign-extends, as the kernel expects of `int` arguments such as `AT_FDCWD`.
    fn from(value: i32) -> Self {
        Arg::Imm(i64::from(value).cast_unsigned())
    }
}

impl From<Data> for Arg {
    fn from(data: Data) -> Self {
        Arg::Data(data)
    }
}

impl From<Slot> for Arg {
    fn from(slot: Slot) -> Self {
        Arg::Slot(slot)
    }
}

/// Arguments of clone3 for a Fork record.
///
/// Source: man 2 clone3.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CloneSpec {
    /// `CLONE_*` flags.
    pub flags: u64,
    /// Signal to the parent at the child's death; 0 for threads.
    pub exit_signal: u64,
    /// fs base of the child, with `CLONE_SETTLS`.
    pub tls: u64,
    /// Address for `CLONE_CHILD_CLEARTID`.
    pub child_tid: u64,
    /// Wanted tids, innermost pid namespace first; empty lets the kernel choose.
    pub set_tid: Vec<i32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Call {
        nr: u16,
        args: [Arg; 6],
        rule: Rule,
        out: Option<Slot>,
        flags: u8,
    },
    Wait {
        word: Word,
        value: u32,
    },
    Post {
        word: Word,
    },
    Fork {
        clone_args: Data,
        child: ProgramId,
        rule: Rule,
    },
    Park,
    Segments {
        out: Slot,
    },
}

impl Step {
    pub(super) fn op(&self) -> Op {
        match self {
            Step::Call { .. } => Op::Call,
            Step::Wait { .. } => Op::Wait,
            Step::Post { .. } => Op::Post,
            Step::Fork { .. } => Op::Fork,
            Step::Park => Op::Park,
            Step::Segments { .. } => Op::Segments,
        }
    }
}

/// Records and bytes of data of a thread's program.
const USUAL_LEN: usize = 16;
const USUAL_DATA: usize = 256;

/// One program under construction or finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    pub(super) name: Cow<'static, str>,
    pub(super) steps: Vec<Step>,
    pub(super) whys: Vec<Cow<'static, str>>,
    pub(super) data: Vec<u8>,
    /// Offsets in `data` of u64 values that hold another offset and become addresses when placed.
    pub(super) pointers: Vec<usize>,
    pub(super) nr_slots: u16,
}

impl Program {
    /// Starts an empty program. `name` names the task in messages, such as `task 4711`.
    pub fn new(name: impl Into<Cow<'static, str>>) -> Program {
        Program {
            name: name.into(),
            steps: Vec::with_capacity(USUAL_LEN),
            whys: Vec::with_capacity(USUAL_LEN),
            data: Vec::with_capacity(USUAL_DATA),
            pointers: Vec::new(),
            nr_slots: 0,
        }
    }

    /// The name given to [`Program::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// True while no record was added.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Copies `bytes` into the program's data, 8-byte aligned.
    pub fn data(&mut self, bytes: &[u8]) -> Data {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let data = Data {
            offset: self.data.len(),
            len: bytes.len(),
        };
        self.data.extend_from_slice(bytes);
        data
    }

    /// A NUL-terminated copy of `text` in the program's data.
    pub fn string(&mut self, text: &[u8]) -> Data {
        let mut bytes = text.to_vec();
        bytes.push(0);
        self.data(&bytes)
    }

    /// Reserves `len` zero bytes for an answer.
    pub fn space(&mut self, len: usize) -> Data {
        let space = self.data(&[]);
        self.data.resize(space.offset + len, 0);
        Data { len, ..space }
    }

    /// Copies 64-bit values into the program's data; [`Arg::Data`] values become addresses when the
    /// program is placed.
    ///
    /// # Panics
    /// For values that are known only when the program runs, which have no place in data.
    pub fn table(&mut self, values: &[Arg]) -> Data {
        let table = self.space(8 * values.len());
        for (i, value) in values.iter().enumerate() {
            let at = table.offset + 8 * i;
            let raw = match *value {
                Arg::Imm(value) => value,
                Arg::Data(data) => {
                    self.pointers.push(at);
                    u64::try_from(data.offset).expect("a program's data fits 64 bits")
                }
                Arg::Slot(_) | Arg::Word(_) | Arg::Arena | Arg::Held(_) => {
                    panic!("only immediates and data go into a table")
                }
            };
            self.data[at..at + 8].copy_from_slice(&raw.to_le_bytes());
        }
        table
    }

    fn push(&mut self, step: Step, why: Cow<'static, str>) {
        self.steps.push(step);
        self.whys.push(why);
    }

    /// Adds a call. `why` says what it is for, such as `mmap of heap [0x55..-0x56..]`.
    pub fn call(
        &mut self,
        nr: i64,
        args: &[Arg],
        rule: Rule,
        why: impl Into<Cow<'static, str>>,
    ) -> &mut Program {
        self.push_call(nr, args, rule, None, 0, why.into());
        self
    }

    /// Adds a call that is repeated while it returns EINTR or EAGAIN.
    pub fn call_retrying(
        &mut self,
        nr: i64,
        args: &[Arg],
        rule: Rule,
        why: impl Into<Cow<'static, str>>,
    ) -> &mut Program {
        self.push_call(nr, args, rule, None, FLAG_RETRY, why.into());
        self
    }

    /// Adds a 32-bit call: number, arguments and structures are those of 32-bit code, and the arena has
    /// to stand below 4 GiB.
    ///
    /// # Panics
    /// For more than five arguments, which the executor has no register for.
    pub fn call_ia32(
        &mut self,
        nr: i64,
        args: &[Arg],
        rule: Rule,
        why: impl Into<Cow<'static, str>>,
    ) -> &mut Program {
        assert!(args.len() <= 5, "a 32-bit call of at most five arguments");
        self.push_call(nr, args, rule, None, FLAG_IA32, why.into());
        self
    }

    /// Adds a call whose result is kept for later arguments and for the coordinator.
    pub fn call_to_slot(
        &mut self,
        nr: i64,
        args: &[Arg],
        rule: Rule,
        why: impl Into<Cow<'static, str>>,
    ) -> Slot {
        let slot = self.new_slot();
        self.push_call(nr, args, rule, Some(slot), 0, why.into());
        slot
    }

    fn new_slot(&mut self) -> Slot {
        let slot = Slot(self.nr_slots);
        self.nr_slots = self
            .nr_slots
            .checked_add(1)
            .expect("a program has under 65,535 slots");
        slot
    }

    fn push_call(
        &mut self,
        nr: i64,
        args: &[Arg],
        rule: Rule,
        out: Option<Slot>,
        flags: u8,
        why: Cow<'static, str>,
    ) {
        let mut full = [Arg::Imm(0); 6];
        full[..args.len()].copy_from_slice(args);
        let nr = u16::try_from(nr).expect("system call numbers fit 16 bits");
        self.push(
            Step::Call {
                nr,
                args: full,
                rule,
                out,
                flags,
            },
            why,
        );
    }

    /// Sleeps until `word` is at least `value`.
    pub fn wait(&mut self, word: Word, value: u32, why: impl Into<Cow<'static, str>>) {
        self.push(Step::Wait { word, value }, why.into());
    }

    /// Increments `word` and wakes its waiters.
    pub fn post(&mut self, word: Word, why: impl Into<Cow<'static, str>>) {
        self.push(Step::Post { word }, why.into());
    }

    /// Makes a thread or process that runs `child`.
    pub fn fork(&mut self, spec: &CloneSpec, child: ProgramId, why: impl Into<Cow<'static, str>>) {
        let rule = match spec.set_tid.first() {
            Some(&tid) => Rule::Exact(i64::from(tid)),
            None => Rule::Ok,
        };
        let tids: Vec<u8> = spec
            .set_tid
            .iter()
            .flat_map(|tid| tid.to_le_bytes())
            .collect();
        let tids_at = self.data(&tids);
        let nr_tids = u64::try_from(spec.set_tid.len()).expect("few pid namespace levels");
        let set_tid = if tids.is_empty() {
            Arg::Imm(0)
        } else {
            Arg::Data(tids_at)
        };
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size,
        // tls, set_tid, set_tid_size, cgroup.
        let clone_args = self.table(&[
            spec.flags.into(),
            Arg::Imm(0),
            spec.child_tid.into(),
            Arg::Imm(0),
            spec.exit_signal.into(),
            Arg::Imm(0),
            Arg::Imm(0),
            spec.tls.into(),
            set_tid,
            nr_tids.into(),
            Arg::Imm(0),
        ]);
        self.push(
            Step::Fork {
                clone_args,
                child,
                rule,
            },
            why.into(),
        );
    }

    /// Looks which thread-local segments the thread has, without a call: bit i of the result stands for entry 12 + i
    /// of the global descriptor table.
    pub fn segments(&mut self, why: impl Into<Cow<'static, str>>) -> Slot {
        let out = self.new_slot();
        self.push(Step::Segments { out }, why.into());
        out
    }

    /// Ends the program: the task sleeps until ptrace takes it over.
    pub fn park(&mut self) {
        self.push(Step::Park, Cow::Borrowed("done"));
    }
}
