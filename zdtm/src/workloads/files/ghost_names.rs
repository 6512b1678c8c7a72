//! Removed names of which there were several, directories in directories, files of an overlay.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, proc, sys};

pub static LINK_REMAP: Workload = Workload::new(
    "files/link-remap",
    "a removed name, opened twice, whose file has another in another directory",
    link_remap,
)
.dump_options(&["--link-remap"]);
pub static LINK_REMAP_REFUSED: Workload = Workload::new(
    "files/link-remap-refused",
    "the same without --link-remap",
    link_remap,
)
.refused(&["removed", "--link-remap"]);
pub static TWO_NAMES: Workload = Workload::new(
    "files/ghost-two-names",
    "a removed file that was opened by two names stays one file",
    two_names,
);
pub static NESTED: Workload = Workload::new(
    "files/ghost-directories",
    "removed directories in one another: open, with a file, and as a working directory",
    nested,
);
pub static OVERLAY: Workload = Workload::new(
    "files/ghost-overlay",
    "removed files of an overlay: of the lower layer, copied up, and new",
    overlay,
)
.needs(&[Need::Root, Need::FileSystem("overlay")]);
pub static NODES: Workload = Workload::new(
    "files/ghost-nodes",
    "O_PATH descriptors of a removed fifo, socket, link and device",
    nodes,
)
.needs(&[Need::Root]);
pub static HOLES: Workload = Workload::new(
    "files/ghost-holes",
    "a removed file with data between holes of some MiB",
    holes,
);

const RW_NEW: i32 = libc::O_RDWR | libc::O_CREAT;

fn shown(fd: impl AsFd) -> Result<String> {
    let link = proc::link("self", &format!("fd/{}", fd.as_fd().as_raw_fd()))?;
    Ok(link.to_string_lossy().into_owned())
}

fn link_remap(stage: &Stage) -> Result<()> {
    let (one, other) = (stage.path("one"), stage.path("other"));
    fs::create_dir(&one)?;
    fs::create_dir(&other)?;
    let (removed, kept) = (one.join("removed"), other.join("kept"));
    let file = sys::open(&removed, RW_NEW)?;
    let reader = sys::open(&removed, libc::O_RDONLY)?;
    sys::write(&file, b"one ")?;
    fs::hard_link(&removed, &kept)?;
    fs::remove_file(&removed)?;
    stage.ready_and_wait()?;
    sys::write(&file, b"two")?;
    let text = fs::read_to_string(&kept)?;
    ensure!(text == "one two", "the other name says `{text}`");
    ensure!(
        sys::read_exact(&reader, 7)? == b"one two",
        "it is another file"
    );
    ensure!(
        shown(&file)?.ends_with("removed (deleted)"),
        "{}",
        shown(&file)?
    );
    // Where the tasks go on, the name that the images need stays.
    if stage.may_have_been_restored() {
        let links = fs::metadata(&kept)?.nlink();
        ensure!(links == 1, "the file has {links} names");
        let left = fs::read_dir(&one)?.count();
        ensure!(left == 0, "{left} files are left where the name was");
    }
    Ok(())
}

fn two_names(stage: &Stage) -> Result<()> {
    let (first, second) = (stage.path("first"), stage.path("second"));
    let writer = sys::open(&first, RW_NEW)?;
    fs::hard_link(&first, &second)?;
    let reader = sys::open(&second, libc::O_RDONLY)?;
    fs::remove_file(&first)?;
    fs::remove_file(&second)?;
    stage.ready_and_wait()?;
    sys::write(&writer, b"through the first")?;
    ensure!(
        sys::read_exact(&reader, 17)? == b"through the first",
        "the names have become two files"
    );
    ensure!(
        shown(&writer)?.ends_with("first (deleted)"),
        "{}",
        shown(&writer)?
    );
    ensure!(
        shown(&reader)?.ends_with("second (deleted)"),
        "{}",
        shown(&reader)?
    );
    let data = File::from(reader).metadata()?;
    ensure!(data.nlink() == 0, "it has {} names", data.nlink());
    Ok(())
}

fn nested(stage: &Stage) -> Result<()> {
    let outer = stage.path("outer");
    let middle = outer.join("middle");
    let inner = middle.join("inner");
    fs::create_dir_all(&inner)?;
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let of_inner = sys::open(&inner, flags)?;
    let file = sys::open(inner.join("file"), RW_NEW)?;
    sys::write(&file, b"contents")?;
    let of_outer = sys::open(&outer, flags)?;
    let at = middle.clone();
    let child = stage.child(move |stage| {
        std::env::set_current_dir(&at).context("going there")?;
        stage.ready()?;
        stage.wait();
        let cwd = proc::link("self", "cwd")?;
        ensure!(
            cwd.to_string_lossy().ends_with("middle (deleted)"),
            "{cwd:?}"
        );
        ensure!(
            File::create("new").is_err(),
            "a removed directory takes a file"
        );
        Ok(())
    })?;
    fs::remove_dir_all(&outer)?;
    stage.ready_and_wait()?;
    ensure!(!outer.exists(), "a removed directory is back");
    for (fd, name) in [
        (&of_outer, "outer"),
        (&of_inner, "inner"),
        (&file, "inner/file"),
    ] {
        let link = shown(fd)?;
        ensure!(
            link.ends_with(&format!("{name} (deleted)")),
            "{name}: {link}"
        );
    }
    sys::seek(&file, 0, libc::SEEK_SET)?;
    ensure!(
        sys::read_exact(&file, 8)? == b"contents",
        "the file has changed"
    );
    child.finish()
}

/// The layers are on a file system of their own: an overlay can't be the upper layer of another.
fn overlay(stage: &Stage) -> Result<()> {
    let base = stage.path("layers");
    fs::create_dir(&base)?;
    sys::mount(Some(c"tmpfs"), &sys::c_path(&base)?, Some(c"tmpfs"), 0).context("a tmpfs")?;
    let lower = base.join("lower");
    fs::create_dir(&lower)?;
    for name in ["plain", "copied"] {
        fs::write(lower.join(name), format!("lower {name}"))?;
    }
    let merged = sys::mount_overlay(&base).context("an overlay")?;
    let plain = sys::open(merged.join("plain"), libc::O_RDONLY)?;
    let copied = sys::open(merged.join("copied"), libc::O_RDWR)?;
    sys::write(&copied, b"upper")?;
    let new = sys::open(merged.join("new"), RW_NEW)?;
    sys::write(&new, b"upper new")?;
    for name in ["plain", "copied", "new"] {
        fs::remove_file(merged.join(name))?;
    }
    stage.ready_and_wait()?;
    for (file, text) in [
        (&plain, "lower plain"),
        (&copied, "upper copied"),
        (&new, "upper new"),
    ] {
        sys::seek(file, 0, libc::SEEK_SET)?;
        let read = sys::read_exact(file, text.len())?;
        let read = String::from_utf8_lossy(&read);
        ensure!(read == text, "`{text}` has become `{read}`");
    }
    for name in ["plain", "copied", "new"] {
        ensure!(!merged.join(name).exists(), "{name} is back");
    }
    let text = fs::read_to_string(lower.join("plain"))?;
    ensure!(text == "lower plain", "the lower layer says `{text}`");
    drop((plain, copied, new));
    sys::unmount(&sys::c_path(&merged)?)?;
    sys::unmount(&sys::c_path(&base)?).context("unmounting the tmpfs")
}

fn nodes(stage: &Stage) -> Result<()> {
    let path = |name: &str| stage.path(name);
    sys::mkfifo(&path("fifo"))?;
    drop(UnixListener::bind(path("socket"))?);
    symlink("anywhere", path("link"))?;
    sys::make_device(&path("null"), libc::makedev(1, 3))?;
    let open = |name: &str| sys::open(path(name), libc::O_PATH | libc::O_NOFOLLOW);
    let kinds = [
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        ("link", libc::S_IFLNK),
        ("null", libc::S_IFCHR),
    ];
    let files = kinds.map(|(name, kind)| (name, kind, open(name)));
    for (name, _) in kinds {
        fs::remove_file(path(name))?;
    }
    stage.ready_and_wait()?;
    for (name, kind, file) in files {
        let file = file.with_context(|| name.to_owned())?;
        let link = shown(&file)?;
        ensure!(
            link.ends_with(&format!("{name} (deleted)")),
            "{name}: {link}"
        );
        let mode = File::from(file).metadata()?.mode();
        ensure!(mode & libc::S_IFMT == kind, "{name} has mode {mode:o}");
        ensure!(!Path::exists(&path(name)), "{name} is back");
    }
    Ok(())
}

fn holes(stage: &Stage) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let path = stage.path("ghost");
    let file = sys::open(&path, RW_NEW)?;
    let places = [3 * MIB, 8 * MIB + 4096, 9 * MIB + 123];
    for (place, seed) in places.into_iter().zip(1u8..) {
        sys::write_at(&file, &[seed; 5000], place)?;
    }
    let file = File::from(file);
    file.set_len(12 * MIB)?;
    let blocks = file.metadata()?.blocks();
    fs::remove_file(&path)?;
    stage.ready_and_wait()?;
    let data = file.metadata()?;
    ensure!(data.len() == 12 * MIB, "{} bytes", data.len());
    ensure!(
        data.blocks() <= blocks,
        "{blocks} blocks were used, {} are",
        data.blocks()
    );
    let mut expected = vec![0u8; usize::try_from(12 * MIB)?];
    for (place, seed) in places.into_iter().zip(1u8..) {
        let place = usize::try_from(place)?;
        expected[place..place + 5000].fill(seed);
    }
    sys::seek(&file, 0, libc::SEEK_SET)?;
    let read = sys::read_exact(&file, expected.len())?;
    ensure!(read == expected, "the contents have changed");
    Ok(())
}
