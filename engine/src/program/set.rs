//! All programs of one arena, and how they are laid out in it.

use super::build::{Arg, Program, ProgramId, Slot, Step, Word};
use super::record::{CONTEXT_SIZE, RECORD_SIZE, Record, Rule, context};
use super::{Data, Op};
use crate::arch;

/// Size of the executable first part of an arena in bytes.
pub const CODE_SIZE: usize = 4096;

/// Word 0 counts parked programs, word 1 failed ones; the others are the caller's.
const PARKED: Word = Word(0);
const FAILED: Word = Word(1);

/// The programs that share one arena.
#[derive(Debug, Default)]
pub struct ProgramSet {
    programs: Vec<Option<Program>>,
    nr_words: u32,
}

impl ProgramSet {
    /// An empty set.
    pub fn new() -> ProgramSet {
        ProgramSet {
            programs: Vec::new(),
            nr_words: 2,
        }
    }

    /// Allocates a futex word, zero at the start.
    pub fn word(&mut self) -> Word {
        let word = Word(self.nr_words);
        self.nr_words += 1;
        word
    }

    /// Gives a number to a program that is built later, so that Fork records can name it.
    pub fn reserve(&mut self) -> ProgramId {
        self.programs.push(None);
        ProgramId(u32::try_from(self.programs.len() - 1).expect("fewer than 2^32 programs"))
    }

    /// Fills a reserved number.
    pub fn set(&mut self, id: ProgramId, program: Program) {
        self.programs[index(id)] = Some(program);
    }

    /// Adds a finished program.
    pub fn add(&mut self, program: Program) -> ProgramId {
        let id = self.reserve();
        self.set(id, program);
        id
    }

    /// Number of programs.
    pub fn len(&self) -> usize {
        self.programs.len()
    }

    /// True for a set of no programs.
    pub fn is_empty(&self) -> bool {
        self.programs.is_empty()
    }

    /// The program with that number.
    ///
    /// # Panics
    /// If the number was reserved and never filled.
    pub fn program(&self, id: ProgramId) -> &Program {
        self.programs[index(id)]
            .as_ref()
            .expect("every reserved program is set")
    }

    /// All programs with their numbers.
    pub fn programs(&self) -> impl Iterator<Item = (ProgramId, &Program)> {
        (0u32..).zip(&self.programs).map(|(i, program)| {
            (
                ProgramId(i),
                program.as_ref().expect("every reserved program is set"),
            )
        })
    }

    /// Lays the programs out for an arena that stands at `base` in the tasks.
    pub fn place(&self, base: u64) -> Placed {
        let words_at = CODE_SIZE;
        let contexts_at = (words_at + 4 * usize_of(self.nr_words)).next_multiple_of(CONTEXT_SIZE);
        let mut end = contexts_at + CONTEXT_SIZE * self.programs.len();
        let mut layout = Vec::with_capacity(self.programs.len());
        for (_, program) in self.programs() {
            let slots = end;
            let records = (slots + 8 * usize::from(program.nr_slots)).next_multiple_of(RECORD_SIZE);
            let data = records + RECORD_SIZE * program.steps.len();
            end = (data + program.data.len()).next_multiple_of(8);
            layout.push(ProgramLayout {
                slots,
                records,
                data,
            });
        }
        let len = end.next_multiple_of(4096);
        Placed {
            base,
            len,
            words_at,
            contexts_at,
            layout,
        }
    }
}

fn index(id: ProgramId) -> usize {
    usize_of(id.0)
}

fn usize_of(value: u32) -> usize {
    usize::try_from(value).expect("usize has at least 32 bits")
}

#[derive(Debug, Clone, Copy)]
struct ProgramLayout {
    slots: usize,
    records: usize,
    data: usize,
}

/// Where everything of a [`ProgramSet`] stands, given the arena's address in the tasks.
#[derive(Debug, Clone)]
pub struct Placed {
    base: u64,
    len: usize,
    words_at: usize,
    contexts_at: usize,
    layout: Vec<ProgramLayout>,
}

impl Placed {
    /// Size of the arena in bytes, a multiple of the page size.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: an arena holds at least the executor.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the arena in the tasks.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Address in the tasks of the byte at `offset` of the arena.
    pub fn address(&self, offset: usize) -> u64 {
        self.base + u64::try_from(offset).expect("arena offsets fit 64 bits")
    }

    /// Offset in the arena of a word.
    pub fn word_offset(&self, word: Word) -> usize {
        self.words_at + 4 * usize_of(word.0)
    }

    /// Offset in the arena of the word that counts parked programs.
    pub fn parked_offset(&self) -> usize {
        self.word_offset(PARKED)
    }

    /// Offset in the arena of the word that counts failed programs.
    pub fn failed_offset(&self) -> usize {
        self.word_offset(FAILED)
    }

    /// Offset in the arena of a program's context.
    pub fn context_offset(&self, id: ProgramId) -> usize {
        self.contexts_at + CONTEXT_SIZE * index(id)
    }

    /// Offset in the arena of a program's first record.
    pub fn records_offset(&self, id: ProgramId) -> usize {
        self.layout[index(id)].records
    }

    /// Offset in the arena of a program's data range.
    pub fn data_offset(&self, id: ProgramId, data: Data) -> usize {
        self.layout[index(id)].data + data.offset
    }

    /// Offset in the arena of a program's slot.
    pub fn slot_offset(&self, id: ProgramId, slot: Slot) -> usize {
        self.layout[index(id)].slots + 8 * usize::from(slot.0)
    }

    /// Hands out all bytes of the arena that are not zero, each part with its offset: executor, contexts, programs.
    pub fn load(&self, set: &ProgramSet, mut put: impl FnMut(usize, &[u8])) {
        put(0, arch::executor_code());
        let mut part = Vec::new();
        for (id, program) in set.programs() {
            part.clear();
            part.resize(CONTEXT_SIZE, 0);
            self.write_context(id, &mut part);
            put(self.context_offset(id), &part);
            part.clear();
            for step in &program.steps {
                part.extend_from_slice(&self.record(id, step).to_bytes());
            }
            self.add_data(id, program, &mut part);
            // The data follow the records.
            put(self.records_offset(id), &part);
        }
    }

    fn write_context(&self, id: ProgramId, out: &mut [u8]) {
        let slots = self.layout[index(id)].slots;
        put(out, context::SLOTS, self.address(slots));
        put(out, context::PARKED, self.address(self.parked_offset()));
        put(out, context::FAILED, self.address(self.failed_offset()));
    }

    fn add_data(&self, id: ProgramId, program: &Program, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&program.data);
        for &pointer in &program.pointers {
            let at = start + pointer;
            let raw: [u8; 8] = out[at..at + 8].try_into().expect("eight bytes");
            let data = self.address(self.layout[index(id)].data);
            put(out, at, data + u64::from_le_bytes(raw));
        }
    }

    fn record(&self, id: ProgramId, step: &Step) -> Record {
        let mut record = Record {
            op: step.op() as u8,
            rule: 0,
            indirect: 0,
            flags: 0,
            nr: 0,
            out: 0,
            args: [0; 6],
            expect: 0,
        };
        match step {
            Step::Call {
                nr,
                args,
                rule,
                out,
                flags,
            } => {
                record.nr = *nr;
                (record.rule, record.expect) = rule.encode();
                record.out = out.map_or(0, |slot| slot.0 + 1);
                record.flags = *flags;
                for (i, arg) in args.iter().enumerate() {
                    record.args[i] = self.value(id, *arg);
                    if matches!(arg, Arg::Slot(_) | Arg::Held(_)) {
                        record.indirect |= 1 << i;
                    }
                }
            }
            Step::Wait { word, value } => {
                record.args[0] = self.address(self.word_offset(*word));
                record.args[1] = u64::from(*value);
            }
            Step::Post { word } => record.args[0] = self.address(self.word_offset(*word)),
            Step::Fork {
                clone_args,
                child,
                rule,
            } => {
                (record.rule, record.expect) = rule.encode();
                record.args[0] = self.address(self.data_offset(id, *clone_args));
                record.args[1] = u64::try_from(clone_args.len()).expect("clone_args is small");
                record.args[2] = self.address(self.records_offset(*child));
                record.args[3] = self.address(self.context_offset(*child));
            }
            Step::Park => debug_assert_eq!(step.op(), Op::Park),
            Step::Segments { out } => {
                (record.rule, record.expect) = Rule::Any.encode();
                record.out = out.0 + 1;
            }
        }
        record
    }

    fn value(&self, id: ProgramId, arg: Arg) -> u64 {
        match arg {
            Arg::Imm(value) => value,
            Arg::Data(data) | Arg::Held(data) => self.address(self.data_offset(id, data)),
            Arg::Slot(slot) => self.address(self.slot_offset(id, slot)),
            Arg::Arena => self.base,
            Arg::Word(word) => self.address(self.word_offset(word)),
        }
    }

    /// Which record of which program stands at that address in the tasks.
    pub fn find_record(&self, set: &ProgramSet, address: u64) -> Option<(ProgramId, usize)> {
        let offset = usize::try_from(address.checked_sub(self.base)?).ok()?;
        set.programs().find_map(|(id, program)| {
            let first = self.records_offset(id);
            let nth = offset.checked_sub(first)? / RECORD_SIZE;
            (nth < program.len()).then_some((id, nth))
        })
    }
}

fn put(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
