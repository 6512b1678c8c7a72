//! Syscall programs: what runs inside a task is data.
//!
//! A [`Program`] is a list of records. One tiny position-independent executor ([`crate::arch`]) walks
//! them inside the task: it makes each call, compares the result with the record's [`Rule`], and stops
//! at the first surprise with the record and the errno left where the coordinator can see them. There
//! are no branches and no loops: whatever depends on a value is decided before, while the program is
//! built.
//!
//! Programs are built with symbolic arguments (an immediate, bytes of the program's own data, the
//! result of an earlier call) and refer to each other and to words by number. A [`ProgramSet`] holds
//! all programs that share one arena; placing it at an address gives the bytes of the arena:
//!
//! ```text
//! +-----------+-------+----------+---------------------------------------------+
//! | executor  | words | contexts | per program: slots, records, data            |
//! | one page  | 4 B   | 64 B     |                                             |
//! +-----------+-------+----------+---------------------------------------------+
//! ```
//!
//! Only the first page is executable, only the rest is writable. The coordinator sees the same memory
//! through a shared mapping, so answers, progress and failures need no ptrace while a program runs.

mod arena;
mod build;
mod print;
mod record;
mod set;

pub use arena::{Arena, ArenaError, ProgramFailure, WaitOutcome};
pub use build::{Arg, CloneSpec, Data, Program, ProgramId, Slot, Word};
pub use record::{CONTEXT_SIZE, FLAG_IA32, FLAG_RETRY, Op, RECORD_SIZE, Record, Rule, context};
pub use set::{Placed, ProgramSet};
