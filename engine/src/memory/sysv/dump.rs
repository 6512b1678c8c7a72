//! Segments of a frozen tree.

use std::collections::BTreeSet;
use std::fs::{self, File};

use firn_proto::{IpcDescEntry, IpcShmEntry};
use firn_sys::mm::map;
use firn_sys::{Errno, Pid, procfs, sysv};

use crate::memory::error::MemoryDumpError;
use crate::memory::range::PAGE_SIZE;
use crate::memory::smaps::{self, Mapping, VmFlags};
use crate::memory::vma::{Vma, status};
use crate::obstacle::Obstacle;

/// A segment that tasks of the tree have attached.
#[derive(Debug)]
pub struct Attached {
    /// Its contents.
    pub file: File,
    /// As the image has it.
    pub entry: IpcShmEntry,
    /// Mappings in the tree.
    mappings: u64,
    /// Tasks that have them.
    pids: BTreeSet<Pid>,
}

/// Whether the name and flags of a mapping are those of a segment.
pub fn is_segment(mapping: &Mapping, shmem_device: (u32, u32)) -> bool {
    let key = mapping.name.strip_prefix(b"/SYSV");
    key.is_some_and(|key| key.len() >= 8 && key[..8].iter().all(u8::is_ascii_hexdigit))
        && (mapping.device == shmem_device || mapping.flags.has(VmFlags::HUGETLB))
}

impl Attached {
    /// Asks the kernel about the segment behind a mapping.
    pub fn new(id: u32, file: File, mapping: &Mapping) -> Result<Attached, Errno> {
        let segment = sysv::stat(id.cast_signed())?;
        let hugetlb_flag = mapping
            .flags
            .has(VmFlags::HUGETLB)
            .then(|| sysv::flag::HUGETLB | mapping.page_size.trailing_zeros() << map::HUGE_SHIFT);
        let desc = IpcDescEntry {
            key: segment.key.cast_unsigned(),
            uid: segment.owner.0,
            gid: segment.owner.1,
            cuid: segment.creator.0,
            cgid: segment.creator.1,
            mode: segment.mode,
            id,
        };
        Ok(Attached {
            file,
            entry: IpcShmEntry {
                desc,
                size: segment.size,
                in_pagemaps: Some(true),
                hugetlb_flag,
            },
            mappings: 0,
            pids: BTreeSet::new(),
        })
    }

    /// Counts a mapping of a task.
    pub fn count(&mut self, pid: Pid) {
        self.mappings += 1;
        self.pids.insert(pid);
    }

    /// Length of the whole segment in memory.
    pub fn len(&self) -> u64 {
        let shift = self.entry.hugetlb_flag.unwrap_or(0) >> map::HUGE_SHIFT;
        let page = if shift == 0 { PAGE_SIZE } else { 1 << shift };
        self.entry.size.next_multiple_of(page)
    }

    /// The obstacle that others are, who have it attached as well.
    pub fn others(&self) -> Option<Obstacle> {
        let id = self.entry.desc.id;
        let attached = sysv::stat(id.cast_signed()).map_or(0, |segment| segment.attached);
        if attached <= self.mappings {
            return None;
        }
        let reason = match self.holder() {
            Some(other) => format!("process {other} outside the tree has it attached as well"),
            None => "a process outside the tree has it attached as well".to_owned(),
        };
        Some(Obstacle {
            pid: *self.pids.first()?,
            object: title(&self.entry),
            reason,
            hint: Some("stop that process, or dump it together with this tree".to_owned()),
        })
    }

    /// A process outside the tree that has it attached.
    fn holder(&self) -> Option<Pid> {
        let pids = fs::read_dir("/proc").ok()?.flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let id = u64::from(self.entry.desc.id);
        pids.map(Pid::from_raw).find(|pid| {
            let maps = procfs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
            let mappings = smaps::parse(&maps).unwrap_or_default();
            !self.pids.contains(pid)
                && mappings
                    .iter()
                    .any(|mapping| mapping.inode == id && mapping.name.starts_with(b"/SYSV"))
        })
    }
}

/// A segment for messages.
pub fn title(entry: &IpcShmEntry) -> String {
    format!(
        "System V segment {} with key {:#x}",
        entry.desc.id, entry.desc.key
    )
}

/// Checks that each segment is mapped from its beginning to its end: nothing less can be attached again.
///
/// # Errors
/// `Obstacles` with the first that is not.
pub fn check_whole<'a>(
    pid: Pid,
    vmas: &[Vma],
    segment: impl Fn(u32) -> Option<&'a Attached>,
) -> Result<(), MemoryDumpError> {
    let all: Vec<&Vma> = vmas.iter().filter(|vma| vma.is(status::SYSVIPC)).collect();
    for pieces in all.chunk_by(|a, b| follows(a, b)) {
        let len: u64 = pieces.iter().map(|vma| vma.range.len()).sum();
        let id = u32::try_from(pieces[0].shmid).unwrap_or(0);
        let Some(segment) = segment(id) else { continue };
        if pieces[0].offset != 0 || len != segment.len() {
            return Err(MemoryDumpError::Obstacles(vec![Obstacle {
                pid,
                object: format!("{} at {}", title(&segment.entry), pieces[0].range),
                reason: "only a part of it is still mapped".to_owned(),
                hint: None,
            }]));
        }
    }
    Ok(())
}

/// Whether `next` is the next part of the same attachment as `last`.
pub fn follows(last: &Vma, next: &Vma) -> bool {
    last.shmid == next.shmid
        && last.range.end == next.range.start
        && last.offset + last.range.len() == next.offset
}
