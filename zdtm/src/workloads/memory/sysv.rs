//! System V shared memory. The runner gives each case an ipc namespace, which the tasks share with whoever
//! dumps them, so keys and ids are free and nothing is left behind.

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, RW, Region};
use crate::{Need, Stage, Workload, proc};

pub static SEGMENTS: Workload = Workload::new(
    "memory/sysv",
    "segments with a key, an owner, a mode; one without a key and removed; attached by two tasks",
    segments,
);
pub static PARTS: Workload = Workload::new(
    "memory/sysv-parts",
    "a segment attached twice, with a protection of its own in the middle",
    parts,
);
pub static HUGE: Workload =
    Workload::new("memory/sysv-huge", "a segment of reserved huge pages", huge)
        .needs(&[Need::HugePages(2), Need::Root]);
pub static OUTSIDE: Workload = Workload::new(
    "refusals/sysv-outside",
    "a segment that a process outside the tree has attached",
    outside,
)
.refused(&["System V segment", "outside the tree"]);
pub static DETACHED_PART: Workload = Workload::new(
    "refusals/sysv-part",
    "a segment of which only a part is still mapped",
    |stage| {
        let id = sys::segment(libc::IPC_PRIVATE, 4 * PAGE, libc::IPC_CREAT | 0o600)?;
        let region = sys::attach(id, 0)?;
        sys::remove_segment(id)?;
        region.part(PAGE, PAGE).unmap()?;
        stage.ready_and_wait()
    },
)
.refused(&["System V segment", "part"]);

const KEY: i32 = 0x4649_524e;
const NEW: i32 = libc::IPC_CREAT | libc::IPC_EXCL;

fn segments(stage: &Stage) -> Result<()> {
    let named = sys::segment(KEY, 5 * PAGE + 100, NEW | 0o640).context("a segment with a key")?;
    sys::own_segment(named, 1, 2)?;
    let private = sys::segment(libc::IPC_PRIVATE, 3 * PAGE, NEW | 0o600)?;
    let (first, second) = (sys::attach(named, 0)?, sys::attach(private, 0)?);
    sys::remove_segment(private)?;
    first.part(0, 4 * PAGE).fill(1);
    second.fill(2);
    let child = stage.child(|stage| {
        let again = sys::attach(named, libc::SHM_RDONLY)?;
        sys::detach(first)?;
        stage.ready_and_wait()?;
        again.part(0, 4 * PAGE).check(1).context("read-only")?;
        again.part(4 * PAGE, 2 * PAGE).check_zero()?;
        let denied = again.protect(RW).map_err(|error| error.raw_os_error());
        ensure!(
            denied == Err(Some(libc::EACCES)),
            "read-only and may be written: {denied:?}"
        );
        second.check(2).context("inherited")?;
        second.put(PAGE, b"from the child");
        Ok(())
    })?;
    let before = (sys::segment_state(named)?, sys::segment_state(private)?);
    ensure!(
        before.0.attached == 2 && before.1.attached == 2,
        "{before:?}"
    );
    stage.ready_and_wait()?;
    let after = (sys::segment_state(named)?, sys::segment_state(private)?);
    ensure!(before == after, "{before:?} have become {after:?}");
    first.part(0, 4 * PAGE).check(1)?;
    child.finish()?;
    ensure!(
        second.get(PAGE, 14) == b"from the child",
        "the child's segment is another"
    );
    let found = sys::segment(KEY, 0, 0).context("finding the key")?;
    ensure!(found == named, "the key leads to {found}, not {named}");
    let third = sys::attach(named, 0)?;
    third.put(5 * PAGE, b"all of it");
    ensure!(first.get(5 * PAGE, 9) == b"all of it", "the end is missing");
    for region in [first, second, third] {
        sys::detach(region)?;
    }
    ensure!(
        sys::segment_state(private).is_err(),
        "the removed segment has outlived its last user"
    );
    ensure!(sys::segment_state(named)?.attached == 0, "still attached");
    Ok(sys::remove_segment(named)?)
}

fn parts(stage: &Stage) -> Result<()> {
    let id = sys::segment(libc::IPC_PRIVATE, 8 * PAGE, NEW | 0o600)?;
    let (one, two) = (sys::attach(id, 0)?, sys::attach(id, 0)?);
    sys::remove_segment(id)?;
    one.fill(3);
    two.part(2 * PAGE, 3 * PAGE).protect(libc::PROT_READ)?;
    two.part(6 * PAGE, PAGE).protect(libc::PROT_NONE)?;
    let before = sys::segment_state(id)?;
    stage.ready_and_wait()?;
    let after = sys::segment_state(id)?;
    ensure!(before == after, "{before:?} has become {after:?}");
    one.check(3)?;
    one.put(2 * PAGE, b"seen");
    ensure!(two.get(2 * PAGE, 4) == b"seen", "two segments now");
    let perms = |region: Region| {
        let vma = proc::vma_at(region.addr)?.context("unmapped")?;
        Ok::<_, anyhow::Error>((vma.perms, vma.end))
    };
    let (middle, hidden) = (two.part(2 * PAGE, 3 * PAGE), two.part(6 * PAGE, PAGE));
    ensure!(perms(middle)? == ("r--s".to_owned(), middle.end()));
    ensure!(perms(hidden)? == ("---s".to_owned(), hidden.end()));
    hidden.protect(RW)?;
    hidden.put(0, b"back");
    Ok(())
}

fn huge(stage: &Stage) -> Result<()> {
    const SIZE: usize = 2 << 20;
    let flags = NEW | libc::SHM_HUGETLB | 0o600;
    let id = sys::segment(libc::IPC_PRIVATE, 2 * SIZE, flags).context("huge pages")?;
    let region = sys::attach(id, 0)?;
    sys::remove_segment(id)?;
    region.part(0, SIZE).fill(4);
    let before = sys::segment_state(id)?;
    stage.ready_and_wait()?;
    let after = sys::segment_state(id)?;
    ensure!(before == after, "{before:?} has become {after:?}");
    region.part(0, SIZE).check(4)?;
    let details = proc::details_at(region.addr)?;
    ensure!(details.has_flag("ht"), "these are no huge pages any more");
    Ok(())
}

/// An orphan, which has gone to somebody above this tree, keeps the segment until this task ends.
fn outside(stage: &Stage) -> Result<()> {
    let id = sys::segment(libc::IPC_PRIVATE, PAGE, NEW | 0o600)?;
    let region = sys::attach(id, 0)?;
    sys::remove_segment(id)?;
    let gate = Region::shared(PAGE)?;
    let (ready, over) = (gate.word(0), gate.word(4));
    let middle = sys::fork()?;
    if middle == 0 {
        if sys::fork()? == 0 {
            ready.store(1, std::sync::atomic::Ordering::SeqCst);
            while over.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                sys::pause_for(5);
            }
        }
        sys::exit_now(0);
    }
    sys::wait(middle)?;
    while ready.load(std::sync::atomic::Ordering::SeqCst) == 0 {
        sys::pause_for(1);
    }
    region.fill(5);
    stage.ready_and_wait()?;
    over.store(1, std::sync::atomic::Ordering::SeqCst);
    region.check(5)
}
