//! Mapped files.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::sys::{PAGE, Pattern, RW, Region};
use crate::{Stage, Workload, proc};

pub static PRIVATE: Workload = Workload::new(
    "memory/file-private",
    "a private file mapping with some pages copied",
    private,
);
pub static PRIVATE_READ_ONLY: Workload = Workload::new(
    "memory/file-relocated",
    "pages written, then made read-only, as the loader does",
    relocated,
);
pub static SHARED: Workload = Workload::new(
    "memory/file-shared",
    "a shared file mapping, written before and after",
    shared,
);
pub static SHARED_READ_ONLY: Workload = Workload::new(
    "memory/file-read-only",
    "shared and private mappings of a read-only file",
    read_only,
);
pub static DELETED: Workload = Workload::new(
    "memory/file-deleted",
    "mappings of files that have been removed",
    deleted,
);
pub static BEYOND_END: Workload = Workload::new(
    "memory/file-end",
    "mappings that reach beyond the end of the file",
    beyond_end,
);
pub static DEV_ZERO: Workload = Workload::new(
    "memory/dev-zero",
    "private and shared mappings of /dev/zero",
    dev_zero,
);

/// Makes a file with the pages of a pattern.
fn make(path: &Path, seed: u64, pages: usize) -> Result<File> {
    let mut pattern = Pattern::new(seed);
    let bytes: Vec<u8> = (0..pages)
        .flat_map(|page| pattern.page(page).to_vec())
        .collect();
    fs::write(path, bytes)?;
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}

fn map(file: &File, pages: usize, prot: i32, flags: i32) -> Result<Region> {
    Ok(Region::file(file.as_fd(), pages * PAGE, prot, flags)?)
}

/// Checks one page of a region against the page of the same index of a file with `seed`.
fn check_page(region: Region, seed: u64, index: usize) -> Result<()> {
    let found = region.get(index * PAGE, PAGE);
    ensure!(
        found == Pattern::new(seed).page(index),
        "page {index} has other contents"
    );
    Ok(())
}

/// Copied pages keep their contents; all others go on following the file.
fn private(stage: &Stage) -> Result<()> {
    let file = make(&stage.path("mapped"), 1, 16)?;
    let region = map(&file, 16, RW, libc::MAP_PRIVATE)?;
    for index in [0, 5, 6, 15] {
        region.part(index * PAGE, PAGE).fill(100 + index as u64);
    }
    stage.ready_and_wait()?;
    file.write_all_at(b"later", 9 * PAGE as u64)?;
    for index in 0..16 {
        match index {
            0 | 5 | 6 | 15 => region.part(index * PAGE, PAGE).check(100 + index as u64),
            9 => {
                let start = region.get(9 * PAGE, 5);
                ensure!(
                    start == b"later",
                    "an untouched page does not follow the file"
                );
                Ok(())
            }
            _ => check_page(region, 1, index),
        }
        .with_context(|| format!("page {index}"))?;
    }
    Ok(())
}

fn relocated(stage: &Stage) -> Result<()> {
    let file = make(&stage.path("mapped"), 2, 8)?;
    let region = map(&file, 8, RW, libc::MAP_PRIVATE)?;
    drop(file);
    region.part(2 * PAGE, 2 * PAGE).fill(50);
    region.part(0, 6 * PAGE).protect(libc::PROT_READ)?;
    region.part(6 * PAGE, 2 * PAGE).protect(libc::PROT_NONE)?;
    stage.ready_and_wait()?;
    region.part(6 * PAGE, 2 * PAGE).protect(libc::PROT_READ)?;
    region.part(2 * PAGE, 2 * PAGE).check(50)?;
    [0, 1, 4, 5, 6, 7]
        .into_iter()
        .try_for_each(|index| check_page(region, 2, index))
}

fn shared(stage: &Stage) -> Result<()> {
    let path = stage.path("mapped");
    let file = make(&path, 3, 8)?;
    let region = map(&file, 8, RW, libc::MAP_SHARED)?;
    let second = map(&file, 8, libc::PROT_READ, libc::MAP_SHARED)?;
    drop(file);
    region.part(0, PAGE).fill(60);
    stage.ready_and_wait()?;
    region.part(0, PAGE).check(60)?;
    check_page(region, 3, 1)?;
    region.put(4 * PAGE, b"through the mapping");
    ensure!(
        second.get(4 * PAGE, 7) == b"through",
        "the second mapping does not see the first"
    );
    let bytes = fs::read(&path)?;
    ensure!(
        bytes[4 * PAGE..].starts_with(b"through the mapping"),
        "the file does not see it"
    );
    ensure!(
        bytes[..PAGE] == *Pattern::new(60).page(0),
        "the file has lost an earlier write"
    );
    Ok(())
}

fn read_only(stage: &Stage) -> Result<()> {
    let path = stage.path("mapped");
    make(&path, 4, 4)?;
    let file = File::open(&path)?;
    let shared = map(&file, 4, libc::PROT_READ, libc::MAP_SHARED)?;
    let private = map(&file, 4, RW, libc::MAP_PRIVATE)?;
    let at_offset = Region::map(
        None,
        2 * PAGE,
        libc::PROT_READ,
        libc::MAP_PRIVATE,
        Some(file.as_fd()),
        2 * PAGE as i64,
    )?;
    private.part(PAGE, PAGE).fill(70);
    stage.ready_and_wait()?;
    (0..4).try_for_each(|index| check_page(shared, 4, index))?;
    private.part(PAGE, PAGE).check(70)?;
    check_page(private, 4, 3)?;
    ensure!(
        at_offset.get(0, PAGE) == Pattern::new(4).page(2),
        "the offset is lost"
    );
    // A file opened for reading cannot be made writable through a shared mapping.
    ensure!(
        shared.protect(RW).is_err(),
        "the shared mapping can be made writable"
    );
    Ok(())
}

fn deleted(stage: &Stage) -> Result<()> {
    let (first, second) = (stage.path("first"), stage.path("second"));
    let file = make(&first, 5, 8)?;
    let private = map(&file, 8, RW, libc::MAP_PRIVATE)?;
    private.part(0, PAGE).fill(80);
    let file = make(&second, 6, 8)?;
    let one = map(&file, 8, RW, libc::MAP_SHARED)?;
    let two = map(&file, 4, RW, libc::MAP_SHARED)?;
    drop(file);
    fs::remove_file(&first)?;
    fs::remove_file(&second)?;
    stage.ready_and_wait()?;
    private.part(0, PAGE).check(80)?;
    (1..8)
        .try_for_each(|index| check_page(private, 5, index))
        .context("private")?;
    (0..8)
        .try_for_each(|index| check_page(one, 6, index))
        .context("shared")?;
    one.put(PAGE, b"both");
    ensure!(
        two.get(PAGE, 4) == b"both",
        "two mappings of one removed file have become two files"
    );
    ensure!(
        !first.exists() && !second.exists(),
        "a removed file is back"
    );
    let name = proc::vma_at(one.addr)?
        .map(|vma| vma.path)
        .unwrap_or_default();
    ensure!(
        name == format!("{} (deleted)", second.display()),
        "the mapping is called {name}"
    );
    Ok(())
}

/// The rest of the last page is zeros, and belongs to nobody; the pages behind give SIGBUS.
fn beyond_end(stage: &Stage) -> Result<()> {
    let path = stage.path("mapped");
    let file = make(&path, 7, 4)?;
    file.set_len(2 * PAGE as u64 + 100)?;
    let private = map(&file, 8, RW, libc::MAP_PRIVATE)?;
    let shared = map(&file, 8, libc::PROT_READ, libc::MAP_SHARED)?;
    private.put(2 * PAGE + 50, b"private");
    stage.ready_and_wait()?;
    ensure!(
        private.get(2 * PAGE + 50, 7) == b"private",
        "the last page has changed"
    );
    ensure!(
        shared.get(2 * PAGE + 100, 50) == [0; 50],
        "the end is not followed by zeros"
    );
    check_page(shared, 7, 1)?;
    file.set_len(4 * PAGE as u64)?;
    shared
        .part(3 * PAGE, PAGE)
        .check_zero()
        .context("after growing the file")?;
    let length = fs::metadata(&path)?.len();
    ensure!(length == 4 * PAGE as u64, "the file has {length} bytes");
    Ok(())
}

fn dev_zero(stage: &Stage) -> Result<()> {
    let zero = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/zero")?;
    let private = map(&zero, 8, RW, libc::MAP_PRIVATE)?;
    let shared = map(&zero, 8, RW, libc::MAP_SHARED)?;
    drop(zero);
    private.part(0, 4 * PAGE).fill(8);
    shared.part(0, 4 * PAGE).fill(9);
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        shared.part(0, 4 * PAGE).check(9).context("in the child")?;
        shared.part(4 * PAGE, PAGE).fill(10);
        Ok(())
    })?;
    stage.ready_and_wait()?;
    private.part(0, 4 * PAGE).check(8)?;
    private.part(4 * PAGE, 4 * PAGE).check_zero()?;
    shared.part(0, 4 * PAGE).check(9)?;
    child.finish()?;
    shared
        .part(4 * PAGE, PAGE)
        .check(10)
        .context("written by the child")
}
