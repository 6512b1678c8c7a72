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
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use firn_proto::BpfmapFileEntry;
use firn_sys::bpf::{self, MapInfo};
use firn_sys::{Errno, Pid, Result};

use super::FileRestoreOptions;
use super::open::local_path;

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
    let text = std::fs::read(format!("/proc/{task}/mountinfo")).unwrap_or_default();
    let root = PathBuf::from(format!("/proc/{task}/root"));
    let mut found: HashMap<u32, Vec<PathBuf>> = HashMap::new();
    let mut nr_names = 0;
    for mount_point in text.split(|byte| *byte == b'\n').filter_map(bpf_mount) {
        walk(&root, &mount_point, 0, &mut nr_names, &mut |name| {
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

/// The mount point of a line of mountinfo, if a filesystem of type bpf is mounted there.
fn bpf_mount(line: &[u8]) -> Option<PathBuf> {
    let separator = line.windows(3).position(|part| part == b" - ")?;
    let (mount, filesystem) = line.split_at(separator);
    if filesystem[3..].split(|byte| *byte == b' ').next() != Some(b"bpf") {
        return None;
    }
    let escaped = mount.split(|byte| *byte == b' ').nth(4)?;
    Some(PathBuf::from(std::ffi::OsString::from_vec(unescaped(
        escaped,
    ))))
}

/// Blanks and the like stand as `\040`.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    out
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
    let name = String::from_utf8_lossy(&entry.map_name);
    for path in paths_of(entry, options) {
        let shown = path.display();
        let found = open_map(&path, 0).and_then(|fd| Ok((bpf::map_info(&fd)?, fd)));
        match found {
            Ok((info, fd)) if is_alike(&info, entry) => {
                if info.id != entry.map_id {
                    losses.push(format!(
                        "BPF map {name}: another map is pinned at {shown} by now; the tasks have that one, with \
                         what it holds"
                    ));
                }
                return Some(fd);
            }
            Ok(_) => losses.push(format!(
                "BPF map {name}: the map that is pinned at {shown} by now is of another shape; the tasks have one \
                 of their own"
            )),
            Err(_) => {}
        }
    }
    None
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
            let name = String::from_utf8_lossy(&entry.map_name);
            losses.push(format!(
                "BPF map {name} can't be pinned at {} again: {errno}",
                path.display()
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_maps_are_told_from_others() {
        let line = b"31 23 0:28 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700";
        assert_eq!(bpf_mount(line), Some(PathBuf::from("/sys/fs/bpf")));
        let line = b"99 23 0:41 / /tmp/a\\040b\\134 rw - bpf none rw";
        assert_eq!(bpf_mount(line), Some(PathBuf::from("/tmp/a b\\")));
        assert_eq!(bpf_mount(b"31 23 0:28 / /bpf rw - tmpfs bpf rw"), None);
        assert_eq!(bpf_mount(b""), None);
        assert_eq!(unescaped(b"\\99"), b"\\99");
    }
}
