//! Eventfds: a counter.
//!
//! The counter is in fdinfo, in hexadecimal; whether it counts as a semaphore is there since Linux 6.5,
//! and has a field of ours in the image, where CRIU has none.

use std::os::fd::OwnedFd;

use firn_proto::{EventfdFileEntry, FdTypes, FileEntry, FirnEventfdEntry};
use firn_sys::eventfd;

use super::anonymous::Anonymous;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::open::{self, Opener};

/// Counters.
pub(super) struct Eventfd;

impl Anonymous for Eventfd {
    type Record = EventfdFileEntry;
    const FD_TYPE: FdTypes = FdTypes::Eventfd;
    const LINK: &'static str = "[eventfd]";
    const NAME: &'static str = "an eventfd";

    fn describe(
        dumping: &Dumping<'_>,
        _: &mut DumpState<'_>,
    ) -> Result<EventfdFileEntry, FileDumpError> {
        let file = dumping.file;
        let counter = file.field("eventfd-count", |text| u64::from_str_radix(text, 16).ok())?;
        let semaphore = file.info.value("eventfd-semaphore") == Some("1");
        Ok(EventfdFileEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            counter,
            firn: semaphore.then_some(FirnEventfdEntry {
                semaphore: Some(true),
            }),
        })
    }

    fn make(eventfd: &EventfdFileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let semaphore = eventfd.firn.as_ref().and_then(|firn| firn.semaphore);
        let fd = eventfd::create(eventfd.counter, semaphore.unwrap_or(false))
            .map_err(FileRestoreError::refused("create", "an eventfd"))?;
        open::set_flags(&fd, eventfd.flags, "an eventfd")?;
        Ok(fd)
    }

    fn record(entry: &FileEntry) -> Option<&EventfdFileEntry> {
        entry.efd.as_ref()
    }

    fn put(record: EventfdFileEntry, entry: &mut FileEntry) {
        entry.efd = Some(record);
    }
}
