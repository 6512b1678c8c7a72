//! Where a task is: working directory, root, umask, executable.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, proc, sys};

pub static CWD: Workload = Workload::new(
    "task/cwd",
    "working directories of a parent and a child",
    cwd,
);
pub static CWD_REMOVED: Workload = Workload::new(
    "task/cwd-removed",
    "a working directory that has been removed",
    cwd_removed,
);
pub static ROOT: Workload =
    Workload::new("task/root", "a root directory by chroot", root).needs(&[Need::Root]);
pub static UMASK: Workload =
    Workload::new("task/umask", "umasks of a parent and two children", umask);
pub static EXE: Workload =
    Workload::new("task/exe", "the link to the executable", exe).needs(&[Need::Root]);

fn cwd(stage: &Stage) -> Result<()> {
    let (outer, inner) = (stage.path("a"), stage.path("a/deep \u{2603}"));
    fs::create_dir_all(&inner)?;
    let for_child = inner.clone();
    let child = stage.child(move |stage| {
        std::env::set_current_dir(&for_child)?;
        stage.ready_and_wait()?;
        ensure!(
            std::env::current_dir()? == for_child,
            "in {:?}",
            std::env::current_dir()?
        );
        fs::write("here", "child").context("writing to a relative path")
    })?;
    std::env::set_current_dir(&outer)?;
    stage.ready_and_wait()?;
    ensure!(
        std::env::current_dir()? == outer,
        "in {:?}",
        std::env::current_dir()?
    );
    child.finish()?;
    let found = fs::read_to_string(inner.join("here"))?;
    ensure!(found == "child", "the child wrote {found:?}");
    Ok(())
}

fn cwd_removed(stage: &Stage) -> Result<()> {
    let path = stage.path("gone");
    fs::create_dir(&path)?;
    std::env::set_current_dir(&path)?;
    fs::remove_dir(&path)?;
    let link = proc::link("self", "cwd")?;
    stage.ready_and_wait()?;
    let now = proc::link("self", "cwd")?;
    ensure!(now == link, "the link was {link:?}, is {now:?}");
    ensure!(!path.exists(), "the removed directory is back");
    let made = fs::write("new", "x");
    ensure!(made.is_err(), "a file could be made in a removed directory");
    Ok(())
}

/// The child cannot see the stage's directory any more: its log and exit code say what is wrong.
fn root(stage: &Stage) -> Result<()> {
    let new_root = stage.path("root");
    fs::create_dir_all(new_root.join("sub"))?;
    fs::write(new_root.join("sub/mark"), "inside")?;
    let link = new_root.clone();
    let child = stage.child(move |stage| {
        std::os::unix::fs::chroot(&new_root)?;
        std::env::set_current_dir("/sub")?;
        stage.ready_and_wait()?;
        let mark = fs::read_to_string("/sub/mark").context("reading below the root")?;
        ensure!(mark == "inside", "read {mark:?}");
        let here = std::env::current_dir()?;
        ensure!(here == Path::new("/sub"), "in {here:?}");
        ensure!(
            !Path::new("/proc/self").exists(),
            "the old root can be seen"
        );
        Ok(())
    })?;
    stage.ready_and_wait()?;
    let found = proc::link(child.pid, "root")?;
    ensure!(found == link, "the child's root was {link:?}, is {found:?}");
    child.finish()
}

fn umask(stage: &Stage) -> Result<()> {
    let masks = [0o077, 0o000];
    let children = masks
        .map(|mask| stage.child(move |stage| keep_umask(stage, mask)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    keep_umask(stage, 0o137)?;
    children.into_iter().try_for_each(|child| child.finish())
}

fn keep_umask(stage: &Stage, mask: u32) -> Result<()> {
    sys::umask(mask);
    stage.ready_and_wait()?;
    let path = stage.path(&format!("made by {}", sys::pid()));
    fs::write(&path, "")?;
    let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
    ensure!(
        mode == 0o666 & !mask,
        "umask {mask:o} makes a file with mode {mode:o}"
    );
    let found = sys::umask(mask);
    ensure!(found == mask, "the umask was {mask:o}, is {found:o}");
    Ok(())
}

fn exe(stage: &Stage) -> Result<()> {
    let before = proc::link("self", "exe")?;
    stage.ready_and_wait()?;
    let after = proc::link("self", "exe")?;
    ensure!(
        before == after,
        "the executable was {before:?}, is {after:?}"
    );
    let (own, linked) = (fs::metadata(&before)?, fs::metadata("/proc/self/exe")?);
    use std::os::unix::fs::MetadataExt;
    let same = (own.dev(), own.ino()) == (linked.dev(), linked.ino());
    ensure!(same, "the link leads to another file than its name");
    // It must be the mapped file too, and busy as one that runs.
    let text = fs::OpenOptions::new().write(true).open("/proc/self/exe");
    let busy = text.err().and_then(|error| error.raw_os_error());
    ensure!(busy == Some(libc::ETXTBSY), "the executable is not busy");
    Ok(())
}
