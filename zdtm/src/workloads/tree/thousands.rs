//! Trees of many tasks. Nearly all are of a program of a few bytes, so that the tree is large and its memory is not.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::super::odd::write_program;
use crate::{Child, Stage, Workload, sys};

pub static TREE: Workload = Workload::new(
    "tree/thousands",
    "five thousand tasks: fifty with ninety-nine small programs each",
    tree,
)
.heavy();
pub static CROWD: Workload = Workload::new(
    "tree/crowd",
    "more tasks than the engine may have descriptors",
    |stage| {
        let limit = u64::try_from(DESCRIPTORS)?;
        sys::set_limit(libc::RLIMIT_NOFILE, limit, limit)?;
        let program = stage.path("pause");
        write_program(&program, &PAUSE)?;
        parent(stage, &program, 2 * DESCRIPTORS)
    },
)
.descriptor_limit(DESCRIPTORS);

const DESCRIPTORS: usize = 100;
const PARENTS: usize = 50;
const CHILDREN: usize = 99;
/// `mov $34, %eax; syscall; jmp` to the start: waits in pause(2) for ever.
const PAUSE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

fn tree(stage: &Stage) -> Result<()> {
    let program = stage.path("pause");
    write_program(&program, &PAUSE)?;
    let parents = (0..PARENTS)
        .map(|_| stage.child(|stage| parent(stage, &program, CHILDREN)))
        .collect::<Result<Vec<Child>>>()?;
    stage.ready_and_wait()?;
    parents.into_iter().try_for_each(Child::finish)
}

fn parent(stage: &Stage, program: &Path, nr_children: usize) -> Result<()> {
    let children = (0..nr_children)
        .map(|_| child(program))
        .collect::<Result<Vec<i32>>>()?;
    stage.ready_and_wait()?;
    for pid in children {
        sys::kill(pid, libc::SIGTERM).with_context(|| format!("ending task {pid}"))?;
        let exit = sys::wait(pid).with_context(|| format!("waiting for task {pid}"))?;
        ensure!(
            exit == sys::Exit::Signal(libc::SIGTERM),
            "task {pid}: {exit}"
        );
    }
    Ok(())
}

fn child(program: &Path) -> Result<i32> {
    let child = Command::new(program)
        .stdin(Stdio::null())
        .spawn()
        .context("starting a small program")?;
    Ok(i32::try_from(child.id())?)
}
