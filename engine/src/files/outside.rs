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
    let kernel_threads = kernel_threads();
    let others: Vec<Pid> = (all_pids().into_iter())
        .filter(|pid| !inside.contains(pid) && !kernel_threads.contains(pid))
        .collect();
    let held_by = |pid: &Pid| -> Vec<(i32, Vec<u8>)> {
        let links = links_of(*pid).into_iter();
        links.filter(|(_, link)| files.contains_key(link)).collect()
    };
    let held = crew::share_out(&others, TASKS_PER_THREAD, held_by);
    let mut found = Vec::new();
    let mut named = HashSet::new();
    for (pid, held) in others.into_iter().zip(held) {
        for (fd, link) in held {
            if !is_ours(pid, fd) && !belongs_to(pid, &inside) && named.insert(link.clone()) {
                let holder = format!("process {pid} (fd {fd})");
                found.push(files[&link].obstacle(trouble(&holder, &link)));
            }
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

/// Who outside the tree has a file without a name that has this inode. Kernels before io_uring and its like got
/// inodes of their own show the same one for all, so that any holder of such a file counts.
pub(super) fn holders_of_inode(file: &OpenFile, inside: &[Pid]) -> Vec<Obstacle> {
    let me = Pid::this();
    let is_another = |pid: Pid, fd: i32| {
        let seen = DescriptorDir::open(pid).and_then(|dir| dir.see(fd));
        pid == me || seen.is_ok_and(|seen| seen.info.ino != file.info.ino)
    };
    let files = HashMap::from([(file.link.clone(), file.clone())]);
    obstacles_among(&files, inside, is_another, |holder, _| {
        let hint = "dump the tree that contains both, or let the other side close it";
        Trouble::new(format!("{holder} outside the tree has it too"), hint)
    })
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
