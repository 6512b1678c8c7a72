//! Eventfds: a counter.
//!
//! The counter is in fdinfo, in hexadecimal; whether it counts as a semaphore is there since Linux 6.5,
//! and has a field of ours in the image, where CRIU has none.

use std::os::fd::OwnedFd;

use firn_proto::{EventfdFileEntry, FdTypes, FileEntry, FirnEventfdEntry};
use firn_sys::eventfd;

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};

/// Counters.
pub(super) struct Eventfd;

impl FileKind for Eventfd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Eventfd
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.is_anonymous("[eventfd]")
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
        let counter = file.field("eventfd-count", |text| u64::from_str_radix(text, 16).ok())?;
        let semaphore = file.info.value("eventfd-semaphore") == Some("1");
        Ok(FileEntry {
            r#type: FdTypes::Eventfd.into(),
            id: dumping.id,
            efd: Some(EventfdFileEntry {
                id: dumping.id,
                flags: file.image_flags(),
                fown: dumping.fown,
                counter,
                firn: semaphore.then_some(FirnEventfdEntry {
                    semaphore: Some(true),
                }),
            }),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let eventfd = entry.efd.as_ref().ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "it has no member for an eventfd")
        })?;
        let semaphore = eventfd.firn.as_ref().and_then(|firn| firn.semaphore);
        let fd = eventfd::create(eventfd.counter, semaphore.unwrap_or(false))
            .map_err(FileRestoreError::refused("create", "an eventfd"))?;
        open::set_flags(&fd, eventfd.flags, "an eventfd")?;
        Ok(fd)
    }
}
