//! Kinds without a path, each open file of which is one message in the image: eventfds and their like.

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry};

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};

/// A kind without a path. What it says here makes a [`FileKind`] of it.
pub(super) trait Anonymous: Sync {
    /// Its message.
    type Record;
    /// Type of its entries.
    const FD_TYPE: FdTypes;
    /// What stands behind `anon_inode:` in the link.
    const LINK: &'static str;
    /// What it is called, with the article.
    const NAME: &'static str;

    /// Describes an open file.
    fn describe(
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<Self::Record, FileDumpError>;

    /// Makes an open file that is as described.
    fn make(record: &Self::Record, opener: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError>;

    /// The message of an entry, if it has one.
    fn record(entry: &FileEntry) -> Option<&Self::Record>;

    /// Puts the message into an entry.
    fn put(record: Self::Record, entry: &mut FileEntry);

    /// What keeps an open file from being dumped.
    fn trouble(_: &OpenFile) -> Option<Trouble> {
        None
    }
}

impl<A: Anonymous> FileKind for A {
    fn fd_type(&self) -> FdTypes {
        A::FD_TYPE
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        // O_PATH tells nothing about it.
        file.is_anonymous(A::LINK) && !file.is_path_only()
    }

    fn trouble(&self, file: &OpenFile, _: &FileDumpOptions) -> Option<Trouble> {
        A::trouble(file)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let mut entry = FileEntry {
            r#type: A::FD_TYPE.into(),
            id: dumping.id,
            ..FileEntry::default()
        };
        A::put(A::describe(dumping, state)?, &mut entry);
        Ok(entry)
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let record = FileRestoreError::expect_member(entry, A::record(entry), A::NAME)?;
        A::make(record, opener)
    }
}
