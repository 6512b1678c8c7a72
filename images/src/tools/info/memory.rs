//! Memory by kind.

use std::collections::BTreeMap;

use firn_proto::{FdTypes, MemfdInodeEntry, MmEntry, VmaEntry};
use serde::Serialize;

use super::TaskInfo;
use crate::tools::set::SetImages;
use crate::tools::vma as status;
use crate::{PageFlags, Pagemap};

/// Memory of one kind, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryInfo {
    /// Mapped.
    pub mapped: u64,
    /// Contents in this directory.
    pub stored: u64,
    /// Contents in parents of this directory.
    pub in_parent: u64,
    /// Contents still on the host of the dump.
    pub remote: u64,
}

impl MemoryInfo {
    fn add(&mut self, other: &MemoryInfo) {
        self.mapped = self.mapped.saturating_add(other.mapped);
        self.stored = self.stored.saturating_add(other.stored);
        self.in_parent = self.in_parent.saturating_add(other.in_parent);
        self.remote = self.remote.saturating_add(other.remote);
    }

    fn add_contents(&mut self, flags: PageFlags, bytes: u64) {
        let part = if flags.contains(PageFlags::PARENT) {
            &mut self.in_parent
        } else if flags.contains(PageFlags::PRESENT) {
            &mut self.stored
        } else {
            &mut self.remote
        };
        *part = part.saturating_add(bytes);
    }
}

/// Name of the memory file that the kernel keeps shared anonymous memory in.
const SHARED_ANONYMOUS: &[u8] = b"/dev/zero";

/// Names the kind of a memory file.
fn kind_of_memfd(memfd: Option<&MemfdInodeEntry>) -> &'static str {
    match memfd {
        Some(memfd) if memfd.name == SHARED_ANONYMOUS => "shared",
        _ => "memfd",
    }
}

/// Finds the memory file that a mapping maps.
fn memfd_of<'set>(set: &'set SetImages, vma: &VmaEntry) -> Option<&'set MemfdInodeEntry> {
    let file = set.file(FdTypes::Memfd, u32::try_from(vma.shmid).ok()?)?;
    let inode = u64::from(file.memfd.as_ref()?.inode_id);
    let mut memfds = set.memfds.iter().map(|placed| &placed.message);
    memfds.find(|memfd| memfd.inode_id == inode)
}

/// Names the kind of a mapping; `None` for one that is no memory (a guard region).
fn kind_of(set: &SetImages, mm: &MmEntry, vma: &VmaEntry) -> Option<&'static str> {
    let has = |bits| vma.status & bits != 0;
    let holds_stack = (vma.start..vma.end).contains(&mm.mm_start_stack);
    Some(match () {
        () if has(status::GUARD) => return None,
        () if has(status::VDSO | status::VVAR | status::VSYSCALL) => "kernel",
        () if has(status::MEMFD) => kind_of_memfd(memfd_of(set, vma)),
        () if has(status::SYSVIPC | status::ANON_SHARED) => "shared",
        () if has(status::AIORING | status::SOCKET | status::PLUGIN) => "device",
        () if has(status::FILE_SHARED) => "file-shared",
        () if has(status::FILE_PRIVATE) => "file-private",
        () if has(status::HEAP) => "heap",
        () if has(status::SHSTK) => "shadow-stack",
        () if has(status::STACK) || vma.flags & status::GROWSDOWN != 0 || holds_stack => "stack",
        () => "anonymous",
    })
}

/// Sums up the memory of a process.
pub(super) fn of_task(
    set: &SetImages,
    mm: &MmEntry,
    pagemap: Option<&Pagemap>,
) -> BTreeMap<&'static str, MemoryInfo> {
    let mut kinds: BTreeMap<&'static str, MemoryInfo> = BTreeMap::new();
    let runs = pagemap.map(|pagemap| &pagemap.runs[..]).unwrap_or_default();
    for vma in mm.vmas.iter().filter(|vma| vma.start < vma.end) {
        let Some(kind) = kind_of(set, mm, vma) else {
            continue;
        };
        let sum = kinds.entry(kind).or_default();
        sum.mapped = sum.mapped.saturating_add(vma.end - vma.start);
        let first = runs.partition_point(|run| run.end() <= vma.start);
        for run in runs[first..].iter().take_while(|run| run.vaddr < vma.end) {
            let bytes = run.end().min(vma.end) - run.vaddr.max(vma.start);
            sum.add_contents(run.flags, bytes);
        }
    }
    kinds
}

/// Sums up all processes, and adds the contents of shared objects.
pub(super) fn total(set: &SetImages, tasks: &[TaskInfo]) -> BTreeMap<&'static str, MemoryInfo> {
    let mut kinds: BTreeMap<&'static str, MemoryInfo> = BTreeMap::new();
    for (kind, memory) in tasks.iter().flat_map(|task| &task.memory) {
        kinds.entry(kind).or_default().add(memory);
    }
    let memfds = set.memfds.iter().map(|placed| &placed.message);
    let memfds: BTreeMap<u64, _> = memfds.map(|memfd| (memfd.shmid.into(), memfd)).collect();
    for (id, pagemap) in &set.shmem_pagemaps {
        let memfd = memfds.get(id).copied();
        let kind = memfd.map_or("shared", |memfd| kind_of_memfd(Some(memfd)));
        let sum = kinds.entry(kind).or_default();
        for run in &pagemap.runs {
            sum.add_contents(run.flags, run.end() - run.vaddr);
        }
    }
    kinds
}
