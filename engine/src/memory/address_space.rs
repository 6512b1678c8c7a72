//! The address space of a frozen task, and its images.

use firn_images::{ImageDir, ImageKind, ImageSetWriter};
use firn_proto::{FirnMmEntry, MmEntry};
use firn_sys::Pid;
use firn_sys::mm::{MmFields, prot};
use firn_sys::procfs;

use super::aio;
use super::classify::{self, Backing};
use super::copy::{self, CopiedTask, PageCopy};
use super::error::{MemoryDumpError, SourceError};
use super::names;
use super::pages;
use super::policies::{self, Governed};
use super::range::AddressRange;
use super::shared_dump::SharedDump;
use super::smaps::{self, Mapping, VmFlags};
use super::space_modes::SpaceModes;
use super::survey;
use super::sysv;
use super::tracking;
use super::vma::{Vma, status};
use crate::obstacle::Obstacle;

/// What only the task itself can tell about its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmAnswers {
    /// Present end of the heap.
    pub brk: u64,
    /// PR_GET_DUMPABLE.
    pub dumpable: i32,
    /// What prctl keeps for it.
    pub modes: SpaceModes,
    /// File id of the executable.
    pub exe_file_id: u32,
    /// NUMA policies.
    pub policies: Vec<Governed>,
}

/// Takes the files behind mappings for the images of open files.
pub trait MappedFiles {
    /// Notes the file of a mapping, open with `open_flags`; equal files give equal ids.
    ///
    /// # Errors
    /// The file can't be dumped.
    fn mapped_file(
        &mut self,
        pid: Pid,
        mapping: &Mapping,
        open_flags: u32,
    ) -> Result<u32, SourceError>;

    /// The file of the io_uring ring that a part of is mapped; None where no task has it open, or not this one
    /// and only its process can map it.
    fn mapped_ring(&mut self, pid: Pid, mapping: &Mapping) -> Option<u32>;

    /// Number of the open socket that a mapping shows.
    ///
    /// # Errors
    /// It can't be dumped.
    fn mapped_socket(&mut self, mapping: &Mapping) -> Result<u32, SourceError>;

    /// Notes a mapped memory file, whose inode is entry `inode_id` of memfd.img.
    fn mapped_memfd(&mut self, inode_id: u32, open_flags: u32) -> u32;
}

/// The address space of a frozen task.
#[derive(Debug)]
pub struct AddressSpace {
    pid: Pid,
    /// The thread through which it is read, which [`Task::speaker`](crate::tree::Task::speaker) names.
    speaker: Pid,
    fields: MmFields,
    auxv: Vec<u64>,
    mappings: Vec<Mapping>,
}

/// An address space of which only the pages are missing.
#[derive(Debug)]
pub struct DescribedSpace<'a> {
    space: &'a AddressSpace,
    answers: MmAnswers,
    vmas: Vec<Vma>,
}

impl DescribedSpace<'_> {
    /// Writes mm, pagemap and pages of the task; several threads may do so for several tasks. What was not
    /// written to since the `parent` was made is left to it, where that is known.
    ///
    /// # Errors
    /// Pages that can't be read, images that can't be written.
    pub fn write(
        mut self,
        parent: Option<&ImageDir>,
        images: &ImageSetWriter,
        pages_id: u32,
        page_copy: &PageCopy<'_>,
    ) -> Result<PageStats, MemoryDumpError> {
        let space = self.space;
        let found = pages::find(space.speaker, &self.vmas, &space.partly_shared())?;
        let in_parent = match parent {
            Some(parent) => tracking::unchanged(space.task(), &found.runs, parent)?,
            None => Vec::new(),
        };
        let (task, runs) = (space.task(), &found.runs);
        let stats = copy::dump(task, runs, &in_parent, images, pages_id, page_copy)?;
        self.vmas
            .extend(found.guards.iter().map(|range| guard(*range)));
        let mm = space.to_image(&self.answers, &self.vmas);
        images.write_one(ImageKind::Mm, u64::from(space.pid.to_image()), &mm)?;
        Ok(stats)
    }
}

/// Counts of a dump, as its statistics image has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageStats {
    /// Pages looked at.
    pub scanned: u64,
    /// Pages written.
    pub written: u64,
    /// Pages left to the parent images.
    pub in_parent: u64,
}

impl std::ops::AddAssign for PageStats {
    fn add_assign(&mut self, other: PageStats) {
        self.scanned += other.scanned;
        self.written += other.written;
        self.in_parent += other.in_parent;
    }
}

impl AddressSpace {
    /// Reads the memory map, the mm fields and the auxiliary vector of `pid` through its thread `speaker`.
    ///
    /// Of a task that `is_tracked` by us the mappings do not tell that. **Preconditions**: the task is stopped
    /// and nothing was mapped into it.
    ///
    /// # Errors
    /// The files of /proc can't be read or understood; `Obstacles` with all mappings that can't be
    /// dumped.
    pub fn read(pid: Pid, speaker: Pid, is_tracked: bool) -> Result<AddressSpace, MemoryDumpError> {
        let map_error = |source| MemoryDumpError::Map { pid, source };
        let mut mappings = smaps::parse(&read_proc(speaker, "smaps")?).map_err(map_error)?;
        if is_tracked {
            for mapping in &mut mappings {
                mapping.flags = mapping.flags.without(VmFlags::UFFD_WP);
            }
        }
        let obstacles = survey::obstacles(pid, &mappings);
        if !obstacles.is_empty() {
            return Err(MemoryDumpError::Obstacles(obstacles));
        }
        let stat = read_proc(speaker, "stat")?;
        let fields = stat_fields(&stat).ok_or(MemoryDumpError::Format { pid, what: "stat" })?;
        Ok(AddressSpace {
            pid,
            speaker,
            fields,
            auxv: auxv_words(&read_proc(speaker, "auxv")?),
            mappings,
        })
    }

    /// The task.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    fn task(&self) -> CopiedTask {
        CopiedTask {
            pid: self.pid,
            speaker: self.speaker,
        }
    }

    /// The mappings as the kernel shows them.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Range of the vdso's code, where the task has one.
    pub fn vdso(&self) -> Option<AddressRange> {
        let vdso = self.mappings.iter().find(|m| m.name == b"[vdso]")?;
        Some(vdso.range)
    }

    /// The mapping of code that has an address.
    pub fn code_at(&self, address: u64) -> Option<AddressRange> {
        let next = self.mappings.partition_point(|m| m.range.end <= address);
        let mapping = self.mappings.get(next)?;
        let is_code = mapping.prot & prot::EXEC != 0 && mapping.range.contains(address);
        is_code.then_some(mapping.range)
    }

    /// Writes mm, pagemap and pages of the task.
    ///
    /// `pages_id` is the number of the pages file, which no other image has.
    ///
    /// # Errors
    /// Pages that can't be read, a mapped file that can't be dumped, images that can't be written.
    pub fn dump(
        &self,
        answers: &MmAnswers,
        files: &mut dyn MappedFiles,
        shared: &mut SharedDump,
        images: &ImageSetWriter,
        pages_id: u32,
        page_copy: &PageCopy<'_>,
    ) -> Result<PageStats, MemoryDumpError> {
        let described = self.describe(answers, files, shared)?;
        described.write(None, images, pages_id, page_copy)
    }

    /// Notes the files and shared memory behind the mappings: the part that goes task by task.
    ///
    /// # Errors
    /// A mapped file that can't be dumped.
    pub fn describe(
        &self,
        answers: &MmAnswers,
        files: &mut dyn MappedFiles,
        shared: &mut SharedDump,
    ) -> Result<DescribedSpace<'_>, MemoryDumpError> {
        Ok(DescribedSpace {
            space: self,
            answers: answers.clone(),
            vmas: self.describe_mappings(files, shared)?,
        })
    }

    /// Memory in which writes can be tracked: private and without a file. None where the kernel writes
    /// unseen: into the buffers that a ring has been told of.
    pub fn trackable(&self) -> Vec<AddressRange> {
        let has_ring =
            |mapping: &Mapping| aio::is_ring(mapping) || mapping.name == b"anon_inode:[io_uring]";
        if self.mappings.iter().any(has_ring) {
            return Vec::new();
        }
        let not = VmFlags::HUGETLB
            .or(VmFlags::DROPPABLE)
            .or(VmFlags::SHADOW_STACK);
        let is_plain = |mapping: &&Mapping| {
            let is_memory = mapping.inode == 0 && !mapping.name.starts_with(b"/");
            let backing = classify::backing(mapping, (u32::MAX, u32::MAX));
            let is_memory = is_memory && backing == Ok(Backing::Memory);
            is_memory && !mapping.is_shared && !mapping.flags.has(not)
        };
        let plain = self.mappings.iter().filter(is_plain);
        plain.map(|mapping| mapping.range).collect()
    }

    /// Private mappings some pages of which are in other address spaces as well.
    fn partly_shared(&self) -> Vec<AddressRange> {
        let private = self.mappings.iter().filter(|mapping| !mapping.is_shared);
        let partly = private.filter(|mapping| mapping.shared > 0);
        partly.map(|mapping| mapping.range).collect()
    }

    fn describe_mappings(
        &self,
        files: &mut dyn MappedFiles,
        shared: &mut SharedDump,
    ) -> Result<Vec<Vma>, MemoryDumpError> {
        let mut vmas = Vec::with_capacity(self.mappings.len());
        for mapping in &self.mappings {
            // What can't be dumped was refused when the map was read.
            let backing = classify::backing(mapping, shared.device()).unwrap_or(Backing::Nothing);
            if backing == Backing::Nothing {
                continue;
            }
            let mut vma = classify::describe(mapping, backing);
            let open_flags = vma.open_flags.unwrap_or(0);
            let failed = |source| MemoryDumpError::File {
                pid: self.pid,
                mapping: mapping.title(),
                source,
            };
            let id = match backing {
                Backing::File => {
                    let file = files.mapped_file(self.speaker, mapping, open_flags);
                    file.map_err(failed)?
                }
                Backing::Socket => files.mapped_socket(mapping).map_err(failed)?,
                Backing::SharedMemory => {
                    let inode = shared.add_mapping(self.speaker, mapping)?;
                    files.mapped_memfd(inode, open_flags)
                }
                Backing::IoUring => files
                    .mapped_ring(self.pid, mapping)
                    .ok_or_else(|| self.closed_ring(mapping))?,
                Backing::Segment => shared.add_segment(self.speaker, mapping)?,
                _ => 0,
            };
            vma.shmid = u64::from(id);
            vmas.push(vma);
        }
        sysv::check_whole(self.speaker, &vmas, |id| shared.segment(id))?;
        classify::join_vvar(&mut vmas);
        Ok(vmas)
    }

    fn closed_ring(&self, mapping: &Mapping) -> MemoryDumpError {
        let reason = "the io_uring ring that it belongs to has no descriptor any more";
        let hint = "let the program unmap it, or keep the ring's descriptor open";
        MemoryDumpError::Obstacles(vec![Obstacle {
            pid: self.pid,
            object: mapping.title(),
            reason: reason.to_owned(),
            hint: Some(hint.to_owned()),
        }])
    }

    fn to_image(&self, answers: &MmAnswers, vmas: &[Vma]) -> MmEntry {
        let f = &self.fields;
        let mut mm = MmEntry {
            mm_start_code: f.start_code,
            mm_end_code: f.end_code,
            mm_start_data: f.start_data,
            mm_end_data: f.end_data,
            mm_start_stack: f.start_stack,
            mm_start_brk: f.start_brk,
            mm_brk: answers.brk,
            mm_arg_start: f.arg_start,
            mm_arg_end: f.arg_end,
            mm_env_start: f.env_start,
            mm_env_end: f.env_end,
            exe_file_id: answers.exe_file_id,
            mm_saved_auxv: self.auxv.clone(),
            vmas: vmas.iter().map(Vma::to_image).collect(),
            dumpable: Some(answers.dumpable),
            aios: aio::entries(vmas),
            thp_disabled: None,
            firn: extension(&self.mappings, &answers.policies),
        };
        answers.modes.describe(&mut mm);
        mm
    }
}

/// What images have beside the common fields, where there is something.
fn extension(mappings: &[Mapping], governed: &[Governed]) -> Option<FirnMmEntry> {
    let entry = FirnMmEntry {
        names: names::to_image(mappings),
        policies: policies::to_image(governed),
        ..FirnMmEntry::default()
    };
    (entry != FirnMmEntry::default()).then_some(entry)
}

fn guard(range: AddressRange) -> Vma {
    Vma {
        range,
        offset: 0,
        shmid: 0,
        prot: 0,
        flags: 0,
        status: status::GUARD,
        advice: 0,
        open_flags: None,
        lock_on_fault: false,
        is_sealed: false,
        is_ring: false,
    }
}

fn read_proc(pid: Pid, what: &'static str) -> Result<Vec<u8>, MemoryDumpError> {
    procfs::read(format!("/proc/{pid}/{what}")).map_err(|source| MemoryDumpError::Read {
        pid,
        what,
        source: source.into(),
    })
}

/// The addresses out of /proc/PID/stat; the break is not among them.
///
/// Source: man 5 proc_pid_stat, fields 26 to 28 and 45 to 51.
fn stat_fields(stat: &[u8]) -> Option<MmFields> {
    // The name stands in parentheses and may hold anything, also parentheses.
    let after_name = stat.iter().rposition(|b| *b == b')')? + 1;
    let text = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let field = |nr: usize| words.get(nr - 3)?.parse::<u64>().ok();
    Some(MmFields {
        start_code: field(26)?,
        end_code: field(27)?,
        start_stack: field(28)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
        brk: 0,
    })
}

/// The words of an auxiliary vector without the final null entry.
fn auxv_words(bytes: &[u8]) -> Vec<u64> {
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
        .collect();
    let end = words.chunks(2).position(|pair| pair[0] == 0);
    words[..end.map_or(words.len(), |pairs| 2 * pairs)].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_addresses_behind_a_nasty_name() {
        let numbers: Vec<String> = (4..=52).map(|n| (n * 1000).to_string()).collect();
        let stat = format!("17 (a) R 1 (b)) S {}\n", numbers.join(" "));
        let fields = stat_fields(stat.as_bytes()).expect("well formed");
        assert_eq!((fields.start_code, fields.end_code), (26_000, 27_000));
        assert_eq!((fields.start_brk, fields.env_end), (47_000, 51_000));
        assert_eq!(stat_fields(b"17 (x) S 1 2"), None);
    }

    #[test]
    fn cuts_the_auxiliary_vector_at_its_end() {
        let words = [33u64, 5, 16, 0, 0, 0, 7, 7];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(auxv_words(&bytes), [33, 5, 16, 0]);
    }

    #[test]
    fn reads_its_own_address_space() {
        let own = Pid::this();
        let space = AddressSpace::read(own, own, false).expect("readable");
        let stack = space.mappings.iter().find(|m| m.name == b"[stack]");
        let stack = stack.expect("a stack").range;
        assert!(stack.contains(space.fields.start_stack));
        assert!(space.vdso().is_some());
    }
}
