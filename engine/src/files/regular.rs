//! Regular files and directories: everything that is opened again by its path.
//!
//! Position and flags are in fdinfo. The entry also says how large the file was and which build id it
//! had and when its content was last changed, so that a restore notices when it is another one; files that
//! the tasks only append to are expected to grow and have none of these. Directories are entries of the same type. A file whose path does
//! not lead to it any more has a stand-in: see [`super::ghost`] and [`super::link_remap`].

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, FirnRegFileEntry, FownEntry, RegFileEntry};
use firn_sys::file::{O_ACCMODE, O_APPEND, O_WRONLY, S_IFDIR, S_IFLNK, S_IFREG, Stat};

use super::dump::{Collected, DumpState};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::locate::{self, Location};
use super::open::Opener;
use super::open_file::{OpenFile, Place, Trouble};
use super::{FileDumpOptions, FileValidation, ghost};

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
        let reg = entry.reg.as_ref().ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "it has no member for a regular file")
        })?;
        opener.open_regular(reg, reg.flags)
    }
}

/// What keeps a file from being opened again by its path.
pub(super) fn path_trouble(file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
    match locate::locate(file) {
        Location::Named(path) => task_trouble(path),
        Location::Nameless(_) => ghost::trouble(file, options),
        Location::Renamed { other: Some(_), .. } => None,
        Location::Renamed { .. } if options.link_remap => None,
        Location::Renamed { .. } => Some(Trouble::new(
            "this name was removed, but the file has others, which are not known",
            "add --link-remap to let the dump make a temporary name",
        )),
        Location::Unreachable => Some(locate::unreachable_trouble()),
    }
}

/// Files of procfs that describe one task can't be opened before that task is there.
fn task_trouble(path: &[u8]) -> Option<Trouble> {
    let name = path.strip_prefix(b"/proc/")?;
    name.first()?.is_ascii_digit().then(|| {
        Trouble::new(
            "it belongs to one task in /proc, which does not exist while files are restored",
            "let the task close it before the dump",
        )
    })
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
        Location::Named(path) => path.clone(),
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
        Location::Unreachable => {
            let trouble = locate::unreachable_trouble();
            return Err(FileDumpError::Obstacles(vec![file.obstacle(trouble)]));
        }
    };
    let mut entry = entry(file, id, fown, name, collected);
    if let (Some(reg), Some(_)) = (&mut entry.reg, &removed_name) {
        reg.firn.get_or_insert_default().removed_name = removed_name;
    }
    Ok(entry)
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
    let sized = file.stat.file_type() == S_IFREG && !only_appended_to(flags);
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
            firn: sized.then(|| mtime_of(&file.stat)),
            ..RegFileEntry::default()
        }),
        ..FileEntry::default()
    }
}

/// Noted whatever the dump was asked to: it costs nothing, and the restore decides what to look at.
fn mtime_of(stat: &Stat) -> FirnRegFileEntry {
    let (seconds, nanoseconds) = stat.mtime;
    FirnRegFileEntry {
        mtime_seconds: Some(seconds),
        mtime_nanoseconds: Some(nanoseconds),
        ..FirnRegFileEntry::default()
    }
}

fn only_appended_to(flags: u32) -> bool {
    let write_only = flags & O_ACCMODE.cast_unsigned() == O_WRONLY.cast_unsigned();
    write_only && flags & O_APPEND.cast_unsigned() != 0
}
