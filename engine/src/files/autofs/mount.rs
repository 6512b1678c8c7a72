//! Mounts of type autofs, as their options tell of them and as images have them.

use std::os::unix::ffi::OsStrExt;

use firn_proto::FirnAutofsEntry;
use firn_sys::Pid;

use super::super::mounts::Mount;

/// Options that are other ones after a restore.
const VOLATILE: [&str; 3] = ["fd", "pgrp", "pipe_ino"];

/// A mount of type autofs with a pipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Automount {
    pub(super) mount: Mount,
    /// Inode number of the pipe.
    pub(super) pipe: u64,
    /// Process group of the automounter.
    pub(super) pgrp: Pid,
}

impl Automount {
    /// None for another mount.
    pub(super) fn of(mount: Mount) -> Option<Automount> {
        if mount.kind != b"autofs" {
            return None;
        }
        let options = str::from_utf8(&mount.options).ok()?;
        Some(Automount {
            pipe: number(options, "pipe_ino")?,
            pgrp: Pid::from_raw(number(options, "pgrp")?),
            mount,
        })
    }

    pub(super) fn to_image(&self) -> FirnAutofsEntry {
        let options = String::from_utf8_lossy(&self.mount.options);
        let lasting = options
            .split(',')
            .filter(|one| !VOLATILE.contains(&key(one)));
        FirnAutofsEntry {
            mount_point: self.mount.path.as_os_str().as_bytes().to_vec(),
            source: self.mount.source.clone(),
            options: join(lasting),
            pgrp: self.pgrp.to_image(),
        }
    }
}

fn key(option: &str) -> &str {
    option.split('=').next().unwrap_or(option)
}

fn join<'a>(options: impl Iterator<Item = &'a str>) -> String {
    options.collect::<Vec<_>>().join(",")
}

fn number<T: std::str::FromStr>(options: &str, name: &str) -> Option<T> {
    let values = options
        .split(',')
        .filter_map(|option| option.split_once('='));
    let mut found = values.filter(|(key, _)| *key == name);
    found.next()?.1.parse().ok()
}

/// Options for a new mount with that pipe, and the seconds after which it may go, which is no option of a new one.
pub(super) fn options_of(entry: &FirnAutofsEntry, pipe: i32, pgrp: Pid) -> (String, u64) {
    let timeout = number(&entry.options, "timeout").unwrap_or(0);
    let lasting = entry.options.split(',').filter(|one| key(one) != "timeout");
    (format!("{},fd={pipe},pgrp={pgrp}", join(lasting)), timeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &str) -> Mount {
        Mount {
            id: 7,
            dev: 41,
            path: "/misc".into(),
            kind: kind.into(),
            source: b"auto".to_vec(),
            options: options.into(),
        }
    }

    const OPTIONS: &str =
        "rw,fd=6,pgrp=4711,timeout=300,minproto=5,maxproto=5,indirect,pipe_ino=31337";

    #[test]
    fn the_pipe_is_among_the_options() {
        let found = Automount::of(mount("autofs", OPTIONS)).expect("an automount");
        assert_eq!((found.pipe, found.pgrp), (31337, Pid::from_raw(4711)));
        assert_eq!(Automount::of(mount("ext4", OPTIONS)), None);
        let silent = OPTIONS.replace("31337", "-1");
        assert_eq!(Automount::of(mount("autofs", &silent)), None);
    }

    #[test]
    fn a_new_mount_has_the_old_options() {
        let found = Automount::of(mount("autofs", OPTIONS)).expect("an automount");
        let (options, timeout) = options_of(&found.to_image(), 9, Pid::from_raw(12));
        assert_eq!(options, "rw,minproto=5,maxproto=5,indirect,fd=9,pgrp=12");
        assert_eq!(timeout, 300);
    }
}
