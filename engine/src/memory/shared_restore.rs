//! Shared memory objects of restored tasks: made by the coordinator, inherited as descriptors.
//!
//! Order: make and fill all, fork, let every task map, then [`SharedRestore::seal`]: a seal against
//! writing forbids writable mappings that are made after it, and some of them against those before.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use firn_images::{ImageDir, ImageKind, ImageReadError, PageSource, PageSourceError};
use firn_proto::MemfdInodeEntry;
use firn_sys::mm::map;
use firn_sys::window::{SharedObject, Window};
use firn_sys::{Errno, memfd};

use super::error::SourceError;
use super::fill::PageFill;
use super::image::MemoryImage;
use super::piece::{self, Piece};
use super::range::{AddressRange, PAGE_SIZE};
use super::sysv::{self, Segment};
use super::vma::{self, status};
use crate::files::MemfdRestore;

/// Bytes of an object that are mapped at once while it is filled.
const WINDOW_BYTES: u64 = 4 << 20;

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
}

/// An object, or the contents of a segment.
#[derive(Debug)]
pub(super) struct Object {
    name: Vec<u8>,
    size: u64,
    /// `MAP_HUGETLB` with its size, or 0.
    huge: u32,
    /// As memfd.img describes it; None for anonymous memory of older images.
    entry: Option<MemfdInodeEntry>,
    pages: PageSource,
    file: Option<File>,
    /// The same, open for reading only, where a mapping needs it so.
    read_only: OnceLock<File>,
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
            ..SharedRestore::default()
        };
        let entries: Vec<MemfdInodeEntry> = images.read_all(ImageKind::MemfdInode, 0)?;
        for entry in entries {
            shared.add_memfd(images, entry)?;
        }
        for (shmid, (size, huge)) in anonymous(tasks) {
            let pages = PageSource::open(images, ImageKind::ShmemPagemap, shmid)?;
            let object = Object {
                name: b"/dev/zero".to_vec(),
                size,
                huge,
                entry: None,
                pages,
                file: None,
                read_only: OnceLock::new(),
            };
            object.check()?;
            shared.by_shmid.insert(shmid, shared.objects.len());
            shared.objects.push(object);
        }
        Ok(shared)
    }

    fn add_memfd(
        &mut self,
        images: &ImageDir,
        entry: MemfdInodeEntry,
    ) -> Result<(), SharedRestoreError> {
        let pages = PageSource::open(images, ImageKind::ShmemPagemap, entry.shmid.into())?;
        let object = Object {
            name: entry.name.clone(),
            size: entry.size,
            huge: map_flags(entry.hugetlb_flag.unwrap_or(0)),
            pages,
            file: None,
            read_only: OnceLock::new(),
            entry: Some(entry.clone()),
        };
        object.check()?;
        let number = u32::try_from(entry.inode_id);
        let number = number.map_err(|_| object.corrupt("has an impossible number"))?;
        if self.by_inode.insert(number, self.objects.len()).is_some() {
            return Err(object.corrupt("has the number of another one"));
        }
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
    pub fn open_all(&mut self, how: &PageFill<'_>) -> Result<(), SharedRestoreError> {
        for object in &mut self.objects {
            let file = object.make()?;
            object.fill(&file, how)?;
            object.file = Some(file);
        }
        self.segments
            .iter()
            .try_for_each(|segment| segment.make(how))
    }

    /// Descriptor of the shared anonymous memory `shmid`, the same in every task.
    pub fn fd_of(&self, shmid: u64) -> Option<i32> {
        let object = &self.objects[*self.by_shmid.get(&shmid)?];
        object.file.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Descriptor, for reading and writing, of the memory file with that number in memfd.img.
    pub fn memfd_inode(&self, inode_id: u32) -> Option<BorrowedFd<'_>> {
        let object = &self.objects[*self.by_inode.get(&inode_id)?];
        object.file.as_ref().map(AsFd::as_fd)
    }

    /// Descriptor of a memory file for mappings that need it open with `open_flags`: one that may not
    /// be written keeps mappings from being made writable. None where there is no such memory file.
    ///
    /// # Errors
    /// It can't be opened once more.
    pub fn mapping_fd(
        &self,
        inode_id: u32,
        open_flags: Option<u32>,
    ) -> Result<Option<i32>, SharedRestoreError> {
        const ACCESS_MODE: u32 = 3;
        let Some(object) = self.by_inode.get(&inode_id).map(|at| &self.objects[*at]) else {
            return Ok(None);
        };
        let Some(file) = &object.file else {
            return Ok(None);
        };
        if open_flags.is_none_or(|flags| flags & ACCESS_MODE != 0) {
            return Ok(Some(file.as_raw_fd()));
        }
        if let Some(file) = object.read_only.get() {
            return Ok(Some(file.as_raw_fd()));
        }
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let opened = File::open(link).map_err(|error| object.failed("reopen")(error.into()))?;
        let file = object.read_only.get_or_init(|| opened);
        Ok(Some(file.as_raw_fd()))
    }

    /// Seals what was sealed. After every task has its mappings and descriptors.
    ///
    /// # Errors
    /// The kernel refuses a seal.
    pub fn seal(&self) -> Result<(), SharedRestoreError> {
        for object in &self.objects {
            if let (Some(entry), Some(file)) = (&object.entry, &object.file) {
                object.seal(entry, file)?;
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
    fn memfd(&self, inode_id: u32) -> Result<BorrowedFd<'_>, SourceError> {
        let missing = || format!("memfd.img has no memory file {inode_id}");
        Ok(self.memfd_inode(inode_id).ok_or_else(missing)?)
    }
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
            pages,
            file: None,
            read_only: OnceLock::new(),
        }
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
        let last = self.pages.runs().last().map_or(0, |run| run.end());
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

    fn make(&self) -> Result<File, SharedRestoreError> {
        let file = match self.is_anonymous() {
            true => self.make_anonymous(),
            false => self.make_memfd(),
        }?;
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
        Ok(file)
    }

    /// An anonymous mapping, of which the kernel gives a descriptor through /proc. Where it does not,
    /// a memory file has to do, which differs in its name only.
    fn make_anonymous(&self) -> Result<File, SharedRestoreError> {
        let unmappable = || self.corrupt("is too large for this machine");
        let len = usize::try_from(self.size).map_err(|_| unmappable())?;
        let object = SharedObject::new(len, self.huge).map_err(self.failed("map"))?;
        let range = object.address_range();
        let link = format!("/proc/self/map_files/{:x}-{:x}", range.0, range.1);
        match OpenOptions::new().read(true).write(true).open(link) {
            Ok(file) => Ok(file),
            Err(error) => {
                tracing::debug!("no descriptor of shared anonymous memory: {error}");
                self.make_memfd()
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

    /// Reads all contents into mapped windows of the object, with several workers.
    pub(super) fn fill(&self, file: &File, how: &PageFill<'_>) -> Result<(), SharedRestoreError> {
        let windows = self.windows();
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let work = || {
            while let Some((window, pieces)) = windows.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.fill_window(file, *window, pieces, how) {
                    // The others stop at their next window.
                    next.store(windows.len(), Ordering::Relaxed);
                    let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
                    failure.get_or_insert(error);
                }
            }
        };
        let workers = how.workers.min(windows.len());
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
        let failure = failure.into_inner().unwrap_or_else(|e| e.into_inner());
        failure.map_or(Ok(()), Err)
    }

    /// Parts of the object that have contents, with the contents.
    fn windows(&self) -> Vec<(AddressRange, Vec<Piece>)> {
        let runs = self.pages.runs();
        // Huge pages are mapped whole; and mapping them beyond the end would make the object grow.
        let step = WINDOW_BYTES.max(vma::huge_page_size(self.huge));
        let object_end = self.size.next_multiple_of(PAGE_SIZE);
        let mut windows = Vec::new();
        let mut start = 0;
        while let Some(run) = runs.get(runs.partition_point(|run| run.end() <= start)) {
            let first = run.vaddr.max(start);
            let first = first - first % step;
            let window = AddressRange::new(first, object_end.min(first + step));
            windows.push((window, piece::pieces_in(&self.pages, window)));
            start = window.end;
        }
        windows
    }

    fn fill_window(
        &self,
        file: &File,
        range: AddressRange,
        pieces: &[Piece],
        how: &PageFill<'_>,
    ) -> Result<(), SharedRestoreError> {
        if how.cancel.is_cancelled() {
            return Err(SharedRestoreError::Cancelled);
        }
        let len = usize::try_from(range.len()).expect("a window fits memory");
        let window =
            Window::of_file(file, range.start, len).map_err(self.failed("map for filling"))?;
        for piece in pieces {
            let source = self.pages.files()[piece.file].file();
            let at = usize::try_from(piece.range.start - range.start).expect("inside");
            let len = usize::try_from(piece.len()).expect("inside");
            let mut done = 0;
            while done < len {
                let offset = piece.offset + u64::try_from(done).expect("inside");
                match window.read_file(source, offset, at + done, len - done) {
                    Ok(0) => return Err(self.failed("read all of")(Errno::EIO)),
                    Ok(read) => done += read,
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(self.failed("fill")(error)),
                }
            }
            how.written.fetch_add(piece.len(), Ordering::Relaxed);
        }
        Ok(())
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
