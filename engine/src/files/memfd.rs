//! Memory files (memfd_create) as descriptors.
//!
//! Content, size, seals and name belong to the inode, which mappings share: whoever saves shared memory
//! keeps them (`SharedDump`, [`MemfdRestore`]). Here are the open files on top of it, with their flags
//! and positions.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_proto::{FdTypes, FileEntry, FownEntry, MemfdFileEntry};
use firn_sys::file::S_IFREG;

use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError, MemfdSourceError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::OpenFile;

const PREFIX: &[u8] = b"/memfd:";

/// Supplies the memory files that images of shared memory hold.
pub trait MemfdRestore {
    /// A descriptor, for reading and writing, of the memory file with that number in memfd.img.
    ///
    /// # Errors
    /// There is no such file, or it could not be made.
    fn memfd(&self, inode_id: u32) -> Result<MemfdSource<'_>, MemfdSourceError>;
}

/// A descriptor of a memory file.
#[derive(Debug)]
pub enum MemfdSource<'a> {
    /// Of one that is kept open.
    Kept(BorrowedFd<'a>),
    /// Of one that is kept by other means.
    Opened(OwnedFd),
}

impl AsFd for MemfdSource<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            MemfdSource::Kept(fd) => *fd,
            MemfdSource::Opened(fd) => fd.as_fd(),
        }
    }
}

/// Memory files.
pub(super) struct Memfd;

/// True for a memory file.
pub(super) fn is_memfd(file: &OpenFile) -> bool {
    file.stat.file_type() == S_IFREG && file.stat.nlink == 0 && file.link.starts_with(PREFIX)
}

/// Makes the entry of an open memory file.
pub(super) fn entry(id: u32, flags: u32, pos: u64, fown: FownEntry, inode_id: u32) -> FileEntry {
    FileEntry {
        r#type: FdTypes::Memfd.into(),
        id,
        memfd: Some(MemfdFileEntry {
            id,
            flags,
            pos,
            fown,
            inode_id,
        }),
        ..FileEntry::default()
    }
}

impl FileKind for Memfd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Memfd
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        is_memfd(file)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        let path = file.proc_path();
        let inode_id = state.shared.add_path(&path, &file.link).map_err(|source| {
            let pid = file.pid;
            let object = file.place.to_string();
            let source = Box::new(source);
            FileDumpError::Memfd {
                pid,
                object,
                source,
            }
        })?;
        let flags = file.image_flags();
        Ok(entry(
            dumping.id,
            flags,
            file.info.pos,
            dumping.fown,
            inode_id,
        ))
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let memfd = FileRestoreError::expect_member(entry, entry.memfd.as_ref(), "a memory file")?;
        let inode_id = memfd.inode_id;
        let source = opener
            .shared
            .memfd(inode_id)
            .map_err(|source| FileRestoreError::Memfd { inode_id, source })?;
        let fd = open::reopen(source, memfd.flags, "a memory file")?;
        open::seek_to(&fd, memfd.pos, entry.id)?;
        Ok(fd)
    }
}
