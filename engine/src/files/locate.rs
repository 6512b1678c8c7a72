//! Whether the path that /proc shows for an open file still leads to it.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};

use firn_sys::file::{self, S_IFDIR};

use super::open_file::{OpenFile, Trouble};

/// What /proc says behind the path of a file that is not there any more.
pub(super) const DELETED: &[u8] = b" (deleted)";

/// Where an open file can be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Location {
    /// The path leads to it.
    Named(Vec<u8>),
    /// It has no name any more; this was its last one.
    Nameless(Vec<u8>),
    /// This name is gone, but the file has others.
    Renamed {
        /// The name that is gone.
        old: Vec<u8>,
        /// Another name, if it stands in the same directory.
        other: Option<Vec<u8>>,
    },
    /// Its path leads nowhere or to something else.
    Unreachable,
}

/// Finds the file by the path that /proc shows; the answer is remembered.
pub(super) fn locate(file: &OpenFile) -> &Location {
    file.location.get_or_init(|| find(file))
}

fn find(file: &OpenFile) -> Location {
    let link = file.link.as_slice();
    if !link.starts_with(b"/") {
        return Location::Unreachable;
    }
    // First the whole text: a living file may be called `x (deleted)`.
    if leads_to(link, file) {
        return Location::Named(link.to_vec());
    }
    let Some(old) = link.strip_suffix(DELETED) else {
        return Location::Unreachable;
    };
    let old = old.to_vec();
    // A removed directory is gone for good, whatever number of links its filesystem reports.
    if file.stat.nlink == 0 || file.stat.file_type() == S_IFDIR {
        return Location::Nameless(old);
    }
    match other_name(&old, file) {
        // It may be the number of names in a lower layer, which nothing can be removed from.
        None if file.stat.nlink == 1 && is_on_overlay(file) => Location::Nameless(old),
        other => Location::Renamed { old, other },
    }
}

/// Whether the file is one of an overlay, which tells the number of names in the layer that has it.
///
/// Source: linux fs/overlayfs/inode.c, ovl_getattr.
pub(super) fn is_on_overlay(file: &OpenFile) -> bool {
    file::filesystem_type(&file.proc_path()) == Ok(file::OVERLAYFS)
}

fn leads_to(path: &[u8], file: &OpenFile) -> bool {
    file::lstat_path(Path::new(OsStr::from_bytes(path))).is_ok_and(|s| s.same_file(&file.stat))
}

/// Looks for another name of the file in the directory of the old one, the only place where one can be
/// found without walking a whole filesystem.
fn other_name(old: &[u8], file: &OpenFile) -> Option<Vec<u8>> {
    let dir = Path::new(OsStr::from_bytes(old)).parent()?;
    std::fs::read_dir(dir)
        .ok()?
        .filter_map(Result::ok)
        .filter(|entry| entry.ino() == file.stat.ino)
        .map(|entry| entry.path().into_os_string().into_vec())
        .find(|path| leads_to(path, file))
}

/// Says why an unreachable file can't be dumped.
pub(super) fn unreachable_trouble() -> Trouble {
    Trouble::new(
        "its path leads to another file or nowhere; it may be hidden by a mount",
        "unmount what hides it, or let the task close it",
    )
}

/// The path as std takes it.
pub(super) fn to_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}
