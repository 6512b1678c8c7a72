//! Pipes: both ends share the inode, which is the pipe's number in images.
//!
//! Each end is an open file with flags of its own; there may be several of either kind, since an end
//! can be opened again through /proc. Content and capacity are in [`super::pipe_data`]. O_DIRECT
//! (packet mode) is not among the flags of an image, so it has a field of ours.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_images::{ImageDir, ImageKind};
use firn_proto::{FdTypes, FileEntry, FirnPipeEntry, PipeEntry};
use firn_sys::file::{
    O_ACCMODE, O_APPEND, O_ASYNC, O_DIRECT, O_NONBLOCK, O_PATH, O_RDWR, O_WRONLY, S_IFIFO,
};
use firn_sys::pipe;

use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::external::Inherited;
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::OpenFile;
use super::pipe_data;

/// Pipes without a name.
pub(super) struct Pipe;

impl FileKind for Pipe {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Pipe
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.stat.file_type() == S_IFIFO && file.link.starts_with(b"pipe:[")
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let pipe_id = state.collected.pipes.add(dumping)?;
        let external = state.collected.options.has_external(dumping.file);
        let flags = dumping.file.image_flags();
        let packet_mode = flags & O_DIRECT.cast_unsigned();
        Ok(FileEntry {
            r#type: FdTypes::Pipe.into(),
            id: dumping.id,
            pipe: Some(PipeEntry {
                id: dumping.id,
                pipe_id,
                flags: flags & !O_DIRECT.cast_unsigned(),
                fown: dumping.fown,
                firn: (packet_mode != 0 || external).then_some(FirnPipeEntry {
                    flags: (packet_mode != 0).then_some(packet_mode),
                    external: external.then_some(true),
                }),
            }),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let pipe = entry
            .pipe
            .as_ref()
            .ok_or_else(|| FileRestoreError::corrupt(entry.id, "it has no member for a pipe"))?;
        opener.pipes.open(pipe)
    }
}

/// The pipes being restored.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    pairs: HashMap<u32, Pair>,
}

/// Both ends of a pipe. The first open file of either kind takes the end itself; a duplicate stays here
/// until all are opened, so that the pipe lives.
#[derive(Debug)]
struct Pair {
    reader: End,
    writer: End,
}

#[derive(Debug)]
struct End {
    fd: OwnedFd,
    taken: bool,
}

impl Pipes {
    /// Makes and fills the pipes that an image holds contents of, except those that are given with theirs.
    pub(super) fn load(
        images: &ImageDir,
        inherited: &Inherited,
    ) -> Result<Pipes, FileRestoreError> {
        let mut pipes = Pipes::default();
        pipe_data::for_each(images, ImageKind::PipesData, |entry, bytes| {
            if inherited.has_pipe(entry.pipe_id) {
                return Ok(());
            }
            let pair = Pair::new(entry.pipe_id)?;
            let writer = pipe_data::fill(pair.writer.fd, entry, &bytes)?;
            let pair = Pair {
                reader: pair.reader,
                writer: End::new(writer),
            };
            match pipes.pairs.insert(entry.pipe_id, pair) {
                None => Ok(()),
                Some(_) => Err(FileRestoreError::corrupt(
                    entry.pipe_id,
                    "its pipe is filled twice",
                )),
            }
        })?;
        Ok(pipes)
    }

    fn open(&mut self, entry: &PipeEntry) -> Result<OwnedFd, FileRestoreError> {
        let pair = match self.pairs.entry(entry.pipe_id) {
            std::collections::hash_map::Entry::Occupied(pair) => pair.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(Pair::new(entry.pipe_id)?)
            }
        };
        let access = entry.flags & (O_ACCMODE | O_PATH).cast_unsigned();
        let end = if access == O_WRONLY.cast_unsigned() {
            &mut pair.writer
        } else {
            &mut pair.reader
        };
        // O_LARGEFILE, for one, tells that the end was opened through /proc, and fcntl can't set it.
        let settable = (O_ACCMODE | O_APPEND | O_ASYNC | O_NONBLOCK).cast_unsigned();
        let own = access != O_RDWR.cast_unsigned() && entry.flags & !settable == 0;
        if end.taken || !own {
            return open::reopen(end.fd.as_fd(), flags_of(entry), "a pipe");
        }
        end.taken = true;
        take(end.fd.as_fd(), entry)
    }
}

fn take(end: BorrowedFd<'_>, entry: &PipeEntry) -> Result<OwnedFd, FileRestoreError> {
    let fd = end
        .try_clone_to_owned()
        .map_err(|error| FileRestoreError::refused("duplicate", "a pipe")(error.into()))?;
    open::set_flags(&fd, flags_of(entry), "a pipe")?;
    Ok(fd)
}

/// All flags of an end; of ours only the one that is known.
pub(super) fn flags_of(entry: &PipeEntry) -> u32 {
    let ours = entry.firn.as_ref().and_then(|firn| firn.flags).unwrap_or(0);
    entry.flags | ours & O_DIRECT.cast_unsigned()
}

impl Pair {
    fn new(pipe_id: u32) -> Result<Pair, FileRestoreError> {
        let name = format!("pipe {pipe_id}");
        let (reader, writer) = pipe::create().map_err(FileRestoreError::refused("create", name))?;
        Ok(Pair {
            reader: End::new(reader),
            writer: End::new(writer),
        })
    }
}

impl End {
    fn new(fd: OwnedFd) -> End {
        End { fd, taken: false }
    }
}
