//! The memory of one task as its images describe it, checked.

use firn_images::{ImageDir, ImageKind, ImageReadError, PagePlace, PageSource, PageSourceError};
use firn_proto::{AioRingEntry, MmEntry};
use firn_sys::Pid;
use firn_sys::mm::{MmFields, TASK_SIZE, map};

use super::aio;
use super::names::{self, Named};
use super::policies::{self, Governed};
use super::range::{self, AddressRange, PAGE_SIZE};
use super::space_modes::SpaceModes;
use super::vma::{Vma, status};

/// More mappings than this are taken for a broken image; the kernel's own limit is far lower.
const MAX_VMAS: usize = 1 << 20;
/// More words of auxiliary vector than any kernel keeps.
const MAX_AUXV_WORDS: usize = 256;

/// Failure to read the images of a task's memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryLoadError {
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageReadError),
    /// The pages could not be found.
    #[error(transparent)]
    Pages(#[from] PageSourceError),
    /// The image contradicts itself.
    #[error("{image}: {what} {range} {problem}")]
    Corrupt {
        /// The image file.
        image: String,
        /// Mapping or page run.
        what: &'static str,
        /// Its addresses.
        range: AddressRange,
        /// What is wrong.
        problem: &'static str,
    },
    /// The image is too large to be true.
    #[error("{image}: {count} {what} are too many")]
    TooMany {
        /// The image file.
        image: String,
        /// What there are too many of.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// The image holds something that can't be restored.
    #[error("task {pid}: mapping {range}: {reason}")]
    Unsupported {
        /// The task.
        pid: Pid,
        /// The mapping.
        range: AddressRange,
        /// Why.
        reason: &'static str,
    },
}

/// The memory of one task as its images describe it.
#[derive(Debug)]
pub struct MemoryImage {
    pid: Pid,
    fields: MmFields,
    auxv: Vec<u64>,
    exe_file_id: u32,
    dumpable: Option<i32>,
    modes: SpaceModes,
    vmas: Vec<Vma>,
    guards: Vec<AddressRange>,
    names: Vec<Named>,
    policies: Vec<Governed>,
    aios: Vec<AioRingEntry>,
    pages: PageSource,
}

impl MemoryImage {
    /// Reads and checks mm and pagemap of a task, and opens its pages files.
    ///
    /// # Errors
    /// Images that are missing, damaged or contradictory; mappings that can't be restored.
    pub fn load(images: &ImageDir, pid: Pid) -> Result<MemoryImage, MemoryLoadError> {
        let id = u64::from(pid.to_image());
        let mm: MmEntry = images.read_one(ImageKind::Mm, id)?;
        let pages = PageSource::open(images, ImageKind::Pagemap, id)?;
        let (vmas, guards) = mappings(pid, &mm)?;
        let image = MemoryImage {
            pid,
            names: names::from_image(&mm, &vmas),
            policies: policies::from_image(&mm, &vmas),
            modes: SpaceModes::from_image(&mm),
            fields: fields(&mm),
            aios: mm.aios,
            auxv: mm.mm_saved_auxv,
            exe_file_id: mm.exe_file_id,
            dumpable: mm.dumpable,
            vmas,
            guards,
            pages,
        };
        image.check_auxv()?;
        image.check_pages()?;
        Ok(image)
    }

    /// The task.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Mappings, ascending, without overlaps.
    pub fn vmas(&self) -> &[Vma] {
        &self.vmas
    }

    /// Guard regions, ascending.
    pub fn guards(&self) -> &[AddressRange] {
        &self.guards
    }

    /// Names that the program has given to mappings.
    pub fn names(&self) -> &[Named] {
        &self.names
    }

    /// Asynchronous I/O contexts, one for each mapping that is the ring of one.
    pub fn aios(&self) -> &[AioRingEntry] {
        &self.aios
    }

    /// NUMA policies, ascending.
    pub fn policies(&self) -> &[Governed] {
        &self.policies
    }

    /// Closes the pages files, which are opened again whenever they are read; not those of a task with rings of
    /// asynchronous I/O, which reads them itself.
    pub fn let_files_go(&mut self) {
        if self.aios.is_empty() {
            self.pages.let_files_go();
        }
    }

    /// Where the contents of pages are.
    pub fn pages(&self) -> &PageSource {
        &self.pages
    }

    /// Addresses of text, data, heap, stack, arguments and environment.
    pub fn fields(&self) -> &MmFields {
        &self.fields
    }

    /// Words of the auxiliary vector, without its end.
    pub fn auxv(&self) -> &[u64] {
        &self.auxv
    }

    /// File id of the executable.
    pub fn exe_file_id(&self) -> u32 {
        self.exe_file_id
    }

    /// PR_SET_DUMPABLE, where the image knows it.
    pub fn dumpable(&self) -> Option<i32> {
        self.dumpable
    }

    /// What prctl keeps for the address space.
    pub fn modes(&self) -> SpaceModes {
        self.modes
    }

    /// All addresses in use, ascending and joined.
    pub fn used_ranges(&self) -> Vec<AddressRange> {
        range::union(self.vmas.iter().map(|vma| vma.range).collect())
    }

    /// Ranges whose contents the pages files hold, ascending and joined.
    pub fn page_ranges(&self) -> Vec<AddressRange> {
        let runs = self.pages.runs().iter();
        range::union(
            runs.map(|run| AddressRange::new(run.vaddr, run.end()))
                .collect(),
        )
    }

    /// Mapping that has the address.
    pub fn vma_at(&self, address: u64) -> Option<&Vma> {
        let index = self.vmas.partition_point(|vma| vma.range.end <= address);
        self.vmas
            .get(index)
            .filter(|vma| vma.range.contains(address))
    }

    /// Range of the vdso's code, where the task had one.
    pub fn vdso(&self) -> Option<AddressRange> {
        self.find(status::VDSO)
    }

    /// Range of the vdso's data, where the task had one.
    pub fn vvar(&self) -> Option<AddressRange> {
        self.find(status::VVAR)
    }

    fn find(&self, status: u32) -> Option<AddressRange> {
        let vma = self.vmas.iter().find(|vma| vma.is(status))?;
        Some(vma.range)
    }

    fn check_auxv(&self) -> Result<(), MemoryLoadError> {
        if self.auxv.len() > MAX_AUXV_WORDS {
            return Err(MemoryLoadError::TooMany {
                image: file_name(ImageKind::Mm, self.pid),
                what: "words of auxiliary vector",
                count: self.auxv.len(),
            });
        }
        Ok(())
    }

    /// All pages must be here and belong to mappings that have pages of their own.
    fn check_pages(&self) -> Result<(), MemoryLoadError> {
        let mut runs = self.pages.runs().iter();
        if let Some(run) = runs.find(|run| run.place == PagePlace::Remote) {
            return Err(MemoryLoadError::Unsupported {
                pid: self.pid,
                range: AddressRange::new(run.vaddr, run.end()),
                reason: "its pages are still on the host of the dump",
            });
        }
        let owners = self.vmas.iter().filter(|vma| vma.has_own_pages());
        let owned = range::union(owners.map(|vma| vma.range).collect());
        let stray = range::subtract(&self.page_ranges(), &owned);
        match stray.first() {
            None => Ok(()),
            Some(&range) => Err(MemoryLoadError::Corrupt {
                image: file_name(ImageKind::Pagemap, self.pid),
                what: "page run",
                range,
                problem: "lies in no mapping with pages of its own",
            }),
        }
    }
}

fn file_name(kind: ImageKind, pid: Pid) -> String {
    kind.file_name(u64::from(pid.to_image()))
}

fn fields(mm: &MmEntry) -> MmFields {
    MmFields {
        start_code: mm.mm_start_code,
        end_code: mm.mm_end_code,
        start_data: mm.mm_start_data,
        end_data: mm.mm_end_data,
        start_brk: mm.mm_start_brk,
        brk: mm.mm_brk,
        start_stack: mm.mm_start_stack,
        arg_start: mm.mm_arg_start,
        arg_end: mm.mm_arg_end,
        env_start: mm.mm_env_start,
        env_end: mm.mm_env_end,
    }
}

/// The mappings of an image, checked, and apart from them its guard regions.
fn mappings(pid: Pid, mm: &MmEntry) -> Result<(Vec<Vma>, Vec<AddressRange>), MemoryLoadError> {
    let image = || file_name(ImageKind::Mm, pid);
    if mm.vmas.len() > MAX_VMAS {
        return Err(MemoryLoadError::TooMany {
            image: image(),
            what: "mappings",
            count: mm.vmas.len(),
        });
    }
    let all = mm.vmas.iter().map(Vma::from_image);
    let (guards, vmas): (Vec<Vma>, Vec<Vma>) = all.partition(|vma| vma.is(status::GUARD));
    for list in [&vmas, &guards] {
        let mut last_end = 0;
        for vma in list {
            let problem = range_problem(vma, last_end)
                .or_else(|| kind_problem(vma))
                .or_else(|| ring_problem(vma, mm));
            if let Some(problem) = problem {
                return Err(MemoryLoadError::Corrupt {
                    image: image(),
                    what: "mapping",
                    range: vma.range,
                    problem,
                });
            }
            if let Some(reason) = unsupported(vma) {
                return Err(MemoryLoadError::Unsupported {
                    pid,
                    range: vma.range,
                    reason,
                });
            }
            last_end = vma.range.end;
        }
    }
    Ok((vmas, guards.iter().map(|guard| guard.range).collect()))
}

fn range_problem(vma: &Vma, last_end: u64) -> Option<&'static str> {
    let AddressRange { start, end } = vma.range;
    if !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) {
        Some("does not consist of whole pages")
    } else if start >= end {
        Some("is empty")
    } else if start < last_end {
        Some("overlaps the one before it")
    } else if end > TASK_SIZE && !vma.is(status::VSYSCALL) {
        Some("lies outside of user space")
    } else if !vma.offset.is_multiple_of(PAGE_SIZE) || vma.offset.checked_add(end - start).is_none()
    {
        Some("has an impossible file offset")
    } else {
        None
    }
}

fn kind_problem(vma: &Vma) -> Option<&'static str> {
    const KINDS: u32 = status::FILE_PRIVATE
        | status::FILE_SHARED
        | status::ANON_SHARED
        | status::ANON_PRIVATE
        | status::AIORING
        | status::SOCKET
        | status::GUARD;
    let kinds = vma.status & KINDS;
    let size = vma.page_size();
    if kinds.count_ones() != 1 {
        Some("is of no kind or of several")
    } else if vma.is(status::SHSTK) && !vma.is(status::ANON_PRIVATE) {
        Some("is a shadow stack that is not memory of its process alone")
    } else if vma.prot & !7 != 0 {
        Some("has an unknown protection")
    } else if vma.has_flag(map::HUGETLB)
        && !(vma.range.start.is_multiple_of(size) && vma.range.end.is_multiple_of(size))
    {
        Some("does not consist of whole huge pages")
    } else {
        None
    }
}

fn ring_problem(vma: &Vma, mm: &MmEntry) -> Option<&'static str> {
    match vma.is(status::AIORING) {
        true => aio::problem(vma, &mm.aios),
        false => None,
    }
}

fn unsupported(vma: &Vma) -> Option<&'static str> {
    let kinds = [(
        status::EXT_PLUGIN,
        "it needs a plug-in of the program that made the image",
    )];
    kinds
        .iter()
        .find(|(bit, _)| vma.is(*bit))
        .map(|(_, reason)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_proto::VmaEntry;

    fn entry(start: u64, end: u64) -> VmaEntry {
        VmaEntry {
            start,
            end,
            prot: 3,
            flags: map::PRIVATE | map::ANONYMOUS,
            status: status::REGULAR | status::ANON_PRIVATE,
            fd: -1,
            ..VmaEntry::default()
        }
    }

    fn problem_of(vmas: Vec<VmaEntry>) -> String {
        let mm = MmEntry {
            vmas,
            ..MmEntry::default()
        };
        match mappings(Pid::from_raw(9), &mm) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn takes_sound_mappings_and_sets_guards_apart() {
        let guard = VmaEntry {
            status: status::GUARD,
            ..entry(0x1000, 0x2000)
        };
        let mm = MmEntry {
            vmas: vec![entry(0x1000, 0x3000), entry(0x3000, 0x4000), guard],
            ..MmEntry::default()
        };
        let (vmas, guards) = mappings(Pid::from_raw(9), &mm).expect("sound");
        assert_eq!(vmas.len(), 2);
        assert_eq!(guards, [AddressRange::new(0x1000, 0x2000)]);
    }

    #[test]
    fn names_what_is_wrong_with_a_mapping() {
        let huge = VmaEntry {
            flags: map::PRIVATE | map::ANONYMOUS | map::HUGETLB,
            ..entry(0x1000, 0x3000)
        };
        let kindless = VmaEntry {
            status: status::REGULAR,
            ..entry(0x1000, 0x3000)
        };
        let socket = VmaEntry {
            status: status::SOCKET | status::ANON_SHARED,
            ..entry(0x1000, 0x3000)
        };
        let cases = [
            (vec![entry(0x1001, 0x3000)], "whole pages"),
            (vec![entry(0x3000, 0x3000)], "is empty"),
            (
                vec![entry(0x1000, 0x3000), entry(0x2000, 0x4000)],
                "overlaps",
            ),
            (vec![entry(0x1000, 1 << 50)], "outside of user space"),
            (vec![huge], "huge pages"),
            (vec![kindless], "no kind"),
            (vec![socket], "of several"),
        ];
        for (vmas, expected) in cases {
            let problem = problem_of(vmas);
            assert!(problem.contains(expected), "{problem}: {expected}");
        }
    }
}
