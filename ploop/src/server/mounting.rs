//! Mounting the file system of a disk, from the process that will take it down again.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

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

/// Whether the topmost mount at a directory is one of this block device.
pub fn is_mounted_at(device: &Path, target: &Path) -> bool {
    let (Ok(device), Ok(target)) = (std::fs::metadata(device), std::fs::metadata(target)) else {
        return false;
    };
    target.dev() == device.rdev()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_apart() {
        let (flags, data) = split_options("ro,noatime,data=ordered,,defaults,rw,discard");
        assert_eq!(flags, MountFlags::NOATIME);
        assert_eq!(data, "data=ordered,discard");
    }
}
