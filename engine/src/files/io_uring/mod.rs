//! io_uring rings: memory that a program and the kernel share, and two counters of the kernel's own.
//!
//! What the kernel shows of a ring: its file (which is mapped here to read it), fdinfo, how it refuses operations
//! (`probe.rs`), and, to a root that may load BPF programs, everything (`inner.rs`): what waits then is saved, too
//! (`in_flight.rs`), and asked for again last of all (`again.rs`). Without the latter
//!
//! * **requests in flight** show only by their number: each request that the kernel has taken gives one completion
//!   as a rule, so a ring is idle when it has taken as many as it has completed. Requests that complete several
//!   times or not at all (multishot, IOSQE_CQE_SKIP_SUCCESS, zero-copy sends, messages between rings) upset the
//!   balance: such a ring is refused even if it is idle;
//! * **parameters** that say when the kernel does its work, and not what comes of it, show nowhere.
//!
//! A restored ring is made with the same parameters, and its counters are moved by requests that do nothing, as
//! they can be set by nothing else: some millions a second. Then entries and indices are written into it.
//! Its mappings can't be put anywhere by request, see `memory/gap.rs`. What only its process can do is in `own.rs`.
//!
//! Source: linux io_uring/io_uring.c, fdinfo.c, memmap.c, register.c.

mod again;
mod asked;
mod belongings;
mod dump;
mod dumped;
mod fdinfo;
mod in_flight;
mod inner;
mod layout;
mod memory;
mod operations;
mod own;
mod probe;
mod registered;
mod restore;
mod settings;
mod turns;
mod users;

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, FirnUringEntry};

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::late::LateFile;
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};
use turns::Turns;

pub(super) use dumped::DumpedRings;

/// Whether a link in /proc/PID/fd leads to a ring.
pub(super) fn is_ring(link: &[u8]) -> bool {
    link == b"anon_inode:[io_uring]"
}

/// Looks at all rings of an image set; returns what is to be said before they are made.
///
/// # Errors
/// Their restore would take too long.
pub(super) fn check<'a>(
    entries: impl Iterator<Item = &'a FileEntry>,
) -> Result<Option<String>, FileRestoreError> {
    let rings = entries.filter_map(|entry| entry.firn_uring.as_deref());
    let (mut total, mut last) = (0, 0);
    for ring in rings {
        total += Turns::of(ring).total();
        last = ring.id;
    }
    match turns::is_too_many(total) {
        true => Err(FileRestoreError::Unsupported {
            id: last,
            kind: "io_uring ring after so many requests that to repeat their number takes too long",
        }),
        false => Ok(turns::warning(total)),
    }
}

/// More places for files or memory than the kernel allows a ring are not tried.
fn check_places(ring: &FirnUringEntry) -> Result<(), FileRestoreError> {
    const MAX: u32 = 1 << 20;
    let nr_files = ring.nr_files.unwrap_or(0);
    let is_outside = ring.files.iter().any(|file| file.place >= nr_files);
    if nr_files > MAX || is_outside || ring.buffers.len() > 1 << 16 {
        let what = "it has more places for registered files or memory than a ring can have";
        return Err(FileRestoreError::corrupt(ring.id, what));
    }
    Ok(())
}

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

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let ring = FileRestoreError::expect_member(
            entry,
            entry.firn_uring.as_deref(),
            "an io_uring ring",
        )?;
        check_places(ring)?;
        if own::has_thread(ring) {
            restore::shape(ring)?;
            return opener.late(FdTypes::FirnUring, entry.id, LateFile::Ring);
        }
        restore::open(ring)
    }
}
