//! Named fifos: a pipe that is opened by path.
//!
//! The entry points to another one that has path and flags. Opening one end sleeps until there is the
//! other, so at restore an end for both is opened first and closed when everything is open.

use std::os::fd::OwnedFd;

use firn_images::{ImageDir, ImageKind};
use firn_proto::{FdTypes, FifoEntry, FileEntry};
use firn_sys::file::{O_NONBLOCK, O_RDWR, S_IFIFO};

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};
use super::shelf::{Room, Shelf};
use super::{pipe_data, regular};

/// Pipes with a name.
pub(super) struct Fifo;

impl FileKind for Fifo {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Fifo
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        let named = file.stat.file_type() == S_IFIFO && file.link.starts_with(b"/");
        named && !file.is_path_only()
    }

    fn trouble(&self, file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
        regular::path_trouble(file, options)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let collected = &mut *state.collected;
        let pipe_id = collected.fifos.add(dumping)?;
        let regf_id = collected.new_id();
        let path = regular::dump(dumping.file, regf_id, dumping.fown, collected)?;
        collected.entries.push(path);
        Ok(FileEntry {
            r#type: FdTypes::Fifo.into(),
            id: dumping.id,
            fifo: Some(FifoEntry {
                id: dumping.id,
                pipe_id,
                regf_id: Some(regf_id),
            }),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let fifo = FileRestoreError::expect_member(entry, entry.fifo.as_ref(), "a fifo")?;
        let reg = opener.path_entry(entry.id, fifo.regf_id)?;
        if !opener.fifos.held.contains(&fifo.pipe_id) {
            let both = opener.open_regular(reg, (O_RDWR | O_NONBLOCK).cast_unsigned())?;
            opener.fifos.held.insert(fifo.pipe_id, both)?;
        }
        opener.open_regular(reg, reg.flags)
    }
}

/// Both ends of the fifos being restored, by their number in images.
#[derive(Debug)]
pub(super) struct Fifos {
    held: Shelf<u32>,
}

impl Fifos {
    /// None yet.
    pub(super) fn new(room: &Room) -> Fifos {
        Fifos {
            held: Shelf::new(room.part(4)),
        }
    }

    /// Fills the fifos, all of which are open now.
    pub(super) fn fill(&mut self, images: &ImageDir) -> Result<(), FileRestoreError> {
        pipe_data::for_each(images, ImageKind::FifoData, |entry, bytes| {
            // No descriptor of a table may lead to it.
            match self.held.remove(&entry.pipe_id)? {
                Some(both) => {
                    let both = pipe_data::fill(both, entry, &bytes)?;
                    Ok(self.held.insert(entry.pipe_id, both)?)
                }
                None => Ok(()),
            }
        })
    }
}
