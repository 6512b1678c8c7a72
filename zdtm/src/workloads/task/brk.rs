//! The heap that `brk` makes.

use anyhow::{Result, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Stage, Workload, proc};

pub static BRK: Workload =
    Workload::new("task/brk", "a heap that grows and shrinks afterwards", brk);

/// The child makes no allocation between the calls that move the break, since malloc uses it too.
fn brk(stage: &Stage) -> Result<()> {
    let start = sys::brk(0).next_multiple_of(PAGE);
    let end = start + 64 * PAGE;
    ensure!(sys::brk(end) == end, "the break cannot be moved");
    let heap = Region {
        addr: start,
        len: 64 * PAGE,
    };
    heap.part(0, 32 * PAGE).fill(1);
    stage.ready_and_wait()?;
    let now = sys::brk(0);
    ensure!(now == end, "the break was {end:#x}, is {now:#x}");
    heap.part(0, 32 * PAGE).check(1)?;
    heap.part(32 * PAGE, 32 * PAGE).check_zero()?;

    let grown = end + 32 * PAGE;
    ensure!(
        sys::brk(grown) == grown,
        "the break cannot be moved up any more"
    );
    let new = Region {
        addr: end,
        len: 32 * PAGE,
    };
    new.check_zero()?;
    new.fill(2);
    let vmas = proc::maps("self")?
        .into_iter()
        .filter(|vma| vma.path == "[heap]")
        .count();
    ensure!(vmas == 1, "the grown heap is {vmas} VMAs");

    ensure!(
        sys::brk(end) == end,
        "the break cannot be moved down any more"
    );
    ensure!(
        proc::vma_at(end)?.is_none(),
        "what was given back is still mapped"
    );
    heap.part(0, 32 * PAGE).check(1)
}
