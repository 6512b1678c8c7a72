//! Shared memory objects of the dumped tasks: each is saved once, whoever maps it or has it open.
//!
//! An object is known by device and inode. Shared anonymous memory is one as well; its name is
//! `/dev/zero`, or `/anon_hugepage` when it is made of huge pages.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use firn_images::{ImageKind, ImageSetWriter, PageFlags, PagemapWriter};
use firn_proto::{IpcShmEntry, MemfdInodeEntry};
use firn_sys::mm::map;
use firn_sys::{Errno, Pid, memfd};

use super::address_space::PageStats;
use super::copy::{self, PageCopy};
use super::error::MemoryDumpError;
use super::names;
use super::range::{AddressRange, PAGE_SIZE};
use super::shared_restore::nr_open;
use super::smaps::Mapping;
use super::sysv::{self, Attached};
use crate::obstacle::Obstacle;

/// Shared memory objects found so far.
#[derive(Debug)]
pub struct SharedDump {
    device: (u32, u32),
    /// Index in `objects`, by st_dev and inode.
    known: HashMap<(u64, u64), usize>,
    objects: Vec<Object>,
    shmids: HashSet<u32>,
    /// System V segments, by id.
    segments: BTreeMap<u32, Attached>,
    /// So many objects are kept open. What is beyond them is opened once more when it is written.
    nr_open: usize,
}

#[derive(Debug)]
struct Object {
    place: Source,
    entry: MemfdInodeEntry,
}

/// How the contents of an object are reached.
#[derive(Debug)]
enum Source {
    /// Open.
    File(File),
    /// By a link of /proc to what a stopped task maps or has open.
    Link(PathBuf),
}

impl SharedDump {
    /// Starts with no objects.
    ///
    /// # Errors
    /// No memory file can be made here.
    pub fn new() -> Result<SharedDump, MemoryDumpError> {
        let probe = memfd::create(c"firn-probe", memfd::flag::CLOEXEC);
        let device = probe.and_then(|file| Ok(split_device(file.metadata()?.dev())));
        let device = device.map_err(|source| shared_error("firn-probe", source))?;
        Ok(SharedDump {
            device,
            known: HashMap::new(),
            objects: Vec::new(),
            shmids: HashSet::new(),
            segments: BTreeMap::new(),
            nr_open: nr_open(),
        })
    }

    /// Device of memory files and shared anonymous memory, as /proc/PID/maps shows it.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// Notes the object of a mapping; returns the number of its entry in memfd.img.
    ///
    /// # Errors
    /// The object can't be opened.
    pub fn add_mapping(&mut self, pid: Pid, mapping: &Mapping) -> Result<u32, MemoryDumpError> {
        // Both numbers are as stat shows them for these file systems.
        let key = (join_device(mapping.device), mapping.inode);
        if let Some(&index) = self.known.get(&key) {
            return Ok(number(index));
        }
        let range = mapping.range;
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end);
        // Shared anonymous memory with a name of its own is known by what it is called without.
        let name = match names::given(&mapping.name) {
            Some(_) => b"/dev/zero",
            None => mapping.name.as_slice(),
        };
        self.add_path(Path::new(&link), name)
    }

    /// Notes the object that a link of /proc leads to, such as `/proc/7/fd/3`, as long as its task is stopped.
    /// `name` is as the link shows it.
    ///
    /// # Errors
    /// The object can't be opened.
    pub fn add_path(&mut self, link: &Path, name: &[u8]) -> Result<u32, MemoryDumpError> {
        let shown = String::from_utf8_lossy(name).into_owned();
        let file = File::open(link).map_err(|source| shared_error(&shown, source.into()))?;
        let known = self.objects.len();
        let index = self.add_file(file, object_name(name))?;
        if let Some(newest) = self.objects.get_mut(known.max(self.nr_open)) {
            newest.place = Source::Link(link.to_owned());
        }
        Ok(index)
    }

    /// Notes the object behind a descriptor open for reading. `name` is its bare name.
    ///
    /// # Errors
    /// The object can't be asked for its state.
    pub fn add_file(&mut self, file: File, name: &[u8]) -> Result<u32, MemoryDumpError> {
        let failed = |source| shared_error(&String::from_utf8_lossy(name), source);
        let stat = file.metadata().map_err(|source| failed(source.into()))?;
        let key = (stat.dev(), stat.ino());
        if let Some(&index) = self.known.get(&key) {
            return Ok(number(index));
        }
        let seals = match memfd::seals(&file) {
            // Huge pages took no seals before Linux 4.16: as if sealed against seals.
            Err(Errno::EINVAL) => memfd::seal::SEAL,
            seals => seals.map_err(failed)?,
        };
        let page_size = stat.blksize();
        let hugetlb = page_size > PAGE_SIZE && split_device(stat.dev()) != self.device;
        let hugetlb_flag =
            hugetlb.then(|| memfd::flag::HUGETLB | page_size.trailing_zeros() << map::HUGE_SHIFT);
        let index = self.objects.len();
        let entry = MemfdInodeEntry {
            name: name.to_vec(),
            uid: stat.uid(),
            gid: stat.gid(),
            size: stat.size(),
            shmid: self.new_shmid(stat.ino()),
            seals,
            inode_id: u64::from(number(index)),
            hugetlb_flag,
            mode: Some(stat.mode()),
        };
        self.known.insert(key, index);
        let place = Source::File(file);
        self.objects.push(Object { place, entry });
        Ok(number(index))
    }

    /// Notes the System V segment of a mapping; returns its id.
    ///
    /// # Errors
    /// The segment can't be opened, or asked for its state.
    pub fn add_segment(&mut self, pid: Pid, mapping: &Mapping) -> Result<u32, MemoryDumpError> {
        let name = || String::from_utf8_lossy(&mapping.name).into_owned();
        let id = u32::try_from(mapping.inode);
        let id = id.map_err(|_| shared_error(&name(), Errno::EINVAL))?;
        if !self.segments.contains_key(&id) {
            let range = mapping.range;
            let link = format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end);
            let file = File::open(link).map_err(|source| shared_error(&name(), source.into()))?;
            let segment = Attached::new(id, file, mapping);
            let segment = segment.map_err(|source| shared_error(&name(), source))?;
            self.claim(id);
            self.segments.insert(id, segment);
        }
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.count(pid);
        }
        Ok(id)
    }

    /// The segment with that id.
    pub(super) fn segment(&self, id: u32) -> Option<&Attached> {
        self.segments.get(&id)
    }

    /// Takes a number for a segment, which can have no other, from an object that has it.
    fn claim(&mut self, id: u32) {
        if self.shmids.insert(id) {
            return;
        }
        let other = self
            .objects
            .iter()
            .position(|object| object.entry.shmid == id);
        if let Some(other) = other {
            self.objects[other].entry.shmid = self.new_shmid(id.into());
        }
    }

    /// The inode's number, or the next free one where two mounts have the same.
    fn new_shmid(&mut self, inode: u64) -> u32 {
        let mut shmid = u32::try_from(inode & u64::from(u32::MAX)).expect("masked");
        while shmid == 0 || !self.shmids.insert(shmid) {
            shmid = shmid.wrapping_add(1);
        }
        shmid
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// True while there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Writes memfd.img and the contents of all objects. `next_pages_id` gives numbers of pages files.
    ///
    /// **Preconditions**: whoever can write to the objects is stopped.
    ///
    /// # Errors
    /// Contents that can't be read, images that can't be written.
    pub fn write(
        &self,
        images: &ImageSetWriter,
        mut next_pages_id: impl FnMut() -> u32,
        page_copy: &PageCopy<'_>,
    ) -> Result<PageStats, MemoryDumpError> {
        let entries: Vec<MemfdInodeEntry> = self
            .objects
            .iter()
            .map(|object| object.entry.clone())
            .collect();
        images.write_all(ImageKind::MemfdInode, 0, &entries)?;
        let mut stats = PageStats::default();
        for object in &self.objects {
            stats += object.write(images, next_pages_id(), page_copy)?;
        }
        stats += self.write_segments(images, next_pages_id, page_copy)?;
        Ok(stats)
    }

    fn write_segments(
        &self,
        images: &ImageSetWriter,
        mut next_pages_id: impl FnMut() -> u32,
        page_copy: &PageCopy<'_>,
    ) -> Result<PageStats, MemoryDumpError> {
        let mut stats = PageStats::default();
        if self.segments.is_empty() {
            return Ok(stats);
        }
        let others: Vec<Obstacle> = self
            .segments
            .values()
            .filter_map(Attached::others)
            .collect();
        if !others.is_empty() {
            return Err(MemoryDumpError::Obstacles(others));
        }
        let entries: Vec<IpcShmEntry> = self.segments.values().map(|s| s.entry).collect();
        images.write_all(
            ImageKind::IpcnsShm,
            sysv::OWN_IPC_NAMESPACE.into(),
            &entries,
        )?;
        for (id, segment) in &self.segments {
            let file = segment.file.try_clone();
            let file = file.map_err(|source| shared_error("a System V segment", source.into()))?;
            let object = Object {
                place: Source::File(file),
                entry: MemfdInodeEntry {
                    name: b"a System V segment".to_vec(),
                    shmid: *id,
                    size: segment.len(),
                    hugetlb_flag: segment.entry.hugetlb_flag,
                    ..MemfdInodeEntry::default()
                },
            };
            stats += object.write(images, next_pages_id(), page_copy)?;
        }
        Ok(stats)
    }
}

impl Object {
    fn write(
        &self,
        images: &ImageSetWriter,
        pages_id: u32,
        page_copy: &PageCopy<'_>,
    ) -> Result<PageStats, MemoryDumpError> {
        let name = String::from_utf8_lossy(&self.entry.name);
        let reopened;
        let file = match &self.place {
            Source::File(file) => file,
            Source::Link(link) => {
                let opened = File::open(link);
                reopened = opened.map_err(|source| shared_error(&name, source.into()))?;
                &reopened
            }
        };
        let ranges = self.contents(file);
        let ranges = ranges.map_err(|source| shared_error(&name, source))?;
        let id = u64::from(self.entry.shmid);
        let mut pagemap = PagemapWriter::new(images, ImageKind::ShmemPagemap, id, pages_id)?;
        for range in &ranges {
            pagemap.push(range.start, range.nr_pages(), PageFlags::PRESENT)?;
        }
        let written = pagemap.finish()?;
        let pages = images.raw_file(ImageKind::Pages, u64::from(pages_id))?;
        copy::copy_file(file, &name, &ranges, &pages, pages_id, page_copy)?;
        Ok(PageStats {
            scanned: written,
            written,
            in_parent: 0,
        })
    }

    /// Ranges that have pages, in whole pages.
    fn contents(&self, file: &File) -> firn_sys::Result<Vec<AddressRange>> {
        let end = self.entry.size.next_multiple_of(PAGE_SIZE);
        if self.entry.hugetlb_flag.is_some() {
            return huge_contents(file, end);
        }
        let mut ranges = Vec::new();
        let mut offset = 0;
        while let Some((start, hole)) = memfd::next_data(file, offset)? {
            let start = start - start % PAGE_SIZE;
            let range = AddressRange::new(start, hole.next_multiple_of(PAGE_SIZE).min(end));
            ranges.push(range);
            offset = hole;
        }
        Ok(super::range::union(ranges))
    }
}

/// Huge pages do not tell their holes: pages of zeros are taken for holes.
fn huge_contents(file: &File, end: u64) -> firn_sys::Result<Vec<AddressRange>> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0u8; 256 << 10];
    let mut ranges = Vec::new();
    let mut offset = 0;
    while offset < end {
        let read = file.read_at(&mut buffer, offset)?;
        if read == 0 {
            break;
        }
        let mut at = offset;
        for page in buffer[..read].chunks(4096) {
            if page.iter().any(|byte| *byte != 0) {
                ranges.push(AddressRange::new(at, at + PAGE_SIZE));
            }
            at += PAGE_SIZE;
        }
        offset = at;
    }
    Ok(super::range::union(ranges))
}

/// The name that an image keeps: without the prefix of memory files and the mark of deleted files.
fn object_name(shown: &[u8]) -> &[u8] {
    let name = shown.strip_suffix(b" (deleted)").unwrap_or(shown);
    name.strip_prefix(b"/memfd:").unwrap_or(name)
}

/// The number of an object in memfd.img; they count from 1.
fn number(index: usize) -> u32 {
    u32::try_from(index + 1).expect("fewer than 2^32 shared memory objects")
}

fn shared_error(name: &str, source: Errno) -> MemoryDumpError {
    MemoryDumpError::Shared {
        name: name.to_owned(),
        source,
    }
}

/// Major and minor of a st_dev, for the small numbers that kernel mounts have.
fn split_device(dev: u64) -> (u32, u32) {
    let major = dev >> 8 & 0xfff | dev >> 32 & !0xfff;
    let minor = dev & 0xff | dev >> 12 & !0xff;
    let part = |value: u64| u32::try_from(value & u64::from(u32::MAX)).expect("masked");
    (part(major), part(minor))
}

fn join_device((major, minor): (u32, u32)) -> u64 {
    let (major, minor) = (u64::from(major), u64::from(minor));
    (major & 0xfff) << 8 | (major & !0xfff) << 32 | minor & 0xff | (minor & !0xff) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_both_ways() {
        for dev in [1, 0xfe00, 0x1234, 0x10_00ff, 0xfff_0001] {
            assert_eq!(join_device(split_device(dev)), dev);
        }
    }

    #[test]
    fn names_lose_their_decoration() {
        assert_eq!(object_name(b"/memfd:a b (deleted)"), b"a b");
        assert_eq!(object_name(b"/dev/zero (deleted)"), b"/dev/zero");
    }

    #[test]
    fn one_object_has_one_number() {
        let mut shared = SharedDump::new().expect("memfd");
        let file = memfd::create(c"object", memfd::flag::CLOEXEC).expect("memfd");
        file.set_len(3 * 4096).expect("size");
        let twin = file.try_clone().expect("dup");
        assert_eq!(shared.add_file(file, b"object").expect("added"), 1);
        assert_eq!(shared.add_file(twin, b"object").expect("added"), 1);
        let other = memfd::create(c"other", memfd::flag::CLOEXEC).expect("memfd");
        assert_eq!(shared.add_file(other, b"other").expect("added"), 2);
        assert_eq!(shared.objects[0].entry.size, 3 * 4096);
        assert_eq!(shared.objects[0].entry.seals, memfd::seal::SEAL);
    }
}
