//! 32-bit programs: C, compiled when they are run.

mod mixed;
mod segment;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{Need, Stage, Workload, sys};

pub static ALL: &[&Workload] = &[
    &REGISTERS,
    &THREADS,
    &SIGNALS,
    &SLEEPS,
    &MEMORY,
    &CALLS,
    &mixed::TREE,
    &mixed::BARE,
    &segment::SEGMENT,
];

/// A compiler and a libc for 32-bit programs, and a kernel that runs them.
const NEEDS: &[Need] = &[
    Need::Program("gcc"),
    Need::File("/usr/lib32/crt1.o"),
    Need::File("/proc/sys/abi/vsyscall32"),
];

static REGISTERS: Workload = Workload::new(
    "ia32/registers",
    "a 32-bit program with its state in registers",
    |stage| become_program(stage, "registers"),
)
.needs(NEEDS);
static THREADS: Workload = Workload::new(
    "ia32/threads",
    "32-bit threads in calls, with thread pointers and a robust mutex",
    |stage| become_program(stage, "threads"),
)
.needs(NEEDS)
.moves(&["syscall"]);
static SIGNALS: Workload = Workload::new(
    "ia32/signals",
    "pending signals and handlers of a 32-bit program, one in its frame",
    |stage| become_program(stage, "signals"),
)
.needs(NEEDS);
static SLEEPS: Workload = Workload::new(
    "ia32/sleeps",
    "32-bit threads that sleep, short and long",
    |stage| become_program(stage, "sleeps"),
)
.needs(NEEDS)
.moves(&["syscall"]);
static MEMORY: Workload = Workload::new(
    "ia32/memory",
    "a 32-bit address space up to its ends",
    |stage| become_program(stage, "memory"),
)
.needs(NEEDS);
static CALLS: Workload = Workload::new(
    "ia32/calls",
    "a call by an instruction of the 32-bit program itself",
    |stage| become_program(stage, "calls"),
)
.needs(NEEDS);

/// Compiles the 32-bit program. The one test with code that uses all registers has a fixed address.
fn compile(stage: &Stage, test: &str) -> Result<PathBuf> {
    let (source, program) = (stage.path("program.c"), stage.path("program"));
    std::fs::write(&source, include_str!("program.c"))?;
    let place: &[&str] = match test {
        "registers" => &["-fno-pie", "-no-pie"],
        _ => &["-fPIE", "-pie"],
    };
    let status = Command::new("gcc")
        .args(["-m32", "-O1", "-pthread", "-o"])
        .arg(&program)
        .args(place)
        .arg(&source)
        .status()
        .context("running gcc")?;
    ensure!(status.success(), "gcc: {status}");
    Ok(program)
}

/// Goes on as the 32-bit program, which speaks the runner's protocol itself.
fn become_program(stage: &Stage, test: &str) -> Result<()> {
    let program = compile(stage, test)?;
    bail!("{}", run(&program, test, stage.dir()))
}

/// Executes the 32-bit program; returns only why it can't.
fn run(program: &Path, test: &str, dir: &Path) -> String {
    let error = sys::exec(program, &[test, &dir.to_string_lossy()]);
    format!("the 32-bit program cannot be run: {error}")
}
