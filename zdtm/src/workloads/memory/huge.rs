//! Huge pages, transparent and reserved.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, RW, Region};
use crate::{Need, Stage, Workload, proc};

const HUGE: usize = 2 << 20;

pub static TRANSPARENT: Workload = Workload::new(
    "memory/huge-transparent",
    "memory advised for huge pages",
    transparent,
);
pub static PRIVATE: Workload = Workload::new(
    "memory/hugetlb-private",
    "a private mapping of reserved huge pages",
    private,
)
.needs(&[Need::HugePages(4)]);
pub static SHARED: Workload = Workload::new(
    "memory/hugetlb-shared",
    "shared huge pages of a parent and a child",
    shared,
)
.needs(&[Need::HugePages(4)]);
pub static MEMFD: Workload =
    Workload::new("memory/hugetlb-memfd", "a memory file of huge pages", memfd)
        .needs(&[Need::HugePages(4)]);

fn transparent(stage: &Stage) -> Result<()> {
    let room = Region::anon(10 * HUGE)?;
    let aligned = room.addr.next_multiple_of(HUGE) - room.addr;
    let region = room.part(aligned, 8 * HUGE);
    region.advise(libc::MADV_HUGEPAGE)?;
    let part = region.part(0, 6 * HUGE);
    part.fill(1);
    stage.ready_and_wait()?;
    part.check(1)?;
    ensure!(
        proc::details_at(region.addr)?.has_flag("hg"),
        "the advice is lost"
    );
    region.part(6 * HUGE, 2 * HUGE).check_zero()
}

/// Some pages of it written, one left alone.
fn map(flags: i32) -> Result<Region> {
    let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let region = Region::map(None, 3 * HUGE, RW, flags, None, 0).context("mapping huge pages")?;
    region.part(0, HUGE).fill(2);
    region.part(2 * HUGE, HUGE).fill(3);
    Ok(region)
}

fn check(region: Region) -> Result<()> {
    region.part(0, HUGE).check(2)?;
    region.part(2 * HUGE, HUGE).check(3)?;
    let details = proc::details_at(region.addr)?;
    let size = details.bytes("KernelPageSize");
    ensure!(size == HUGE as u64, "the pages have {size} bytes now");
    ensure!(details.has_flag("ht"), "these are no huge pages any more");
    Ok(())
}

fn private(stage: &Stage) -> Result<()> {
    let region = map(libc::MAP_PRIVATE)?;
    stage.ready_and_wait()?;
    check(region)?;
    region.part(HUGE, sys::PAGE).check_zero()
}

fn shared(stage: &Stage) -> Result<()> {
    let region = map(libc::MAP_SHARED)?;
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        check(region)?;
        region.put(HUGE, b"from the child");
        Ok(())
    })?;
    stage.ready_and_wait()?;
    check(region)?;
    child.finish()?;
    ensure!(
        region.get(HUGE, 8) == b"from the",
        "the child's memory is another"
    );
    Ok(())
}

fn memfd(stage: &Stage) -> Result<()> {
    let file = File::from(sys::memfd(c"huge", libc::MFD_HUGETLB).context("making the file")?);
    file.set_len(2 * HUGE as u64)?;
    let region = Region::file(file.as_fd(), 2 * HUGE, RW, libc::MAP_SHARED)?;
    region.part(0, HUGE).fill(4);
    stage.ready_and_wait()?;
    region.part(0, HUGE).check(4)?;
    let again = Region::file(file.as_fd(), 2 * HUGE, RW, libc::MAP_SHARED)?;
    again.part(0, HUGE).check(4).context("mapped once more")?;
    let size = proc::details_at(region.addr)?.bytes("KernelPageSize");
    ensure!(size == HUGE as u64, "the pages have {size} bytes now");
    Ok(())
}
