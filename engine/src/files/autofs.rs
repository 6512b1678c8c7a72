//! Pipes that the kernel writes to for an automounter.
//!
//! No process has their writing end, so they look like pipes whose other end is nowhere. A restored
//! daemon would need its mount set up again with the new pipe, which belongs to mount namespaces, so they
//! are refused by name.
//!
//! Source: linux Documentation/filesystems/autofs.rst; the option `pipe_ino` of the mount, Linux 4.16.

use std::collections::HashMap;

use super::open_file::{OpenFile, Trouble};
use crate::obstacle::Obstacle;

/// One obstacle for each of the pipes (by link text) that an automount writes to.
pub(super) fn obstacles(pipes: &HashMap<Vec<u8>, OpenFile>) -> Vec<Obstacle> {
    if pipes.is_empty() {
        return Vec::new();
    }
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounts = text.lines().filter_map(parse);
    let found = mounts.filter_map(|(inode, mount_point)| {
        let pipe = pipes.get(format!("pipe:[{inode}]").as_bytes())?;
        Some(pipe.obstacle(Trouble::new(
            format!(
                "the kernel tells an automounter through it what to mount at {mount_point} (autofs)"
            ),
            "stop the automounter before the dump, and start it after the restore",
        )))
    });
    found.collect()
}

/// Inode of the pipe and mount point of an autofs mount that has one.
fn parse(line: &str) -> Option<(u64, &str)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    if filesystem.next() != Some("autofs") {
        return None;
    }
    let options = filesystem.nth(1)?;
    let inode = options
        .split(',')
        .find_map(|option| option.strip_prefix("pipe_ino="))?;
    Some((inode.parse().ok()?, mount.split(' ').nth(4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pipe_is_among_the_options() {
        let line = "99 24 0:41 / /misc rw,relatime shared:44 - autofs auto \
            rw,fd=6,pgrp=4711,timeout=300,minproto=5,maxproto=5,indirect,pipe_ino=31337";
        assert_eq!(parse(line), Some((31337, "/misc")));
        assert_eq!(parse(&line.replace("autofs", "ext4")), None);
        assert_eq!(parse(&line.replace("31337", "-1")), None);
    }
}
