//! Inotify watches and fanotify marks.

use std::fs;

use anyhow::{Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static INOTIFY: Workload = Workload::new(
    "files/inotify",
    "watches of files and directories keep numbers and masks",
    inotify,
);
pub static REMOVED: Workload = Workload::new(
    "files/inotify-removed",
    "a watch of a file that was removed and is still open",
    removed,
);
pub static FANOTIFY: Workload = Workload::new(
    "files/fanotify",
    "marks on a file, a mount and a filesystem",
    fanotify,
)
.needs(&[Need::Root]);

const IN_MODIFY: u32 = 2;
const IN_CREATE: u32 = 0x100;
const IN_ATTRIB: u32 = 4;
const IN_ONESHOT: u32 = 0x8000_0000;
const IN_IGNORED: u32 = 0x8000;

fn inotify(stage: &Stage) -> Result<()> {
    let (file, dir) = (stage.path("file"), stage.path("dir"));
    fs::write(&file, "x")?;
    fs::create_dir(&dir)?;
    let fd = sys::inotify(libc::IN_NONBLOCK)?;
    let gone = sys::add_watch(&fd, &stage.path("."), IN_CREATE)?;
    let of_file = sys::add_watch(&fd, &file, IN_MODIFY | IN_ONESHOT)?;
    let of_dir = sys::add_watch(&fd, &dir, IN_CREATE)?;
    let of_proc = sys::add_watch(&fd, "/proc".as_ref(), IN_ATTRIB)?;
    sys::remove_watch(&fd, gone)?;
    // The removal itself is told.
    sys::take_watched(&fd)?;
    stage.ready_and_wait()?;
    let events = sys::take_watched(&fd)?;
    ensure!(events.is_empty(), "the restore shows: {events:?}");
    fs::write(&file, "y")?;
    fs::write(dir.join("new"), "")?;
    let events = sys::take_watched(&fd)?;
    let told = |watch, mask, name: &str| events.contains(&(watch, mask, name.to_owned()));
    ensure!(told(of_dir, IN_CREATE, "new"), "no new file: {events:?}");
    ensure!(told(of_file, IN_MODIFY, ""), "no change: {events:?}");
    ensure!(
        told(of_file, IN_IGNORED, ""),
        "the watch was for one event: {events:?}"
    );
    sys::remove_watch(&fd, of_proc)?;
    let next = sys::add_watch(&fd, &file, IN_MODIFY)?;
    ensure!(next > of_proc, "the next watch is {next}");
    Ok(())
}

fn removed(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    let file = sys::open(&path, libc::O_RDWR | libc::O_CREAT)?;
    let fd = sys::inotify(libc::IN_NONBLOCK)?;
    let watch = sys::add_watch(&fd, &path, IN_MODIFY)?;
    fs::remove_file(&path)?;
    stage.ready_and_wait()?;
    sys::write(&file, b"x")?;
    let events = sys::take_watched(&fd)?;
    ensure!(
        events == [(watch, IN_MODIFY, String::new())],
        "one change was made: {events:?}"
    );
    Ok(())
}

const FAN_CLASS_NOTIF: u32 = 0;
const FAN_NONBLOCK: u32 = 2;
const FAN_OPEN: u64 = 0x20;
const FAN_CLOSE_NOWRITE: u64 = 0x10;
const FAN_MARK_ADD: u32 = 1;
const FAN_MARK_MOUNT: u32 = 0x10;
const FAN_MARK_IGNORED_MASK: u32 = 0x20;
const FAN_MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
const FAN_MARK_FILESYSTEM: u32 = 0x100;

fn fanotify(stage: &Stage) -> Result<()> {
    // Nobody else opens files of these two.
    let (a, b) = (stage.path("a"), stage.path("b"));
    for dir in [&a, &b] {
        fs::create_dir(dir)?;
        let path = sys::c_path(dir)?;
        sys::mount(Some(c"none"), &path, Some(c"tmpfs"), 0)?;
        fs::write(dir.join("file"), "x")?;
        fs::write(dir.join("ignored"), "x")?;
    }
    let group = |flags| sys::fanotify(FAN_CLASS_NOTIF | FAN_NONBLOCK | flags, 0);
    let of_inode = group(0)?;
    let ignored = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY;
    sys::fanotify_mark(&of_inode, FAN_MARK_ADD, FAN_OPEN, &a.join("file"))?;
    let of_mount = group(0)?;
    sys::fanotify_mark(&of_mount, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN, &a)?;
    sys::fanotify_mark(&of_mount, ignored, FAN_OPEN, &a.join("ignored"))?;
    let of_filesystem = group(0)?;
    let flags = FAN_MARK_ADD | FAN_MARK_FILESYSTEM;
    sys::fanotify_mark(&of_filesystem, flags, FAN_OPEN | FAN_CLOSE_NOWRITE, &b)?;
    stage.ready_and_wait()?;
    let told = |group| -> Result<bool> {
        let mut event = [0; 24];
        match sys::read(group, &mut event) {
            Ok(24) => {
                let fd = i32::from_ne_bytes(event[16..20].try_into()?);
                sys::close(fd)?;
                Ok(true)
            }
            Ok(other) => anyhow::bail!("an event of {other} bytes"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    ensure!(!told(&of_inode)? && !told(&of_mount)?, "events of nothing");
    ensure!(!told(&of_filesystem)?, "events of nothing");
    fs::read(a.join("ignored"))?;
    ensure!(!told(&of_mount)?, "an ignored file is told");
    fs::read(a.join("file"))?;
    ensure!(told(&of_inode)?, "the file's mark tells nothing");
    ensure!(told(&of_mount)?, "the mount's mark tells nothing");
    fs::read(b.join("file"))?;
    ensure!(told(&of_filesystem)?, "the filesystem's mark tells nothing");
    // The closing may have joined the opening.
    told(&of_filesystem)?;
    ensure!(!told(&of_mount)?, "the other mount is told");
    Ok(())
}
