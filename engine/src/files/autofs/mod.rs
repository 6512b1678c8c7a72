//! Pipes that the kernel writes to for an automounter.
//!
//! No process has their writing end: a mount of type autofs has it. The kernel writes down there what is to be
//! mounted, and whoever has walked into the mount waits until the automounter has answered.
//!
//! ```text
//! dump      the options of the mount tell the inode of its pipe, and the automounter's process group
//! restore   makes a new pipe, and the mount where it is gone ([`restore`])
//! a task    of the group silences the mount and gives it the new pipe: its group becomes the automounter's
//! ```
//!
//! What waits in the pipe is somebody's request, whom nobody would answer, so the dump is refused until it has been
//! read. Who waits for the answer to a request that has been read gets ENOENT when the mount is silenced.
//!
//! Source: linux Documentation/filesystems/autofs.rst; the option `pipe_ino` of the mount, Linux 4.16.

mod mount;
mod restore;

pub(super) use restore::Automounts;

use std::collections::{HashMap, HashSet};

use firn_proto::{FileEntry, PipeEntry};
use firn_sys::Pid;
use firn_sys::file::{O_ACCMODE, O_WRONLY};

use super::dump::Collected;
use super::mounts;
use super::open_file::{OpenFile, Trouble};
use crate::obstacle::Obstacle;
use crate::task::status::Stat;
use mount::Automount;

/// One obstacle for each of the pipes (by link text) that an automount writes to and that can't be saved, in a tree
/// of these processes, which run.
pub(super) fn obstacles(pipes: &HashMap<Vec<u8>, OpenFile>, pids: &[Pid]) -> Vec<Obstacle> {
    let served = served(pipes);
    if served.is_empty() {
        return Vec::new();
    }
    let groups = pids.iter().filter_map(|pid| Stat::read(*pid).ok());
    let groups: HashSet<Pid> = groups.map(|stat| stat.pgid).collect();
    let found = served.iter().filter_map(|(link, mount)| {
        let trouble = master_trouble(mount, &groups)?;
        Some(pipes[link].obstacle(trouble))
    });
    found.collect()
}

/// Notes the mounts at the entries of their pipes, and takes these out of the half-open ones of a frozen tree with
/// these process groups. Returns what can't be saved.
pub(super) fn settle(
    half_open: &mut HashMap<Vec<u8>, OpenFile>,
    groups: &HashSet<Pid>,
    collected: &mut Collected,
) -> Vec<Obstacle> {
    let mut found = Vec::new();
    for (link, mount) in served(half_open) {
        let pipe = half_open.remove(&link).expect("it was among them");
        let trouble = master_trouble(&mount, groups)
            .or_else(|| request_trouble(&mount, collected.pipes.waiting(mount.pipe)));
        if let Some(trouble) = trouble {
            found.push(pipe.obstacle(trouble));
            continue;
        }
        let pipes = collected.entries.iter_mut().filter_map(pipe_of);
        for entry in pipes.filter(|pipe| u64::from(pipe.pipe_id) == mount.pipe && is_read(pipe)) {
            entry.firn.get_or_insert_default().autofs = Some(mount.to_image());
        }
    }
    found
}

fn pipe_of(entry: &mut FileEntry) -> Option<&mut PipeEntry> {
    entry.pipe.as_mut()
}

fn is_read(pipe: &PipeEntry) -> bool {
    pipe.flags & O_ACCMODE.cast_unsigned() != O_WRONLY.cast_unsigned()
}

/// The pipes, by link text, that mounts write to. All tasks of a tree have the mounts of the first one.
fn served(pipes: &HashMap<Vec<u8>, OpenFile>) -> Vec<(Vec<u8>, Automount)> {
    let Some(any) = pipes.values().next() else {
        return Vec::new();
    };
    let mounts = mounts::of_task(any.pid)
        .into_iter()
        .filter_map(Automount::of);
    let linked = mounts.map(|mount| (format!("pipe:[{}]", mount.pipe).into_bytes(), mount));
    linked
        .filter(|(link, _)| pipes.contains_key(link))
        .collect()
}

fn master_trouble(mount: &Automount, groups: &HashSet<Pid>) -> Option<Trouble> {
    if groups.contains(&mount.pgrp) {
        return None;
    }
    Some(Trouble::new(
        format!(
            "the kernel tells process group {}, which is not in the tree, through it what to mount at {} (autofs)",
            mount.pgrp,
            mount.mount.path.display()
        ),
        "dump the tree that contains the automounter",
    ))
}

fn request_trouble(mount: &Automount, waiting: u64) -> Option<Trouble> {
    (waiting > 0).then(|| {
        Trouble::new(
            format!(
                "somebody waits for something to be mounted at {} (autofs)",
                mount.mount.path.display()
            ),
            "dump again when the automounter has answered",
        )
    })
}
