//! Probes of the cgroup freezers: a child of ours, in a cgroup of ours, which is gone afterwards.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use firn_sys::Errno;
use firn_sys::probe::IdleChild;

/// How long freezing one sleeping task may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Freezes a child by `cgroup.freeze`.
pub(super) fn freeze_v2() -> Result<(), Errno> {
    let parent = own_cgroup(|controllers, kind| kind == "cgroup2" && controllers.is_empty())?;
    let cgroup = Scratch::make(&parent)?;
    let child = cgroup.child()?;
    std::fs::write(cgroup.path.join("cgroup.freeze"), "1")?;
    let frozen = wait_for(&cgroup.path.join("cgroup.events"), |text| {
        text.lines().any(|line| line == "frozen 1")
    });
    std::fs::write(cgroup.path.join("cgroup.freeze"), "0")?;
    drop(child);
    frozen
}

/// Freezes a child by `freezer.state`.
pub(super) fn freeze_v1() -> Result<(), Errno> {
    let has = |controllers: &str| controllers.split(',').any(|name| name == "freezer");
    let parent = own_cgroup(|controllers, kind| kind == "cgroup" && has(controllers))?;
    let cgroup = Scratch::make(&parent)?;
    let child = cgroup.child()?;
    let state = cgroup.path.join("freezer.state");
    std::fs::write(&state, "FROZEN")?;
    let frozen = wait_for(&state, |text| text.trim() == "FROZEN");
    std::fs::write(&state, "THAWED")?;
    drop(child);
    frozen
}

fn wait_for(file: &Path, reached: impl Fn(&str) -> bool) -> Result<(), Errno> {
    let start = Instant::now();
    while !reached(&std::fs::read_to_string(file)?) {
        if start.elapsed() > PATIENCE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// The directory of the own cgroup in the hierarchy that `wanted` accepts by controllers and type.
fn own_cgroup(wanted: impl Fn(&str, &str) -> bool) -> Result<PathBuf, Errno> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    groups
        .lines()
        .find_map(|line| directory(line, &mounts, &wanted))
        .ok_or(Errno::ENOENT)
}

fn directory(line: &str, mounts: &str, wanted: &impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    let (_, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let mount = mounts.lines().find_map(|mount| {
        let (before, after) = mount.split_once(" - ")?;
        let mut fields = before.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1)?);
        let all_there = controllers
            .split(',')
            .filter(|name| !name.is_empty())
            .all(|name| options.split(',').any(|option| option == name));
        (wanted(controllers, kind) && all_there).then(|| (root.to_owned(), point.to_owned()))
    });
    let (root, point) = mount?;
    let below = if root == "/" {
        path
    } else {
        path.strip_prefix(&root)?
    };
    Some(Path::new(&point).join(below.trim_start_matches('/')))
}

/// A cgroup that is removed when it goes.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn make(parent: &Path) -> Result<Scratch, Errno> {
        let path = parent.join(format!("firn-check-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Scratch { path })
    }

    fn child(&self) -> Result<IdleChild, Errno> {
        let child = IdleChild::spawn()?;
        std::fs::write(self.path.join("cgroup.procs"), child.pid().to_string())?;
        Ok(child)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A task that has just been reaped can hold the group for a moment.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        tracing::warn!("cgroup {} can't be removed", self.path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 24 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
31 24 0:27 /lxc/a /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
";

    #[test]
    fn directories_follow_mount_points_and_roots() {
        let v2 = |controllers: &str, kind: &str| kind == "cgroup2" && controllers.is_empty();
        let found = directory("0::/user", MOUNTS, &v2);
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup/unified/user")));
        let v1 = |_: &str, kind: &str| kind == "cgroup";
        let found = directory("6:freezer:/lxc/a/b", MOUNTS, &v1);
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup/freezer/b")));
        assert_eq!(directory("6:freezer:/elsewhere", MOUNTS, &v1), None);
        assert_eq!(directory("nonsense", MOUNTS, &v1), None);
    }
}
