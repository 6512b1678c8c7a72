//! Modes of a whole address space: merging of equal pages, and huge pages for those who ask.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Need, Stage, Workload, proc};

pub static MERGED: Workload = Workload::new(
    "memory/merge-any",
    "a child all of whose equal pages are merged, but for one mapping",
    merged,
)
.needs(&[Need::File("/sys/kernel/mm/ksm")]);
pub static HUGE_IF_ADVISED: Workload = Workload::new(
    "memory/huge-if-advised",
    "children without huge pages, and with none but those that are advised",
    huge_if_advised,
);
pub static NAMED: Workload = Workload::new(
    "memory/named",
    "mappings with names that the program has given them",
    named,
)
.needs(&[Need::VmaNames]);

const PR_SET_THP_DISABLE: i64 = 41;
const PR_GET_THP_DISABLE: i64 = 42;
const PR_SET_MEMORY_MERGE: i64 = 67;
const PR_GET_MEMORY_MERGE: i64 = 68;

fn get(option: i64) -> Result<u64> {
    Ok(sys::prctl_with(option, [0; 3])?)
}

/// Whether a mapping is one whose pages are merged.
fn is_merged(region: Region) -> Result<bool> {
    Ok(proc::details_at(region.addr)?.has_flag("mg"))
}

fn merged(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        let (kept, freed) = (Region::anon(4 * PAGE)?, Region::anon(4 * PAGE)?);
        kept.fill(1);
        freed.fill(1);
        sys::prctl_with(PR_SET_MEMORY_MERGE, [1, 0, 0]).context("PR_SET_MEMORY_MERGE")?;
        freed.advise(libc::MADV_UNMERGEABLE)?;
        stage.ready_and_wait()?;
        ensure!(get(PR_GET_MEMORY_MERGE)? == 1, "the mode is lost");
        ensure!(is_merged(kept)?, "a mapping is not merged any more");
        ensure!(!is_merged(freed)?, "a mapping is merged that was not");
        ensure!(is_merged(Region::anon(PAGE)?)?, "new memory is not merged");
        kept.check(1)?;
        freed.check(1)
    })?;
    let own = Region::anon(4 * PAGE)?;
    stage.ready_and_wait()?;
    ensure!(get(PR_GET_MEMORY_MERGE)? == 0, "the parent has it, too");
    ensure!(!is_merged(own)?, "the parent's memory is merged");
    child.finish()
}

fn huge_if_advised(stage: &Stage) -> Result<()> {
    // Linux 6.18 knows the exception.
    let modes = [(1, 0), (1, 2)].into_iter().filter(|(disable, flags)| {
        let known = sys::prctl_with(PR_SET_THP_DISABLE, [*disable, *flags, 0]).is_ok();
        let _ = sys::prctl_with(PR_SET_THP_DISABLE, [0; 3]);
        known
    });
    let children = modes
        .map(|(disable, flags)| {
            stage.child(move |stage| {
                sys::prctl_with(PR_SET_THP_DISABLE, [disable, flags, 0])?;
                let was = get(PR_GET_THP_DISABLE)?;
                stage.ready_and_wait()?;
                let is = get(PR_GET_THP_DISABLE)?;
                ensure!(was == is, "the mode was {was}, is {is}");
                Ok(())
            })
        })
        .collect::<Result<Vec<_>>>()?;
    stage.ready_and_wait()?;
    ensure!(get(PR_GET_THP_DISABLE)? == 0, "the parent has a mode, too");
    children.into_iter().try_for_each(crate::Child::finish)
}

fn named(stage: &Stage) -> Result<()> {
    let region = Region::anon(4 * PAGE)?;
    sys::name_memory(region, c"a name")?;
    let shown = || {
        let maps = fs::read_to_string("/proc/self/maps")?;
        Ok::<_, anyhow::Error>(maps.contains("[anon:a name]"))
    };
    ensure!(shown()?, "the name does not show");
    stage.ready_and_wait()?;
    ensure!(shown()?, "the name is lost");
    Ok(())
}
