//! Regular files that are where they were.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};

use anyhow::{Context, Result, ensure};

use crate::{Stage, Workload, proc, sys};

pub static POSITIONS: Workload = Workload::new(
    "files/positions",
    "files with positions, read and written on",
    positions,
);
pub static FLAGS: Workload = Workload::new(
    "files/flags",
    "every lasting open flag and access mode",
    flags,
);
pub static APPEND: Workload = Workload::new(
    "files/append",
    "a file opened with O_APPEND, written by two",
    append,
);
pub static PATH: Workload = Workload::new(
    "files/o-path",
    "O_PATH descriptors of a file, a directory, a link",
    path,
);
pub static PATH_ODD: Workload = Workload::new(
    "files/o-path-odd",
    "O_PATH descriptors of a pipe, a memory file, a device and a namespace",
    path_odd,
);
pub static PATH_REFUSED: Workload = Workload::new(
    "files/o-path-refused",
    "an O_PATH descriptor of an eventfd, which tells nothing about it",
    |stage| {
        let counter = sys::eventfd(0, 0)?;
        let path = format!("/proc/self/fd/{}", counter.as_raw_fd());
        let path_only = sys::open(path, libc::O_PATH)?;
        stage.ready_and_wait()?;
        drop((counter, path_only));
        Ok(())
    },
)
.refused(&["O_PATH", "eventfd"]);
pub static TWICE: Workload = Workload::new(
    "files/opened-twice",
    "one file opened twice: two positions",
    twice,
);
pub static MANY: Workload = Workload::new("files/many", "a thousand open files", many);
pub static LARGE_OFFSET: Workload = Workload::new(
    "files/large-offset",
    "positions beyond 4 GiB and the end",
    large_offset,
);
pub static RENAMED: Workload = Workload::new(
    "files/renamed",
    "a file renamed after it was opened",
    renamed,
);

fn position(fd: impl AsFd) -> Result<u64> {
    Ok(sys::seek(fd, 0, libc::SEEK_CUR)?)
}

fn positions(stage: &Stage) -> Result<()> {
    let (read, written) = (stage.path("read"), stage.path("written"));
    fs::write(&read, "0123456789")?;
    let reader = sys::open(&read, libc::O_RDONLY)?;
    ensure!(sys::read_exact(&reader, 4)? == b"0123");
    let writer = sys::open(&written, libc::O_RDWR | libc::O_CREAT)?;
    sys::write(&writer, b"before ")?;
    stage.ready_and_wait()?;
    let found = position(&reader)?;
    ensure!(found == 4, "the position was 4, is {found}");
    ensure!(
        sys::read_exact(&reader, 6)? == b"456789",
        "reading on gave something else"
    );
    sys::write(&writer, b"after")?;
    let text = fs::read_to_string(&written)?;
    ensure!(text == "before after", "the written file says `{text}`");
    Ok(())
}

fn flags(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, "contents")?;
    let modes = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR];
    let extra = [
        0,
        libc::O_NONBLOCK,
        libc::O_APPEND,
        libc::O_DSYNC,
        libc::O_SYNC,
        libc::O_NOATIME,
        libc::O_DIRECT,
        libc::O_NOFOLLOW,
        libc::O_APPEND | libc::O_NONBLOCK | libc::O_SYNC,
    ];
    // O_TRUNC and O_CREAT act once: a restore that used them again would show here.
    let once = libc::O_CREAT | libc::O_TRUNC;
    let mut files: Vec<(i32, OwnedFd, i32)> = Vec::new();
    for mode in modes {
        for flags in extra.iter().map(|flags| flags | mode) {
            let fd = sys::open(&path, flags).with_context(|| format!("flags {flags:#o}"))?;
            let shown = sys::fcntl(&fd, libc::F_GETFL, 0)?;
            files.push((flags, fd, shown));
        }
    }
    let truncated = sys::open(&path, libc::O_RDWR | once)?;
    let shown = sys::fcntl(&truncated, libc::F_GETFL, 0)?;
    files.push((once, truncated, shown));
    fs::write(&path, "contents")?;
    stage.ready_and_wait()?;
    for (flags, fd, was) in files {
        let is = sys::fcntl(&fd, libc::F_GETFL, 0)?;
        ensure!(
            was == is,
            "opened with {flags:#o}: flags were {was:#o}, are {is:#o}"
        );
    }
    let text = fs::read_to_string(&path)?;
    ensure!(text == "contents", "the file says `{text}`");
    Ok(())
}

fn append(stage: &Stage) -> Result<()> {
    let path = stage.path("log");
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
    let file = sys::open(&path, flags)?;
    sys::write(&file, b"one ")?;
    let path_of_child = path.clone();
    let child = stage.child(move |stage| {
        let file = sys::open(&path_of_child, flags)?;
        sys::write(&file, b"two ")?;
        stage.ready_and_wait()?;
        sys::write(&file, b"three ")?;
        Ok(())
    })?;
    stage.ready_and_wait()?;
    child.finish()?;
    sys::write(&file, b"four")?;
    let text = fs::read_to_string(&path)?;
    ensure!(text == "one two three four", "the log says `{text}`");
    Ok(())
}

fn path(stage: &Stage) -> Result<()> {
    let (file, link) = (stage.path("file"), stage.path("link"));
    fs::write(&file, "behind the path")?;
    symlink(&file, &link)?;
    let of_file = sys::open(&file, libc::O_PATH)?;
    let of_dir = sys::open(stage.path("."), libc::O_PATH | libc::O_DIRECTORY)?;
    let of_link = sys::open(&link, libc::O_PATH | libc::O_NOFOLLOW)?;
    stage.ready_and_wait()?;
    let number = |fd: &OwnedFd| fd.as_raw_fd();
    let mut byte = [0];
    let error = sys::read(&of_file, &mut byte)
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(
        error == Some(libc::EBADF),
        "an O_PATH descriptor can be read"
    );
    let text = fs::read_to_string(format!("/proc/self/fd/{}", number(&of_file)))?;
    ensure!(text == "behind the path", "the file says `{text}`");
    let text = fs::read_to_string(format!("/proc/self/fd/{}/file", number(&of_dir)))?;
    ensure!(
        text == "behind the path",
        "through the directory the file says `{text}`"
    );
    let found = proc::link("self", &format!("fd/{}", number(&of_link)))?;
    ensure!(found == link, "the link's descriptor leads to {found:?}");
    Ok(())
}

fn path_odd(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let memory = sys::memfd(c"path only", 0)?;
    sys::write(&memory, b"memory")?;
    let own = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
    let of_pipe = sys::open(own(&reader), libc::O_PATH)?;
    let of_memory = sys::open(own(&memory), libc::O_PATH)?;
    let of_device = sys::open("/dev/ptmx", libc::O_PATH)?;
    let of_namespace = sys::open("/proc/self/ns/net", libc::O_PATH)?;
    stage.ready_and_wait()?;
    for fd in [&of_pipe, &of_memory, &of_device, &of_namespace] {
        let error = sys::read(fd, &mut [0]).err().and_then(|e| e.raw_os_error());
        ensure!(error == Some(libc::EBADF), "{} can be read", own(fd));
    }
    sys::write(&writer, b"x")?;
    let again = sys::open(own(&of_pipe), libc::O_RDONLY | libc::O_NONBLOCK)?;
    ensure!(sys::read_exact(&again, 1)? == b"x", "it is another pipe");
    let again = sys::open(own(&of_memory), libc::O_RDONLY)?;
    ensure!(
        sys::read_exact(&again, 6)? == b"memory",
        "it is another memory file"
    );
    let net = fs::metadata(own(&of_namespace))?.ino();
    ensure!(
        net == fs::metadata("/proc/self/ns/net")?.ino(),
        "it is another namespace"
    );
    Ok(())
}

fn twice(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, "0123456789")?;
    let (one, two) = (
        sys::open(&path, libc::O_RDWR)?,
        sys::open(&path, libc::O_RDWR)?,
    );
    sys::seek(&one, 2, libc::SEEK_SET)?;
    sys::seek(&two, 7, libc::SEEK_SET)?;
    stage.ready_and_wait()?;
    sys::write(&one, b"ab")?;
    let positions = (position(&one)?, position(&two)?);
    ensure!(
        positions == (4, 7),
        "the positions are {positions:?}, should be 4 and 7"
    );
    ensure!(
        sys::read_exact(&two, 3)? == b"789",
        "the second reads something else"
    );
    ensure!(
        fs::read_to_string(&path)? == "01ab456789",
        "the file is another"
    );
    Ok(())
}

fn many(stage: &Stage) -> Result<()> {
    let files = (0..1000u32)
        .map(|n| {
            let file = sys::open(
                stage.path(&format!("file {n}")),
                libc::O_RDWR | libc::O_CREAT,
            )?;
            sys::write(&file, format!("{n} and {n}").as_bytes())?;
            sys::seek(&file, i64::from(n % 7), libc::SEEK_SET)?;
            Ok(file)
        })
        .collect::<Result<Vec<OwnedFd>>>()?;
    stage.ready_and_wait()?;
    for (n, file) in (0u32..).zip(files) {
        let found = position(&file)?;
        ensure!(
            found == u64::from(n % 7),
            "file {n}: the position is {found}"
        );
        let mut text = [0; 32];
        let length = File::from(file).read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text[..length]).into_owned();
        ensure!(text == format!("{n} and {n}"), "file {n} says `{text}`");
    }
    Ok(())
}

fn large_offset(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    let file = sys::open(&path, libc::O_RDWR | libc::O_CREAT)?;
    let place = (5 << 30) + 123;
    sys::seek(&file, place, libc::SEEK_SET)?;
    stage.ready_and_wait()?;
    let length = fs::metadata(&path)?.len();
    ensure!(length == 0, "the file has grown to {length} bytes");
    let found = position(&file)?;
    ensure!(
        found == place.cast_unsigned(),
        "the position was {place}, is {found}"
    );
    sys::write(&file, b"x")?;
    let length = fs::metadata(&path)?.len();
    ensure!(
        length == place.cast_unsigned() + 1,
        "the file has {length} bytes"
    );
    Ok(())
}

fn renamed(stage: &Stage) -> Result<()> {
    let (old, new) = (stage.path("old"), stage.path("new"));
    let file = sys::open(&old, libc::O_RDWR | libc::O_CREAT)?;
    sys::write(&file, b"mine")?;
    fs::rename(&old, &new)?;
    fs::write(&old, "another file")?;
    stage.ready_and_wait()?;
    sys::write(&file, b" still")?;
    ensure!(
        fs::read_to_string(&new)? == "mine still",
        "the renamed file is not the open one"
    );
    ensure!(
        fs::read_to_string(&old)? == "another file",
        "the new file of the old name is touched"
    );
    Ok(())
}
