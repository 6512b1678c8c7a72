//! Segments of a tree being restored: made and filled by the coordinator, attached by the tasks.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::sync::atomic::{AtomicBool, Ordering};

use firn_images::{ImageDir, ImageKind, PageSource};
use firn_proto::IpcShmEntry;
use firn_sys::mm::map;
use firn_sys::sysv::{self, Attachment, flag};
use firn_sys::{Errno, Pid};

use super::OWN_IPC_NAMESPACE;
use super::dump::title;
use crate::memory::fill::PageFill;
use crate::memory::image::MemoryImage;
use crate::memory::range::PAGE_SIZE;
use crate::memory::shared_restore::{Object, SharedRestoreError};
use crate::memory::vma::status;

/// Whoever makes a segment just then gets the id that was asked for.
const ATTEMPTS: usize = 10;

/// A segment.
#[derive(Debug)]
pub struct Segment {
    entry: IpcShmEntry,
    object: Object,
    is_made: AtomicBool,
}

/// Reads the segments that tasks have attached.
///
/// # Errors
/// Images that are missing, damaged or contradictory.
pub fn load(images: &ImageDir, tasks: &[&MemoryImage]) -> Result<Vec<Segment>, SharedRestoreError> {
    let vmas = tasks.iter().flat_map(|image| image.vmas());
    let wanted: BTreeSet<u64> = vmas
        .filter(|vma| vma.is(status::SYSVIPC))
        .map(|vma| vma.shmid)
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut segments = Vec::new();
    let entries = images.read_all(ImageKind::IpcnsShm, OWN_IPC_NAMESPACE.into())?;
    for entry in entries {
        segments.push(Segment::load(images, entry)?);
    }
    let is_there = |id: &u64| segments.iter().any(|s| u64::from(s.entry.desc.id) == *id);
    match wanted.iter().find(|id| !is_there(id)) {
        None => Ok(segments),
        Some(id) => Err(SharedRestoreError::Corrupt {
            name: format!("System V segment {id}"),
            problem: "is mapped, but the images do not have it",
        }),
    }
}

impl Segment {
    fn load(images: &ImageDir, entry: IpcShmEntry) -> Result<Segment, SharedRestoreError> {
        let name = title(&entry);
        if entry.in_pagemaps != Some(true) {
            return Err(SharedRestoreError::Corrupt {
                name,
                problem: "has its contents in a form of old images",
            });
        }
        let huge = match entry.hugetlb_flag.unwrap_or(0) {
            0 => 0,
            flags => map::HUGETLB | flags & map::HUGE_MASK,
        };
        let page = crate::memory::vma::huge_page_size(huge).max(PAGE_SIZE);
        let size = entry.size.checked_next_multiple_of(page);
        let pages = PageSource::open(images, ImageKind::ShmemPagemap, entry.desc.id.into())?;
        let object = Object::of_segment(name, size.unwrap_or(u64::MAX), huge, pages);
        object.check()?;
        Ok(Segment {
            entry,
            object,
            is_made: AtomicBool::new(false),
        })
    }

    fn id(&self) -> i32 {
        self.entry.desc.id.cast_signed()
    }

    fn failed(&self, action: &'static str) -> impl Fn(Errno) -> SharedRestoreError {
        self.object.failed(action)
    }

    /// Makes the segment and fills it.
    ///
    /// # Errors
    /// Its id or key is taken, there is no room, its contents can't be read.
    pub fn make(&self, how: &PageFill<'_>) -> Result<(), SharedRestoreError> {
        self.make_room()?;
        self.create()?;
        self.is_made.store(true, Ordering::Relaxed);
        let desc = &self.entry.desc;
        sysv::set_owner(self.id(), (desc.uid, desc.gid), desc.mode)
            .map_err(self.failed("give owner and mode to"))?;
        let attachment = Attachment::new(self.id()).map_err(self.failed("attach"))?;
        let start = attachment.address();
        let link = format!(
            "/proc/self/map_files/{start:x}-{:x}",
            start + self.object.size()
        );
        let file = OpenOptions::new().read(true).write(true).open(link);
        let file = file.map_err(|error| self.failed("open")(error.into()))?;
        match self.object.pages() {
            Some(pages) => self.object.fill(&file, pages, how),
            None => Ok(()),
        }
    }

    /// Removes the segment that was dumped, if it is still there and nobody uses it.
    fn make_room(&self) -> Result<(), SharedRestoreError> {
        let Ok(there) = sysv::stat(self.id()) else {
            return Ok(());
        };
        let is_same = there.key.cast_unsigned() == self.entry.desc.key
            && there.size == self.entry.size
            && there.attached == 0;
        if !is_same {
            return Err(SharedRestoreError::SegmentTaken {
                id: self.id(),
                name: self.object.title(),
                holders: there.attached,
            });
        }
        sysv::remove(self.id()).map_err(self.failed("replace"))
    }

    fn create(&self) -> Result<(), SharedRestoreError> {
        let desc = &self.entry.desc;
        let size =
            usize::try_from(self.entry.size).map_err(|_| self.object.corrupt("is too large"))?;
        let flags = desc.mode & 0o777 | self.entry.hugetlb_flag.unwrap_or(0);
        for _ in 0..ATTEMPTS {
            fs::write("/proc/sys/kernel/shm_next_id", desc.id.to_string())
                .map_err(|error| self.failed("choose the id of")(error.into()))?;
            let made = sysv::create(desc.key.cast_signed(), size, flags, (desc.cuid, desc.cgid))
                .map_err(self.failed("make"))?;
            if made == self.id() {
                return Ok(());
            }
            sysv::remove(made).map_err(self.failed("make"))?;
        }
        Err(self.failed("get the id of")(Errno::EEXIST))
    }

    /// Locks and removes what was locked and removed. After every task has attached it.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn settle(&self) -> Result<(), SharedRestoreError> {
        if self.entry.desc.mode & flag::LOCKED != 0 {
            sysv::lock(self.id()).map_err(self.failed("lock"))?;
        }
        if self.entry.desc.mode & flag::DEST != 0 {
            sysv::remove(self.id()).map_err(self.failed("remove"))?;
        }
        Ok(())
    }

    /// Lets the segment stay.
    pub fn keep(&self) {
        self.is_made.store(false, Ordering::Relaxed);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // One that was to be removed has gone already.
        if self.is_made.load(Ordering::Relaxed) && sysv::remove(self.id()).is_ok() {
            tracing::debug!(pid = %Pid::this(), "removed {} again", self.object.title());
        }
    }
}
