//! Opening files again, with the flags and the position they had.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use firn_proto::{FdTypes, RegFileEntry, TaskKobjIdsEntry};
use firn_sys::file::{
    self, O_ACCMODE, O_ASYNC, O_CLOEXEC, O_CREAT, O_EXCL, O_NOCTTY, O_PATH, O_TMPFILE, O_TRUNC,
};
use firn_sys::{Errno, fcntl};

use super::FileRestoreOptions;
use super::bpf::Maps;
use super::entries::Entries;
use super::error::FileRestoreError;
use super::external::Inherited;
use super::fifo::Fifos;
use super::ghost_restore::StandIns;
use super::late::LateFiles;
use super::locate;
use super::memfd::MemfdRestore;
use super::pidfd::Departed;
use super::pipe::Pipes;
use super::pty::Ptys;
use super::sockets::SocketSet;
use super::tty::TerminalInfos;

/// Position of files that are not to be moved to any.
const NO_POSITION: u64 = u64::MAX;

/// What kinds need while they open files; dropped when all are open.
pub(super) struct Opener<'a> {
    pub(super) entries: &'a Entries,
    pub(super) options: &'a FileRestoreOptions,
    pub(super) shared: &'a dyn MemfdRestore,
    pub(super) stand_ins: StandIns,
    pub(super) pipes: Pipes,
    pub(super) fifos: Fifos,
    pub(super) terminals: &'a TerminalInfos,
    pub(super) sockets: SocketSet<'a>,
    pub(super) departed: Departed,
    pub(super) ptys: Ptys,
    pub(super) late_files: LateFiles,
    pub(super) maps: Maps,
    pub(super) inherited: &'a Inherited,
    /// Numbers of the namespaces that the tree is in.
    pub(super) root_ids: Option<TaskKobjIdsEntry>,
}

impl<'a> Opener<'a> {
    /// Opens the path of an entry, or its stand-in, with these flags.
    pub(super) fn open_regular(
        &mut self,
        entry: &RegFileEntry,
        flags: u32,
    ) -> Result<OwnedFd, FileRestoreError> {
        if let Some(fd) = self.inherited.open_file(entry, flags)? {
            return Ok(fd);
        }
        if let Some(fd) = self.stand_ins.take_nameless(entry.id) {
            seek_to(&fd, entry.pos, entry.id)?;
            return Ok(fd);
        }
        match self.stand_ins.path(entry.id) {
            Some(path) => open_entry_at(path, entry, flags),
            None => open_entry_at(&path_of(entry, self.options), entry, flags),
        }
    }

    /// The entry with the path of a fifo or terminal; old images gave both the same number.
    pub(super) fn path_entry(
        &self,
        id: u32,
        regf_id: Option<u32>,
    ) -> Result<&'a RegFileEntry, FileRestoreError> {
        let entry = self.entries.get(FdTypes::Reg, regf_id.unwrap_or(id));
        entry
            .and_then(|entry| entry.reg.as_ref())
            .ok_or_else(|| FileRestoreError::corrupt(id, "the entry with its path is missing"))
    }
}

/// Where the entry's path is on this machine.
pub(super) fn path_of(entry: &RegFileEntry, options: &FileRestoreOptions) -> PathBuf {
    local_path(&entry.name, options)
}

/// Where a path of an image is on this machine.
pub(super) fn local_path(name: &[u8], options: &FileRestoreOptions) -> PathBuf {
    let path = locate::to_path(name);
    match &options.root {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(&path)),
        None => path,
    }
}

/// Opens an entry's file at its path.
pub(super) fn open_entry_at(
    path: &Path,
    entry: &RegFileEntry,
    flags: u32,
) -> Result<OwnedFd, FileRestoreError> {
    let fd = open_path(path, flags)?;
    if flags & O_PATH.cast_unsigned() == 0 {
        seek_to(&fd, entry.pos, entry.id)?;
    }
    Ok(fd)
}

/// Opens a path with flags as images have them.
pub(super) fn open_path(path: &Path, flags: u32) -> Result<OwnedFd, FileRestoreError> {
    let name = path.display().to_string();
    let opened = file::open(path, opening(flags)).or_else(|errno| match errno {
        Errno::ENOENT => open_unvisited(path, flags),
        errno => Err(errno),
    });
    opened.map_err(FileRestoreError::refused("open", name))
}

/// Opens the root of an automounter's direct mount. To open it in the usual way is to ask for what is to be mounted
/// there, and nobody answers until the automounter runs again.
///
/// Source: linux fs/namei.c, follow_automount.
fn open_unvisited(path: &Path, flags: u32) -> firn_sys::Result<OwnedFd> {
    let found = file::open(path, (O_PATH | O_CLOEXEC).cast_unsigned())?;
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    file::open(path.as_ref(), opening(flags))
}

/// Opens the file behind a descriptor once more, as an open file of its own.
pub(super) fn reopen(
    fd: impl AsFd,
    flags: u32,
    what: &'static str,
) -> Result<OwnedFd, FileRestoreError> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    file::open(path.as_ref(), opening(flags)).map_err(FileRestoreError::refused("open", what))
}

/// The flags to open with: none that would create or empty anything, or take a controlling terminal.
/// O_ASYNC is set by the task, because the kernel remembers the descriptor's number.
fn opening(flags: u32) -> u32 {
    let flags = harmless(flags) | O_NOCTTY.cast_unsigned();
    if is_nameless(flags) {
        flags & !O_TMPFILE.cast_unsigned()
    } else {
        flags
    }
}

/// The flags without those that change files or belong to the task.
pub(super) fn harmless(flags: u32) -> u32 {
    flags & !(O_CREAT | O_EXCL | O_TRUNC | O_ASYNC).cast_unsigned()
}

/// Whether a file was made without a name (O_TMPFILE) by opening it.
pub(super) fn is_nameless(flags: u32) -> bool {
    // O_DIRECTORY is among the bits.
    flags & O_TMPFILE.cast_unsigned() == O_TMPFILE.cast_unsigned()
}

/// Sets the flags that fcntl can change, where there are any, except O_ASYNC.
pub(super) fn set_flags(fd: impl AsFd, flags: u32, what: &str) -> Result<(), FileRestoreError> {
    let flags = flags & !(O_ACCMODE | O_ASYNC).cast_unsigned();
    if flags == 0 {
        return Ok(());
    }
    fcntl::set_flags(fd, flags).map_err(FileRestoreError::refused("set the flags of", what))
}

/// Moves an open file to its position.
pub(super) fn seek_to(fd: impl AsFd, pos: u64, id: u32) -> Result<(), FileRestoreError> {
    if pos == 0 || pos == NO_POSITION {
        return Ok(());
    }
    let name = format!("open file {id}");
    file::seek(fd, pos).map_err(FileRestoreError::refused("set the position of", name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_created_or_emptied() {
        let dangerous = (O_CREAT | O_EXCL | O_TRUNC).cast_unsigned();
        assert_eq!(opening(dangerous | 2), 2 | O_NOCTTY.cast_unsigned());
        // The path of a nameless temporary file leads to a file and not to a directory.
        let flags = opening((O_TMPFILE | file::O_RDWR).cast_unsigned());
        assert_eq!(flags, (file::O_RDWR | O_NOCTTY).cast_unsigned());
    }
}
