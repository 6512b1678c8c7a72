//! Signalfds: a mask. What waits in them are the signals of whoever reads.

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, SignalfdEntry};
use firn_sys::signalfd;

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};

/// Signals to be read.
pub(super) struct Signalfd;

impl FileKind for Signalfd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Signalfd
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.is_anonymous("[signalfd]")
    }

    fn trouble(&self, _: &OpenFile, _: &FileDumpOptions) -> Option<Trouble> {
        None
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        _: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        Ok(FileEntry {
            r#type: FdTypes::Signalfd.into(),
            id: dumping.id,
            sgfd: Some(SignalfdEntry {
                id: dumping.id,
                flags: file.image_flags(),
                fown: dumping.fown,
                sigmask: file.field("sigmask", |text| u64::from_str_radix(text, 16).ok())?,
            }),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let signalfd = entry.sgfd.as_ref().ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "it has no member for a signalfd")
        })?;
        let fd = signalfd::create(signalfd.sigmask)
            .map_err(FileRestoreError::refused("create", "a signalfd"))?;
        open::set_flags(&fd, signalfd.flags, "a signalfd")?;
        Ok(fd)
    }
}
