//! Shared memory objects of restored tasks: made by the coordinator, inherited as descriptors.
//!
//! Order: make and fill all, fork, let every task map, then [`SharedRestore::seal`]: a seal against
//! writing forbids writable mappings that are made after it, and some of them against those before.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::sync::OnceLock;

use firn_images::{ImageDir, ImageKind, ImageReadError, PageSource, PageSourceError};
use firn_proto::MemfdInodeEntry;
use firn_sys::file::{O_RDONLY, O_RDWR};
use firn_sys::mm::map;
use firn_sys::window::SharedObject;
use firn_sys::{Errno, Pid, memfd, rlimit};

use super::error::SourceError;
use super::fill::PageFill;
use super::image::MemoryImage;
use super::range::PAGE_SIZE;
use super::sources::MappingSource;
use super::sysv::{self, Segment};
use super::vma::status;
use crate::files::{MemfdRestore, MemfdSource};

/// So many objects are kept by a descriptor at most. What there is beyond them is kept by a mapping, since a tree may
/// have more of it than a process may have descriptors.
const MAX_DESCRIPTORS: usize = 1024;
/// One of so many descriptors that this process may have keeps an object.
const SHARE: u64 = 16;

/// Failure to restore shared memory.
#[derive(Debug, thiserror::Error)]
pub enum SharedRestoreError {
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageReadError),
    /// Contents could not be found.
    #[error(transparent)]
    Pages(#[from] PageSourceError),
    /// The images contradict themselves.
    #[error("shared memory `{name}`: {problem}")]
    Corrupt {
        /// The object.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The object could not be made.
    #[error("can't {action} shared memory `{name}` of {size} bytes")]
    Make {
        /// What was tried.
        action: &'static str,
        /// The object.
        name: String,
        /// Its size.
        size: u64,
        /// Cause.
        source: Errno,
    },
    /// The id of a System V segment is in use.
    #[error(
        "{name} exists already: {holders} mappings of it, or another key or size; \
         remove it with `ipcrm -m {id}` if nobody needs it"
    )]
    SegmentTaken {
        /// Its id.
        id: i32,
        /// The segment of the images.
        name: String,
        /// Mappings of the one that is there.
        holders: u64,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// Shared memory objects of a tree being restored.
#[derive(Debug, Default)]
pub struct SharedRestore {
    objects: Vec<Object>,
    by_inode: HashMap<u32, usize>,
    by_shmid: HashMap<u64, usize>,
    segments: Vec<Segment>,
    /// So many objects are kept by a descriptor.
    nr_open: usize,
}

/// An object, or the contents of a segment.
#[derive(Debug)]
pub(super) struct Object {
    name: Vec<u8>,
    pub(super) size: u64,
    /// `MAP_HUGETLB` with its size, or 0.
    pub(super) huge: u32,
    /// As memfd.img describes it; None for anonymous memory of older images.
    entry: Option<MemfdInodeEntry>,
    /// Number of its contents.
    shmid: u64,
    /// Its contents. Those of objects that are not kept open are not, either.
    pages: Option<PageSource>,
    held: Held,
    /// The same, open for reading only, where a mapping needs it so.
    read_only: OnceLock<File>,
}

/// How an object is kept until all tasks have it.
#[derive(Debug)]
enum Held {
    /// It is not made yet.
    Nothing,
    /// By a descriptor.
    File(File),
    /// By a mapping.
    Mapping(SharedObject),
}

impl SharedRestore {
    /// Reads the memory files, and the shared anonymous memory that tasks map without one.
    ///
    /// # Errors
    /// Images that are missing, damaged or contradictory.
    pub fn load<'a>(
        images: &ImageDir,
        tasks: impl IntoIterator<Item = &'a MemoryImage>,
    ) -> Result<SharedRestore, SharedRestoreError> {
        let tasks: Vec<&MemoryImage> = tasks.into_iter().collect();
        let mut shared = SharedRestore {
            segments: sysv::load(images, &tasks)?,
            nr_open: nr_open(),
            ..SharedRestore::default()
        };
        let entries: Vec<MemfdInodeEntry> = images.read_all(ImageKind::MemfdInode, 0)?;
        for entry in entries {
            shared.add_memfd(images, entry)?;
        }
        for (shmid, (size, huge)) in anonymous(tasks) {
            let mut object = Object {
                name: b"/dev/zero".to_vec(),
                size,
                huge,
                entry: None,
                shmid,
                pages: open_pages(images, shmid, size)?,
                held: Held::Nothing,
                read_only: OnceLock::new(),
            };
            object.check()?;
            shared.by_shmid.insert(shmid, shared.objects.len());
            object.pages = object
                .pages
                .filter(|_| shared.objects.len() < shared.nr_open);
            shared.objects.push(object);
        }
        Ok(shared)
    }

    fn add_memfd(
        &mut self,
        images: &ImageDir,
        entry: MemfdInodeEntry,
    ) -> Result<(), SharedRestoreError> {
        let shmid = entry.shmid.into();
        let mut object = Object {
            name: entry.name.clone(),
            size: entry.size,
            huge: map_flags(entry.hugetlb_flag.unwrap_or(0)),
            shmid,
            pages: open_pages(images, shmid, entry.size)?,
            held: Held::Nothing,
            read_only: OnceLock::new(),
            entry: Some(entry.clone()),
        };
        object.check()?;
        let number = u32::try_from(entry.inode_id);
        let number = number.map_err(|_| object.corrupt("has an impossible number"))?;
        if self.by_inode.insert(number, self.objects.len()).is_some() {
            return Err(object.corrupt("has the number of another one"));
        }
        object.pages = object.pages.filter(|_| self.objects.len() < self.nr_open);
        self.objects.push(object);
        Ok(())
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Makes all objects and fills them. They go when this value is dropped and nobody uses them.
    ///
    /// # Errors
    /// An object can't be made (no memory, no huge pages), its contents can't be read.
    pub fn open_all(
        &mut self,
        images: &ImageDir,
        how: &PageFill<'_>,
    ) -> Result<(), SharedRestoreError> {
        for (nth, object) in self.objects.iter_mut().enumerate() {
            let (file, mapping) = object.make()?;
            let pages = match object.pages.take() {
                Some(pages) => Some(pages),
                None => open_pages(images, object.shmid, object.size)?,
            };
            if let Some(pages) = pages {
                object.fill(&file, &pages, how)?;
            }
            object.held = match nth < self.nr_open {
                true => Held::File(file),
                false => object.held_by_mapping(file, mapping),
            };
        }
        self.segments
            .iter()
            .try_for_each(|segment| segment.make(how))
    }

    /// The shared anonymous memory `shmid`.
    pub fn anonymous(&self, shmid: u64) -> Option<MappingSource> {
        self.objects[*self.by_shmid.get(&shmid)?].source()
    }

    /// Descriptor, for reading and writing, of the memory file with that number in memfd.img.
    fn memfd_inode(&self, inode_id: u32) -> Option<std::io::Result<MemfdSource<'_>>> {
        let object = &self.objects[*self.by_inode.get(&inode_id)?];
        match &object.held {
            Held::Nothing => None,
            Held::File(file) => Some(Ok(MemfdSource::Kept(file.as_fd()))),
            Held::Mapping(mapping) => {
                let opened = open_mapping(mapping);
                Some(opened.map(|file| MemfdSource::Opened(file.into())))
            }
        }
    }

    /// A memory file for mappings that need it open with `open_flags`: one that may not be written keeps
    /// mappings from being made writable. None where there is no such memory file.
    ///
    /// # Errors
    /// It can't be opened once more.
    pub fn mapping_source(
        &self,
        inode_id: u32,
        open_flags: Option<u32>,
    ) -> Result<Option<MappingSource>, SharedRestoreError> {
        const ACCESS_MODE: u32 = 3;
        let Some(object) = self.by_inode.get(&inode_id).map(|at| &self.objects[*at]) else {
            return Ok(None);
        };
        let is_writable = open_flags.is_none_or(|flags| flags & ACCESS_MODE != 0);
        // CRIU does not say how a mapping had its file open; nobody can write by one of a file sealed so.
        let is_writable = is_writable && !object.is_sealed_against_writing();
        let file = match &object.held {
            Held::File(file) if !is_writable => file,
            Held::Mapping(mapping) if !is_writable => {
                return Ok(Some(source_of(mapping, O_RDONLY)));
            }
            _ => return Ok(object.source()),
        };
        if object.read_only.get().is_none() {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let opened = File::open(link).map_err(|error| object.failed("reopen")(error.into()))?;
            let _ = object.read_only.set(opened);
        }
        let file = object.read_only.get();
        Ok(file.map(|file| MappingSource::Fd(file.as_raw_fd())))
    }

    /// Seals what was sealed. After every task has its mappings and descriptors.
    ///
    /// # Errors
    /// The kernel refuses a seal.
    pub fn seal(&self) -> Result<(), SharedRestoreError> {
        for object in &self.objects {
            match (&object.entry, &object.held) {
                (Some(entry), Held::File(file)) => object.seal(entry, file)?,
                (Some(entry), Held::Mapping(mapping)) if entry.seals != 0 => {
                    let file = open_mapping(mapping).map_err(Errno::from);
                    object.seal(entry, &file.map_err(object.failed("open"))?)?;
                }
                _ => {}
            }
        }
        self.segments.iter().try_for_each(Segment::settle)
    }

    /// Lets what outlives its users stay, now that the restore has come to its end.
    pub fn keep(&self) {
        self.segments.iter().for_each(Segment::keep);
    }
}

impl MemfdRestore for SharedRestore {
    fn memfd(&self, inode_id: u32) -> Result<MemfdSource<'_>, SourceError> {
        let missing = || format!("memfd.img has no memory file {inode_id}");
        Ok(self.memfd_inode(inode_id).ok_or_else(missing)??)
    }
}

/// The link of /proc that leads to the memory of a mapping of process `who`.
fn mapping_link(who: &str, mapping: &SharedObject) -> String {
    let range = mapping.address_range();
    format!("/proc/{who}/map_files/{:x}-{:x}", range.0, range.1)
}

/// What a mapping keeps, as tasks open it.
fn source_of(mapping: &SharedObject, flags: i32) -> MappingSource {
    let pid = Pid::this();
    MappingSource::Path(mapping_link(&pid.to_string(), mapping), flags)
}

/// How many objects a dump or a restore keeps by a descriptor each.
pub(super) fn nr_open() -> usize {
    let share = rlimit::descriptor_limit().map(|limit| limit / SHARE);
    let share = share.and_then(|share| usize::try_from(share).ok());
    share.map_or(MAX_DESCRIPTORS, |share| share.min(MAX_DESCRIPTORS))
}

fn open_mapping(mapping: &SharedObject) -> std::io::Result<File> {
    let link = mapping_link("self", mapping);
    OpenOptions::new().read(true).write(true).open(link)
}

/// Size and huge page flags of shared anonymous memory, by number.
fn anonymous<'a>(tasks: impl IntoIterator<Item = &'a MemoryImage>) -> BTreeMap<u64, (u64, u32)> {
    let mut found: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
    for image in tasks {
        for vma in image
            .vmas()
            .iter()
            .filter(|vma| vma.is(status::ANON_SHARED) && !vma.is(status::SYSVIPC))
        {
            let object = found.entry(vma.shmid).or_default();
            // Checked not to overflow when the image was loaded.
            object.0 = object.0.max(vma.offset + vma.range.len());
            object.1 |= vma.flags & (map::HUGETLB | map::HUGE_MASK);
        }
    }
    found
}

/// The pages of an object; None where it is empty, for which CRIU makes no image.
fn open_pages(
    images: &ImageDir,
    shmid: u64,
    size: u64,
) -> Result<Option<PageSource>, SharedRestoreError> {
    if size == 0 {
        return Ok(None);
    }
    let pages = PageSource::open(images, ImageKind::ShmemPagemap, shmid)?;
    Ok(Some(pages))
}

/// The flags of mmap for the huge pages that flags of memfd_create ask for.
fn map_flags(memfd_flags: u32) -> u32 {
    match memfd_flags & memfd::flag::HUGETLB {
        0 => 0,
        _ => map::HUGETLB | memfd_flags & map::HUGE_MASK,
    }
}

/// The other way round.
fn memfd_flags(map_flags: u32) -> u32 {
    match map_flags & map::HUGETLB {
        0 => 0,
        _ => memfd::flag::HUGETLB | map_flags & map::HUGE_MASK,
    }
}

impl Object {
    /// The contents of a System V segment.
    pub(super) fn of_segment(name: String, size: u64, huge: u32, pages: PageSource) -> Object {
        Object {
            name: name.into_bytes(),
            size,
            huge,
            entry: None,
            shmid: 0,
            pages: Some(pages),
            held: Held::Nothing,
            read_only: OnceLock::new(),
        }
    }

    pub(super) fn pages(&self) -> Option<&PageSource> {
        self.pages.as_ref()
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn title(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    pub(super) fn corrupt(&self, problem: &'static str) -> SharedRestoreError {
        SharedRestoreError::Corrupt {
            name: self.title(),
            problem,
        }
    }

    pub(super) fn failed(&self, action: &'static str) -> impl Fn(Errno) -> SharedRestoreError {
        let (name, size) = (self.title(), self.size);
        move |source| SharedRestoreError::Make {
            action,
            name: name.clone(),
            size,
            source,
        }
    }

    pub(super) fn check(&self) -> Result<(), SharedRestoreError> {
        let end = self.size.checked_next_multiple_of(PAGE_SIZE);
        let end = end.filter(|end| *end <= i64::MAX.cast_unsigned());
        let end = end.ok_or_else(|| self.corrupt("has an impossible size"))?;
        let runs = self.pages.as_ref().map_or(&[][..], PageSource::runs);
        let last = runs.last().map_or(0, |run| run.end());
        match last <= end {
            true => Ok(()),
            false => Err(self.corrupt("has pages beyond its end")),
        }
    }

    /// Shared anonymous memory shows its name in maps, and it is not that of a memory file.
    fn is_anonymous(&self) -> bool {
        let is_named_so = match self.huge {
            0 => self.name == b"/dev/zero",
            _ => self.name == b"/anon_hugepage" || self.entry.is_none(),
        };
        is_named_so && self.size > 0
    }

    fn is_sealed_against_writing(&self) -> bool {
        let seals = self.entry.as_ref().map_or(0, |entry| entry.seals);
        seals & memfd::seal::WRITE != 0
    }

    fn source(&self) -> Option<MappingSource> {
        match &self.held {
            Held::Nothing => None,
            Held::File(file) => Some(MappingSource::Fd(file.as_raw_fd())),
            Held::Mapping(mapping) => Some(source_of(mapping, O_RDWR)),
        }
    }

    /// Makes the object; shared anonymous memory comes with a mapping of it.
    fn make(&self) -> Result<(File, Option<SharedObject>), SharedRestoreError> {
        let (file, mapping) = match self.is_anonymous() {
            true => self.make_anonymous()?,
            false => (self.make_memfd()?, None),
        };
        if let Some(entry) = &self.entry {
            let set = fchown(&file, Some(entry.uid), Some(entry.gid)).and_then(|()| {
                let mode = entry.mode.map(|mode| mode & 0o7777);
                mode.map_or(Ok(()), |mode| {
                    file.set_permissions(Permissions::from_mode(mode))
                })
            });
            set.map_err(Errno::from)
                .map_err(self.failed("give owner and mode to"))?;
        }
        Ok((file, mapping))
    }

    /// An anonymous mapping, of which the kernel gives a descriptor through /proc. Where it does not,
    /// a memory file has to do, which differs in its name only.
    fn make_anonymous(&self) -> Result<(File, Option<SharedObject>), SharedRestoreError> {
        let unmappable = || self.corrupt("is too large for this machine");
        let len = usize::try_from(self.size).map_err(|_| unmappable())?;
        let object = SharedObject::new(len, self.huge).map_err(self.failed("map"))?;
        match open_mapping(&object) {
            Ok(file) => Ok((file, Some(object))),
            Err(error) => {
                tracing::debug!("no descriptor of shared anonymous memory: {error}");
                Ok((self.make_memfd()?, None))
            }
        }
    }

    fn make_memfd(&self) -> Result<File, SharedRestoreError> {
        let name = CString::new(self.name.as_slice())
            .map_err(|_| self.corrupt("has a zero byte in its name"))?;
        let flags = memfd::flag::CLOEXEC | memfd::flag::ALLOW_SEALING | memfd_flags(self.huge);
        let file = match memfd::create(&name, flags) {
            // Huge pages took no seals before Linux 4.16.
            Err(Errno::EINVAL) if self.huge != 0 => {
                memfd::create(&name, flags & !memfd::flag::ALLOW_SEALING)
            }
            created => created,
        };
        let file = file.map_err(self.failed("make"))?;
        file.set_len(self.size)
            .map_err(Errno::from)
            .map_err(self.failed("give its size to"))?;
        Ok(file)
    }

    /// Lets a mapping keep the object, where the kernel opens what it is of.
    fn held_by_mapping(&self, file: File, mapping: Option<SharedObject>) -> Held {
        if let Some(mapping) = mapping {
            return Held::Mapping(mapping);
        }
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let mapping = read_only
            .map_err(Errno::from)
            .and_then(SharedObject::of_file);
        match mapping {
            Ok(mapping) if open_mapping(&mapping).is_ok() => Held::Mapping(mapping),
            _ => Held::File(file),
        }
    }

    fn seal(&self, entry: &MemfdInodeEntry, file: &File) -> Result<(), SharedRestoreError> {
        if self.is_anonymous() {
            return Ok(());
        }
        let present = match memfd::seals(file) {
            // Huge pages without seals.
            Err(Errno::EINVAL) => return Ok(()),
            present => present.map_err(self.failed("ask for seals of"))?,
        };
        let missing = entry.seals & !present;
        match missing {
            0 => Ok(()),
            missing => memfd::add_seals(file, missing).map_err(self.failed("seal")),
        }
    }
}
