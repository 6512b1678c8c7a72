//! BPF maps: hashes and arrays with what they hold; programs and all other maps are refused.
//!
//! fdinfo tells what a map was made with, the map itself what it holds and what it is called. Several open
//! files may be of one map, which has a number on its machine. One that is pinned stays what it is for others: see
//! [`super::bpf_pin`]. What can't be read back from the kernel and is lost: the description of the types of keys
//! and values (BTF), with a warning, as with one of a map that is not pinned and that a loaded program uses.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use firn_images::{ImageDir, ImageKind, ImageSetWriter};
use firn_proto::{BpfmapDataEntry, BpfmapFileEntry, FdTypes, FileEntry, FirnBpfmapFileEntry};
use firn_sys::Errno;
use firn_sys::bpf::{self, Contents, MapSpec};
use firn_sys::file::{O_ACCMODE, O_RDONLY, O_WRONLY};

use super::FileRestoreOptions;
use super::anonymous::Anonymous;
use super::bpf_pin::{self, MapUsers};
use super::dump::{DumpState, query};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};

/// `enum bpf_map_type`.
const KINDS: [&str; 34] = [
    "unspecified",
    "hash",
    "array",
    "program array",
    "perf event array",
    "per-CPU hash",
    "per-CPU array",
    "stack trace",
    "cgroup array",
    "LRU hash",
    "LRU per-CPU hash",
    "LPM trie",
    "array of maps",
    "hash of maps",
    "device map",
    "socket map",
    "CPU map",
    "XSK map",
    "socket hash",
    "cgroup storage",
    "reuseport socket array",
    "per-CPU cgroup storage",
    "queue",
    "stack",
    "socket storage",
    "device hash",
    "struct_ops",
    "ring buffer",
    "inode storage",
    "task storage",
    "bloom filter",
    "user ring buffer",
    "cgroup local storage",
    "arena",
];

/// Maps.
pub(super) struct BpfMap;

/// What the maps of a dump hold, by their numbers.
#[derive(Debug, Default)]
pub(super) struct MapContents {
    maps: HashMap<u32, Contents>,
    users: MapUsers,
}

impl MapContents {
    /// Writes bpfmap-data, if there are maps.
    pub(super) fn write(&self, images: &ImageSetWriter) -> Result<(), FileDumpError> {
        if self.maps.is_empty() {
            return Ok(());
        }
        let mut writer = images.writer(ImageKind::BpfmapData, 0);
        let mut maps: Vec<_> = self.maps.iter().collect();
        maps.sort_by_key(|(id, _)| **id);
        for (&map_id, contents) in maps {
            let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("checked when it was read");
            writer.entry(&BpfmapDataEntry {
                map_id,
                keys_bytes: len(&contents.keys),
                values_bytes: len(&contents.values),
                count: contents.count,
            })?;
            writer.payload(&contents.keys)?;
            writer.payload(&contents.values)?;
        }
        writer.finish()?;
        Ok(())
    }
}

fn kind_of(file: &OpenFile) -> Option<u32> {
    file.info.value("map_type")?.parse().ok()
}

impl Anonymous for BpfMap {
    type Record = BpfmapFileEntry;
    const FD_TYPE: FdTypes = FdTypes::Bpfmap;
    const LINK: &'static str = "bpf-map";
    const NAME: &'static str = "a BPF map";

    fn trouble(file: &OpenFile) -> Option<Trouble> {
        let kind = kind_of(file)?;
        if [bpf::HASH, bpf::ARRAY].contains(&kind) {
            return None;
        }
        let name = usize::try_from(kind).ok().and_then(|kind| KINDS.get(kind));
        let name = name.map_or_else(|| kind.to_string(), |name| (*name).to_owned());
        Some(Trouble::new(
            format!("BPF maps of type {name} are not saved"),
            "let the task close it before the dump",
        ))
    }

    fn describe(
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<BpfmapFileEntry, FileDumpError> {
        let file = dumping.file;
        let failed = |what| move |source| query(file, what, source);
        let number = |key| file.field(key, |text| text.parse().ok());
        let fd = dumping.duplicate.ok_or(Errno::EBADF);
        let fd = fd.map_err(failed("the map"))?;
        let info = bpf::map_info(fd).map_err(failed("the map"))?;
        let collected = &mut *state.collected;
        let users = &mut collected.maps.users;
        let pins = users.pins_of(info.id, file.pid).iter();
        let pin: Vec<Vec<u8>> = pins
            .map(|pin| pin.as_os_str().as_bytes().to_vec())
            .collect();
        let mut lost = Vec::new();
        if info.btf_id != 0 && pin.is_empty() {
            lost.push("the description of its types (BTF) is not saved");
        }
        if pin.is_empty() && users.is_in_program(info.id, file.pid) {
            lost.push(
                "a program in the kernel uses the map, and a restored task has another one: pin it",
            );
        }
        for lost in lost {
            let link = file.link_text();
            let warning = format!("task {}: {} ({link}): {lost}", file.pid, file.place);
            collected.warnings.push(warning);
        }
        if let Entry::Vacant(place) = collected.maps.maps.entry(info.id) {
            let contents = if access(file.info.flags) == bpf::WRONLY {
                bpf::map_by_id(info.id, bpf::RDONLY).and_then(bpf::read_map)
            } else {
                bpf::read_map(fd)
            };
            let contents = contents.map_err(failed("what the map holds"))?;
            if u32::try_from(contents.values.len().max(contents.keys.len())).is_err() {
                return Err(failed("what the map holds")(Errno::EMSGSIZE));
            }
            place.insert(contents);
        }
        Ok(BpfmapFileEntry {
            id: dumping.id,
            flags: file.image_flags(),
            pos: file.info.pos,
            fown: dumping.fown,
            map_type: info.spec.kind,
            key_size: info.spec.key_size,
            value_size: info.spec.value_size,
            map_id: info.id,
            max_entries: info.spec.max_entries,
            map_flags: info.spec.flags,
            memlock: number("memlock")?,
            frozen: number("frozen")? != 0,
            map_name: info.spec.name,
            ifindex: info.spec.ifindex,
            mnt_id: None,
            map_extra: Some(info.spec.extra),
            firn: (!pin.is_empty()).then_some(FirnBpfmapFileEntry { pin }),
        })
    }

    fn make(
        record: &BpfmapFileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        opener.maps.open(record, opener.options)
    }

    fn record(entry: &FileEntry) -> Option<&BpfmapFileEntry> {
        entry.bpf.as_deref()
    }

    fn put(record: BpfmapFileEntry, entry: &mut FileEntry) {
        entry.bpf = Some(Box::new(record));
    }
}

/// How a descriptor may use its map, as BPF has it.
fn access(flags: u32) -> u32 {
    match (flags & O_ACCMODE.cast_unsigned()).cast_signed() {
        O_RDONLY => bpf::RDONLY,
        O_WRONLY => bpf::WRONLY,
        _ => 0,
    }
}

/// The maps being restored.
#[derive(Debug, Default)]
pub(super) struct Maps {
    contents: HashMap<u32, Contents>,
    /// By the number that they had; they can be read and written.
    made: HashMap<u32, OwnedFd>,
    /// What is not as it was, in sentences.
    pub(super) losses: Vec<String>,
}

impl Maps {
    /// Reads what maps held.
    pub(super) fn load(images: &ImageDir) -> Result<Maps, FileRestoreError> {
        let mut maps = Maps::default();
        let Some(mut reader) = images.reader_if_there(ImageKind::BpfmapData, 0)? else {
            return Ok(maps);
        };
        while let Some(entry) = reader.next_entry::<BpfmapDataEntry>()? {
            let contents = Contents {
                count: entry.count,
                keys: reader.payload(u64::from(entry.keys_bytes))?,
                values: reader.payload(u64::from(entry.values_bytes))?,
            };
            // CRIU writes them once for each open file.
            maps.contents.insert(entry.map_id, contents);
        }
        Ok(maps)
    }

    fn open(
        &mut self,
        record: &BpfmapFileEntry,
        options: &FileRestoreOptions,
    ) -> Result<OwnedFd, FileRestoreError> {
        let name = || format!("BPF map {}", String::from_utf8_lossy(&record.map_name));
        if !self.made.contains_key(&record.map_id) {
            let map = match bpf_pin::open(record, options, &mut self.losses) {
                Some(map) => map,
                None => {
                    let map = self.make(record)?;
                    bpf_pin::pin(&map, record, options, &mut self.losses);
                    map
                }
            };
            self.made.insert(record.map_id, map);
        }
        let map = &self.made[&record.map_id];
        let info = bpf::map_info(map).map_err(FileRestoreError::refused("look at", name()))?;
        bpf::map_by_id(info.id, access(record.flags))
            .map_err(FileRestoreError::refused("open", name()))
    }

    fn make(&mut self, record: &BpfmapFileEntry) -> Result<OwnedFd, FileRestoreError> {
        let name = || format!("BPF map {}", String::from_utf8_lossy(&record.map_name));
        if ![bpf::HASH, bpf::ARRAY].contains(&record.map_type) {
            return Err(FileRestoreError::Unsupported {
                id: record.id,
                kind: "BPF map that is neither hash nor array",
            });
        }
        let spec = MapSpec {
            kind: record.map_type,
            key_size: record.key_size,
            value_size: record.value_size,
            max_entries: record.max_entries,
            flags: record.map_flags,
            name: record.map_name.clone(),
            ifindex: record.ifindex,
            extra: record.map_extra.unwrap_or(0),
        };
        let map = bpf::create_map(&spec).map_err(FileRestoreError::refused("create", name()))?;
        if let Some(contents) = self.contents.remove(&record.map_id) {
            bpf::fill_map(map.as_fd(), &contents)
                .map_err(FileRestoreError::refused("fill", name()))?;
        }
        if record.frozen {
            bpf::freeze_map(&map).map_err(FileRestoreError::refused("freeze", name()))?;
        }
        Ok(map)
    }
}
