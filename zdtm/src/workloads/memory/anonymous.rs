//! Private anonymous memory.

use anyhow::{Context, Result, ensure};

use crate::sys::{PAGE, RW, Region};
use crate::{Stage, Workload, proc};

pub static PATTERNS: Workload = Workload::new(
    "memory/anonymous",
    "private anonymous mappings of many sizes",
    patterns,
);
pub static PROTECTIONS: Workload = Workload::new(
    "memory/protections",
    "every protection, PROT_NONE with data under it",
    protections,
);
pub static SPARSE: Workload = Workload::new(
    "memory/sparse",
    "a large mapping with a page here and there",
    sparse,
);
pub static MANY: Workload = Workload::new("memory/many-vmas", "two thousand small VMAs", many);
pub static MOST: Workload = Workload::new(
    "memory/most-vmas",
    "nearly as many VMAs as a process may have",
    |stage| alternating(stage, most_vmas()? - SPARE_VMAS),
)
.heavy();
pub static LARGE: Workload = Workload::new("memory/large", "64 MiB of distinct pages", large);
pub static ZERO_PAGES: Workload = Workload::new(
    "memory/zero-pages",
    "pages only read, and pages written with zeros",
    zero_pages,
);

fn patterns(stage: &Stage) -> Result<()> {
    let regions = [1, 2, 3, 16, 511, 512, 513]
        .map(|pages| Region::anon(pages * PAGE))
        .into_iter()
        .collect::<Result<Vec<Region>, _>>()?;
    for (seed, region) in (1..).zip(&regions) {
        region.fill(seed);
    }
    stage.ready_and_wait()?;
    for (seed, region) in (1..).zip(&regions) {
        region
            .check(seed)
            .with_context(|| format!("region {seed}"))?;
        region.fill(seed + 100);
        region.check(seed + 100).context("after writing again")?;
    }
    Ok(())
}

fn protections(stage: &Stage) -> Result<()> {
    const ALL: [(i32, &str); 5] = [
        (libc::PROT_NONE, "---p"),
        (libc::PROT_READ, "r--p"),
        (RW, "rw-p"),
        (libc::PROT_READ | libc::PROT_EXEC, "r-xp"),
        (RW | libc::PROT_EXEC, "rwxp"),
    ];
    let mut regions = Vec::new();
    for (seed, (prot, perms)) in (1..).zip(ALL) {
        let region = Region::anon(8 * PAGE)?;
        region.part(0, 4 * PAGE).fill(seed);
        region.protect(prot)?;
        regions.push((seed, region, perms));
    }
    let untouched = Region::anon(4 * PAGE)?;
    untouched.protect(libc::PROT_NONE)?;
    stage.ready_and_wait()?;
    for (seed, region, perms) in regions {
        let found = proc::vma_at(region.addr)?
            .map(|vma| vma.perms)
            .unwrap_or_default();
        ensure!(found == perms, "region {seed} was {perms}, is {found}");
        region.protect(libc::PROT_READ)?;
        region
            .part(0, 4 * PAGE)
            .check(seed)
            .with_context(|| format!("region {perms}"))?;
        region.part(4 * PAGE, 4 * PAGE).check_zero()?;
    }
    untouched.protect(RW)?;
    untouched.check_zero().context("never touched")
}

fn sparse(stage: &Stage) -> Result<()> {
    const LEN: usize = 1 << 30;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let region = Region::map(None, LEN, RW, flags, None, 0)?;
    let touched: Vec<usize> = (0..200).map(|n| n * n * 6 * PAGE % LEN).collect();
    for &offset in &touched {
        region.part(offset, PAGE).fill(offset as u64);
    }
    let resident = proc::details_at(region.addr)?.bytes("Rss");
    stage.ready_and_wait()?;
    let now = proc::details_at(region.addr)?.bytes("Rss");
    ensure!(
        now <= resident,
        "{resident} bytes were resident, {now} are: untouched pages came in"
    );
    for &offset in &touched {
        region.part(offset, PAGE).check(offset as u64)?;
        let next = (offset + PAGE) % LEN;
        if !touched.contains(&next) {
            region.part(next, PAGE).check_zero()?;
        }
    }
    Ok(())
}

/// What a restored process needs for itself, and the engine in it.
const SPARE_VMAS: usize = 500;

fn most_vmas() -> Result<usize> {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count")?;
    Ok(most.trim().parse()?)
}

fn many(stage: &Stage) -> Result<()> {
    alternating(stage, 4000)
}

/// So many VMAs of one page each, every other read-only.
fn alternating(stage: &Stage, wanted: usize) -> Result<()> {
    let region = Region::anon(wanted * PAGE)?;
    for (index, page) in region.pages().enumerate() {
        page.put(0, &index.to_le_bytes());
        if index % 2 == 1 {
            page.protect(libc::PROT_READ)?;
        }
    }
    stage.ready_and_wait()?;
    for (index, page) in region.pages().enumerate() {
        ensure!(
            page.get(0, 8) == index.to_le_bytes(),
            "page {index} has other contents"
        );
        if index % 2 == 0 {
            page.put(8, &[1]);
        }
    }
    let inside = |vma: &proc::Vma| (region.addr..region.end()).contains(&vma.start);
    let count = proc::maps("self")?.iter().filter(|vma| inside(vma)).count();
    ensure!(count + 1 >= wanted, "{wanted} VMAs have become {count}");
    Ok(())
}

/// Much memory is filled in other ways than little.
fn large(stage: &Stage) -> Result<()> {
    let whole = Region::anon(48 << 20)?;
    let (sparse, constant) = (Region::anon(24 << 20)?, Region::anon(4 << 20)?);
    whole.fill(7);
    constant.fill(9);
    constant.protect(libc::PROT_READ)?;
    for page in sparse.pages().step_by(3) {
        page.fill(8);
    }
    stage.ready_and_wait()?;
    whole.check(7)?;
    constant.check(9)?;
    for (index, page) in sparse.pages().enumerate() {
        match index % 3 {
            0 => page.check(8)?,
            _ => page.check_zero()?,
        }
    }
    for region in [whole, sparse] {
        region.fill(3);
        region.check(3)?;
    }
    Ok(())
}

/// A page that was only read is the kernel's zero page; one written with zeros is memory.
fn zero_pages(stage: &Stage) -> Result<()> {
    let (read, written) = (Region::anon(64 * PAGE)?, Region::anon(64 * PAGE)?);
    read.check_zero()?;
    written.put(0, &vec![0; 64 * PAGE]);
    let resident = proc::details_at(read.addr)?.bytes("Rss");
    stage.ready_and_wait()?;
    let now = proc::details_at(read.addr)?.bytes("Rss");
    ensure!(
        now <= resident,
        "pages that were only read have become memory: {now} bytes"
    );
    read.check_zero()?;
    written.check_zero()?;
    for region in [read, written] {
        region.fill(3);
        region.check(3)?;
    }
    Ok(())
}
