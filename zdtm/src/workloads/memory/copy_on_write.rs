//! Pages that a parent and its children share until one writes.
//!
//! Whether they are still shared shows in the page frame numbers of /proc/PID/pagemap: two mappings
//! share a page when both have the same frame.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Need, Stage, Workload};

pub static READ_ONLY: Workload = Workload::new(
    "memory/cow",
    "8 MiB that a child has never written",
    untouched,
)
.needs(&[Need::Root]);
pub static CHAIN: Workload = Workload::new(
    "memory/cow-chain",
    "three generations and two siblings share pages",
    chain,
)
.needs(&[Need::Root]);
pub static PARTLY: Workload = Workload::new(
    "memory/cow-partly",
    "some pages written by the parent, some by the child, some moved",
    partly,
)
.needs(&[Need::Root]);

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Reads the frame of every page of a region in some process; 0 for pages that are not there.
fn frames(pid: i32, region: Region) -> Result<Vec<u64>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut bytes = vec![0; region.len / PAGE * 8];
    pagemap.read_exact_at(&mut bytes, (region.addr / PAGE * 8) as u64)?;
    let mut frames = Vec::new();
    for word in bytes.chunks_exact(8) {
        let word = u64::from_ne_bytes(word.try_into()?);
        frames.push(if word & PRESENT == 0 { 0 } else { word & FRAME });
    }
    Ok(frames)
}

/// Counts the pages of which two processes have the same frame.
fn nr_shared(one: i32, other: i32, region: Region) -> Result<usize> {
    let (one, other) = (frames(one, region)?, frames(other, region)?);
    ensure!(
        one.iter().any(|&frame| frame != 0),
        "page frames cannot be seen here"
    );
    Ok(one
        .iter()
        .zip(&other)
        .filter(|(one, other)| one == other && **one != 0)
        .count())
}

/// Touches every page by reading, so that both have it mapped.
fn check(stage: &Stage, region: Region, seed: u64) -> Result<()> {
    stage.ready_and_wait()?;
    region.check(seed)
}

fn untouched(stage: &Stage) -> Result<()> {
    let region = Region::anon(8 << 20)?;
    region.fill(1);
    let child = stage.child(|stage| check(stage, region, 1))?;
    let before = nr_shared(sys::pid(), child.pid, region)?;
    stage.ready_and_wait()?;
    let after = nr_shared(sys::pid(), child.pid, region)?;
    ensure!(
        after == before,
        "{before} pages were shared with the child, {after} are"
    );
    region.check(1)?;
    region.part(0, PAGE).fill(2);
    child.finish().context("the child sees the parent's write")
}

fn chain(stage: &Stage) -> Result<()> {
    let region = Region::anon(256 * PAGE)?;
    region.fill(3);
    let sibling = stage.child(|stage| check(stage, region, 3))?;
    let child = stage.child(|stage| {
        let grandchild = stage.child(|stage| check(stage, region, 3))?;
        let own = sys::pid();
        let before = nr_shared(own, grandchild.pid, region)?;
        stage.ready_and_wait()?;
        let after = nr_shared(own, grandchild.pid, region)?;
        ensure!(
            after == before,
            "{before} pages were shared with the grandchild, {after} are"
        );
        grandchild.finish()?;
        region.check(3)
    })?;
    let pids = [sibling.pid, child.pid];
    let count = || {
        let with_both = pids.map(|pid| nr_shared(sys::pid(), pid, region));
        Ok::<_, anyhow::Error>((
            nr_shared(pids[0], pids[1], region)?,
            with_both.into_iter().collect::<Result<Vec<_>>>()?,
        ))
    };
    let before = count()?;
    stage.ready_and_wait()?;
    let after = count()?;
    ensure!(
        after == before,
        "shared between siblings and with the parent: {before:?}, now {after:?}"
    );
    sibling.finish()?;
    child.finish()
}

/// Who has written has pages of its own; contents and counts must both be right.
fn partly(stage: &Stage) -> Result<()> {
    let region = Region::anon(64 * PAGE)?;
    let protected = Region::anon(16 * PAGE)?;
    region.fill(4);
    protected.fill(5);
    let child = stage.child(|stage| {
        region.part(0, 8 * PAGE).fill(6);
        region.part(48 * PAGE, 8 * PAGE).unmap()?;
        protected.protect(libc::PROT_READ)?;
        stage.ready_and_wait()?;
        region.part(0, 8 * PAGE).check(6)?;
        let pattern = |page: usize| sys::Pattern::new(4).page(page).to_vec();
        for page in (8..48).chain(56..64) {
            ensure!(
                region.get(page * PAGE, PAGE) == pattern(page),
                "page {page} has changed"
            );
        }
        protected.check(5)
    })?;
    region.part(8 * PAGE, 8 * PAGE).fill(7);
    let count = || {
        Ok::<_, anyhow::Error>((
            nr_shared(sys::pid(), child.pid, region)?,
            nr_shared(sys::pid(), child.pid, protected)?,
        ))
    };
    let before = count()?;
    stage.ready_and_wait()?;
    let after = count()?;
    ensure!(
        after == before,
        "shared pages were {before:?}, are {after:?}"
    );
    region.part(8 * PAGE, 8 * PAGE).check(7)?;
    ensure!(
        region.get(0, PAGE) == sys::Pattern::new(4).page(0),
        "page 0 has changed"
    );
    protected.check(5)?;
    child.finish()
}
