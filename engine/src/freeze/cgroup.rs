//! The cgroup v2 freezer, where the tree has a group to itself.
//!
//! Tasks of a frozen v2 group can be seized and stop for ptrace, so the group is thawed again as soon as
//! every thread is in its ptrace stop. A v1 freezer can't be used this way: its tasks do not react to
//! ptrace until they are thawed.
//!
//! Source: linux Documentation/admin-guide/cgroup-v2.rst, cgroup.freeze.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use firn_sys::Pid;
use firn_sys::procfs;

use super::{FreezeOptions, walk};
use crate::inject::Journal;

/// Failure of the cgroup freezer.
#[derive(Debug, thiserror::Error)]
pub enum CgroupFreezeError {
    /// A file of the group could not be read or written.
    #[error("can't access {}", path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The group did not report to be frozen.
    #[error("the cgroup {} did not freeze in time", .0.display())]
    NotFrozen(PathBuf),
}

/// A group that was frozen here; dropped, it is thawed.
#[derive(Debug)]
pub struct FrozenGroup {
    path: PathBuf,
    journal: Option<Journal>,
    thawed: bool,
}

/// Finds the group to be frozen: the one that was asked for, or else the one that holds the tree and nothing else.
///
/// Returns None where there is no such group, or where somebody else has frozen it already.
pub fn find(root: Pid, options: &FreezeOptions) -> Result<Option<PathBuf>, CgroupFreezeError> {
    let path = match &options.cgroup {
        Some(path) => path.clone(),
        None => match own_group(root) {
            Some(path) => path,
            None => return Ok(None),
        },
    };
    Ok((!is_set(&path.join("cgroup.freeze"))?).then_some(path))
}

impl FrozenGroup {
    /// Freezes a group, which is noted.
    pub fn freeze(
        path: PathBuf,
        deadline: Instant,
        journal: Option<&Journal>,
    ) -> Result<FrozenGroup, CgroupFreezeError> {
        if let Some(journal) = journal {
            journal.note_frozen(Some(&path));
        }
        let group = FrozenGroup {
            path,
            journal: journal.cloned(),
            thawed: false,
        };
        write(&group.path.join("cgroup.freeze"), "1")?;
        group.wait_frozen(deadline)?;
        Ok(group)
    }

    fn wait_frozen(&self, deadline: Instant) -> Result<(), CgroupFreezeError> {
        loop {
            let events = read(&self.path.join("cgroup.events"))?;
            if events.lines().any(|line| line == "frozen 1") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(CgroupFreezeError::NotFrozen(self.path.clone()));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Thaws the group.
    pub fn thaw(mut self) -> Result<(), CgroupFreezeError> {
        self.thawed = true;
        let result = thaw(&self.path);
        self.forget();
        result
    }

    fn forget(&self) {
        if let Some(journal) = &self.journal {
            journal.note_frozen(None);
        }
    }
}

impl Drop for FrozenGroup {
    fn drop(&mut self) {
        if !self.thawed {
            let _ = thaw(&self.path);
            self.forget();
        }
    }
}

/// Thaws a group.
///
/// # Errors
/// Its file can't be written.
pub fn thaw(group: &Path) -> Result<(), CgroupFreezeError> {
    write(&group.join("cgroup.freeze"), "0")
}

/// The v2 group of `root`, if it and its subgroups hold exactly the tree below `root`.
fn own_group(root: Pid) -> Option<PathBuf> {
    let membership = procfs::read_to_string(format!("/proc/{root}/cgroup")).ok()?;
    let name = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))?;
    if name.is_empty() {
        return None;
    }
    let path = mount_point()?.join(name);
    fs::exists(path.join("cgroup.freeze"))
        .ok()
        .filter(|exists| *exists)?;
    let tree: HashSet<Pid> = walk::running_tree(root).into_iter().collect();
    (members(&path)?.iter().all(|pid| tree.contains(pid))).then_some(path)
}

/// Where the v2 hierarchy is mounted.
fn mount_point() -> Option<PathBuf> {
    let mounts = procfs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        fs.starts_with("cgroup2 ")
            .then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

fn members(path: &Path) -> Option<Vec<Pid>> {
    let text = procfs::read_to_string(path.join("cgroup.procs")).ok()?;
    let mut all: Vec<Pid> = text
        .lines()
        .filter_map(|line| line.parse().ok())
        .map(Pid::from_raw)
        .collect();
    for entry in fs::read_dir(path).ok()?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(members(&entry.path())?);
        }
    }
    Some(all)
}

fn is_set(path: &Path) -> Result<bool, CgroupFreezeError> {
    Ok(read(path)?.trim_end() == "1")
}

fn read(path: &Path) -> Result<String, CgroupFreezeError> {
    procfs::read_to_string(path).map_err(|source| CgroupFreezeError::Access {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupFreezeError> {
    fs::write(path, value).map_err(|source| CgroupFreezeError::Access {
        path: path.to_owned(),
        source,
    })
}
