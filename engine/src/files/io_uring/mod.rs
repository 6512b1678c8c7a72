//! io_uring rings: memory that a program and the kernel share, and two counters of the kernel's own.
//!
//! What the kernel shows of a ring: its file (which is mapped here to read it), fdinfo, and how it refuses
//! operations (`probe.rs`). What it does not show decides what can be saved:
//!
//! * **Requests in flight** are not listed. Each request that the kernel has taken gives one completion as a
//!   rule, so a ring is idle when it has taken as many as it has completed. Requests that complete several
//!   times or not at all (multishot, IOSQE_CQE_SKIP_SUCCESS, zero-copy sends, messages between rings) upset the
//!   balance: such a ring is refused even if it is idle.
//! * **Registered files and eventfds** are shown by name at most, and which open file it is can't be told.
//! * **Parameters**: IORING_SETUP_SUBMIT_ALL, COOP_TASKRUN and the idle time of a submitting thread show
//!   nowhere. A restored ring does without the former two, which changes when the kernel does its work but not
//!   what comes of it, and has the kernel's usual idle time.
//!
//! A restored ring is made with the same parameters, and its counters are moved by requests that do nothing, as
//! they can be set by nothing else: some millions a second. Then entries and indices are written into it.
//! Its mappings can't be put anywhere by request, see `memory/gap.rs`.
//!
//! Source: linux io_uring/io_uring.c, fdinfo.c, memmap.c, register.c.

mod dump;
mod fdinfo;
mod layout;
mod probe;
mod registered;
mod restore;

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry};

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};

/// Rings.
pub(super) struct IoUring;

impl FileKind for IoUring {
    fn fd_type(&self) -> FdTypes {
        FdTypes::FirnUring
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.is_anonymous("[io_uring]")
    }

    fn trouble(&self, file: &OpenFile, _: &FileDumpOptions) -> Option<Trouble> {
        let shown = fdinfo::Shown::parse(&file.info.lines)?;
        dump::trouble(&shown)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        dump::dump(dumping, state)
    }

    fn open(&self, entry: &FileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let ring = entry.firn_uring.as_ref().ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "it has no member for an io_uring ring")
        })?;
        restore::open(ring)
    }
}
