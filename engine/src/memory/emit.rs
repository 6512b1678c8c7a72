//! The plan of a task's memory as records of its program.

use std::collections::HashSet;
use std::os::fd::AsRawFd;

use firn_sys::mm::{self, MmFields, advice, map, prot};
use firn_sys::nr;
use firn_sys::sysv::flag as sysv_flag;

use super::fresh;
use super::gap;
use super::image::MemoryImage;
use super::names;
use super::piece::Piece;
use super::plan::{MemoryPlan, Phase};
use super::policies;
use super::range::{self, AddressRange};
use super::shadow_stacks;
use super::sources::{self, MappingFdError, MappingFds, MappingSource};
use super::sysv;
use super::vdso::KernelVdso;
use super::vma::{KEPT_ADVICE, Vma, status};
use crate::program::{Arg, Program, Rule, Slot};

/// Most ranges and most bytes of one preadv.
const MAX_IOVECS: usize = 1024;
const MAX_READ: u64 = 1 << 30;
const ENOMEM: i32 = 12;

impl MemoryPlan {
    /// Removes what the task got at fork and does not want. First of all memory records.
    pub fn unmap_not_inherited(&self, p: &mut Program) {
        for range in &self.unwanted {
            let why = format!("munmap of the parent's [{range}]");
            p.call(nr::MUNMAP, &args(*range), Rule::Exact(0), why);
        }
        for range in &self.dropped {
            let [start, len] = args(*range);
            let why = format!("madvise to drop the parent's pages [{range}]");
            let advice = advice::DONTNEED.into();
            p.call(nr::MADVISE, &[start, len, advice], Rule::Exact(0), why);
        }
        policies::plan_removal(p, &self.governed_by_maker);
        for &index in &self.unprotected {
            self.protect(p, index, self.prot_while_filled[index], "to be filled");
        }
    }

    /// Maps what children of the task inherit, and reads the pages of it that the task reads itself. The
    /// slot tells the coordinator the userfaultfd to fill through, if there is one.
    ///
    /// # Errors
    /// A mapping has no descriptor.
    pub fn map_before_fork(
        &self,
        p: &mut Program,
        fds: &mut dyn MappingFds,
    ) -> Result<Option<Slot>, MappingFdError> {
        self.map_phase(p, fds, &self.early)
    }

    /// Closes what the coordinator filled through: after it has, and before anything is forked or changed.
    pub fn settle(&self, p: &mut Program, filled_through: Option<Slot>) {
        if let Some(uffd) = filled_through {
            fresh::close(p, uffd);
        }
    }

    /// Puts the vdso into place; the native one, where there is one, was parked at `parked_at`. After
    /// [`MemoryPlan::unmap_not_inherited`].
    pub fn place_vdso(&self, p: &mut Program, native: Option<&KernelVdso>, parked_at: u64) {
        self.vdso.place(p, native, parked_at);
    }

    /// Maps everything else at its final place, and reads the pages that the task reads itself. As
    /// [`MemoryPlan::map_before_fork`].
    ///
    /// # Errors
    /// A mapping has no descriptor.
    pub fn map(
        &self,
        p: &mut Program,
        fds: &mut dyn MappingFds,
    ) -> Result<Option<Slot>, MappingFdError> {
        let filled_through = self.map_phase(p, fds, &self.late)?;
        self.set_up_aio(p, fds)?;
        Ok(filled_through)
    }

    /// Makes asynchronous I/O contexts, which land anywhere first: where nothing else is mapped any more.
    fn set_up_aio(&self, p: &mut Program, fds: &mut dyn MappingFds) -> Result<(), MappingFdError> {
        if self.aio.is_empty() {
            return Ok(());
        }
        let null = fds.null_fd().map_err(|source| MappingFdError {
            pid: self.image.pid(),
            mapping: "its asynchronous I/O contexts".to_owned(),
            source,
        })?;
        for context in &self.aio {
            context.emit(p, &self.image, null);
        }
        Ok(())
    }

    /// Gives protection, advice, locks and seals, and tells the kernel the shape of the address space. Nothing may be written to the memory after it, and the limits
    /// RLIMIT_AS, RLIMIT_DATA, RLIMIT_MEMLOCK and PR_SET_MDWE may be set only after it; credentials too.
    ///
    /// # Errors
    /// There is no descriptor of the executable.
    pub fn finish(&self, p: &mut Program, fds: &mut dyn MappingFds) -> Result<(), MappingFdError> {
        self.describe(p, fds)?;
        let modes = self.image.modes();
        modes.plan(p, self.own_modes, self.image.vmas().iter());
        let pid = self.image.pid();
        let is_there = |fds: &dyn MappingFds, vma: &Vma| fds.own_ring_fd(pid, vma).is_none();
        for index in self.indices() {
            let vma = self.vma(index);
            if !is_there(&*fds, vma) {
                continue;
            }
            if self.prot_while_filled[index] != vma.prot {
                self.protect(p, index, vma.prot, "to its protection");
            }
            give_advice(p, vma);
        }
        self.govern_inherited(p);
        names::plan(p, self.image.names());
        for range in self.image.guards() {
            let [start, len] = args(*range);
            let why = format!("madvise to install the guard region [{range}]");
            let advice = advice::GUARD_INSTALL.into();
            p.call(nr::MADVISE, &[start, len, advice], Rule::Exact(0), why);
        }
        for vma in self.image.vmas().iter().filter(|vma| is_there(&*fds, vma)) {
            lock(p, vma);
        }
        for vma in self.image.vmas().iter().filter(|vma| vma.is_sealed) {
            let why = format!("mseal of {}", vma.title());
            p.call(mm::SYS_MSEAL, &args(vma.range), Rule::Exact(0), why);
        }
        Ok(())
    }

    /// Says whether core dumps may be written. After the credentials are set, which resets it.
    pub fn set_dumpable(&self, p: &mut Program) {
        // 2, "only by root", can't be asked for; it comes by itself with changed credentials.
        if let Some(dumpable @ 0..=1) = self.image.dumpable() {
            let args = [Arg::from(mm::PR_SET_DUMPABLE), Arg::from(dumpable)];
            p.call(nr::PRCTL, &args, Rule::Exact(0), "PR_SET_DUMPABLE");
        }
    }

    fn map_phase(
        &self,
        p: &mut Program,
        fds: &mut dyn MappingFds,
        phase: &Phase,
    ) -> Result<Option<Slot>, MappingFdError> {
        self.map_rings(p, fds, phase)?;
        for &index in &phase.mapped {
            let vma = self.vma(index);
            if vma.is_ring {
                continue;
            }
            if vma.is(status::SYSVIPC) {
                self.attach(p, index);
                self.govern(p, index);
                continue;
            }
            if vma.is(status::SHSTK) {
                shadow_stacks::map(p, vma);
                continue;
            }
            self.map_one(p, fds, vma, self.prot_while_filled[index])?;
            self.govern(p, index);
            if vma.has_advice(advice::HUGEPAGE) {
                advise(p, vma, advice::HUGEPAGE);
            }
        }
        read_pages(p, &self.image, &phase.read_by_task);
        Ok(fresh::open(p, &phase.fresh))
    }

    /// NUMA policies come before pages, which they place.
    fn govern(&self, p: &mut Program, index: usize) {
        policies::plan(p, self.image.policies(), self.vma(index).range, &self.nodes);
    }

    /// Policies of memory that came along, whose pages are where they are.
    fn govern_inherited(&self, p: &mut Program) {
        if self.image.policies().is_empty() {
            return;
        }
        let mapped = self.early.mapped.iter().chain(&self.late.mapped);
        let mapped: HashSet<usize> = mapped.copied().collect();
        for index in self.indices().filter(|index| !mapped.contains(index)) {
            self.govern(p, index);
        }
    }

    /// Parts of io_uring rings come first, while there is little to fill around them.
    fn map_rings(
        &self,
        p: &mut Program,
        fds: &mut dyn MappingFds,
        phase: &Phase,
    ) -> Result<(), MappingFdError> {
        let mut rings = Vec::new();
        for &index in &phase.mapped {
            let vma = self.vma(index);
            if !vma.is_ring || fds.own_ring_fd(self.image.pid(), vma).is_some() {
                continue;
            }
            let fd = fds.ring_fd(vma).map_err(|source| MappingFdError {
                pid: self.image.pid(),
                mapping: vma.title(),
                source,
            })?;
            let prot = self.prot_while_filled[index];
            rings.push(gap::Part { vma, prot, fd });
        }
        gap::map_rings(p, &rings, &self.taken);
        Ok(())
    }

    /// Maps parts of the rings that the task has made itself, when everything else is there.
    pub fn map_own_rings(&self, p: &mut Program, fds: &dyn MappingFds) {
        let pid = self.image.pid();
        let part = |vma| {
            let fd = fds.own_ring_fd(pid, vma)?;
            let prot = vma.prot;
            Some(gap::Part { vma, prot, fd })
        };
        let rings: Vec<gap::Part<'_>> = self.image.vmas().iter().filter_map(part).collect();
        let wanted = range::union(rings.iter().map(|part| part.vma.range).collect());
        let all = self.image.vmas().iter().map(|vma| vma.range);
        let all = range::union(all.chain(self.taken.iter().copied()).collect());
        gap::map_rings(p, &rings, &range::subtract(&all, &wanted));
        for gap::Part { vma, .. } in &rings {
            give_advice(p, vma);
            lock(p, vma);
        }
    }

    fn map_one(
        &self,
        p: &mut Program,
        fds: &mut dyn MappingFds,
        vma: &Vma,
        prot: u32,
    ) -> Result<(), MappingFdError> {
        let has_object = vma.has_object();
        let source = match has_object {
            true => fds.mapping_source(vma).map_err(|source| MappingFdError {
                pid: self.image.pid(),
                mapping: vma.title(),
                source,
            })?,
            false => MappingSource::Fd(-1),
        };
        let (fd, opened): (Arg, _) = match source {
            MappingSource::Fd(fd) => (fd.into(), None),
            MappingSource::Path(path, flags) => {
                let opened = sources::open(p, &path, flags, vma);
                (opened.into(), Some(opened))
            }
        };
        let [start, len] = args(vma.range);
        let offset = if has_object { vma.offset } else { 0 };
        p.call(
            nr::MMAP,
            &[
                start,
                len,
                prot.into(),
                map_flags(vma, has_object).into(),
                fd,
                offset.into(),
            ],
            Rule::Exact(vma.range.start.cast_signed()),
            format!("mmap of {}", vma.title()),
        );
        if let Some(opened) = opened {
            let why = "closing what is mapped now";
            p.call(nr::CLOSE, &[opened.into()], Rule::Exact(0), why);
        }
        Ok(())
    }

    /// Attaches a System V segment, with the first of its parts and for all of them.
    fn attach(&self, p: &mut Program, index: usize) {
        const ACCESS_MODE: u32 = 3;
        let vma = self.vma(index);
        let is_read_only = vma.open_flags.is_some_and(|flags| flags & ACCESS_MODE == 0);
        let is_rest = index > 0 && sysv::follows(self.vma(index - 1), vma);
        if !is_rest {
            let parts = (index..self.image.vmas().len()).map(|at| self.vma(at));
            let is_executable = parts
                .take_while(|part| part.shmid == vma.shmid)
                .any(|part| part.prot & prot::EXEC != 0);
            let mut flags = 0;
            flags |= if is_read_only { sysv_flag::RDONLY } else { 0 };
            flags |= if is_executable { sysv_flag::EXEC } else { 0 };
            let id = vma.shmid.into();
            let start = vma.range.start;
            p.call(
                nr::SHMAT,
                &[id, start.into(), flags.into()],
                Rule::Exact(start.cast_signed()),
                format!("shmat of {}", vma.title()),
            );
        }
        // What it has been attached with is not known to be the same as what it has to be.
        self.protect(p, index, vma.prot, "to its protection");
    }

    fn protect(&self, p: &mut Program, index: usize, prot: u32, what: &str) {
        let vma = self.vma(index);
        let [start, len] = args(vma.range);
        let why = format!("mprotect of {} {what}", vma.title());
        p.call(
            nr::MPROTECT,
            &[start, len, prot.into()],
            Rule::Exact(0),
            why,
        );
    }

    fn describe(&self, p: &mut Program, fds: &mut dyn MappingFds) -> Result<(), MappingFdError> {
        let exe = fds
            .exe_fd(self.image.exe_file_id())
            .map_err(|source| MappingFdError {
                pid: self.image.pid(),
                mapping: "the executable".to_owned(),
                source,
            })?;
        // The kernel's copy ends with a null entry.
        let mut auxv = self.image.auxv().to_vec();
        auxv.extend([0, 0]);
        let auxv_size = u32::try_from(8 * auxv.len()).expect("checked when it was loaded");
        let auxv = words(p, &auxv);
        let addresses = self.image.fields().addresses();
        let mut table: Vec<Arg> = addresses.into_iter().map(Arg::Imm).collect();
        table.push(auxv);
        table.push(MmFields::tail(auxv_size, exe.cast_unsigned()).into());
        let table = p.table(&table);
        let size = u64::try_from(mm::MM_MAP_SIZE).expect("a small structure");
        p.call(
            nr::PRCTL,
            &[
                mm::PR_SET_MM.into(),
                mm::PR_SET_MM_MAP.into(),
                table.into(),
                size.into(),
            ],
            Rule::Exact(0),
            "PR_SET_MM_MAP",
        );
        Ok(())
    }
}

fn args(range: AddressRange) -> [Arg; 2] {
    [range.start.into(), range.len().into()]
}

pub(super) fn words(p: &mut Program, words: &[u64]) -> Arg {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    p.data(&bytes).into()
}

fn map_flags(vma: &Vma, has_object: bool) -> u32 {
    let kept = map::SHARED
        | map::PRIVATE
        | map::DROPPABLE
        | map::GROWSDOWN
        | map::NORESERVE
        | map::HUGETLB
        | map::HUGE_MASK;
    let mut flags = vma.flags & kept | map::FIXED_NOREPLACE;
    if has_object {
        // The object says which pages it has.
        flags &= !(map::HUGETLB | map::HUGE_MASK);
    } else {
        flags |= map::ANONYMOUS;
    }
    if vma.has_advice(advice::NOHUGEPAGE) {
        // The same flag of the mapping, without a call of its own.
        flags |= map::STACK;
    }
    flags
}

fn give_advice(p: &mut Program, vma: &Vma) {
    let with_mapping = [advice::HUGEPAGE, advice::NOHUGEPAGE];
    let is_kernels = vma.status & (status::VVAR | status::VDSO | status::VSYSCALL) != 0;
    for advice in KEPT_ADVICE {
        if vma.has_advice(advice) && !with_mapping.contains(&advice) && !is_kernels {
            advise(p, vma, advice);
        }
    }
}

fn advise(p: &mut Program, vma: &Vma, advice: u32) {
    let [start, len] = args(vma.range);
    let why = format!("madvise {advice} of {}", vma.title());
    p.call(
        nr::MADVISE,
        &[start, len, advice.into()],
        Rule::Exact(0),
        why,
    );
}

fn lock(p: &mut Program, vma: &Vma) {
    if !vma.has_flag(map::LOCKED) {
        return;
    }
    let [start, len] = args(vma.range);
    let why = format!("mlock of {}", vma.title());
    // The range is locked even when not all of it could be brought in, as with no access at all.
    let rule = Rule::OkOr(ENOMEM);
    match vma.lock_on_fault {
        true => p.call(
            nr::MLOCK2,
            &[start, len, mm::MLOCK_ONFAULT.into()],
            rule,
            why,
        ),
        false => p.call(nr::MLOCK, &[start, len], rule, why),
    };
}

/// Reads of pages, as few as the layout of the files allows.
fn read_pages(p: &mut Program, image: &MemoryImage, pieces: &[Piece]) {
    for group in file_groups(pieces) {
        let first = &group[0];
        let file = &image.pages().files()[first.file];
        let mut iovecs = Vec::with_capacity(2 * group.len());
        for piece in group {
            iovecs.extend([Arg::from(piece.range.start), Arg::from(piece.len())]);
        }
        let len: u64 = group.iter().map(Piece::len).sum();
        let table = p.table(&iovecs);
        let count = u64::try_from(group.len()).expect("few ranges");
        let held = file.held().expect("tasks read files that are held");
        let fd = held.as_raw_fd();
        let why = format!(
            "reading {} pages from [{:#x}] on out of {}",
            len / range::PAGE_SIZE,
            first.range.start,
            file.path().display()
        );
        p.call_retrying(
            nr::PREADV,
            &[fd.into(), table.into(), count.into(), first.offset.into()],
            Rule::Exact(len.cast_signed()),
            why,
        );
    }
}

/// Groups of pieces that one call can read.
fn file_groups(pieces: &[Piece]) -> Vec<&[Piece]> {
    let mut groups = Vec::new();
    for together in pieces.chunk_by(|a, b| a.is_followed_in_file_by(b)) {
        let mut rest = together;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest.iter().take(MAX_IOVECS).take_while(|piece| {
                bytes += piece.len();
                bytes <= MAX_READ
            });
            // A task that reads itself has less than the limit, so one piece always fits.
            let (group, next) = rest.split_at(fitting.count().max(1));
            groups.push(group);
            rest = next;
        }
    }
    groups
}
