//! Unix sockets.
//!
//! Who is connected to whom, who waits to be accepted, and what is shut down is told by unix_diag; queues
//! are looked at with MSG_PEEK at SO_PEEK_OFF, descriptors in them included. The name stays with a socket
//! also when its file is gone or has been moved, so both are kept.
//!
//! Not kept: messages of somebody who waits to be accepted (no call shows them), which refuses the dump.

mod connect;
mod dump;
mod fill;
mod finish;
mod makers;
mod names;
mod restore;

pub(in crate::files) use dump::DumpedUnix;
pub(super) use names::shown;
pub(in crate::files) use restore::RestoredUnix;

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry};

use super::{is_socket, protocol_name};
use crate::files::dump::DumpState;
use crate::files::error::{FileDumpError, FileRestoreError};
use crate::files::kind::{Dumping, FileKind};
use crate::files::open::Opener;
use crate::files::open_file::OpenFile;

/// `uflags` of a socket that stands for a peer outside of the tree.
const USK_EXTERN: u32 = 1;

/// Unix sockets.
pub(in crate::files) struct UnixSocketKind;

impl FileKind for UnixSocketKind {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Unixsk
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        // A name for streams and one for the others.
        is_socket(file) && protocol_name(file).is_some_and(|name| name.starts_with("UNIX"))
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let sockets = &mut state.collected.sockets;
        let entry = sockets.unix.add(dumping, &mut sockets.defaults)?;
        Ok(FileEntry {
            r#type: FdTypes::Unixsk.into(),
            id: dumping.id,
            usk: Some(Box::new(entry)),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        opener.sockets.take(FdTypes::Unixsk, entry.id)
    }
}
