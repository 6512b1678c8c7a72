//! Mappings at odd places and with odd flags.

use anyhow::{Result, ensure};

use crate::sys::{PAGE, RW, Region};
use crate::{Stage, Workload, proc};

pub static NO_RESERVE: Workload = Workload::new(
    "memory/no-reserve",
    "mappings with and without MAP_NORESERVE",
    no_reserve,
);
pub static EDGES: Workload = Workload::new(
    "memory/edges",
    "low, high and adjacent mappings that must not merge",
    edges,
);

const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

fn no_reserve(stage: &Stage) -> Result<()> {
    let counted = Region::anon(16 * PAGE)?;
    let uncounted = Region::map(None, 16 * PAGE, RW, ANON | libc::MAP_NORESERVE, None, 0)?;
    counted.part(0, PAGE).fill(1);
    uncounted.part(0, PAGE).fill(2);
    stage.ready_and_wait()?;
    ensure!(
        !proc::details_at(counted.addr)?.has_flag("nr"),
        "MAP_NORESERVE has come"
    );
    ensure!(
        proc::details_at(uncounted.addr)?.has_flag("nr"),
        "MAP_NORESERVE is lost"
    );
    counted.part(0, PAGE).check(1)?;
    uncounted.part(0, PAGE).check(2)
}

/// The lowest place a task may map, the highest, and neighbours that differ only in a flag.
fn edges(stage: &Stage) -> Result<()> {
    const LOW: usize = 0x10000;
    const HIGH: usize = 0x7fff_ffff_f000 - PAGE;
    let low = Region::map(Some(LOW), 4 * PAGE, RW, ANON, None, 0)?;
    let high = Region::map(Some(HIGH), PAGE, RW, ANON, None, 0)?;
    let room = Region::anon(8 * PAGE)?;
    room.unmap()?;
    let first = Region::map(Some(room.addr), 4 * PAGE, RW, ANON, None, 0)?;
    let flags = ANON | libc::MAP_NORESERVE;
    let second = Region::map(Some(first.end()), 4 * PAGE, RW, flags, None, 0)?;
    for (seed, region) in (1..).zip([low, high, first, second]) {
        region.fill(seed);
    }
    stage.ready_and_wait()?;
    for (seed, region) in (1..).zip([low, high, first, second]) {
        region.check(seed)?;
    }
    let end = proc::vma_at(first.addr)?.map(|vma| vma.end);
    ensure!(end == Some(second.addr), "neighbours have become one VMA");
    Ok(())
}
