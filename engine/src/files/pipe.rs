//! Pipes: both ends share the inode, which is the pipe's number in images.
//!
//! Each end is an open file with flags of its own; there may be several of either kind, since an end
//! can be opened again through /proc. Content and capacity are in [`super::pipe_data`]. O_DIRECT
//! (packet mode) is not among the flags of an image, so it has a field of ours.

use std::os::fd::{AsFd, OwnedFd};

use firn_images::{ImageDir, ImageKind};
use firn_proto::{FdTypes, FileEntry, FirnPipeEntry, PipeEntry};
use firn_sys::file::{
    O_ACCMODE, O_APPEND, O_ASYNC, O_DIRECT, O_NONBLOCK, O_PATH, O_RDWR, O_WRONLY, S_IFIFO,
};
use firn_sys::pipe;

use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::external::Inherited;
use super::ids::{IdMap, IdSet};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::OpenFile;
use super::pipe_data;
use super::shelf::{Held, Room, Shelf};

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
                    ..FirnPipeEntry::default()
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
        let pipe = FileRestoreError::expect_member(entry, entry.pipe.as_ref(), "a pipe")?;
        opener.pipes.open(pipe)
    }
}

/// The pipes being restored.
#[derive(Debug)]
pub(super) struct Pipes {
    /// Both ends of each pipe, until all its open files are there, so that it lives.
    ends: Shelf<(u32, Side)>,
    /// Ends that an open file has taken for itself; the others of its kind are opened anew.
    taken: IdSet<(u32, Side)>,
    /// How many open files of each pipe are still to come.
    to_come: IdMap<u32, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    Reader,
    Writer,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Reader => Side::Writer,
            Side::Writer => Side::Reader,
        }
    }
}

impl Pipes {
    /// Makes and fills the pipes that an image holds contents of, except those that are given with theirs.
    /// `nr_ends` says how many open files each of them has.
    pub(super) fn load(
        images: &ImageDir,
        inherited: &Inherited,
        nr_ends: IdMap<u32, usize>,
        room: &Room,
    ) -> Result<Pipes, FileRestoreError> {
        let mut pipes = Pipes {
            ends: Shelf::new(room.part(4)),
            taken: IdSet::default(),
            to_come: nr_ends,
        };
        pipe_data::for_each(images, ImageKind::PipesData, |entry, bytes| {
            if inherited.has_pipe(entry.pipe_id) {
                return Ok(());
            }
            if pipes.ends.contains(&(entry.pipe_id, Side::Reader)) {
                let what = "its pipe is filled twice";
                return Err(FileRestoreError::corrupt(entry.pipe_id, what));
            }
            let (reader, writer) = create(entry.pipe_id)?;
            let writer = pipe_data::fill_new(writer, entry, &bytes)?;
            pipes.put(entry.pipe_id, reader, writer)
        })?;
        Ok(pipes)
    }

    fn open(&mut self, entry: &PipeEntry) -> Result<OwnedFd, FileRestoreError> {
        let id = entry.pipe_id;
        self.make(id)?;
        let left = self.to_come.get(&id).copied().unwrap_or(usize::MAX);
        let access = entry.flags & (O_ACCMODE | O_PATH).cast_unsigned();
        let side = match access == O_WRONLY.cast_unsigned() {
            true => Side::Writer,
            false => Side::Reader,
        };
        // O_LARGEFILE, for one, tells that the end was opened through /proc, and fcntl can't set it.
        let settable = (O_ACCMODE | O_APPEND | O_ASYNC | O_NONBLOCK).cast_unsigned();
        let own = access != O_RDWR.cast_unsigned() && entry.flags & !settable == 0;
        let fd = match own && self.taken.insert((id, side)) {
            true => self.take((id, side), left, entry)?,
            false => open::reopen(self.any_end(id, side)?, flags_of(entry), "a pipe")?,
        };
        self.count_off(id)?;
        Ok(fd)
    }

    /// Takes an end for an open file. It stays for others where its pipe needs it.
    fn take(
        &mut self,
        end: (u32, Side),
        left: usize,
        entry: &PipeEntry,
    ) -> Result<OwnedFd, FileRestoreError> {
        let (id, side) = end;
        // The other one is enough for one more open file, of whichever kind.
        let is_last = left <= 1 || left == 2 && self.ends.contains(&(id, side.other()));
        let fd = match is_last {
            true => self.ends.remove(&end)?.expect("nobody else has taken it"),
            false => {
                let kept = self.ends.get(&end)?.expect("nobody else has taken it");
                let copy = kept.as_fd().try_clone_to_owned();
                copy.map_err(|e| FileRestoreError::refused("duplicate", "a pipe")(e.into()))?
            }
        };
        open::set_flags(&fd, flags_of(entry), "a pipe")?;
        Ok(fd)
    }

    /// The end of that kind, or else the other one: either can be opened again as both.
    fn any_end(&self, id: u32, side: Side) -> Result<Held<'_>, FileRestoreError> {
        if let Some(end) = self.ends.get(&(id, side))? {
            return Ok(end);
        }
        let other = self.ends.get(&(id, side.other()))?;
        Ok(other.expect("one stays until all open files are there"))
    }

    /// A writing end for whoever has it without a descriptor of the tree.
    pub(super) fn writer(&mut self, id: u32) -> Result<OwnedFd, FileRestoreError> {
        self.make(id)?;
        let end = self.ends.get(&(id, Side::Writer))?.expect("it was made");
        let copy = end.as_fd().try_clone_to_owned();
        copy.map_err(|error| FileRestoreError::refused("duplicate", "a pipe")(error.into()))
    }

    /// Makes a pipe that is not there yet.
    fn make(&mut self, id: u32) -> Result<(), FileRestoreError> {
        let is_there = |side| self.ends.contains(&(id, side));
        if !is_there(Side::Reader) && !is_there(Side::Writer) {
            let (reader, writer) = create(id)?;
            self.put(id, reader, writer)?;
        }
        Ok(())
    }

    fn put(&mut self, id: u32, reader: OwnedFd, writer: OwnedFd) -> Result<(), FileRestoreError> {
        self.ends.insert((id, Side::Reader), reader)?;
        Ok(self.ends.insert((id, Side::Writer), writer)?)
    }

    /// Lets a pipe go when the last of its open files is there.
    fn count_off(&mut self, id: u32) -> Result<(), FileRestoreError> {
        let Some(left) = self.to_come.get_mut(&id) else {
            return Ok(());
        };
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.ends.remove(&(id, Side::Reader))?;
            self.ends.remove(&(id, Side::Writer))?;
        }
        Ok(())
    }
}

/// All flags of an end; of ours only the one that is known.
pub(super) fn flags_of(entry: &PipeEntry) -> u32 {
    let ours = entry.firn.as_ref().and_then(|firn| firn.flags).unwrap_or(0);
    entry.flags | ours & O_DIRECT.cast_unsigned()
}

fn create(pipe_id: u32) -> Result<(OwnedFd, OwnedFd), FileRestoreError> {
    let name = format!("pipe {pipe_id}");
    pipe::create().map_err(FileRestoreError::refused("create", name))
}
