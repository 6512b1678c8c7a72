//! Descriptors that share one open file, and tables that share descriptors.

use std::fs;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};

use crate::{Child, Stage, Workload, sys};

pub static DUPLICATES: Workload = Workload::new(
    "files/duplicates",
    "descriptors duplicated inside a task",
    duplicates,
);
pub static INHERITED: Workload = Workload::new(
    "files/inherited",
    "open files shared by a parent and its children",
    inherited,
);
pub static TABLE: Workload = Workload::new(
    "files/shared-table",
    "two tasks with one descriptor table",
    table,
);
pub static CLOSE_ON_EXEC: Workload = Workload::new(
    "files/close-on-exec",
    "close-on-exec, per descriptor, and an exec",
    cloexec,
);
pub static NUMBERS: Workload = Workload::new("files/numbers", "high numbers and gaps", numbers);

const RW_NEW: i32 = libc::O_RDWR | libc::O_CREAT;

fn duplicates(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, "0123456789")?;
    let one = sys::open(&path, libc::O_RDWR)?;
    let two = sys::dup(&one)?;
    let three = sys::dup_to(&one, 77, libc::O_CLOEXEC)?;
    let apart = sys::open(&path, libc::O_RDWR)?;
    sys::seek(&two, 3, libc::SEEK_SET)?;
    stage.ready_and_wait()?;
    let own = sys::pid();
    let same = |a: &std::os::fd::OwnedFd, b: &std::os::fd::OwnedFd| {
        sys::same_open_file(own, a.as_raw_fd(), own, b.as_raw_fd())
    };
    ensure!(
        same(&one, &two)? && same(&one, &three)?,
        "duplicates are open files apart"
    );
    ensure!(!same(&one, &apart)?, "files opened apart have become one");
    ensure!(
        sys::read_exact(&three, 2)? == b"34",
        "the position is not shared"
    );
    ensure!(
        sys::read_exact(&one, 2)? == b"56",
        "the position is not shared"
    );
    sys::fcntl(&one, libc::F_SETFL, i64::from(libc::O_APPEND))?;
    let flags = sys::fcntl(&two, libc::F_GETFL, 0)?;
    ensure!(flags & libc::O_APPEND != 0, "status flags are not shared");
    Ok(())
}

fn inherited(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, "0123456789")?;
    let file = sys::open(&path, libc::O_RDONLY)?;
    let parent = sys::pid();
    let (number, file) = (file.as_raw_fd(), &file);
    let children = (0..3)
        .map(|index| {
            stage.child(|stage| {
                // The second has it under another number too.
                let copy = if index == 1 {
                    Some(sys::dup_to(file, 50, 0)?)
                } else {
                    None
                };
                stage.ready_and_wait()?;
                let own = copy.as_ref().map_or(number, AsRawFd::as_raw_fd);
                let same = sys::same_open_file(sys::pid(), own, parent, number)?;
                ensure!(same, "the file is not shared with the parent any more");
                sys::read_exact(file, 2).context("reading on").map(drop)
            })
        })
        .collect::<Result<Vec<Child>>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)?;
    let rest = sys::read_exact(file, 4)?;
    ensure!(
        rest == b"6789",
        "after three children read two bytes each, {rest:?} is left"
    );
    Ok(())
}

/// What one opens, the other has.
fn table(stage: &Stage) -> Result<()> {
    let (path, shared) = (stage.path("file"), sys::Region::shared(sys::PAGE)?);
    let (state, number) = (shared.word(0), shared.word(4));
    // SAFETY: memory is not shared, so that the child has a stack and a heap of its own.
    let pid = unsafe { sys::clone_process(libc::CLONE_FILES)? };
    if pid == 0 {
        state.store(1, std::sync::atomic::Ordering::SeqCst);
        crate::stop::wait();
        let opened = sys::open(&path, RW_NEW);
        let code = match opened {
            Ok(fd) => {
                number.store(
                    fd.as_raw_fd().unsigned_abs(),
                    std::sync::atomic::Ordering::SeqCst,
                );
                std::mem::forget(fd);
                0
            }
            Err(_) => 1,
        };
        sys::exit_now(code);
    }
    while state.load(std::sync::atomic::Ordering::SeqCst) == 0 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    let common = sys::same_table(sys::pid(), pid)?;
    ensure!(common, "the two have tables of their own now");
    sys::kill(pid, libc::SIGTERM)?;
    let exit = sys::wait(pid)?;
    ensure!(exit == sys::Exit::Code(0), "the other task: {exit}");
    let number = i32::try_from(number.load(std::sync::atomic::Ordering::SeqCst))?;
    let written = sys::write(sys::borrow(number), b"both").context("using the other's file")?;
    ensure!(written == 4, "wrote {written}");
    Ok(())
}

fn cloexec(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, "")?;
    let closing = sys::dup_to(sys::open(&path, libc::O_RDONLY)?, 60, libc::O_CLOEXEC)?;
    let staying = sys::dup_to(&closing, 61, 0)?;
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let set = |fd: &std::os::fd::OwnedFd| sys::fcntl(fd, libc::F_GETFD, 0);
    stage.ready_and_wait()?;
    for (name, fd, wanted) in [
        ("the closing one", &closing, libc::FD_CLOEXEC),
        ("the staying one", &staying, 0),
        ("the pipe's reader", &reader, libc::FD_CLOEXEC),
        ("the pipe's writer", &writer, libc::FD_CLOEXEC),
    ] {
        let found = set(fd)?;
        ensure!(
            found == wanted,
            "{name}: close-on-exec was {wanted}, is {found}"
        );
    }
    let pid = sys::fork()?;
    if pid == 0 {
        let test = "test ! -e /proc/self/fd/60 && test -e /proc/self/fd/61";
        let _ = sys::exec(std::path::Path::new("/bin/sh"), &["-c", test]);
        sys::exit_now(98);
    }
    let exit = sys::wait(pid)?;
    ensure!(
        exit == sys::Exit::Code(0),
        "after an exec the wrong descriptors are open ({exit})"
    );
    Ok(())
}

fn numbers(stage: &Stage) -> Result<()> {
    let file = sys::open(stage.path("file"), RW_NEW)?;
    let wanted = [5, 63, 64, 100, 255, 256, 1023, 1024, 4097];
    let copies = wanted.map(|number| sys::dup_to(&file, number, 0));
    let copies = copies.into_iter().collect::<Result<Vec<_>, _>>()?;
    let before = crate::proc::numbers("/proc/self/fd")?;
    stage.ready_and_wait()?;
    let after = crate::proc::numbers("/proc/self/fd")?;
    ensure!(
        before == after,
        "the numbers were {before:?}, are {after:?}"
    );
    for copy in &copies {
        sys::write(copy, b"x")?;
    }
    let place = sys::seek(&file, 0, libc::SEEK_CUR)?;
    ensure!(
        place == 9,
        "nine bytes by nine numbers, the position is {place}"
    );
    // A new descriptor gets the lowest free number: nothing is hidden below.
    let lowest = sys::dup(&file)?.as_raw_fd();
    let free = (0..).find(|number| !after.contains(number)).unwrap_or(0);
    // Reading the directory had a descriptor too, and it was at the lowest free number.
    ensure!(
        lowest <= free,
        "a new descriptor gets {lowest}, {free} is free"
    );
    Ok(())
}
