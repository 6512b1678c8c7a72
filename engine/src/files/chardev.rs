//! Character devices that keep nothing per open file: opened again by their path.

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry};
use firn_sys::file::{S_IFBLK, S_IFCHR, S_IFIFO, S_IFSOCK};

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};
use super::regular::{self, Regular};

/// Major number of the memory devices.
const MEMORY: u32 = 1;
/// null, zero, full, random, urandom.
const STATELESS: [u32; 5] = [3, 5, 7, 8, 9];
/// Major and minor number of /dev/autofs, which only passes commands on.
const AUTOFS: (u32, u32) = (10, 235);

/// Devices without a state, and any node that was opened with O_PATH only.
pub(super) struct CharDevice;

impl FileKind for CharDevice {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Reg
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        if !file.link.starts_with(b"/") {
            return false;
        }
        let (major, minor) = file.stat.device();
        match file.stat.file_type() {
            // Nothing but the path matters of a node that no driver has opened.
            S_IFCHR | S_IFBLK | S_IFIFO | S_IFSOCK if file.is_path_only() => true,
            S_IFCHR if (major, minor) == AUTOFS => true,
            S_IFCHR => major == MEMORY && STATELESS.contains(&minor),
            _ => false,
        }
    }

    fn trouble(&self, file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
        regular::path_trouble(file, options)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        Regular.dump(dumping, state)
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        Regular.open(entry, opener)
    }
}
