//! Which tasks belong to a tree: /proc/PID/task, its children, and who must not be frozen.

use std::collections::HashSet;
use std::fs;
use std::sync::OnceLock;

use firn_sys::Pid;

use super::FreezeError;
use crate::crew;
use crate::task::status::{Stat, Status, StatusError};
use crate::task::threads::ThreadsDir;

/// Threads of a process that are worth a thread of our own to ask for their children.
const THREADS_PER_THREAD: usize = 64;

/// Tids of a process, the leader first; empty when it is gone.
pub fn threads(pid: Pid) -> Vec<Pid> {
    let tids = ThreadsDir::open(pid).and_then(|dir| dir.tids());
    let mut tids = tids.unwrap_or_default();
    tids.sort_by_key(|tid| (*tid != pid, *tid));
    tids
}

/// The thread through which a process is looked at: its leader, or another one where that has exited.
pub fn speaker(pid: Pid) -> Pid {
    let is_dead = |tid: Pid| {
        Status::read(pid, tid).map_or(true, |status| matches!(status.state, b'Z' | b'X'))
    };
    let mut tids = threads(pid).into_iter();
    tids.find(|tid| !is_dead(*tid)).unwrap_or(pid)
}

/// Children of a process, of all its threads; empty when it is gone.
pub fn children(pid: Pid, threads: &[Pid]) -> Vec<Pid> {
    let Ok(dir) = ThreadsDir::open(pid) else {
        return Vec::new();
    };
    // Unreadable for a thread that has just exited, and on kernels without CONFIG_PROC_CHILDREN.
    let read = |tid: &Pid| dir.read(*tid, "children");
    let texts = crew::share_out(threads, THREADS_PER_THREAD, read);
    let mut all: Vec<Pid> = (texts.iter().flatten())
        .filter_map(|text| str::from_utf8(text).ok())
        .flat_map(str::split_whitespace)
        .filter_map(|number| number.parse().ok())
        .map(Pid::from_raw)
        .collect();
    if all.is_empty() && !has_children_files() {
        all = children_by_scan(pid);
    }
    all
}

/// Whether the kernel has `children` files (CONFIG_PROC_CHILDREN); it does not change while it runs.
fn has_children_files() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let me = std::process::id();
        fs::exists(format!("/proc/{me}/task/{me}/children")).unwrap_or(false)
    })
}

/// Looks through all of /proc for children of `pid`, where the kernel has no `children` files.
fn children_by_scan(pid: Pid) -> Vec<Pid> {
    numbers_in("/proc")
        .into_iter()
        .filter(|candidate| Stat::read(*candidate).is_ok_and(|stat| stat.ppid == pid))
        .collect()
}

fn numbers_in(dir: &str) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

/// Refuses roots that can't be frozen at all.
///
/// # Errors
/// The process is gone, dead, a kernel thread, or this process or one of its ancestors.
pub fn check_root(root: Pid) -> Result<(), FreezeError> {
    let stat = match Stat::read(root) {
        Ok(stat) => stat,
        Err(StatusError::Read { .. }) => return Err(FreezeError::Gone(root)),
        Err(error) => return Err(error.into()),
    };
    if stat.is_kernel_thread() {
        return Err(FreezeError::KernelThread(root));
    }
    if own_ancestors().contains(&root) {
        return Err(FreezeError::OwnAncestor(root));
    }
    if stat.state == b'Z' && threads(root).len() <= 1 {
        return Err(FreezeError::RootIsZombie(root));
    }
    Ok(())
}

/// This process and everything above it.
fn own_ancestors() -> HashSet<Pid> {
    let mut seen = HashSet::new();
    let mut pid = Pid::this();
    while pid.raw() > 0 && seen.insert(pid) {
        let Ok(stat) = Stat::read(pid) else { break };
        pid = stat.ppid;
    }
    seen
}

/// The pids of a tree that is not stopped, parents first: a snapshot for a first look, not to rely on.
pub fn running_tree(root: Pid) -> Vec<Pid> {
    let mut seen = HashSet::from([root]);
    let mut all = vec![root];
    let mut next = 0;
    while next < all.len() {
        let pid = all[next];
        next += 1;
        for child in children(pid, &threads(pid)) {
            if seen.insert(child) {
                all.push(child);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_itself_its_parent_and_the_dead() {
        let me = Pid::this();
        assert!(matches!(check_root(me), Err(FreezeError::OwnAncestor(_))));
        assert!(matches!(
            check_root(Pid::from_raw(1)),
            Err(FreezeError::OwnAncestor(_))
        ));
        assert!(matches!(
            check_root(Pid::from_raw(i32::MAX)),
            Err(FreezeError::Gone(_))
        ));
    }

    #[test]
    fn finds_own_threads_and_children() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let me = Pid::this();
        assert!(threads(me).starts_with(&[me]));
        assert!(children(me, &threads(me)).contains(&pid));
        assert!(running_tree(me).contains(&pid));
        assert!(children_by_scan(me).contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
