//! Programs in words: what `--plan` prints and what failures quote.

use std::fmt::{self, Write};

use super::build::{Arg, Program, Step};
use super::record::{FLAG_IA32, Rule};
use super::set::ProgramSet;
use crate::arch;

impl Program {
    /// What record number `nth` is for.
    pub fn why(&self, nth: usize) -> &str {
        self.whys.get(nth).map_or("unknown record", |why| why)
    }

    /// Record number `nth` as one line: the call with its arguments, or what else it does.
    pub fn describe(&self, nth: usize) -> String {
        let mut out = String::new();
        if let Some(step) = self.steps.get(nth) {
            // Writing to a String does not fail.
            let _ = describe(&mut out, step);
        }
        out
    }
}

fn describe(out: &mut String, step: &Step) -> fmt::Result {
    match step {
        Step::Call {
            nr,
            args,
            rule,
            out: slot,
            flags,
        } => {
            if let Some(slot) = slot {
                write!(out, "s{} = ", slot.0)?;
            }
            match flags & FLAG_IA32 {
                0 => write!(out, "{}(", arch::syscall_name(*nr))?,
                _ => write!(out, "ia32 {}(", arch::ia32_syscall_name(*nr))?,
            }
            let used = 6 - args
                .iter()
                .rev()
                .take_while(|arg| **arg == Arg::Imm(0))
                .count();
            for (i, arg) in args[..used].iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                argument(out, *arg)?;
            }
            out.push(')');
            match rule {
                Rule::Ok => Ok(()),
                Rule::Exact(value) if *value > 0xffff => write!(out, " == {value:#x}"),
                Rule::Exact(value) => write!(out, " == {value}"),
                Rule::Any => write!(out, " or any error"),
                Rule::OkOr(errno) => write!(out, " or errno {errno}"),
            }
        }
        Step::Wait { word, value } => write!(out, "wait w{} >= {value}", word.0),
        Step::Post { word } => write!(out, "post w{}", word.0),
        Step::Fork {
            child,
            rule: Rule::Exact(tid),
            ..
        } => {
            write!(out, "fork program {} as {tid}", child.0)
        }
        Step::Fork { child, .. } => write!(out, "fork program {}", child.0),
        Step::Park => write!(out, "park"),
        Step::Segments { out: slot } => write!(out, "s{} = segments", slot.0),
    }
}

fn argument(out: &mut String, arg: Arg) -> fmt::Result {
    match arg {
        Arg::Imm(value) if value.cast_signed() < 0 && value.cast_signed() > -4096 => {
            write!(out, "{}", value.cast_signed())
        }
        Arg::Imm(value) if value > 0xffff => write!(out, "{value:#x}"),
        Arg::Imm(value) => write!(out, "{value}"),
        Arg::Data(data) => write!(out, "data+{:#x}", data.offset),
        Arg::Held(data) => write!(out, "*data+{:#x}", data.offset),
        Arg::Slot(slot) => write!(out, "s{}", slot.0),
        Arg::Arena => write!(out, "arena"),
        Arg::Word(word) => write!(out, "w{}", word.0),
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} records, {} data bytes",
            self.name,
            self.len(),
            self.data.len()
        )?;
        for nth in 0..self.len() {
            writeln!(
                f,
                "  {nth:>4}  {:<60}  # {}",
                self.describe(nth),
                self.why(nth)
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for ProgramSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, program) in self.programs() {
            write!(f, "program {}: {program}", id.0)?;
        }
        Ok(())
    }
}
