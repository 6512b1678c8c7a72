//! Regular files and directories: everything that is opened again by its path.
//!
//! Position and flags are in fdinfo. The entry also says how large the file was and which build id it
//! had and when its content was last changed, so that a restore notices when it is another one; files that
//! the tasks only append to are expected to grow and are compared only where a policy says so
//! ([`super::policy`]). Directories are entries of the same type. A file whose path does
//! not lead to it any more has a stand-in: see [`super::ghost`] and [`super::link_remap`].

use std::os::fd::OwnedFd;

use firn_proto::{
    FdTypes, FileEntry, FirnRegFileEntry, FownEntry, RegFileEntry, RemapFilePathEntry, RemapType,
};
use firn_sys::file::{O_ACCMODE, O_APPEND, O_WRONLY, S_IFDIR, S_IFLNK, S_IFREG, Stat};

use super::dump::{Collected, DumpState};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::late::LateFile;
use super::locate::{self, Location};
use super::open::Opener;
use super::open_file::{OpenFile, Place, Trouble};
use super::{FileDumpOptions, FileValidation, ghost, message_queue, task_files};

/// Regular files, directories, and symbolic links opened with O_PATH.
pub(super) struct Regular;

impl FileKind for Regular {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Reg
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        let by_path = matches!(file.stat.file_type(), S_IFREG | S_IFDIR | S_IFLNK);
        by_path
            && !super::memfd::is_memfd(file)
            && (file.link.starts_with(b"/") || file.link.starts_with(b"("))
    }

    fn trouble(&self, file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
        path_trouble(file, options)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        dump(dumping.file, dumping.id, dumping.fown, state.collected)
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let reg = FileRestoreError::expect_member(entry, entry.reg.as_ref(), "a regular file")?;
        let is_task_file = task_files::task_of(&reg.name).is_some();
        if is_task_file && reg.ext != Some(true) && opener.stand_ins.path(reg.id).is_none() {
            return opener.late(FdTypes::Reg, reg.id, LateFile::OfTask(reg.clone()));
        }
        opener.open_regular(reg, reg.flags)
    }
}

/// What keeps a file from being opened again by its path.
pub(super) fn path_trouble(file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
    if message_queue::is_queue(file) {
        return message_queue::trouble(file);
    }
    match locate::locate(file) {
        Location::Named(path) => task_files::trouble(file, path),
        Location::Nameless(old) | Location::Renamed { old, .. } if is_task_file(old) => {
            match task_files::departed(old) {
                Some(_) => task_files::trouble(file, old),
                None => Some(task_files::vanished()),
            }
        }
        Location::Unreachable if is_task_file(&file.link) => {
            // /proc shows the old path of what a task had that is gone.
            match task_files::departed(&file.link) {
                Some(_) => task_files::trouble(file, &file.link),
                None => Some(task_files::vanished()),
            }
        }
        Location::Nameless(_) => ghost::trouble(file, options),
        Location::Renamed { other: Some(_), .. } => None,
        Location::Renamed { .. } if options.link_remap => None,
        Location::Renamed { .. } => Some(unknown_names()),
        Location::Unreachable => Some(locate::unreachable_trouble()),
    }
}

fn is_task_file(path: &[u8]) -> bool {
    task_files::task_of(path).is_some()
}

/// Makes the entry of a file that is opened by its path, with a stand-in where the path is gone.
pub(super) fn dump(
    file: &OpenFile,
    id: u32,
    fown: FownEntry,
    collected: &mut Collected,
) -> Result<FileEntry, FileDumpError> {
    let mut removed_name = None;
    let name = match locate::locate(file) {
        Location::Named(path) => {
            if let Some(task) = task_files::task_of(path)
                && !collected.inside.contains(&task)
            {
                return Err(in_the_way(file, task_files::outside(task)));
            }
            path.clone()
        }
        Location::Nameless(old) | Location::Renamed { old, .. } if is_task_file(old) => {
            departed(file, old, id, collected)?
        }
        Location::Unreachable if is_task_file(&file.link) => {
            departed(file, &file.link, id, collected)?
        }
        Location::Nameless(old) if collected.link_remaps.has_other_names(file, old) => {
            if !collected.options.link_remap {
                return Err(in_the_way(file, unknown_names()));
            }
            link_remap(file, old, id, fown, collected)?;
            old.clone()
        }
        Location::Nameless(old) => {
            collected.ghosts.add(file, old, id);
            old.clone()
        }
        Location::Renamed {
            old,
            other: Some(path),
        } => {
            removed_name = Some(old.clone());
            path.clone()
        }
        Location::Renamed { old, other: None } => {
            link_remap(file, old, id, fown, collected)?;
            old.clone()
        }
        Location::Unreachable => return Err(in_the_way(file, locate::unreachable_trouble())),
    };
    let mut entry = entry(file, id, fown, name, collected);
    if let (Some(reg), Some(_)) = (&mut entry.reg, &removed_name) {
        reg.firn.get_or_insert_default().removed_name = removed_name;
    }
    Ok(entry)
}

fn in_the_way(file: &OpenFile, trouble: Trouble) -> FileDumpError {
    FileDumpError::Obstacles(vec![file.obstacle(trouble)])
}

/// Notes that the path is that of a task's file, and the task gone.
fn departed(
    file: &OpenFile,
    old: &[u8],
    id: u32,
    collected: &mut Collected,
) -> Result<Vec<u8>, FileDumpError> {
    let Some(task) = task_files::departed(old) else {
        return Err(in_the_way(file, task_files::vanished()));
    };
    collected.departed.push(RemapFilePathEntry {
        orig_id: id,
        remap_id: task.to_image(),
        remap_type: Some(RemapType::Procfs.into()),
    });
    Ok(old.to_vec())
}

fn unknown_names() -> Trouble {
    Trouble::new(
        "this name was removed, but the file has others, which are not known",
        "add --link-remap to let the dump make a temporary name",
    )
}

fn link_remap(
    file: &OpenFile,
    old: &[u8],
    id: u32,
    fown: FownEntry,
    collected: &mut Collected,
) -> Result<(), FileDumpError> {
    let link_id = collected.new_id();
    let name = collected.link_remaps.make(file, old, id, link_id)?;
    if let Some(name) = name {
        let link = entry(file, link_id, fown, name, collected);
        collected.entries.push(link);
    }
    Ok(())
}

/// Makes the entry of a file with this path.
pub(super) fn entry(
    file: &OpenFile,
    id: u32,
    fown: FownEntry,
    name: Vec<u8>,
    collected: &mut Collected,
) -> FileEntry {
    let flags = file.image_flags();
    let is_regular = file.stat.file_type() == S_IFREG && !task_files::is_made_up(&name);
    let sized = is_regular && !only_appended_to(flags);
    // Data files have no build id, and opening each of a thousand of them would show.
    let may_be_elf = matches!(file.place, Place::Link(_)) || file.stat.mode & 0o111 != 0;
    let build_id = match collected.options.validation {
        FileValidation::BuildId | FileValidation::Mtime if sized && may_be_elf => {
            collected.build_ids.get(&file.proc_path(), &file.stat)
        }
        _ => Vec::new(),
    };
    FileEntry {
        r#type: FdTypes::Reg.into(),
        id,
        reg: Some(RegFileEntry {
            id,
            flags,
            pos: file.info.pos,
            fown,
            name,
            size: sized.then_some(file.stat.size),
            mode: Some(file.stat.mode),
            build_id,
            firn: is_regular.then(|| noted(&file.stat, sized)),
            ..RegFileEntry::default()
        }),
        ..FileEntry::default()
    }
}

/// Noted whatever the dump was asked to: it costs nothing, and the restore decides what to look at.
fn noted(stat: &Stat, sized: bool) -> FirnRegFileEntry {
    let (seconds, nanoseconds) = stat.mtime;
    FirnRegFileEntry {
        mtime_seconds: Some(seconds),
        mtime_nanoseconds: Some(nanoseconds),
        appended_size: (!sized).then_some(stat.size),
        ..FirnRegFileEntry::default()
    }
}

fn only_appended_to(flags: u32) -> bool {
    let write_only = flags & O_ACCMODE.cast_unsigned() == O_WRONLY.cast_unsigned();
    write_only && flags & O_APPEND.cast_unsigned() != 0
}
