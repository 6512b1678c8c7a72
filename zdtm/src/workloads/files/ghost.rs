//! Files that are open and have no name any more.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static SMALL: Workload = Workload::new(
    "files/ghost",
    "a removed file, read, written and at a position",
    small,
)
.needs(&[Need::Root]);
pub static LARGE: Workload = Workload::new("files/ghost-large", "a removed file of 20 MiB", large);
pub static SPARSE: Workload = Workload::new(
    "files/ghost-sparse",
    "a removed file of 10 GiB that is one hole",
    sparse,
);
pub static HARD_LINK: Workload = Workload::new(
    "files/ghost-hard-link",
    "a removed name whose file has another",
    hard_link,
)
.dump_options(&["--link-remap"]);
pub static SHARED: Workload = Workload::new(
    "files/ghost-shared",
    "a removed file open in two tasks, opened apart and inherited, and mapped",
    shared,
);
// Its old name cannot show in /proc again, since it belongs to the other file.
pub static NAME_TAKEN: Workload = Workload::new(
    "files/ghost-name-taken",
    "a removed file whose name another has now",
    name_taken,
)
.moves(&["fd"]);
// O_TMPFILE shows in the flags of the first open file, and means nothing any more.
pub static TEMPORARY: Workload =
    Workload::new("files/o-tmpfile", "a file that never had a name", temporary).moves(&["fd"]);

const RW_NEW: i32 = libc::O_RDWR | libc::O_CREAT;

fn small(stage: &Stage) -> Result<()> {
    let path = stage.path("ghost");
    let file = sys::open(&path, RW_NEW)?;
    sys::write(&file, b"contents")?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o4711))?;
    fs::remove_file(&path)?;
    sys::seek(&file, 3, libc::SEEK_SET)?;
    stage.ready_and_wait()?;
    ensure!(!path.exists(), "the removed file is back");
    ensure!(
        sys::read_exact(&file, 5)? == b"tents",
        "position or contents have changed"
    );
    sys::write(&file, b"!")?;
    let file = File::from(file);
    let data = file.metadata()?;
    ensure!(data.len() == 9, "the file has {} bytes", data.len());
    ensure!(data.nlink() == 0, "the file has {} names", data.nlink());
    ensure!(
        data.mode() & 0o7777 == 0o4711,
        "the mode is {:o}",
        data.mode() & 0o7777
    );
    Ok(())
}

fn large(stage: &Stage) -> Result<()> {
    const CHUNK: usize = 64 << 10;
    let path = stage.path("ghost");
    let file = File::from(sys::open(&path, RW_NEW)?);
    let chunk = |n: u64| vec![u8::try_from(n % 251).unwrap_or(0); CHUNK];
    for n in 0..320 {
        file.write_all_at(&chunk(n), n * CHUNK as u64)?;
    }
    fs::remove_file(&path)?;
    stage.ready_and_wait()?;
    let mut found = vec![0; CHUNK];
    for n in 0..320 {
        file.read_exact_at(&mut found, n * CHUNK as u64)?;
        ensure!(found == chunk(n), "chunk {n} has changed");
    }
    ensure!(
        file.metadata()?.len() == 20 << 20,
        "{} bytes",
        file.metadata()?.len()
    );
    Ok(())
}

fn sparse(stage: &Stage) -> Result<()> {
    const LEN: u64 = 10 << 30;
    let path = stage.path("ghost");
    let file = File::from(sys::open(&path, RW_NEW)?);
    file.set_len(LEN)?;
    file.write_all_at(b"start", 0)?;
    file.write_all_at(b"middle", LEN / 2 + 17)?;
    file.write_all_at(b"end", LEN - 3)?;
    let blocks = file.metadata()?.blocks();
    fs::remove_file(&path)?;
    stage.ready_and_wait()?;
    let data = file.metadata()?;
    ensure!(data.len() == LEN, "{} bytes", data.len());
    ensure!(
        data.blocks() <= blocks + 64,
        "{blocks} blocks were used, {} are",
        data.blocks()
    );
    for (text, place) in [
        (&b"start"[..], 0),
        (b"middle", LEN / 2 + 17),
        (b"end", LEN - 3),
    ] {
        let mut found = vec![0; text.len()];
        file.read_exact_at(&mut found, place)?;
        ensure!(found == text, "at {place} stands {found:?}");
    }
    let mut hole = [1; 64];
    file.read_exact_at(&mut hole, 3 << 30)?;
    ensure!(hole == [0; 64], "the hole holds something");
    Ok(())
}

/// The file lives on under its other name: what is written through the descriptor shows there.
fn hard_link(stage: &Stage) -> Result<()> {
    let (removed, kept) = (stage.path("removed"), stage.path("kept"));
    let file = sys::open(&removed, RW_NEW)?;
    sys::write(&file, b"one ")?;
    fs::hard_link(&removed, &kept)?;
    fs::remove_file(&removed)?;
    stage.ready_and_wait()?;
    sys::write(&file, b"two")?;
    let text = fs::read_to_string(&kept)?;
    ensure!(text == "one two", "the other name says `{text}`");
    ensure!(!removed.exists(), "the removed name is back");
    let data = File::from(file).metadata()?;
    let other = fs::metadata(&kept)?;
    ensure!(
        data.ino() == other.ino(),
        "the descriptor leads to another file"
    );
    ensure!(other.nlink() == 1, "the file has {} names", other.nlink());
    let entries = fs::read_dir(stage.path("."))?.count();
    ensure!(entries == 1, "{entries} files in the directory, was 1");
    Ok(())
}

fn shared(stage: &Stage) -> Result<()> {
    let path = stage.path("ghost");
    let file = sys::open(&path, RW_NEW)?;
    sys::write(&file, &[b'.'; 4096])?;
    let apart = path.clone();
    let child = stage.child(|stage| {
        let own = sys::open(&apart, libc::O_RDONLY)?;
        stage.ready_and_wait()?;
        ensure!(
            sys::read_exact(&own, 5)? == b"HELLO",
            "the file opened apart is another"
        );
        sys::write(&file, b"CHILD").context("through the inherited descriptor")?;
        Ok(())
    })?;
    let mapped = sys::Region::file(
        std::os::fd::AsFd::as_fd(&file),
        4096,
        sys::RW,
        libc::MAP_SHARED,
    )?;
    fs::remove_file(&path)?;
    stage.ready_and_wait()?;
    sys::seek(&file, 100, libc::SEEK_SET)?;
    mapped.put(0, b"HELLO");
    child.finish()?;
    let place = sys::seek(&file, 0, libc::SEEK_CUR)?;
    ensure!(place == 105, "the position is not shared any more: {place}");
    ensure!(
        mapped.get(100, 5) == b"CHILD",
        "the mapping is of another file"
    );
    Ok(())
}

fn name_taken(stage: &Stage) -> Result<()> {
    let path = stage.path("name");
    let file = sys::open(&path, RW_NEW)?;
    sys::write(&file, b"old")?;
    fs::remove_file(&path)?;
    fs::write(&path, "new one")?;
    stage.ready_and_wait()?;
    let text = fs::read_to_string(&path)?;
    ensure!(text == "new one", "the new file of that name says `{text}`");
    sys::seek(&file, 0, libc::SEEK_SET)?;
    let text = sys::read_exact(&file, 3)?;
    ensure!(text == b"old", "the open file says {text:?}");
    Ok(())
}

/// Such a file never was in the directory, and must not come to be there.
fn temporary(stage: &Stage) -> Result<()> {
    let file = sys::open(stage.path("."), libc::O_TMPFILE | libc::O_RDWR)?;
    sys::write(&file, b"nameless")?;
    stage.ready_and_wait()?;
    sys::seek(&file, 0, libc::SEEK_SET)?;
    ensure!(
        sys::read_exact(&file, 8)? == b"nameless",
        "the contents have changed"
    );
    let entries = fs::read_dir(stage.path("."))?.count();
    ensure!(entries == 0, "{entries} files in the directory, was none");
    let number = file.as_raw_fd();
    let data = fs::metadata(format!("/proc/self/fd/{number}"))?;
    ensure!(data.nlink() == 0, "the file has {} names", data.nlink());
    let flags = sys::fcntl(&file, libc::F_GETFL, 0)?;
    ensure!(
        flags & libc::O_TMPFILE == libc::O_TMPFILE,
        "the flags are {flags:o}"
    );
    Ok(())
}
