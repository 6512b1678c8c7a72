//! Who uses a block device. No call tells: it is looked for where a use shows, in the mounts that each
//! process sees and the files that it has open.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Users that are named; more are as good as these.
const NAMED: usize = 4;

/// Whether a process has a block device open.
///
/// # Errors
/// There is no /proc.
pub fn is_open(number: u64) -> io::Result<bool> {
    Ok(processes()?.any(|(_, dir)| has_open(&dir, number)))
}

/// What uses a device, each in a few words, as far as it can be seen from here.
pub fn users_of(device: &Path) -> Vec<String> {
    let Ok(number) = std::fs::metadata(device).map(|meta| meta.rdev()) else {
        return Vec::new();
    };
    let me = std::process::id();
    let mut namespaces = HashSet::new();
    let mut users = Vec::new();
    for (pid, dir) in processes().into_iter().flatten() {
        let name = || name_of(pid, &dir);
        if std::fs::read_link(dir.join("ns/mnt")).is_ok_and(|it| namespaces.insert(it)) {
            let mounts = std::fs::read(dir.join("mountinfo")).unwrap_or_default();
            users.extend(
                mount_of(&mounts, device, number)
                    .map(|at| format!("the mount at {at} that {} sees", name())),
            );
        }
        if pid != me && has_open(&dir, number) {
            users.push(format!("{}, which has it open", name()));
        }
        if users.len() >= NAMED {
            break;
        }
    }
    users
}

/// Who keeps a mount from being taken down, each in a few words, as far as it can be seen from here. Only the names
/// of what processes use are looked at: the file system may not answer.
pub fn users_of_mount(target: &Path) -> Vec<String> {
    let users = processes().into_iter().flatten().filter_map(|(pid, dir)| {
        let used = used_below(&dir, target)?;
        Some(format!(
            "{}, which uses {}",
            name_of(pid, &dir),
            used.display()
        ))
    });
    users.take(NAMED).collect()
}

/// A file or directory below a mount that a process has open, is in, or runs.
fn used_below(process: &Path, target: &Path) -> Option<PathBuf> {
    let fds = std::fs::read_dir(process.join("fd")).into_iter().flatten();
    let links = ["cwd", "root", "exe"].map(|name| process.join(name));
    let mut links = links.into_iter().chain(fds.flatten().map(|fd| fd.path()));
    links.find_map(|link| {
        let used = std::fs::read_link(link).ok()?;
        used.starts_with(target).then_some(used)
    })
}

fn name_of(pid: u32, process: &Path) -> String {
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    format!("process {pid} ({})", name.trim_end())
}

/// Number and directory of each process.
fn processes() -> io::Result<impl Iterator<Item = (u32, PathBuf)>> {
    let entries = std::fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, entry.path()))
    }))
}

/// Whether a process has a block device open; one that has ended meanwhile has nothing open. Nobody is
/// asked for news of the files: a server of one of them may never answer.
fn has_open(process: &Path, number: u64) -> bool {
    use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
    let is_it = |path: PathBuf| {
        let known = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
        known.is_ok_and(|stat| {
            FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice
                && rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor) == number
        })
    };
    let fds = std::fs::read_dir(process.join("fd")).into_iter().flatten();
    fds.flatten().any(|fd| is_it(fd.path()))
}

/// Where a device is mounted, as the table writes it.
///
/// Source: man 5 proc_pid_mountinfo
fn mount_of(mountinfo: &[u8], device: &Path, number: u64) -> Option<String> {
    let named = format!(
        "{}:{}",
        rustix::fs::major(number),
        rustix::fs::minor(number)
    );
    let device = device.as_os_str().as_encoded_bytes();
    mountinfo.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        let is_it =
            fields.get(2) == Some(&named.as_bytes()) || fields.get(dash + 2) == Some(&device);
        is_it.then(|| String::from_utf8_lossy(fields.get(4).unwrap_or(&&b"?"[..])).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_nobody_has_open_are_not_found() {
        assert!(!is_open(u64::MAX).unwrap());
        assert!(users_of(Path::new("/dev/ublkb4711")).is_empty());
    }

    #[test]
    fn who_is_in_a_directory_is_found() {
        let dir = std::env::current_dir().unwrap();
        let own = Path::new("/proc/self");
        assert_eq!(used_below(own, &dir).as_deref(), Some(&*dir));
        assert_eq!(used_below(own, &dir.join("no-such-place")), None);
    }

    #[test]
    fn mounts_are_found_by_number_and_by_name() {
        let info = b"36 35 7:5 / /a\\040b rw - ext4 /dev/root rw\n\
            37 35 0:44 / /mnt rw shared:3 - btrfs /dev/loop9 rw\n";
        let found = |name: &str, number| mount_of(info, Path::new(name), number);
        assert_eq!(
            found("/dev/loop5", rustix::fs::makedev(7, 5)).as_deref(),
            Some("/a\\040b")
        );
        assert_eq!(
            found("/dev/loop9", rustix::fs::makedev(7, 9)).as_deref(),
            Some("/mnt")
        );
        assert_eq!(found("/dev/loop6", rustix::fs::makedev(7, 6)), None);
    }
}
