//! Who else holds a pipe of the tree.
//!
//! The kernel has no list of a pipe's holders, so all of /proc is walked; that is done only for trees
//! that have pipes. Links are compared as text: `pipe:[INODE]`, or the path of a fifo.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};

use firn_sys::{Pid, file};

use super::open_file::{DescriptorDir, OpenFile, Trouble, links_of};
use super::survey::held_outside;
use crate::crew;
use crate::freeze;
use crate::obstacle::Obstacle;
use crate::task::status::Stat;

/// Tasks that are worth a thread of their own to look at their descriptors.
const TASKS_PER_THREAD: usize = 16;

/// One obstacle for each of the files (by link text) that a process other than `inside` has open.
pub(super) fn obstacles(files: &HashMap<Vec<u8>, OpenFile>, inside: &[Pid]) -> Vec<Obstacle> {
    obstacles_with(files, inside, held_outside)
}

/// The same with words of the caller's, who is given the holder and the link text.
pub(super) fn obstacles_with(
    files: &HashMap<Vec<u8>, OpenFile>,
    inside: &[Pid],
    trouble: impl Fn(&str, &[u8]) -> Trouble,
) -> Vec<Obstacle> {
    obstacles_among(files, inside, |_, _| false, trouble)
}

fn obstacles_among(
    files: &HashMap<Vec<u8>, OpenFile>,
    inside: &[Pid],
    is_ours: impl Fn(Pid, i32) -> bool,
    trouble: impl Fn(&str, &[u8]) -> Trouble,
) -> Vec<Obstacle> {
    if files.is_empty() {
        return Vec::new();
    }
    let inside: HashSet<Pid> = inside.iter().copied().collect();
    let mut found = Vec::new();
    let mut named = HashSet::new();
    for (pid, fd, link) in links_outside(&inside, |link| files.contains_key(link)) {
        if !is_ours(pid, fd) && !belongs_to(pid, &inside) && named.insert(link.clone()) {
            let holder = format!("process {pid} (fd {fd})");
            found.push(files[&link].obstacle(trouble(&holder, &link)));
        }
    }
    found
}

/// The same at the end of a look at stopped tasks: `ours` are descriptors of this process which it has for
/// the time of the dump only.
pub(super) fn obstacles_beside(
    files: &HashMap<Vec<u8>, OpenFile>,
    inside: &[Pid],
    ours: &[OwnedFd],
) -> Vec<Obstacle> {
    let me = Pid::this();
    let is_ours = |pid: Pid, fd: i32| pid == me && ours.iter().any(|own| own.as_raw_fd() == fd);
    obstacles_among(files, inside, is_ours, held_outside)
}

/// A descriptor of a process outside of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) pid: Pid,
    pub(super) fd: i32,
    /// Of the file; None where it could not be looked at.
    pub(super) inode: Option<u64>,
}

/// Who outside the tree and this process has files of a kind that has no names, such as `anon_inode:[io_uring]`.
pub(super) fn holders(link: &[u8], inside: &[Pid]) -> Vec<Held> {
    let inside: HashSet<Pid> = inside.iter().copied().collect();
    let me = Pid::this();
    let held = links_outside(&inside, |found| found == link).into_iter();
    let held = held.filter(|(pid, ..)| *pid != me && !belongs_to(*pid, &inside));
    let seen = held.map(|(pid, fd, _)| {
        let seen = DescriptorDir::open(pid).and_then(|dir| dir.see(fd));
        let inode = seen.ok().map(|seen| seen.info.ino);
        Held { pid, fd, inode }
    });
    seen.collect()
}

/// All descriptors of other processes with such links.
fn links_outside(
    inside: &HashSet<Pid>,
    is_wanted: impl Fn(&[u8]) -> bool + Sync,
) -> Vec<(Pid, i32, Vec<u8>)> {
    let kernel_threads = kernel_threads();
    let others: Vec<Pid> = (all_pids().into_iter())
        .filter(|pid| !inside.contains(pid) && !kernel_threads.contains(pid))
        .collect();
    let held_by = |pid: &Pid| -> Vec<(Pid, i32, Vec<u8>)> {
        let links = links_of(*pid).into_iter();
        let wanted = links.filter(|(_, link)| is_wanted(link));
        wanted.map(|(fd, link)| (*pid, fd, link)).collect()
    };
    crew::share_out(&others, TASKS_PER_THREAD, held_by).concat()
}

/// True for a process that was born into the tree after its list was made, and for one that is gone
/// already: a tree that is not stopped yet forks while it is looked at.
fn belongs_to(pid: Pid, inside: &HashSet<Pid>) -> bool {
    let mut seen = HashSet::new();
    let mut at = pid;
    while at.raw() > 0 && seen.insert(at) {
        if inside.contains(&at) {
            return true;
        }
        match Stat::read(at) {
            Ok(stat) => at = stat.ppid,
            Err(_) => return at == pid,
        }
    }
    false
}

/// Most of the tasks of a quiet system, none of which has a descriptor. In a pid namespace there are none.
fn kernel_threads() -> HashSet<Pid> {
    const KTHREADD: Pid = Pid::from_raw(2);
    match Stat::read(KTHREADD) {
        Ok(stat) if stat.is_kernel_thread() => freeze::children(KTHREADD, &[KTHREADD])
            .into_iter()
            .collect(),
        _ => HashSet::new(),
    }
}

fn all_pids() -> Vec<Pid> {
    let numbers = file::open("/proc".as_ref(), 0).and_then(file::list_numbers);
    numbers
        .unwrap_or_default()
        .into_iter()
        .map(Pid::from_raw)
        .collect()
}
