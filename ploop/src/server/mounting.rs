//! Mounting the file system of a disk, from the process that will take it down again.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::kernel;

/// The options that are the kernel's own; the others go to the file system.
const FLAGS: &[(&str, MountFlags, bool)] = &[
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("suid", MountFlags::NOSUID, false),
    ("nodev", MountFlags::NODEV, true),
    ("dev", MountFlags::NODEV, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("noatime", MountFlags::NOATIME, true),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("relatime", MountFlags::RELATIME, true),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("lazytime", MountFlags::LAZYTIME, true),
];

/// Splits options as in fstab into the kernel's flags and the file system's own.
pub fn split_options(options: &str) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut rest = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match FLAGS.iter().find(|(name, ..)| *name == option) {
            Some((_, flag, on)) => flags.set(*flag, *on),
            None if option == "defaults" => {}
            None => rest.push(option),
        }
    }
    (flags, rest.join(","))
}

/// Options with what belongs to a file system of a disk: snapshots, clones and backups are mounted beside the
/// disk that they come from, and XFS takes only one of a name unless told not to look.
pub fn with_defaults(fs_type: &str, options: &str) -> String {
    match fs_type {
        "xfs" if options.is_empty() => "nouuid".to_owned(),
        "xfs" => format!("{options},nouuid"),
        _ => options.to_owned(),
    }
}

/// Mounts a device.
///
/// # Errors
/// The kernel refused: no such file system, damaged, no such directory.
pub fn mount(
    device: &Path,
    target: &Path,
    fs_type: &str,
    options: &str,
    read_only: bool,
) -> io::Result<()> {
    let (mut flags, data) = split_options(options);
    flags.set(
        MountFlags::RDONLY,
        read_only || flags.contains(MountFlags::RDONLY),
    );
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(
        device,
        target,
        fs_type,
        flags,
        data.as_c_str(),
    )?)
}

/// Takes a mount down.
///
/// # Errors
/// `EBUSY` as long as somebody uses it.
pub fn unmount(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?)
}

/// Does something where the mounts of another process are seen: a disk may be mounted in a namespace
/// that only its server is in.
///
/// # Errors
/// The process is no more, or its mounts may not be looked at.
pub fn where_seen_by<T: Send>(process: i32, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let theirs = File::open(format!("/proc/{process}/ns/mnt"))?;
    let ours = std::fs::metadata("/proc/self/ns/mnt")?;
    let there = theirs.metadata()?;
    if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        let visitor = scope.spawn(|| {
            kernel::enter_mount_namespace(&theirs)?;
            Ok(work())
        });
        let panicked = |_| Err(io::Error::other("the visit to another namespace failed"));
        visitor.join().unwrap_or_else(panicked)
    })
}

/// Whether the topmost mount at a directory is one of this block device. The device number that files
/// show does not tell: Btrfs makes one up.
pub fn is_mounted_at(device: &Path, target: &Path) -> bool {
    // Of this thread: it may be in another namespace than the others.
    let mounts = std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default();
    let Some(source) = topmost_source(&mounts, target) else {
        return false;
    };
    let number = |path: &Path| std::fs::metadata(path).map(|meta| meta.rdev()).ok();
    source == device || number(&source).is_some_and(|it| it != 0 && Some(it) == number(device))
}

/// The source of the topmost mount at a directory.
///
/// Source: man 5 proc_pid_mountinfo
fn topmost_source(mountinfo: &[u8], target: &Path) -> Option<PathBuf> {
    let mut lines = mountinfo.split(|byte| *byte == b'\n').rev();
    lines.find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        let at = unescaped(fields.get(4)?);
        (at == target).then(|| fields.get(dash + 2).map(|field| unescaped(field)))?
    })
}

/// A path in which spaces and the like are written as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < field.len() {
        let digits = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                at += 4;
            }
            None => {
                bytes.push(field[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_apart() {
        let (flags, data) = split_options("ro,noatime,data=ordered,,defaults,rw,discard");
        assert_eq!(flags, MountFlags::NOATIME);
        assert_eq!(data, "data=ordered,discard");
        assert_eq!(with_defaults("xfs", ""), "nouuid");
        assert_eq!(with_defaults("xfs", "ro"), "ro,nouuid");
        assert_eq!(with_defaults("ext4", "ro"), "ro");
    }

    #[test]
    fn the_topmost_mount_at_a_place_is_found() {
        let info = b"36 35 98:0 / /a\\040b rw - btrfs /dev/loop1 rw\n\
            37 35 0:44 /x /mnt rw,noatime shared:3 master:1 - ext4 /dev/loop2 rw\n\
            38 37 0:45 / /mnt rw - tmpfs none rw\n";
        let source = |target: &str| topmost_source(info, Path::new(target));
        assert_eq!(source("/a b"), Some("/dev/loop1".into()));
        assert_eq!(source("/mnt"), Some("none".into()));
        assert_eq!(source("/"), None);
        assert_eq!(unescaped(b"\\1\\134x\\"), PathBuf::from("\\1\\x\\"));
    }
}
