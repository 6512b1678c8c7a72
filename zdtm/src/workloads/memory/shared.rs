//! Shared anonymous memory.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Child, Stage, Workload};

pub static FAMILY: Workload = Workload::new(
    "memory/shared",
    "memory shared by a parent and three generations",
    family,
);
pub static PARTS: Workload = Workload::new(
    "memory/shared-parts",
    "one object mapped in parts, at other places, with other protections",
    parts,
);
pub static BIG: Workload = Workload::new(
    "memory/shared-sparse",
    "256 MiB shared, a page here and there",
    big,
);

pub static THOUSANDS: Workload = Workload::new(
    "memory/shared-thousands",
    "3,000 objects, more than are kept open, each shared with a child",
    thousands,
);

fn family(stage: &Stage) -> Result<()> {
    let shared = Region::shared(64 * PAGE)?;
    let private = Region::anon(PAGE)?;
    shared.part(0, 32 * PAGE).fill(1);
    private.fill(2);
    let child = stage.child(|stage| {
        let grandchild = stage.child(|stage| {
            shared.part(32 * PAGE, PAGE).fill(3);
            stage.ready_and_wait()?;
            shared.part(0, 32 * PAGE).check(1)?;
            shared.part(33 * PAGE, PAGE).fill(4);
            Ok(())
        })?;
        private.fill(5);
        stage.ready_and_wait()?;
        grandchild.finish()?;
        shared
            .part(33 * PAGE, PAGE)
            .check(4)
            .context("written by the grandchild")?;
        private.check(5)
    })?;
    stage.ready_and_wait()?;
    shared.part(0, 32 * PAGE).check(1)?;
    shared.part(32 * PAGE, PAGE).check(3)?;
    shared.part(34 * PAGE, 30 * PAGE).check_zero()?;
    child.finish()?;
    shared
        .part(33 * PAGE, PAGE)
        .check(4)
        .context("written after the restore")?;
    private.check(2).context("private memory")
}

fn parts(stage: &Stage) -> Result<()> {
    let shared = Region::shared(16 * PAGE)?;
    shared.fill(6);
    let children = [
        // Only the end of it, elsewhere and read-only.
        stage.child(|stage| {
            shared.part(0, 12 * PAGE).unmap()?;
            let room = Region::anon(4 * PAGE)?;
            let rest = shared.part(12 * PAGE, 4 * PAGE).move_to(room.addr)?;
            rest.protect(libc::PROT_READ)?;
            stage.ready_and_wait()?;
            let word = rest.word(8).load(Ordering::SeqCst);
            ensure!(word == 0xfeed, "the moved part says {word:#x}");
            Ok(())
        }),
        // A hole in the middle, and one part without access.
        stage.child(|stage| {
            shared.part(4 * PAGE, 4 * PAGE).unmap()?;
            shared.part(8 * PAGE, PAGE).protect(libc::PROT_NONE)?;
            stage.ready_and_wait()?;
            shared.part(8 * PAGE, PAGE).protect(sys::RW)?;
            let word = shared.word(12 * PAGE + 8).load(Ordering::SeqCst);
            ensure!(word == 0xfeed, "the parted one says {word:#x}");
            Ok(())
        }),
    ];
    let children = children.into_iter().collect::<Result<Vec<Child>>>()?;
    shared.part(0, 2 * PAGE).unmap()?;
    stage.ready_and_wait()?;
    let whole = shared.part(2 * PAGE, 2 * PAGE);
    ensure!(
        whole.get(0, PAGE) == sys::Pattern::new(6).page(2),
        "page 2 has other contents"
    );
    shared.word(12 * PAGE + 8).store(0xfeed, Ordering::SeqCst);
    children.into_iter().try_for_each(Child::finish)
}

fn big(stage: &Stage) -> Result<()> {
    const LEN: usize = 256 << 20;
    let shared = Region::shared(LEN)?;
    let places: Vec<usize> = (0..64).map(|n| n * n * n * 17 * PAGE % LEN).collect();
    for &place in &places {
        shared.part(place, PAGE).fill(place as u64);
    }
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        shared.put(LEN - PAGE, b"end");
        Ok(())
    })?;
    let resident = crate::proc::details_at(shared.addr)?.bytes("Rss");
    stage.ready_and_wait()?;
    for &place in &places {
        shared.part(place, PAGE).check(place as u64)?;
    }
    let now = crate::proc::details_at(shared.addr)?.bytes("Rss");
    ensure!(
        now <= resident + (1 << 20),
        "{resident} bytes were there, {now} are: holes are filled"
    );
    child.finish()?;
    ensure!(
        shared.get(LEN - PAGE, 3) == b"end",
        "the child's memory is another"
    );
    Ok(())
}

fn thousands(stage: &Stage) -> Result<()> {
    let objects: Vec<Region> = (0..3000)
        .map(|_| Region::shared(2 * PAGE))
        .collect::<std::io::Result<_>>()?;
    let number = |nth: usize| u32::try_from(nth).unwrap_or(0);
    for (nth, object) in objects.iter().enumerate() {
        object.word(0).store(number(nth), Ordering::SeqCst);
    }
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        for (nth, object) in objects.iter().enumerate() {
            let found = object.word(0).load(Ordering::SeqCst);
            ensure!(found == number(nth), "object {nth} says {found}");
            object.word(8).store(found + 1, Ordering::SeqCst);
        }
        Ok(())
    })?;
    stage.ready_and_wait()?;
    child.finish()?;
    for (nth, object) in objects.iter().enumerate() {
        let found = object.word(8).load(Ordering::SeqCst);
        ensure!(
            found == number(nth) + 1,
            "after the restore object {nth} says {found}"
        );
    }
    Ok(())
}
