//! Pidfds of tasks that live, of threads, and of tasks that are gone.
//!
//! A task has a pidfd only once it exists, so those files are opened late: see [`super::late`]. For the
//! gone a helper is made and ended; those that were of one task are of one helper again.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, PidfdEntry};
use firn_sys::file::{O_EXCL, O_NONBLOCK, O_RDWR};
use firn_sys::{Pid, clone3, pidfd, wait};

use super::anonymous::Anonymous;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::late::LateFile;
use super::open::{self, Opener};
use super::open_file::Trouble;

/// What fdinfo and images say of a task that is gone.
const GONE: i32 = -1;

/// Descriptors of tasks.
pub(super) struct Pidfd;

impl Anonymous for Pidfd {
    type Record = PidfdEntry;
    const FD_TYPE: FdTypes = FdTypes::Pidfd;
    const LINK: &'static str = "[pidfd]";
    const NAME: &'static str = "a pidfd";

    fn describe(
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<PidfdEntry, FileDumpError> {
        let file = dumping.file;
        let pid: i32 = file.field("Pid", |text| text.parse().ok())?;
        if pid != GONE && !state.collected.inside.contains(&Pid::from_raw(pid)) {
            let obstacle = file.obstacle(outside(pid));
            return Err(FileDumpError::Obstacles(vec![obstacle]));
        }
        // One number for each nested namespace, the innermost last.
        let nspid = file.field("NSpid", |text| {
            text.split_whitespace().next_back()?.parse().ok()
        })?;
        let ino = u32::try_from(file.info.ino & 0xffff_ffff).expect("masked");
        Ok(PidfdEntry {
            id: dumping.id,
            ino,
            flags: file.image_flags() & !O_RDWR.cast_unsigned(),
            nspid,
            fown: dumping.fown,
        })
    }

    fn make(wanted: &PidfdEntry, opener: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        if wanted.nspid != GONE {
            let late = LateFile::Pidfd(*wanted);
            return opener.late(FdTypes::Pidfd, wanted.id, late);
        }
        let helper = opener.departed.of(wanted.ino)?;
        open_of(helper, wanted)
    }

    fn record(entry: &FileEntry) -> Option<&PidfdEntry> {
        entry.pidfd.as_ref()
    }

    fn put(record: PidfdEntry, entry: &mut FileEntry) {
        entry.pidfd = Some(record);
    }
}

fn outside(pid: i32) -> Trouble {
    let of = match pid {
        0 => "a task of an outer pid namespace".to_owned(),
        pid => format!("task {pid}"),
    };
    Trouble::new(
        format!("it is of {of}, outside the tree"),
        "dump the tree that contains both, or let the task close it",
    )
}

/// Opens a pidfd of a task that is there.
pub(super) fn open_of(pid: Pid, wanted: &PidfdEntry) -> Result<OwnedFd, FileRestoreError> {
    let flags = wanted.flags & (O_EXCL | O_NONBLOCK).cast_unsigned();
    let fd = pidfd::open_with(pid, flags).map_err(FileRestoreError::refused(
        "open",
        format!("a pidfd of {pid}"),
    ))?;
    open::set_flags(&fd, wanted.flags & !O_EXCL.cast_unsigned(), "a pidfd")?;
    Ok(fd)
}

/// Helpers that have ended and stand for tasks that are gone, by the number of the pidfd's inode.
#[derive(Debug, Default)]
pub(super) struct Departed {
    helpers: HashMap<u32, Pid>,
}

impl Departed {
    fn of(&mut self, ino: u32) -> Result<Pid, FileRestoreError> {
        if let Some(pid) = self.helpers.get(&ino) {
            return Ok(*pid);
        }
        let pid = clone3::spawn_dead(0).map_err(FileRestoreError::refused(
            "make",
            "a helper that ends at once",
        ))?;
        self.helpers.insert(ino, pid);
        Ok(pid)
    }
}

impl Drop for Departed {
    fn drop(&mut self) {
        for pid in self.helpers.values() {
            // Only now are they gone for whoever holds a pidfd.
            let _ = wait::wait(*pid);
        }
    }
}
