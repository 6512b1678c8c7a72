//! Where BPF maps are pinned: names in a filesystem of type bpf, under which others find them.
//!
//! A pinned map outlives the tasks that have it open, and belongs to whoever knows the name: loaders, programs
//! in the kernel, tools. So a restore takes the map that is pinned there, if it has the same shape, with what it
//! holds by then; a map of its own, filled from the images, would be another one for everybody else. Where the name
//! leads nowhere any more, the map is made anew and pinned again.
//!
//! The kernel does not tell where a map is pinned, so the names in all such filesystems are looked through.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use firn_proto::BpfmapFileEntry;
use firn_sys::bpf::{self, MapInfo};
use firn_sys::{Errno, Pid, Result};

use super::open::local_path;
use super::{FileRestoreOptions, mounts};

/// More names than any machine has.
const MAX_NAMES: usize = 1 << 16;
/// Deeper than any program makes its directories.
const MAX_DEPTH: usize = 16;

/// What is known of the maps of the machine; looked for when the first map is met.
#[derive(Debug, Default)]
pub(super) struct MapUsers {
    known: Option<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// By number of the map.
    pins: HashMap<u32, Vec<PathBuf>>,
    /// Numbers of the maps that loaded programs use.
    in_programs: HashSet<u32>,
}

impl MapUsers {
    /// Where a map is pinned, as the task sees it.
    pub(super) fn pins_of(&mut self, map: u32, task: Pid) -> &[PathBuf] {
        let known = self.known(task);
        known.pins.get(&map).map_or(&[], Vec::as_slice)
    }

    /// Whether a program that is loaded into the kernel uses a map.
    pub(super) fn is_in_program(&mut self, map: u32, task: Pid) -> bool {
        self.known(task).in_programs.contains(&map)
    }

    fn known(&mut self, task: Pid) -> &Known {
        self.known.get_or_insert_with(|| Known {
            pins: pins(task),
            in_programs: bpf::maps_of_programs().unwrap_or_default(),
        })
    }
}

fn pins(task: Pid) -> HashMap<u32, Vec<PathBuf>> {
    let mounts = mounts::of_task(task).into_iter();
    let root = PathBuf::from(format!("/proc/{task}/root"));
    let mut found: HashMap<u32, Vec<PathBuf>> = HashMap::new();
    let mut nr_names = 0;
    for mount in mounts.filter(|mount| mount.kind == b"bpf") {
        walk(&root, &mount.path, 0, &mut nr_names, &mut |name| {
            if let Some(info) = map_at(&inside(&root, name)) {
                let pins = found.entry(info.id).or_default();
                if !pins.iter().any(|pin| pin == name) {
                    pins.push(name.to_owned());
                }
            }
        });
    }
    found.values_mut().for_each(|pins| pins.sort());
    found
}

/// The path as this process reaches it.
fn inside(root: &Path, name: &Path) -> PathBuf {
    root.join(name.strip_prefix("/").unwrap_or(name))
}

/// Calls `take` with the path of every file.
fn walk(root: &Path, dir: &Path, depth: usize, nr_names: &mut usize, take: &mut impl FnMut(&Path)) {
    let entries = std::fs::read_dir(inside(root, dir));
    for entry in entries.into_iter().flatten().flatten() {
        *nr_names += 1;
        if *nr_names > MAX_NAMES {
            return;
        }
        let name = dir.join(entry.file_name());
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < MAX_DEPTH => {
                walk(root, &name, depth + 1, nr_names, take);
            }
            Ok(kind) if kind.is_file() => take(&name),
            _ => {}
        }
    }
}

/// Opens what is pinned at a path, if it is a map.
fn open_map(path: &Path, flags: u32) -> Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::ENOENT)?;
    let fd = bpf::pinned(&name, flags)?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    match link.is_ok_and(|link| link.as_os_str().as_bytes() == b"anon_inode:bpf-map") {
        true => Ok(fd),
        false => Err(Errno::EINVAL),
    }
}

fn map_at(path: &Path) -> Option<MapInfo> {
    let fd = open_map(path, bpf::RDONLY).or_else(|_| open_map(path, bpf::WRONLY));
    bpf::map_info(&fd.ok()?).ok()
}

/// Paths of an entry on this machine.
fn paths_of(entry: &BpfmapFileEntry, options: &FileRestoreOptions) -> Vec<PathBuf> {
    let pins = entry.firn.iter().flat_map(|firn| &firn.pin);
    pins.map(|pin| local_path(pin, options)).collect()
}

/// The map that is pinned where the one of an entry was, if it has the same shape. What is not as it was comes as
/// a sentence.
pub(super) fn open(
    entry: &BpfmapFileEntry,
    options: &FileRestoreOptions,
    losses: &mut Vec<String>,
) -> Option<OwnedFd> {
    let name = shown(entry);
    for path in paths_of(entry, options) {
        let shown = path.display();
        let found = open_map(&path, 0).and_then(|fd| Ok((bpf::map_info(&fd)?, fd)));
        match found {
            Ok((info, fd)) if is_alike(&info, entry) => {
                if info.id != entry.map_id {
                    losses.push(format!(
                        "{name}: another map is pinned at {shown} by now; the tasks have that one, with \
                         what it holds"
                    ));
                }
                return Some(fd);
            }
            Ok(_) => losses.push(format!(
                "{name}: the map that is pinned at {shown} by now is of another shape; the tasks have one \
                 of their own"
            )),
            Err(Errno::ENOENT) => {}
            Err(errno) => losses.push(format!(
                "{name}: what is at {shown} by now is no map to be had ({errno}); the tasks have one of their own"
            )),
        }
    }
    None
}

/// The map of an entry, for messages.
fn shown(entry: &BpfmapFileEntry) -> String {
    match &entry.map_name[..] {
        [] => format!("BPF map {}", entry.map_id),
        name => format!("BPF map {}", String::from_utf8_lossy(name)),
    }
}

fn is_alike(info: &MapInfo, entry: &BpfmapFileEntry) -> bool {
    let spec = &info.spec;
    (spec.kind, spec.key_size, spec.value_size)
        == (entry.map_type, entry.key_size, entry.value_size)
        && (spec.max_entries, spec.flags) == (entry.max_entries, entry.map_flags)
}

/// Pins a new map where the one of an entry was.
pub(super) fn pin(
    map: &OwnedFd,
    entry: &BpfmapFileEntry,
    options: &FileRestoreOptions,
    losses: &mut Vec<String>,
) {
    for path in paths_of(entry, options) {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL);
        let pinned = name.and_then(|name| bpf::pin(map, &name));
        if let Err(errno) = pinned.or_else(|errno| match errno {
            // Something else is there, which has been told.
            Errno::EEXIST => Ok(()),
            errno => Err(errno),
        }) {
            losses.push(format!(
                "{} can't be pinned at {} again: {errno}",
                shown(entry),
                path.display()
            ));
        }
    }
}
