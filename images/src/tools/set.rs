//! All images of a directory in memory, with what went wrong in reading them.
//!
//! Contents of pages stay in their files.

use std::collections::{BTreeMap, BTreeSet};

use firn_proto::{
    BpfmapDataEntry, CgroupEntry, CoreEntry, FdTypes, FdinfoEntry, FileEntry, FsEntry,
    InventoryEntry, IpcShmEntry, MemfdInodeEntry, Message, MmEntry, Name, PipeDataEntry,
    PstreeEntry, RemapFilePathEntry, SeccompEntry, SkPacketEntry, TaskKobjIdsEntry, TtyInfoEntry,
};

use super::check::{Fault, Problem};
use crate::{
    ImageDir, ImageFile, ImageKind, ImageReadError, ImageReader, PageSourceError, Pagemap,
};

/// A message and where it stands.
#[derive(Debug)]
pub(crate) struct Placed<M> {
    pub(crate) message: M,
    pub(crate) entry: u64,
    pub(crate) offset: u64,
}

/// The images of a directory. A damaged image counts as empty, and is among the problems.
#[derive(Debug, Default)]
pub(crate) struct SetImages {
    pub(crate) names: BTreeSet<String>,
    /// Names of the files that are not read because they are damaged.
    pub(crate) damaged: BTreeSet<String>,
    pub(crate) inventory: Option<InventoryEntry>,
    pub(crate) pstree: Vec<Placed<PstreeEntry>>,
    pub(crate) cores: BTreeMap<u64, CoreEntry>,
    pub(crate) ids: BTreeMap<u64, TaskKobjIdsEntry>,
    pub(crate) mms: BTreeMap<u64, MmEntry>,
    pub(crate) fs: BTreeMap<u64, FsEntry>,
    pub(crate) fdinfos: BTreeMap<u64, Vec<Placed<FdinfoEntry>>>,
    /// By type and number: a tun device has the number of the regular file that it came by.
    pub(crate) files: BTreeMap<(i32, u32), Placed<FileEntry>>,
    pub(crate) remaps: Vec<Placed<RemapFilePathEntry>>,
    pub(crate) memfds: Vec<Placed<MemfdInodeEntry>>,
    pub(crate) shms: Vec<Placed<IpcShmEntry>>,
    pub(crate) ttys: Vec<Placed<TtyInfoEntry>>,
    pub(crate) pipes_data: Vec<Placed<PipeDataEntry>>,
    pub(crate) fifos_data: Vec<Placed<PipeDataEntry>>,
    pub(crate) packets: Vec<Placed<SkPacketEntry>>,
    pub(crate) bpf_data: Vec<Placed<BpfmapDataEntry>>,
    pub(crate) seccomp: Option<SeccompEntry>,
    pub(crate) cgroup: Option<CgroupEntry>,
    pub(crate) pagemaps: BTreeMap<u64, Pagemap>,
    pub(crate) shmem_pagemaps: BTreeMap<u64, Pagemap>,
    pub(crate) problems: Vec<Problem>,
}

impl SetImages {
    /// Reads all images but those named in `damaged`.
    pub(crate) fn read(dir: &ImageDir, files: &[ImageFile], damaged: BTreeSet<String>) -> Self {
        let mut set = Self {
            names: files.iter().map(|file| file.name.clone()).collect(),
            damaged,
            ..Self::default()
        };
        for file in files {
            if set.damaged.contains(&file.name) {
                continue;
            }
            if let Err(fault) = set.read_file(dir, file) {
                set.damaged.insert(file.name.clone());
                set.problems.push(Problem {
                    file: file.name.clone(),
                    entry: None,
                    offset: None,
                    fault,
                });
            }
        }
        set
    }

    /// Says whether an image is in the directory, damaged or not.
    pub(crate) fn has(&self, kind: ImageKind, id: u64) -> bool {
        self.names.contains(&kind.file_name(id))
    }

    /// Says whether an image is there and could not be read.
    pub(crate) fn is_damaged(&self, kind: ImageKind, id: u64) -> bool {
        self.damaged.contains(&kind.file_name(id))
    }

    /// Finds a file by its type and number.
    pub(crate) fn file(&self, kind: FdTypes, id: u32) -> Option<&FileEntry> {
        let placed = self.files.get(&(i32::from(kind), id))?;
        Some(&placed.message)
    }

    /// Says whether there is a regular file of this number.
    pub(crate) fn has_reg(&self, id: u32) -> bool {
        self.file(FdTypes::Reg, id).is_some()
    }

    fn read_file(&mut self, dir: &ImageDir, file: &ImageFile) -> Result<(), Fault> {
        let (kind, id) = (file.kind, file.id);
        let reader = || dir.reader(kind, id).map_err(Fault::Read);
        match kind {
            ImageKind::Inventory => self.inventory = Some(one(reader()?)?),
            ImageKind::Pstree => self.pstree = all(reader()?)?,
            ImageKind::Core => keep(&mut self.cores, id, one(reader()?)?),
            ImageKind::Ids => keep(&mut self.ids, id, one(reader()?)?),
            ImageKind::Mm => keep(&mut self.mms, id, one(reader()?)?),
            ImageKind::Fs => keep(&mut self.fs, id, one(reader()?)?),
            ImageKind::Fdinfo => keep(&mut self.fdinfos, id, all(reader()?)?),
            ImageKind::Files => self.read_files(all(reader()?)?, &file.name),
            ImageKind::RemapFpath => self.remaps = all(reader()?)?,
            ImageKind::MemfdInode => self.memfds = all(reader()?)?,
            ImageKind::TtyInfo => self.ttys = all(reader()?)?,
            ImageKind::IpcnsShm => self.shms.extend(with_payload(reader()?, shm_bytes)?),
            ImageKind::PipesData => self.pipes_data = with_payload(reader()?, pipe_bytes)?,
            ImageKind::FifoData => self.fifos_data = with_payload(reader()?, pipe_bytes)?,
            ImageKind::SkQueues => self.packets = with_payload(reader()?, packet_bytes)?,
            ImageKind::BpfmapData => self.bpf_data = with_payload(reader()?, bpf_bytes)?,
            ImageKind::Seccomp => self.seccomp = Some(one(reader()?)?),
            ImageKind::Cgroup => self.cgroup = Some(one(reader()?)?),
            ImageKind::Pagemap => keep(&mut self.pagemaps, id, pagemap(reader()?)?),
            ImageKind::ShmemPagemap => keep(&mut self.shmem_pagemaps, id, pagemap(reader()?)?),
            _ => {}
        }
        Ok(())
    }

    fn read_files(&mut self, entries: Vec<Placed<FileEntry>>, name: &str) {
        for placed in entries {
            let id = placed.message.id;
            let key = (placed.message.r#type, id);
            if self.files.contains_key(&key) {
                self.problems.push(Problem {
                    file: name.to_owned(),
                    entry: Some(placed.entry),
                    offset: Some(placed.offset),
                    fault: Fault::Twice {
                        what: "file",
                        id: id.into(),
                    },
                });
                continue;
            }
            self.files.insert(key, placed);
        }
    }
}

fn keep<M>(map: &mut BTreeMap<u64, M>, id: u64, message: M) {
    map.insert(id, message);
}

fn one<M: Message + Name + Default>(reader: ImageReader) -> Result<M, Fault> {
    reader.one().map_err(Fault::Read)
}

fn all<M: Message + Name + Default>(reader: ImageReader) -> Result<Vec<Placed<M>>, Fault> {
    with_payload(reader, |_| 0)
}

/// Reads all entries, and passes over as many bytes of payload as each of them has.
fn with_payload<M: Message + Name + Default>(
    mut reader: ImageReader,
    bytes: impl Fn(&M) -> u64,
) -> Result<Vec<Placed<M>>, Fault> {
    let mut read = || -> Result<_, ImageReadError> {
        let mut entries = Vec::new();
        loop {
            let place = reader.place();
            let Some(message) = reader.next_entry()? else {
                return Ok(entries);
            };
            let len = bytes(&message);
            if len > 0 {
                reader.skip_payload(len)?;
            }
            entries.push(Placed {
                message,
                entry: place.entry,
                offset: place.offset,
            });
        }
    };
    read().map_err(Fault::Read)
}

fn pagemap(reader: ImageReader) -> Result<Pagemap, Fault> {
    Pagemap::read_from(reader).map_err(|error| match error {
        PageSourceError::Image(error) => Fault::Read(error),
        error => Fault::Pages(error),
    })
}

fn pipe_bytes(entry: &PipeDataEntry) -> u64 {
    entry.bytes.into()
}

fn packet_bytes(entry: &SkPacketEntry) -> u64 {
    entry.length.into()
}

fn bpf_bytes(entry: &BpfmapDataEntry) -> u64 {
    u64::from(entry.keys_bytes) + u64::from(entry.values_bytes)
}

fn shm_bytes(entry: &IpcShmEntry) -> u64 {
    match entry.in_pagemaps {
        Some(true) => 0,
        _ => super::extra::round_up(entry.size, 4),
    }
}
