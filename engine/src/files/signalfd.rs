//! Signalfds: a mask. What waits in them are the signals of whoever reads.

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, SignalfdEntry};
use firn_sys::signalfd;

use super::anonymous::Anonymous;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::open::{self, Opener};

/// Signals to be read.
pub(super) struct Signalfd;

impl Anonymous for Signalfd {
    type Record = SignalfdEntry;
    const FD_TYPE: FdTypes = FdTypes::Signalfd;
    const LINK: &'static str = "[signalfd]";
    const NAME: &'static str = "a signalfd";

    fn describe(
        dumping: &Dumping<'_>,
        _: &mut DumpState<'_>,
    ) -> Result<SignalfdEntry, FileDumpError> {
        let file = dumping.file;
        Ok(SignalfdEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            sigmask: file.field("sigmask", |text| u64::from_str_radix(text, 16).ok())?,
        })
    }

    fn make(signalfd: &SignalfdEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let fd = signalfd::create(signalfd.sigmask)
            .map_err(FileRestoreError::refused("create", "a signalfd"))?;
        open::set_flags(&fd, signalfd.flags, "a signalfd")?;
        Ok(fd)
    }

    fn record(entry: &FileEntry) -> Option<&SignalfdEntry> {
        entry.sgfd.as_ref()
    }

    fn put(record: SignalfdEntry, entry: &mut FileEntry) {
        entry.sgfd = Some(record);
    }
}
