//! Memory: mappings, what backs them, page runs, pages files, parents.

use std::collections::BTreeMap;

use firn_proto::{FdTypes, MmEntry, VmaEntry};

use super::{Fault, Findings};
use crate::tools::set::SetImages;
use crate::tools::vma as status;
use crate::{
    ImageDir, ImageFile, ImageKind, PAGE_SIZE, PageFlags, PageSource, Pagemap, PagemapRun,
};

pub(super) fn check_memory(
    dir: &ImageDir,
    files: &[ImageFile],
    set: &SetImages,
    found: &mut Findings,
) {
    for (pid, mm) in &set.mms {
        check_mappings(*pid, mm, found);
        for vma in &mm.vmas {
            check_backing(set, *pid, vma, found);
        }
        if let Some(pagemap) = set.pagemaps.get(pid) {
            check_covered(*pid, mm, pagemap, found);
        }
    }
    check_objects(set, found);
    check_pages(dir, files, set, found);
}

fn check_mappings(pid: u64, mm: &MmEntry, found: &mut Findings) {
    let mut last: Option<&VmaEntry> = None;
    let mut guards: Option<&VmaEntry> = None;
    for vma in &mm.vmas {
        let guard = vma.status & status::GUARD != 0;
        let before = if guard { guards } else { last };
        let what = if vma.start >= vma.end {
            Some("is empty or ends before it begins")
        } else if !(vma.start.is_multiple_of(PAGE_SIZE) && vma.end.is_multiple_of(PAGE_SIZE)) {
            Some("is not made of whole pages")
        } else if before.is_some_and(|before| before.end > vma.start) {
            Some("begins before the end of the one before it")
        } else if guards.is_some() && !guard {
            Some("comes after guard regions")
        } else {
            None
        };
        if let Some(what) = what {
            let (start, end) = (vma.start, vma.end);
            found.file(ImageKind::Mm, pid, Fault::Mapping { start, end, what });
        }
        *(if guard { &mut guards } else { &mut last }) = Some(vma);
    }
}

/// Checks that the file or object of a mapping is there.
fn check_backing(set: &SetImages, pid: u64, vma: &VmaEntry, found: &mut Findings) {
    let id = vma.shmid;
    let has = |bits| vma.status & bits != 0;
    let unknown = !set.has(ImageKind::Files, 0) || set.is_damaged(ImageKind::Files, 0);
    let file = |kind| unknown || u32::try_from(id).is_ok_and(|id| set.file(kind, id).is_some());
    let missing = if has(status::PLUGIN | status::AIORING | status::GUARD) {
        None
    } else if vma.firn.and_then(|firn| firn.io_uring) == Some(true) {
        (!file(FdTypes::FirnUring)).then_some("io_uring ring")
    } else if has(status::MEMFD) {
        (!file(FdTypes::Memfd)).then_some("memfd")
    } else if has(status::SOCKET) {
        (!file(FdTypes::Packetsk)).then_some("packet socket")
    } else if has(status::FILE_PRIVATE | status::FILE_SHARED) {
        (!file(FdTypes::Reg)).then_some("regular file")
    } else if has(status::SYSVIPC) {
        let known = set
            .shms
            .iter()
            .any(|shm| u64::from(shm.message.desc.id) == id);
        (!known).then_some("shared memory segment")
    } else if has(status::ANON_SHARED) {
        (!set.has(ImageKind::ShmemPagemap, id)).then_some("shared memory object")
    } else {
        None
    };
    if let Some(what) = missing {
        let from = format!("mapping {:#x}-{:#x}", vma.start, vma.end);
        found.file(ImageKind::Mm, pid, Fault::Dangling { from, what, id });
    }
}

/// Checks that every page run lies within mappings.
fn check_covered(pid: u64, mm: &MmEntry, pagemap: &Pagemap, found: &mut Findings) {
    let mappings = mm.vmas.iter().filter(|vma| vma.status & status::GUARD == 0);
    let mut ranges: Vec<(u64, u64)> = mappings.map(|vma| (vma.start, vma.end)).collect();
    ranges.sort_unstable();
    for run in &pagemap.runs {
        if let Some(at) = first_uncovered(&ranges, run) {
            let (start, end) = (run.vaddr, run.end());
            found.file(ImageKind::Pagemap, pid, Fault::Outside { start, end, at });
        }
    }
}

fn first_uncovered(ranges: &[(u64, u64)], run: &PagemapRun) -> Option<u64> {
    let mut at = run.vaddr;
    let first = ranges.partition_point(|(_, end)| *end <= at);
    for (start, end) in &ranges[first..] {
        if *start > at || at >= run.end() {
            break;
        }
        at = at.max(*end);
    }
    (at < run.end()).then_some(at)
}

/// Checks memory files and segments: their pages are there, and within their size.
fn check_objects(set: &SetImages, found: &mut Findings) {
    for placed in &set.memfds {
        let memfd = &placed.message;
        check_object(set, memfd.shmid.into(), memfd.size, "memfd", found);
    }
    let segments = set.shms.iter().map(|placed| &placed.message);
    for shm in segments.filter(|shm| shm.in_pagemaps == Some(true)) {
        check_object(
            set,
            shm.desc.id.into(),
            shm.size,
            "shared memory segment",
            found,
        );
    }
}

fn check_object(set: &SetImages, id: u64, size: u64, what: &str, found: &mut Findings) {
    let kind = ImageKind::ShmemPagemap;
    if !set.has(kind, id) {
        return found.file(kind, id, Fault::Missing(format!("{what} {id}")));
    }
    let runs = set
        .shmem_pagemaps
        .get(&id)
        .map(|map| &map.runs[..])
        .unwrap_or_default();
    let limit = size.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
    for run in runs.iter().filter(|run| run.end() > limit) {
        let (start, end, at) = (run.vaddr, run.end(), limit.max(run.vaddr));
        found.file(kind, id, Fault::Outside { start, end, at });
    }
}

/// Checks that pages files have the size that their pagemaps say, and that parents have the rest.
fn check_pages(dir: &ImageDir, files: &[ImageFile], set: &SetImages, found: &mut Findings) {
    let mut sizes = BTreeMap::new();
    for file in files.iter().filter(|file| file.kind == ImageKind::Pages) {
        let metadata = dir.path().join(&file.name).metadata();
        sizes.insert(file.id, metadata.map_or(0, |metadata| metadata.len()));
    }
    let mut users: BTreeMap<u64, (ImageKind, u64)> = BTreeMap::new();
    let own = set
        .pagemaps
        .iter()
        .map(|(id, map)| (ImageKind::Pagemap, *id, map));
    let shared = set.shmem_pagemaps.iter();
    let shared = shared.map(|(id, map)| (ImageKind::ShmemPagemap, *id, map));
    for (kind, id, pagemap) in own.chain(shared) {
        let pages_id = u64::from(pagemap.pages_id);
        if users.insert(pages_id, (kind, id)).is_some() {
            let (what, twice) = ("pages file", pages_id);
            found.file(kind, id, Fault::Twice { what, id: twice });
        }
        let expected = pagemap.present_bytes();
        match sizes.get(&pages_id) {
            None if expected > 0 => {
                let needed_by = kind.file_name(id);
                found.file(ImageKind::Pages, pages_id, Fault::Missing(needed_by));
            }
            Some(size) if *size != expected => {
                let found_bytes = *size;
                let fault = Fault::PagesSize {
                    found: found_bytes,
                    expected,
                };
                found.file(ImageKind::Pages, pages_id, fault);
            }
            _ => check_parents(dir, kind, id, pagemap, found),
        }
    }
    // A damaged pagemap may be the one that a pages file belongs to.
    let unread = |file: &ImageFile| match file.kind {
        ImageKind::Pagemap => !set.pagemaps.contains_key(&file.id),
        ImageKind::ShmemPagemap => !set.shmem_pagemaps.contains_key(&file.id),
        _ => false,
    };
    if files.iter().any(unread) {
        return;
    }
    for id in sizes.keys().filter(|id| !users.contains_key(id)) {
        found.file(ImageKind::Pages, *id, Fault::Orphan);
        found.last_is_remark();
    }
}

fn check_parents(
    dir: &ImageDir,
    kind: ImageKind,
    id: u64,
    pagemap: &Pagemap,
    found: &mut Findings,
) {
    let in_parent = |run: &PagemapRun| run.flags.contains(PageFlags::PARENT);
    if pagemap.runs.iter().any(in_parent)
        && let Err(error) = PageSource::open(dir, kind, id)
    {
        found.file(kind, id, Fault::Pages(error));
    }
}
