//! Memory files: mapped, as descriptors, and sealed.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, RW, Region};
use crate::{Need, Stage, Workload, proc};

pub static MAPPED: Workload = Workload::new(
    "memory/memfd",
    "a memory file mapped by two tasks, descriptor closed",
    mapped,
);
pub static DESCRIPTORS: Workload = Workload::new(
    "memory/memfd-descriptors",
    "memory files with position, seals, modes, holes",
    descriptors,
);
pub static PRIVATE: Workload = Workload::new(
    "memory/memfd-private",
    "a private mapping of a memory file",
    private,
);

pub static FLAGS: Workload = Workload::new(
    "memory/memfd-flags",
    "memory files made with each flag: sealable, not sealable, executable for good, never executable",
    flags,
);
pub static HUGE: Workload = Workload::new(
    "memory/memfd-huge",
    "a memory file of huge pages, as a descriptor",
    huge,
)
.needs(&[Need::HugePages(2)]);

pub static SEALED: Workload = Workload::new(
    "memory/memfd-sealed",
    "memory files that nobody may write any more, but for who had mapped one before; sealed seals",
    sealed,
);

pub static SEALED_MAPPED: Workload = Workload::new(
    "memory/memfd-sealed-mapped",
    "memory files sealed against writing that are mapped shared, for reading only and for good",
    sealed_mapped,
)
// Whether the kernel counts as shared what nobody can write shows there and nowhere else.
.moves(&["vmflags"]);

fn mapped(stage: &Stage) -> Result<()> {
    let file = File::from(sys::memfd(c"mapped name", 0)?);
    file.set_len(16 * PAGE as u64)?;
    let region = Region::file(file.as_fd(), 16 * PAGE, RW, libc::MAP_SHARED)?;
    drop(file);
    region.part(0, 8 * PAGE).fill(1);
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        region.part(0, 8 * PAGE).check(1)?;
        region.part(8 * PAGE, PAGE).fill(2);
        Ok(())
    })?;
    stage.ready_and_wait()?;
    region.part(0, 8 * PAGE).check(1)?;
    child.finish()?;
    region
        .part(8 * PAGE, PAGE)
        .check(2)
        .context("written by the child")?;
    let name = proc::vma_at(region.addr)?
        .map(|vma| vma.path)
        .unwrap_or_default();
    ensure!(
        name == "/memfd:mapped name (deleted)",
        "the mapping is called {name}"
    );
    Ok(())
}

const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

fn descriptors(stage: &Stage) -> Result<()> {
    let sealed = File::from(sys::memfd(c"sealed", libc::MFD_ALLOW_SEALING)?);
    sealed.write_all_at(b"contents", 0)?;
    sealed.set_len(10 << 20)?;
    sealed.write_all_at(b"far away", 9 << 20)?;
    sys::seek(&sealed, 4, libc::SEEK_SET)?;
    sys::fcntl(&sealed, libc::F_ADD_SEALS, i64::from(SEALS))?;
    let append = File::from(sys::memfd(c"append", libc::MFD_CLOEXEC)?);
    sys::fcntl(&append, libc::F_SETFL, i64::from(libc::O_APPEND))?;
    append.write_all_at(b"0123", 0)?;
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&sealed));
    let reader = File::open(own)?;
    let region = Region::file(sealed.as_fd(), PAGE, RW, libc::MAP_SHARED)?;
    stage.ready_and_wait()?;

    let place = sys::seek(&sealed, 0, libc::SEEK_CUR)?;
    ensure!(place == 4, "the position was 4, is {place}");
    ensure!(
        sys::read_exact(&sealed, 4)? == b"ents",
        "the contents have changed"
    );
    let seals = sys::fcntl(&sealed, libc::F_GET_SEALS, 0)?;
    ensure!(seals == SEALS, "the seals were {SEALS:#x}, are {seals:#x}");
    ensure!(sealed.set_len(1).is_err(), "a sealed file can be shrunk");
    region.put(0, b"CON");
    let mut start = [0; 8];
    reader.read_exact_at(&mut start, 0)?;
    ensure!(
        &start == b"CONtents",
        "mapping and descriptors are not one file: {start:?}"
    );
    reader.read_exact_at(&mut start, 9 << 20)?;
    ensure!(
        &start == b"far away",
        "what stood behind the hole has changed"
    );
    ensure!(
        sys::write(&reader, b"x").is_err(),
        "a read-only descriptor can be written"
    );
    use std::os::unix::fs::MetadataExt;
    let blocks = sealed.metadata()?.blocks() * 512;
    ensure!(blocks < 1 << 20, "the hole is filled: {blocks} bytes");
    let flags = sys::fcntl(&append, libc::F_GETFD, 0)?;
    ensure!(flags == libc::FD_CLOEXEC, "close-on-exec is lost");
    sys::seek(&append, 0, libc::SEEK_SET)?;
    sys::write(&append, b"45")?;
    let length = append.metadata()?.len();
    ensure!(length == 6, "O_APPEND is lost: {length} bytes");
    Ok(())
}

fn private(stage: &Stage) -> Result<()> {
    let file = File::from(sys::memfd(c"private", 0)?);
    file.set_len(8 * PAGE as u64)?;
    let shared = Region::file(file.as_fd(), 8 * PAGE, RW, libc::MAP_SHARED)?;
    shared.fill(3);
    let private = Region::file(file.as_fd(), 8 * PAGE, RW, libc::MAP_PRIVATE)?;
    private.part(0, PAGE).fill(4);
    stage.ready_and_wait()?;
    private.part(0, PAGE).check(4)?;
    shared.check(3).context("shared")?;
    shared.put(4 * PAGE, b"seen by both");
    ensure!(
        private.get(4 * PAGE, 4) == b"seen",
        "an untouched private page is a copy"
    );
    Ok(())
}

fn sealed(stage: &Stage) -> Result<()> {
    const FUTURE_WRITE: i32 = libc::F_SEAL_FUTURE_WRITE;
    let make = |seed: u8| {
        let file = File::from(sys::memfd(c"sealed", libc::MFD_ALLOW_SEALING)?);
        file.write_all_at(&[seed; PAGE], 0)?;
        Ok::<_, anyhow::Error>(file)
    };
    let (frozen, future, last) = (make(1)?, make(2)?, make(3)?);
    let copy = Region::file(frozen.as_fd(), PAGE, RW, libc::MAP_PRIVATE)?;
    copy.put(0, b"own");
    let writer = Region::file(future.as_fd(), PAGE, RW, libc::MAP_SHARED)?;
    let seals = [libc::F_SEAL_WRITE, FUTURE_WRITE, SEALS | libc::F_SEAL_SEAL];
    for (file, seals) in [&frozen, &future, &last].into_iter().zip(seals) {
        sys::fcntl(file, libc::F_ADD_SEALS, i64::from(seals))?;
    }
    stage.ready_and_wait()?;
    for (file, seals) in [&frozen, &future, &last].into_iter().zip(seals) {
        let found = sys::fcntl(file, libc::F_GET_SEALS, 0)?;
        ensure!(found == seals, "the seals were {seals:#x}, are {found:#x}");
    }
    ensure!(frozen.write_all_at(b"x", 0).is_err(), "it may be written");
    ensure!(
        future.write_all_at(b"x", 0).is_err(),
        "it may be written again"
    );
    ensure!(copy.get(0, 4) == b"own\x01", "the private copy has changed");
    writer.put(0, b"mapped");
    let mut bytes = [0; 7];
    future.read_exact_at(&mut bytes, 0)?;
    ensure!(
        &bytes == b"mapped\x02",
        "who had it mapped does not write to it: {bytes:?}"
    );
    ensure!(
        Region::file(future.as_fd(), PAGE, RW, libc::MAP_SHARED).is_err(),
        "it may be mapped writable again"
    );
    Ok(())
}

fn sealed_mapped(stage: &Stage) -> Result<()> {
    let seals = [libc::F_SEAL_WRITE, libc::F_SEAL_FUTURE_WRITE];
    let make = |seal: i32| {
        let file = File::from(sys::memfd(c"sealed", libc::MFD_ALLOW_SEALING)?);
        file.write_all_at(&[7; 2 * PAGE], 0)?;
        sys::fcntl(&file, libc::F_ADD_SEALS, i64::from(seal))?;
        let region = Region::file(file.as_fd(), 2 * PAGE, libc::PROT_READ, libc::MAP_SHARED);
        // Before Linux 6.7 a file that nobody may write could not be mapped shared.
        Ok::<_, anyhow::Error>((seal, file, region.ok()))
    };
    let files = seals.map(make).into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(files[1].2.is_some(), "it can't be mapped for reading");
    stage.ready_and_wait()?;
    for (seal, file, region) in &files {
        let found = sys::fcntl(file, libc::F_GET_SEALS, 0)?;
        ensure!(found == *seal, "the seals were {seal:#x}, are {found:#x}");
        ensure!(file.write_all_at(b"x", 0).is_err(), "it may be written");
        if let Some(region) = region {
            ensure!(
                region.get(PAGE - 1, 2) == [7, 7],
                "{seal:#x}: it has changed"
            );
            ensure!(
                region.protect(RW).is_err(),
                "{seal:#x}: what was mapped may be written"
            );
        }
    }
    Ok(())
}

fn mode_and_seals(file: &File) -> Result<(u32, i32)> {
    use std::os::unix::fs::MetadataExt;
    let seals = sys::fcntl(file, libc::F_GET_SEALS, 0)?;
    Ok((file.metadata()?.mode(), seals))
}

fn flags(stage: &Stage) -> Result<()> {
    const NOEXEC_SEAL: u32 = 8;
    const EXEC: u32 = 0x10;
    let made = [
        0,
        libc::MFD_CLOEXEC,
        libc::MFD_ALLOW_SEALING,
        NOEXEC_SEAL,
        EXEC,
        EXEC | libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC,
    ];
    let make = |flags: &u32| -> Result<(u32, File, (u32, i32))> {
        let file = File::from(sys::memfd(c"flags", *flags).with_context(|| format!("{flags:#x}"))?);
        file.write_all_at(&flags.to_ne_bytes(), 4096)?;
        let was = mode_and_seals(&file)?;
        Ok((*flags, file, was))
    };
    let files: Vec<_> = made.iter().map(make).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    for (flags, file, was) in files {
        let is = mode_and_seals(&file)?;
        ensure!(
            was == is,
            "{flags:#x}: mode and seals were {was:x?}, are {is:x?}"
        );
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 4096)?;
        ensure!(
            bytes == flags.to_ne_bytes(),
            "{flags:#x}: it holds {bytes:?}"
        );
    }
    Ok(())
}

fn huge(stage: &Stage) -> Result<()> {
    const HUGE: usize = 2 << 20;
    let flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    let file = File::from(sys::memfd(c"huge", flags)?);
    file.set_len(2 * HUGE as u64)?;
    let region = Region::file(file.as_fd(), 2 * HUGE, RW, libc::MAP_SHARED)?;
    region.put(HUGE, b"huge");
    stage.ready_and_wait()?;
    ensure!(region.get(HUGE, 4) == b"huge", "the contents have changed");
    let again = Region::file(file.as_fd(), 2 * HUGE, RW, libc::MAP_SHARED)?;
    region.put(0, b"both");
    ensure!(
        again.get(0, 4) == b"both",
        "mapping and descriptor are not one file"
    );
    Ok(())
}
