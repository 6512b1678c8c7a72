//! Open directories.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static DIRECTORY: Workload =
    Workload::new("files/directory", "a directory read half", directory);
pub static REMOVED: Workload = Workload::new(
    "files/directory-removed",
    "a directory that has been removed",
    removed,
);

fn directory(stage: &Stage) -> Result<()> {
    let path = stage.path("directory");
    fs::create_dir(&path)?;
    let wanted: BTreeSet<String> = (0..300).map(|n| format!("entry number {n}")).collect();
    for name in &wanted {
        fs::write(path.join(name), "")?;
    }
    let fd = sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY)?;
    let mut seen = BTreeSet::new();
    let first = sys::read_names(&fd, 2048)?;
    ensure!(
        !first.is_empty() && first.len() < 300,
        "{} names in 2 KiB",
        first.len()
    );
    let mut all = first;
    stage.ready_and_wait()?;
    loop {
        let more = sys::read_names(&fd, 2048)?;
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    for name in all.into_iter().filter(|name| !name.starts_with('.')) {
        ensure!(seen.insert(name.clone()), "`{name}` was read twice");
    }
    ensure!(seen == wanted, "{} of 300 entries were read", seen.len());
    Ok(())
}

fn removed(stage: &Stage) -> Result<()> {
    let path = stage.path("directory");
    fs::create_dir(&path)?;
    let fd = sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY)?;
    fs::remove_dir(&path)?;
    stage.ready_and_wait()?;
    ensure!(!path.exists(), "the removed directory is back");
    // The kernel says ENOENT for a directory that is no more.
    match sys::read_names(&fd, 2048) {
        Ok(names) => ensure!(names.is_empty(), "the removed directory holds {names:?}"),
        Err(error) => ensure!(
            error.raw_os_error() == Some(libc::ENOENT),
            "reading it: {error}"
        ),
    }
    let link = crate::proc::link(
        "self",
        &format!("fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)),
    )?;
    ensure!(
        link.to_string_lossy().ends_with("directory (deleted)"),
        "it leads to {link:?}"
    );
    Ok(())
}
