//! Putting a finished set in place.
//!
//! Order matters: the data are on disk before any file has its final name; an old inventory is
//! gone, on disk as well, before the first new file arrives; the new inventory arrives last. At
//! no moment, and after no power cut, does an inventory stand beside files of another set.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;

use firn_proto::InventoryEntry;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::{ImageSetWriter, PARENT_LINK, private};
use crate::error::ImageWriteError;
use crate::kind::{Header, ImageKind};

/// Up to so many files are synced one by one; for more, the file system is synced once.
const MAX_SINGLE_SYNCS: usize = 16;
/// File systems that live in memory, where syncing means nothing.
const TMPFS_MAGIC: u32 = 0x0102_1994;
const RAMFS_MAGIC: u32 = 0x8584_58f6;

pub(super) fn seal(
    set: &ImageSetWriter,
    inventory: &InventoryEntry,
) -> Result<(), ImageWriteError> {
    if let Some(name) = &set.lock().abandoned {
        return Err(ImageWriteError::Unfinished {
            path: set.path_of(name),
        });
    }
    let names = std::mem::take(&mut set.lock().names);
    set.write_one(ImageKind::Inventory, 0, inventory)?;
    let unusable = |source| ImageWriteError::Directory {
        path: set.path.clone(),
        source,
    };
    let above = private::open_dir(&set.path).map_err(unusable)?;
    let durable = is_durable(&above);
    if durable {
        sync_files(set, &names)?;
    }
    remove_old_set(set, &above, &names, durable)?;
    publish(set, &above, &names, durable)
}

fn is_durable(dir: &OwnedFd) -> bool {
    let kind = rustix::fs::fstatfs(dir).map(|s| u32::try_from(s.f_type).unwrap_or(0));
    !matches!(kind, Ok(TMPFS_MAGIC | RAMFS_MAGIC))
}

fn sync_files(set: &ImageSetWriter, names: &[String]) -> Result<(), ImageWriteError> {
    if names.len() > MAX_SINGLE_SYNCS {
        let synced = rustix::fs::syncfs(set.private.fd());
        return synced.map_err(|errno| set.directory_error("sync", errno.into()));
    }
    let inventory = ImageKind::Inventory.file_name(0);
    for name in names
        .iter()
        .filter(|n| *n != PARENT_LINK)
        .chain([&inventory])
    {
        let synced = set.private.open_file(name).and_then(|file| file.sync_all());
        synced.map_err(|source| set.file_error("sync", name, source))?;
    }
    Ok(())
}

/// Removes a set that was in the directory before, its inventory first.
///
/// Files that the new set has not are removed too: a reader would take them for part of it.
fn remove_old_set(
    set: &ImageSetWriter,
    above: &OwnedFd,
    names: &[String],
    durable: bool,
) -> Result<(), ImageWriteError> {
    let inventory = ImageKind::Inventory.file_name(0);
    match rustix::fs::unlinkat(above, &inventory, AtFlags::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        removed => removed.map_err(|e| set.file_error("remove", &inventory, e.into()))?,
    }
    if durable {
        rustix::fs::fsync(above).map_err(|e| set.directory_error("sync", e.into()))?;
    }
    let new: HashSet<&str> = names.iter().map(String::as_str).collect();
    let listed = leftovers(set, &new).map_err(|e| set.directory_error("list", e))?;
    for name in listed {
        let removed = rustix::fs::unlinkat(above, &name, AtFlags::empty());
        removed.map_err(|e| set.file_error("remove", &name, e.into()))?;
    }
    Ok(())
}

fn leftovers(set: &ImageSetWriter, new: &HashSet<&str>) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&set.path)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if !new.contains(name.as_str()) && !entry.file_type()?.is_dir() && belongs_to_set(&name) {
            found.push(name);
        }
    }
    Ok(found)
}

/// Says whether a file is part of a set, and not of the work directory or of `cpuinfo dump`.
fn belongs_to_set(name: &str) -> bool {
    let kind = ImageKind::of_file_name(name).map(|(kind, _)| kind);
    let own = |k: ImageKind| k != ImageKind::Cpuinfo && k.info().header != Header::Service;
    name == PARENT_LINK || kind.is_some_and(own)
}

/// Gives all files their final names, the inventory last; takes all back on an error.
fn publish(
    set: &ImageSetWriter,
    above: &OwnedFd,
    names: &[String],
    durable: bool,
) -> Result<(), ImageWriteError> {
    let inventory = ImageKind::Inventory.file_name(0);
    let mut published = Vec::new();
    let mut publish_all = || {
        for name in names {
            let moved = set.private.publish(name, above);
            moved.map_err(|source| set.file_error("move into place", name, source))?;
            published.push(name);
        }
        if durable {
            rustix::fs::fsync(above).map_err(|e| set.directory_error("sync", e.into()))?;
        }
        let moved = set.private.publish(&inventory, above);
        moved.map_err(|source| set.file_error("move into place", &inventory, source))?;
        published.push(&inventory);
        match durable {
            true => rustix::fs::fsync(above).map_err(|e| set.directory_error("sync", e.into())),
            false => Ok(()),
        }
    };
    let result = publish_all();
    if result.is_err() {
        for name in published.iter().rev() {
            // The first error is the one to tell.
            let _ = rustix::fs::unlinkat(above, name.as_str(), AtFlags::empty());
        }
    }
    result
}
