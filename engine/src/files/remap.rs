//! What stands in for the paths of files that have none any more (`remap-fpath.img`).

use std::collections::{HashMap, HashSet};

use firn_proto::{FdTypes, RegFileEntry, RemapFilePathEntry, RemapType};
use firn_sys::Pid;

use super::entries::Entries;
use super::error::FileRestoreError;
use super::task_files;

/// Bit of remap_id that marked ghosts before there was remap_type.
const OLD_GHOST_BIT: u32 = 1 << 31;

/// What stands in for the path of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remap {
    /// A ghost with this number.
    Ghost(u32),
    /// Another entry, with a name that the dump has made.
    Link(u32),
    /// A file of /proc of this task, which is gone.
    Departed(Pid),
}

/// All of them by the number of the file.
pub(super) fn by_file(
    images: &[RemapFilePathEntry],
    entries: &Entries,
) -> Result<HashMap<u32, Remap>, FileRestoreError> {
    let mut remaps = HashMap::new();
    for image in images {
        if entries.get(FdTypes::Reg, image.orig_id).is_none() {
            let what = "its path is missing";
            return Err(FileRestoreError::corrupt(image.orig_id, what));
        }
        remaps.insert(image.orig_id, Remap::of(image)?);
    }
    add_unnamed_departed(&mut remaps, entries.regular());
    Ok(remaps)
}

/// CRIU names a task that is gone with the first file of it only, and the others are of the same task.
fn add_unnamed_departed<'a>(
    remaps: &mut HashMap<u32, Remap>,
    files: impl Iterator<Item = &'a RegFileEntry>,
) {
    let departed = remaps.values().filter_map(|remap| match remap {
        Remap::Departed(task) => Some(*task),
        Remap::Ghost(_) | Remap::Link(_) => None,
    });
    let departed: HashSet<Pid> = departed.collect();
    if departed.is_empty() {
        return;
    }
    for file in files {
        let task = task_files::task_of(&file.name);
        if let Some(task) = task.filter(|task| departed.contains(task)) {
            remaps.entry(file.id).or_insert(Remap::Departed(task));
        }
    }
}

impl Remap {
    fn of(image: &RemapFilePathEntry) -> Result<Remap, FileRestoreError> {
        match image.remap_type.map(RemapType::try_from) {
            Some(Ok(RemapType::Ghost)) => Ok(Remap::Ghost(image.remap_id)),
            Some(Ok(RemapType::Linked)) => Ok(Remap::Link(image.remap_id)),
            None if image.remap_id & OLD_GHOST_BIT != 0 => {
                Ok(Remap::Ghost(image.remap_id & !OLD_GHOST_BIT))
            }
            None => Ok(Remap::Link(image.remap_id)),
            Some(Ok(RemapType::Procfs)) => Ok(Remap::Departed(Pid::from_image(image.remap_id))),
            Some(Err(_)) => {
                let what = "it has a stand-in of an unknown kind";
                Err(FileRestoreError::corrupt(image.orig_id, what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(id: u32, name: &str) -> RegFileEntry {
        RegFileEntry {
            id,
            name: name.into(),
            ..RegFileEntry::default()
        }
    }

    fn image(remap_id: u32, remap_type: Option<RemapType>) -> RemapFilePathEntry {
        RemapFilePathEntry {
            orig_id: 1,
            remap_id,
            remap_type: remap_type.map(Into::into),
        }
    }

    #[test]
    fn stand_ins_without_a_type_are_told_by_a_bit() {
        let of = |remap_id, remap_type| Remap::of(&image(remap_id, remap_type)).unwrap();
        assert_eq!(of(7, None), Remap::Link(7));
        assert_eq!(of(OLD_GHOST_BIT | 7, None), Remap::Ghost(7));
        assert_eq!(of(7, Some(RemapType::Ghost)), Remap::Ghost(7));
        let gone = Remap::Departed(Pid::from_raw(7));
        assert_eq!(of(7, Some(RemapType::Procfs)), gone);
    }

    #[test]
    fn all_files_of_a_task_that_is_gone_are_told_by_one() {
        let gone = Remap::Departed(Pid::from_raw(3));
        let mut remaps = HashMap::from([(1, gone), (5, Remap::Link(6))]);
        let files = [
            file(1, "/proc/3/status"),
            file(2, "/proc/3/stat"),
            file(3, "/proc/33/stat"),
            file(4, "/etc/passwd"),
            file(5, "/proc/3/comm"),
        ];
        add_unnamed_departed(&mut remaps, files.iter());
        let expected = HashMap::from([(1, gone), (2, gone), (5, Remap::Link(6))]);
        assert_eq!(remaps, expected);
    }
}
