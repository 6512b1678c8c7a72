//! Finding the files that are watched: fdinfo names them by device, inode and file handle only.
//!
//! First by handle, which gives the file and so its path; then, where the filesystem knows no handles,
//! such as overlayfs or proc, among mount points and by a walk over the filesystem. Images keep handle
//! and path; a restore takes the path, which means the same on another machine, and else the handle. A
//! file without a name is found among the ghosts by device and inode.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};

use firn_proto::FhEntry;
use firn_sys::file::{self, O_NOFOLLOW, O_NONBLOCK, O_PATH, Stat};
use firn_sys::{Errno, fsnotify};

use super::mounts::{self, Mount};

/// Words that CRIU gives a handle at least.
const HANDLE_WORDS: usize = 16;
/// Names that a walk looks at before it gives up.
const MAX_NAMES: usize = 500_000;
const DELETED: &[u8] = b" (deleted)";

/// A watched file as fdinfo describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Watched {
    /// Device in the kernel's encoding.
    pub(super) dev: u32,
    pub(super) ino: u64,
    /// Type and bytes of the handle, where there is one.
    pub(super) handle: Option<(i32, Vec<u8>)>,
}

/// Where a watched file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It has this path.
    Path(PathBuf),
    /// It has no name any more; this was its last one.
    Nameless(PathBuf),
}

/// Mounts of this process by device, and walks that were made.
#[derive(Debug, Default)]
pub(super) struct Finder {
    mounts: Option<Vec<Mount>>,
    walked: HashMap<u32, HashMap<u64, PathBuf>>,
}

/// The words `key:value` of a line of fdinfo.
pub(super) fn words(line: &str) -> HashMap<&str, &str> {
    line.split_whitespace()
        .filter_map(|word| word.split_once(':'))
        .collect()
}

/// A hexadecimal word.
pub(super) fn hex(words: &HashMap<&str, &str>, key: &str) -> Option<u64> {
    u64::from_str_radix(words.get(key)?, 16).ok()
}

impl Watched {
    /// Reads the words that say which file it is.
    pub(super) fn parse(words: &HashMap<&str, &str>) -> Option<Watched> {
        let kind = hex(words, "fhandle-type").and_then(|kind| i32::try_from(kind).ok());
        let bytes = words.get("f_handle").and_then(|text| parse_bytes(text));
        Some(Watched {
            dev: u32::try_from(hex(words, "sdev")?).ok()?,
            ino: hex(words, "ino")?,
            handle: kind.zip(bytes),
        })
    }

    /// The handle as images have it, with the file's path.
    pub(super) fn to_image(&self, found: &Found) -> FhEntry {
        let (kind, bytes) = self.handle.clone().unwrap_or_default();
        let mut handle: Vec<u64> = bytes
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_le_bytes(word)
            })
            .collect();
        handle.resize(handle.len().max(HANDLE_WORDS), 0);
        FhEntry {
            bytes: u32::try_from(bytes.len()).unwrap_or(0),
            r#type: kind.cast_unsigned(),
            handle,
            path: match found {
                Found::Path(path) => path.to_str().map(str::to_owned),
                Found::Nameless(_) => None,
            },
            mnt_id: None,
        }
    }

    /// The file that an image describes.
    pub(super) fn from_image(dev: u32, ino: u64, handle: &FhEntry) -> Watched {
        let bytes = handle.handle.iter().flat_map(|word| word.to_le_bytes());
        let len = usize::try_from(handle.bytes).unwrap_or(0);
        let bytes: Vec<u8> = bytes.take(len.min(fsnotify::MAX_HANDLE)).collect();
        Watched {
            dev,
            ino,
            handle: (!bytes.is_empty()).then(|| (handle.r#type.cast_signed(), bytes)),
        }
    }

    fn is(&self, stat: &Stat) -> bool {
        file::kernel_device(stat.dev) == self.dev && stat.ino == self.ino
    }
}

fn parse_bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

impl Finder {
    /// Finds the file.
    pub(super) fn find(&mut self, watched: &Watched) -> Option<Found> {
        if let Some(fd) = self.open(watched) {
            return path_behind(&fd, watched);
        }
        let mounts = self.mounts_of(watched.dev);
        let mounted = mounts.iter().find(|path| leads_to(path, watched));
        if let Some(path) = mounted {
            return Some(Found::Path(path.clone()));
        }
        let walked = self
            .walked
            .entry(watched.dev)
            .or_insert_with(|| walk(&mounts));
        let path = walked.get(&watched.ino)?;
        leads_to(path, watched).then(|| Found::Path(path.clone()))
    }

    /// Opens the file by its handle, as with O_PATH.
    pub(super) fn open(&mut self, watched: &Watched) -> Option<OwnedFd> {
        let (kind, handle) = watched.handle.as_ref()?;
        self.mounts_of(watched.dev).iter().find_map(|mount| {
            let mount = file::open(mount, O_NONBLOCK.cast_unsigned()).ok()?;
            fsnotify::open_by_handle(mount, *kind, handle).ok()
        })
    }

    fn mounts_of(&mut self, dev: u32) -> Vec<PathBuf> {
        let mounts = self.mounts.get_or_insert_with(mounts::here).iter();
        let here = mounts.filter(|mount| mount.dev == dev);
        here.map(|mount| mount.path.clone()).collect()
    }
}

fn leads_to(path: &Path, watched: &Watched) -> bool {
    file::lstat_path(path).is_ok_and(|stat| watched.is(&stat))
}

fn path_behind(fd: &OwnedFd, watched: &Watched) -> Option<Found> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    if leads_to(&link, watched) {
        return Some(Found::Path(link));
    }
    let old = link.as_os_str().as_bytes().strip_suffix(DELETED)?;
    Some(Found::Nameless(OsString::from_vec(old.to_vec()).into()))
}

/// The mount with that number.
pub(super) fn mount_by_id(id: u32) -> Option<Mount> {
    mounts::here().into_iter().find(|mount| mount.id == id)
}

/// A mount of the filesystem on that device.
pub(super) fn mount_by_device(dev: u32) -> Option<Mount> {
    mounts::here().into_iter().find(|mount| mount.dev == dev)
}

/// Names of a filesystem by inode, nearest to its roots first.
fn walk(roots: &[PathBuf]) -> HashMap<u64, PathBuf> {
    let mut names = HashMap::new();
    let mut queue: VecDeque<PathBuf> = roots.iter().cloned().collect();
    while let Some(dir) = queue.pop_front() {
        let entries = std::fs::read_dir(&dir).into_iter().flatten();
        for entry in entries.filter_map(Result::ok) {
            if names.len() >= MAX_NAMES {
                return names;
            }
            names.entry(entry.ino()).or_insert_with(|| entry.path());
            // Another filesystem shows its own root there, whose entry still has the covered inode.
            if entry.file_type().is_ok_and(|kind| kind.is_dir())
                && is_same_filesystem(&entry.path(), &dir)
            {
                queue.push_back(entry.path());
            }
        }
    }
    names
}

fn is_same_filesystem(a: &Path, b: &Path) -> bool {
    match (file::lstat_path(a), file::lstat_path(b)) {
        (Ok(a), Ok(b)) => a.dev == b.dev,
        _ => false,
    }
}

/// Opens the path of a watched file, itself where it is a link.
pub(super) fn open_path(path: &Path) -> Result<OwnedFd, Errno> {
    file::open(path, (O_PATH | O_NOFOLLOW).cast_unsigned())
}

/// A path that leads to an open file, whatever it is called.
pub(super) fn path_to(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "inotify wd:2 ino:3094f sdev:1b mask:fff ignored_mask:0 fhandle-bytes:c \
        fhandle-type:1 f_handle:8a2608314f09030000000000";

    #[test]
    fn a_handle_survives_the_image() {
        let watched = Watched::parse(&words(LINE)).expect("captured from a kernel");
        assert_eq!((watched.dev, watched.ino), (0x1b, 0x3094f));
        let image = watched.to_image(&Found::Path("/x".into()));
        assert_eq!((image.bytes, image.r#type), (12, 1));
        assert_eq!(image.handle.len(), 16);
        assert_eq!(Watched::from_image(0x1b, 0x3094f, &image), watched);
    }

    #[test]
    fn files_are_found_with_and_without_handle() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("watched");
        std::fs::write(&path, "x").expect("write");
        let stat = file::lstat_path(&path).expect("it is there");
        let watched = Watched {
            dev: file::kernel_device(stat.dev),
            ino: stat.ino,
            handle: None,
        };
        let names = walk(&[dir.path().to_owned()]);
        assert_eq!(names.get(&stat.ino), Some(&path));
        assert!(leads_to(&path, &watched));
    }
}
