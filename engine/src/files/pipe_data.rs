//! Bytes that wait in pipes and fifos.
//!
//! They are copied with tee into a pipe of our own and read from there, so the original keeps them. In
//! packet mode (O_DIRECT) one read returns one packet, also from the copy, so the borders are seen.

use std::collections::HashMap;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use firn_images::{ImageDir, ImageKind, ImageSetWriter};
use firn_proto::{FirnPipeDataEntry, PipeDataEntry};
use firn_sys::file::{O_ACCMODE, O_DIRECT, O_NONBLOCK, O_RDONLY, O_RDWR, O_WRONLY};
use firn_sys::{Errno, Pid, fcntl, pidfd, pipe};

use super::dump::{fd_of, query};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::open_file::OpenFile;

/// Capacity that every new pipe has.
const DEFAULT_CAPACITY: usize = 65536;
/// What an empty pipe takes in any case.
const LEAST_ROOM: usize = 4096;
/// The largest number of bytes that a pipe can hold, for any privilege.
const MAX_BYTES: u64 = 1 << 31;

/// How many bytes are read when their pipes are met; what is more is read when it is written, so that it need not all
/// be kept in memory.
const MAX_READ_AHEAD: u64 = 4 << 20;

/// The pipes met so far, by inode.
#[derive(Debug, Default)]
pub(super) struct PipeContents {
    pipes: BTreeMap<u32, Contents>,
    peeker: Peeker,
    /// Bytes that were read already.
    nr_read: u64,
}

#[derive(Debug)]
struct Contents {
    capacity: usize,
    /// A descriptor of a reading end, where there is one.
    reader: Option<(Pid, i32)>,
    has_writer: bool,
    waiting: u64,
    /// What waits, and the lengths of its packets, where it was read when the end was met.
    read: Option<(Vec<u8>, Vec<u32>)>,
    packet_mode: bool,
    any: OpenFile,
}

impl PipeContents {
    /// Notes an open end. Returns the pipe's number in images.
    pub(super) fn add(&mut self, dumping: &Dumping<'_>) -> Result<u32, FileDumpError> {
        let file = dumping.file;
        let pipe_id = u32::try_from(file.stat.ino & 0xffff_ffff).expect("masked");
        let (Some(fd), Some(number)) = (dumping.duplicate, fd_of(file)) else {
            return Ok(pipe_id);
        };
        let failed = |source| query(file, "the pipe", source);
        let mode = file.info.flags & O_ACCMODE.cast_unsigned();
        let reads = mode == O_RDONLY.cast_unsigned() || mode == O_RDWR.cast_unsigned();
        let writes = mode == O_WRONLY.cast_unsigned() || mode == O_RDWR.cast_unsigned();
        let contents = match self.pipes.entry(pipe_id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(Contents {
                capacity: pipe::capacity(fd).map_err(failed)?,
                reader: None,
                has_writer: false,
                waiting: 0,
                read: None,
                packet_mode: false,
                any: file.clone(),
            }),
        };
        if reads && contents.reader.is_none() {
            contents.reader = Some((file.pid, number));
            contents.waiting = pipe::waiting(fd).map_err(failed)?;
            // The duplicate is at hand now, and would have to be fetched once more.
            if contents.waiting > 0 && self.nr_read + contents.waiting <= MAX_READ_AHEAD {
                let read = self.peeker.peek(fd, contents.capacity, contents.waiting);
                contents.read = Some(read.map_err(failed)?);
                self.nr_read += contents.waiting;
            }
        }
        contents.has_writer |= writes;
        contents.packet_mode |= file.info.flags & O_DIRECT.cast_unsigned() != 0;
        Ok(pipe_id)
    }

    /// Pipes of which the tree has one end only while somebody has the other: any of their descriptors,
    /// by link text.
    pub(super) fn half_open(&self) -> Result<HashMap<Vec<u8>, OpenFile>, FileDumpError> {
        let mut found = HashMap::new();
        for pipe in self.pipes.values().filter(|pipe| !pipe.is_whole()) {
            let failed = |source| query(&pipe.any, "the other end", source);
            if pipe.has_other_end().map_err(failed)? {
                found.insert(pipe.any.link.clone(), pipe.any.clone());
            }
        }
        Ok(found)
    }

    /// Bytes that wait in a pipe.
    pub(super) fn waiting(&self, inode: u64) -> u64 {
        let pipe = u32::try_from(inode).ok();
        pipe.and_then(|id| self.pipes.get(&id))
            .map_or(0, |pipe| pipe.waiting)
    }

    /// Writes the contents; returns the number of bytes.
    pub(super) fn write(
        &mut self,
        images: &ImageSetWriter,
        kind: ImageKind,
    ) -> Result<u64, FileDumpError> {
        let mut writer = images.writer(kind, 0);
        let mut total = 0;
        let peeker = &mut self.peeker;
        for (&pipe_id, contents) in &mut self.pipes {
            if contents.waiting == 0 && contents.capacity == DEFAULT_CAPACITY {
                continue;
            }
            let (bytes, packets) = match contents.read.take() {
                Some(read) => read,
                None => contents.peek(peeker)?,
            };
            let len = u32::try_from(bytes.len()).expect("pipes hold less than 2 GiB");
            writer.entry(&PipeDataEntry {
                pipe_id,
                bytes: len,
                size: u32::try_from(contents.capacity).ok(),
                firn: contents
                    .packet_mode
                    .then_some(FirnPipeDataEntry { packets }),
            })?;
            writer.payload(&bytes)?;
            total += u64::from(len);
        }
        writer.finish()?;
        Ok(total)
    }
}

impl Contents {
    /// Whether the tree has ends of both kinds.
    fn is_whole(&self) -> bool {
        self.reader.is_some() && self.has_writer
    }

    /// Whether somebody holds an end of the kind that the tree does not have.
    fn has_other_end(&self) -> firn_sys::Result<bool> {
        let Some(fd) = fd_of(&self.any) else {
            return Ok(false);
        };
        let own_end = pidfd::getfd(pidfd::open(self.any.pid)?, fd)?;
        pipe::other_end_open(own_end)
    }

    fn peek(&self, peeker: &mut Peeker) -> Result<(Vec<u8>, Vec<u32>), FileDumpError> {
        let Some((pid, fd)) = self.reader.filter(|_| self.waiting > 0) else {
            return Ok(Default::default());
        };
        let failed = |source| query(&self.any, "the content", source);
        let pidfd = peeker.pidfd(pid).map_err(failed)?;
        let reader = pidfd::getfd(pidfd, fd).map_err(failed)?;
        peeker
            .peek(&reader, self.capacity, self.waiting)
            .map_err(failed)
    }
}

/// Copies what waits in pipes without taking it out, all through one pipe of our own.
#[derive(Debug, Default)]
struct Peeker {
    /// The task asked last.
    task: Option<(Pid, OwnedFd)>,
    copy: Option<OwnPipe>,
}

/// A pipe that is empty between two uses.
#[derive(Debug)]
struct OwnPipe {
    reader: File,
    writer: OwnedFd,
    capacity: usize,
}

impl Peeker {
    fn pidfd(&mut self, pid: Pid) -> firn_sys::Result<&OwnedFd> {
        if self.task.as_ref().is_none_or(|(known, _)| *known != pid) {
            self.task = Some((pid, pidfd::open_by_thread(pid)?));
        }
        Ok(&self.task.as_ref().expect("made above").1)
    }

    /// An empty pipe with as many slots as one of `capacity`, each of which may hold a single byte.
    fn copy(&mut self, capacity: usize) -> firn_sys::Result<&mut OwnPipe> {
        if self
            .copy
            .as_ref()
            .is_none_or(|copy| copy.capacity < capacity)
        {
            let (reader, writer) = pipe::create()?;
            pipe::set_capacity(&writer, capacity)?;
            self.copy = Some(OwnPipe {
                reader: reader.into(),
                writer,
                capacity,
            });
        }
        Ok(self.copy.as_mut().expect("made above"))
    }

    /// The bytes, and how many each read returned, which are the packets in packet mode.
    fn peek(
        &mut self,
        reader: impl AsFd,
        capacity: usize,
        waiting: u64,
    ) -> firn_sys::Result<(Vec<u8>, Vec<u32>)> {
        let copy = self.copy(capacity)?;
        let wanted = usize::try_from(waiting).map_err(|_| Errno::EINVAL)?;
        let copied = pipe::tee(reader, &copy.writer, wanted)?;
        if copied != wanted {
            return Err(Errno::EIO);
        }
        let mut bytes = vec![0; wanted];
        let mut packets = Vec::new();
        let mut at = 0;
        while at < wanted {
            let got = copy.reader.read(&mut bytes[at..])?;
            if got == 0 {
                return Err(Errno::EIO);
            }
            packets.push(u32::try_from(got).map_err(|_| Errno::EINVAL)?);
            at += got;
        }
        Ok((bytes, packets))
    }
}

/// Reads the contents of all pipes out of an image and hands each to `fill`.
pub(super) fn for_each(
    images: &ImageDir,
    kind: ImageKind,
    mut fill: impl FnMut(&PipeDataEntry, Vec<u8>) -> Result<(), FileRestoreError>,
) -> Result<(), FileRestoreError> {
    let Some(mut reader) = images.reader_if_there(kind, 0)? else {
        return Ok(());
    };
    while let Some(entry) = reader.next_entry::<PipeDataEntry>()? {
        let bytes = reader.payload(u64::from(entry.bytes))?;
        fill(&entry, bytes)?;
    }
    Ok(())
}

/// Sets the capacity of a pipe that nobody else has yet and fills it.
pub(super) fn fill_new(
    writer: OwnedFd,
    entry: &PipeDataEntry,
    bytes: &[u8],
) -> Result<OwnedFd, FileRestoreError> {
    let has_capacity =
        |size: u32| pipe::capacity(&writer).is_ok_and(|is| u32::try_from(is) == Ok(size));
    let is_plain = entry.firn.is_none() && entry.size.is_none_or(has_capacity);
    if !is_plain || bytes.len() > LEAST_ROOM {
        return fill(writer, entry, bytes);
    }
    let failed =
        |source| FileRestoreError::refused("fill", format!("pipe {}", entry.pipe_id))(source);
    write(&writer, bytes).map_err(failed)?;
    Ok(writer)
}

/// Sets the capacity of a pipe or fifo and fills it.
pub(super) fn fill(
    writer: OwnedFd,
    entry: &PipeDataEntry,
    bytes: &[u8],
) -> Result<OwnedFd, FileRestoreError> {
    let name = || format!("pipe {}", entry.pipe_id);
    if u64::from(entry.bytes) > MAX_BYTES {
        return Err(FileRestoreError::corrupt(
            entry.pipe_id,
            "it holds more than a pipe can",
        ));
    }
    if let Some(size) = entry.size {
        let size = usize::try_from(size).expect("32 bits fit");
        pipe::set_capacity(&writer, size)
            .map_err(FileRestoreError::refused("set the capacity of", name()))?;
    }
    // Without sleeping, because nobody reads yet: what does not fit was never in the pipe.
    let set_flags = |flags: i32| fcntl::set_flags(&writer, flags.cast_unsigned());
    let failed = |source: Errno| match source {
        Errno::EAGAIN => {
            FileRestoreError::corrupt(entry.pipe_id, "more bytes wait in it than it can hold")
        }
        source => FileRestoreError::refused("fill", name())(source),
    };
    set_flags(O_NONBLOCK).map_err(failed)?;
    if let Some(firn) = &entry.firn {
        set_flags(O_NONBLOCK | O_DIRECT).map_err(failed)?;
        for packet in packets(entry.pipe_id, firn, bytes)? {
            write(&writer, packet).map_err(failed)?;
        }
    } else {
        write(&writer, bytes).map_err(failed)?;
    }
    set_flags(0).map_err(failed)?;
    Ok(writer)
}

fn write(writer: &OwnedFd, bytes: &[u8]) -> firn_sys::Result<()> {
    let mut left = bytes;
    while !left.is_empty() {
        left = &left[pipe::write(writer, left)?..];
    }
    Ok(())
}

/// The packets one by one.
fn packets<'a>(
    pipe_id: u32,
    entry: &FirnPipeDataEntry,
    mut bytes: &'a [u8],
) -> Result<Vec<&'a [u8]>, FileRestoreError> {
    let mut packets = Vec::with_capacity(entry.packets.len());
    for &len in &entry.packets {
        let len = usize::try_from(len).expect("32 bits fit");
        let Some((packet, rest)) = bytes.split_at_checked(len) else {
            return Err(FileRestoreError::corrupt(
                pipe_id,
                "its packets are longer than it",
            ));
        };
        packets.push(packet);
        bytes = rest;
    }
    match bytes.is_empty() {
        true => Ok(packets),
        false => Err(FileRestoreError::corrupt(
            pipe_id,
            "its packets are shorter than it",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn peeking_leaves_the_pipe_as_it_is() {
        let (reader, writer) = pipe::create().expect("a pipe");
        let mut writer = File::from(writer);
        // Sixteen slots with few bytes each.
        for chunk in 0..16u8 {
            writer.write_all(&[chunk; 5]).expect("room");
        }
        let capacity = pipe::capacity(&reader).expect("a pipe");
        let waiting = pipe::waiting(&reader).expect("a pipe");
        let (seen, _) = Peeker::default()
            .peek(&reader, capacity, waiting)
            .expect("tee");
        assert_eq!(seen.len(), 80);
        drop(writer);
        let mut left = Vec::new();
        File::from(reader).read_to_end(&mut left).expect("read");
        assert_eq!(left, seen);
    }

    fn packed(packets: &[u32]) -> Option<FirnPipeDataEntry> {
        let packets = packets.to_vec();
        Some(FirnPipeDataEntry { packets })
    }

    #[test]
    fn packets_keep_their_borders() {
        let (reader, writer) = pipe::create().expect("a pipe");
        let entry = PipeDataEntry {
            pipe_id: 1,
            bytes: 6,
            size: None,
            firn: packed(&[1, 3, 2]),
        };
        let writer = fill(writer, &entry, b"abbbcc").expect("room");
        assert_eq!(fcntl::flags(&writer), Ok(O_WRONLY.cast_unsigned()));
        let (bytes, packets) = Peeker::default()
            .peek(&reader, DEFAULT_CAPACITY, 6)
            .expect("tee");
        assert_eq!((bytes.as_slice(), packets), (&b"abbbcc"[..], vec![1, 3, 2]));
        for wrong in [[7].as_slice(), &[1]] {
            let entry = PipeDataEntry {
                firn: packed(wrong),
                ..entry.clone()
            };
            let (_reader, writer) = pipe::create().expect("a pipe");
            assert!(fill(writer, &entry, b"abbbcc").is_err());
        }
    }

    #[test]
    fn a_full_pipe_of_another_size_comes_back() {
        let (reader, writer) = pipe::create().expect("a pipe");
        let entry = PipeDataEntry {
            pipe_id: 1,
            bytes: 8192,
            size: Some(8192),
            firn: None,
        };
        let writer = fill(writer, &entry, &[3; 8192]).expect("exactly full");
        assert_eq!(pipe::waiting(&reader), Ok(8192));
        assert_eq!(pipe::capacity(&writer), Ok(8192));
        let (_reader, writer) = pipe::create().expect("a pipe");
        let refused = fill(writer, &entry, &[3; 8193]);
        assert!(matches!(refused, Err(FileRestoreError::Corrupt { .. })));
    }
}
