//! So many descriptors that a dump asks for most of them in a way of its own, among them those that it may not.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use anyhow::{Context, Result, ensure};

use crate::{Stage, Workload, sys};

const FILES: usize = 200;
const F_GETFD: i32 = 1;
const F_SETFD: i32 = 2;
const F_GETFL: i32 = 3;

pub static SORTS: Workload = Workload::new(
    "files/many-sorts",
    "hundreds of files and pipes, some of them locked, removed, linked twice, shared",
    sorts,
)
.dump_options(&["--file-locks", "--link-remap"]);
pub static MOVING: Workload = Workload::new(
    "files/many-moving",
    "hundreds of files that are renamed, moved in, opened anew and marked all the time",
    moving,
)
.moves(&["fd"]);

fn open(stage: &Stage, name: &str, flags: i32) -> Result<OwnedFd> {
    let file = sys::open(stage.path(name), libc::O_RDWR | libc::O_CREAT | flags)?;
    sys::write(&file, name.as_bytes())?;
    Ok(file)
}

fn mark(fd: impl AsFd, marked: bool) -> Result<()> {
    sys::fcntl(fd, F_SETFD, i64::from(marked)).map(drop)?;
    Ok(())
}

fn is_marked(fd: impl AsFd) -> Result<bool> {
    Ok(sys::fcntl(fd, F_GETFD, 0)? == 1)
}

fn text_of(file: impl AsFd) -> Result<String> {
    let mut text = [0; 64];
    let file = File::from(sys::dup(file)?);
    let length = file.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn sorts(stage: &Stage) -> Result<()> {
    let lasting = libc::O_APPEND | libc::O_NONBLOCK;
    let flags_of = |n: usize| [0, libc::O_APPEND, libc::O_NONBLOCK, lasting][n % 4];
    let mut files = Vec::new();
    for n in 0..FILES {
        let file = open(stage, &format!("file {n}"), flags_of(n))?;
        sys::seek(&file, i64::try_from(n % 5)?, libc::SEEK_SET)?;
        mark(&file, n % 3 == 0)?;
        files.push(file);
    }
    let removed = open(stage, "removed", 0)?;
    fs::remove_file(stage.path("removed"))?;
    let second = open(stage, "first name", 0)?;
    fs::hard_link(stage.path("first name"), stage.path("second name"))?;
    let by_second = sys::open(stage.path("second name"), libc::O_RDWR)?;
    let twin = sys::dup(&files[7])?;
    let (locked, flocked) = (&files[11], &files[12]);
    sys::flock(flocked, libc::LOCK_EX)?;
    sys::lock_range(locked, 6, 1, 2, 3)?;
    let mut pipes = Vec::new();
    for n in 0..FILES / 2 {
        let (reader, writer) = sys::pipe(0)?;
        sys::write(&writer, format!("pipe {n}").as_bytes())?;
        mark(&writer, n % 2 == 0)?;
        pipes.push((reader, writer));
    }
    stage.ready_and_wait()?;
    for (n, file) in files.iter().enumerate() {
        let text = text_of(file)?;
        ensure!(text == format!("file {n}"), "file {n} says `{text}`");
        let position = sys::seek(file, 0, libc::SEEK_CUR)?;
        ensure!(position == u64::try_from(n % 5)?, "file {n} at {position}");
        ensure!(
            is_marked(file)? == (n % 3 == 0),
            "close-on-exec of file {n}"
        );
        let flags = sys::fcntl(file, F_GETFL, 0)? & lasting;
        ensure!(flags == flags_of(n), "file {n} has the flags {flags:#o}");
    }
    ensure!(
        text_of(&removed)? == "removed",
        "the removed file has changed"
    );
    ensure!(
        fs::metadata(stage.path("removed")).is_err(),
        "it has a name again"
    );
    sys::seek(&second, 0, libc::SEEK_SET)?;
    let (one, other) = (
        File::from(second).metadata()?,
        File::from(by_second).metadata()?,
    );
    ensure!(one.ino() == other.ino(), "two names are two files");
    let (me, twins) = (sys::pid(), (files[7].as_raw_fd(), twin.as_raw_fd()));
    ensure!(
        sys::same_open_file(me, twins.0, me, twins.1)?,
        "a duplicate is none any more"
    );
    let again = sys::open(stage.path("file 12"), libc::O_RDWR)?;
    let taken = sys::flock(&again, libc::LOCK_EX | libc::LOCK_NB);
    ensure!(taken.is_err(), "the lock of a file is gone");
    for (n, (reader, writer)) in pipes.iter().enumerate() {
        let expected = format!("pipe {n}");
        let text = sys::read_exact(reader, expected.len())?;
        ensure!(text == expected.as_bytes(), "pipe {n} holds something else");
        ensure!(
            is_marked(writer)? == (n % 2 == 0),
            "close-on-exec of pipe {n}"
        );
        ensure!(
            !is_marked(reader)?,
            "close-on-exec of the reader of pipe {n}"
        );
    }
    Ok(())
}

/// What the busy thread has done to one descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Done {
    path: PathBuf,
    text: String,
    position: u64,
    marked: bool,
}

fn moving(stage: &Stage) -> Result<()> {
    let mut files: Vec<OwnedFd> = Vec::new();
    let mut done = Vec::new();
    for n in 0..FILES {
        let text = format!("even {n}");
        files.push(open(stage, &text, 0)?);
        open(stage, &format!("odd {n}"), 0)?;
        let (path, position) = (stage.path(&text), u64::try_from(text.len())?);
        let marked = is_marked(&files[n])?;
        done.push(Done {
            path,
            text,
            position,
            marked,
        });
    }
    let (over, dir) = (AtomicBool::new(false), stage.path(""));
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    // By then the thread has all the memory that it is going to have.
    let (moves, begun) = mpsc::channel();
    std::thread::scope(|scope| {
        let (over, done) = (&over, &mut done);
        let mover = scope.spawn(move || -> Result<()> {
            let mut round = 0;
            while !over.load(Ordering::Relaxed) {
                round += 1;
                for (n, number) in numbers.iter().enumerate() {
                    change(&dir, round + n, n, *number, &mut done[n])?;
                }
                // Nobody listens any more after the first ones.
                let _ = moves.send(());
            }
            Ok(())
        });
        for () in begun.iter().take(4) {}
        drop(begun);
        let waited = stage.ready_and_wait();
        over.store(true, Ordering::Relaxed);
        let moved = mover.join().expect("the mover does not panic");
        waited.and(moved)
    })?;
    for (n, (file, done)) in files.iter().zip(&done).enumerate() {
        check(file.as_fd(), done).with_context(|| format!("file {n}"))?;
    }
    Ok(())
}

/// Changes one thing about a descriptor, and checks first what is known of it.
fn change(dir: &Path, round: usize, n: usize, number: RawFd, done: &mut Done) -> Result<()> {
    let file = sys::borrow(number);
    check(file, done).with_context(|| format!("file {n}"))?;
    match round % 4 {
        0 => {
            done.marked = !done.marked;
            mark(file, done.marked)?;
        }
        1 => {
            done.position = u64::try_from(round % 1000)?;
            sys::seek(file, i64::try_from(done.position)?, libc::SEEK_SET)?;
        }
        2 => {
            let name = format!("{}, round {}", done.text, round % 2);
            let path = dir.join(&name);
            fs::rename(&done.path, &path)?;
            done.path = path;
        }
        _ => {
            // The other file of the two takes the number; whatever its name is now.
            let other = if done.text.starts_with("even") {
                "odd"
            } else {
                "even"
            };
            let text = format!("{other} {n}");
            let names = [
                text.clone(),
                format!("{text}, round 0"),
                format!("{text}, round 1"),
            ];
            let path = names
                .iter()
                .map(|name| dir.join(name))
                .find(|path| path.exists());
            let path = path.context("a file is gone")?;
            let opened = sys::open(&path, libc::O_RDWR)?;
            let flags = if done.marked { libc::O_CLOEXEC } else { 0 };
            std::mem::forget(sys::dup_to(&opened, number, flags)?);
            *done = Done {
                path,
                text,
                position: 0,
                marked: done.marked,
            };
        }
    }
    Ok(())
}

fn check(file: BorrowedFd<'_>, done: &Done) -> Result<()> {
    let text = text_of(file)?;
    ensure!(text == done.text, "it says `{text}`, not `{}`", done.text);
    let position = sys::seek(file, 0, libc::SEEK_CUR)?;
    ensure!(
        position == done.position,
        "it is at {position}, not {}",
        done.position
    );
    let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    ensure!(
        link == done.path,
        "it is {}, not {}",
        link.display(),
        done.path.display()
    );
    ensure!(
        is_marked(file)? == done.marked,
        "its close-on-exec has changed"
    );
    Ok(())
}
