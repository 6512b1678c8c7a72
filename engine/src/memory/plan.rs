//! How the memory of a tree of tasks is rebuilt, decided before anything is made.
//!
//! ```text
//! a task's program                              coordinator
//! unmap what it inherits and does not want
//! map what its children inherit, read pages     ── posts ── fills large mappings
//!                                               ── waits ──
//! fork its children
//! map everything else, read pages               ── posts ── fills large mappings
//! protect, advise, lock                         ── waits ──
//! ```
//!
//! A task reads its pages itself where they are few, straight from the pages file into place, which
//! costs no round trip. Large memory is filled by the coordinator with all cores, and so is that of tasks whose pages
//! files are not open all the time, because there are more of them than a process may have descriptors.

use std::ops::Range;
use std::sync::Arc;

use firn_sys::mm::prot;
use firn_sys::{Errno, Pid};

use super::aio::{self, AioPlan};
use super::compare;
use super::fresh::{self, FreshFacts};
use super::image::MemoryImage;
use super::inherit::{self, Inheritance};
use super::piece::{self, Piece};
use super::range::{self, AddressRange};
use super::shadow_stacks;
use super::space_modes::SpaceModes;
use super::vdso::{self, KernelVdso, KernelVdsos, VdsoChoice, VdsoError, VdsoPlan};
use super::vma::{Vma, status};
use crate::task::mempolicy::Nodes;

/// Tasks with more page bytes than this are filled by the coordinator.
const MAX_READ_BY_TASK: u64 = 16 << 20;

/// Failure to plan the memory of a tree.
#[derive(Debug, thiserror::Error)]
pub enum MemoryPlanError {
    /// The contents of pages could not be read.
    #[error("can't read {path}")]
    Read {
        /// The pages file.
        path: String,
        /// Cause.
        source: Errno,
    },
    /// The ring of an asynchronous I/O context is not as the kernel writes it.
    #[error("task {pid}: the aio ring {range} is not as the kernel writes it")]
    AioRing {
        /// The task.
        pid: Pid,
        /// The ring.
        range: AddressRange,
    },
    /// The vdso can't be restored.
    #[error(transparent)]
    Vdso(#[from] VdsoError),
}

/// What is to be known of a task to plan its memory.
#[derive(Debug)]
pub struct TaskMemory {
    /// Its images.
    pub image: MemoryImage,
    /// Index of the task that forks it, among those given; None for one that the coordinator makes.
    pub maker: Option<usize>,
    /// Instruction pointers of its threads.
    pub instruction_pointers: Vec<u64>,
}

/// What is to be known of this machine.
#[derive(Debug)]
pub struct MemoryFacts {
    /// How fresh memory can be filled.
    pub fresh: FreshFacts,
    /// The running kernel's vdsos.
    pub vdsos: KernelVdsos,
    /// How vdsos are put into place.
    pub vdso_choice: VdsoChoice,
    /// NUMA nodes with memory that may be used.
    pub nodes: Nodes,
    /// Modes that every restored address space comes with.
    pub own_modes: SpaceModes,
}

impl MemoryFacts {
    /// Looks at the machine; at what it has for 32-bit programs only where there are some.
    ///
    /// # Errors
    /// A vdso can't be read.
    pub fn probe(has_ia32: bool) -> Result<MemoryFacts, VdsoError> {
        let ia32 = match has_ia32 {
            true => KernelVdso::read_ia32()?,
            false => None,
        };
        Ok(MemoryFacts {
            fresh: FreshFacts::probe(),
            vdsos: KernelVdsos {
                native: KernelVdso::read()?,
                ia32: ia32.map(Arc::new),
            },
            vdso_choice: VdsoChoice::ByContent,
            nodes: Nodes::usable(),
            own_modes: SpaceModes::own(),
        })
    }
}

/// One of the two times at which a task gets mappings and pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Phase {
    /// Indices of the mappings that are made.
    pub(super) mapped: Vec<usize>,
    /// Pages that the task reads itself.
    pub(super) read_by_task: Vec<Piece>,
    /// Pages that the coordinator writes.
    pub(super) filled: Vec<Piece>,
    /// The mappings, ascending, into which they are copied through userfaultfd.
    pub(super) fresh: Vec<AddressRange>,
}

/// How the memory of one task is rebuilt.
#[derive(Debug)]
pub struct MemoryPlan {
    pub(super) image: MemoryImage,
    /// Mappings that the parent has when it forks the task and that the task does not want.
    pub(super) unwanted: Vec<AddressRange>,
    /// Pages that come along and that the task does not have.
    pub(super) dropped: Vec<AddressRange>,
    /// Mappings that are made writable to be filled, by index.
    pub(super) unprotected: Vec<usize>,
    /// Memory that comes along with a NUMA policy, which is not to stay.
    pub(super) governed_by_maker: Vec<AddressRange>,
    /// NUMA nodes that are here.
    pub(super) nodes: Nodes,
    /// Modes that it comes with.
    pub(super) own_modes: SpaceModes,
    /// Protection that each mapping has while it is filled.
    pub(super) prot_while_filled: Vec<u32>,
    /// Before the task forks its children.
    pub(super) early: Phase,
    /// After it.
    pub(super) late: Phase,
    /// Pages of shadow stacks, which the coordinator writes when it traces the task.
    pub(super) shadow: Vec<Piece>,
    /// What is mapped when everything but what children inherit is about to be.
    pub(super) taken: Vec<AddressRange>,
    /// Asynchronous I/O contexts.
    pub(super) aio: Vec<AioPlan>,
    /// What happens to the vdso.
    pub(super) vdso: VdsoPlan,
    /// Pages compared with the parent's.
    pub(super) nr_compared: u64,
    /// Pages that stay shared with the parent.
    pub(super) nr_shared: u64,
}

/// Plans the memory of a tree; makers come before those they make. `hole` is where nothing may be put.
///
/// # Errors
/// Pages files that can't be read, a vdso that can't be restored.
pub fn plan_tree(
    tasks: Vec<TaskMemory>,
    hole: AddressRange,
    facts: &MemoryFacts,
) -> Result<Vec<MemoryPlan>, MemoryPlanError> {
    let inheritances: Vec<Inheritance> = tasks
        .iter()
        .map(|task| {
            task.maker.map_or_else(Inheritance::default, |maker| {
                inherit::inheritance(&tasks[maker].image, &task.image)
            })
        })
        .collect();
    let governed_by_makers: Vec<Vec<AddressRange>> = tasks
        .iter()
        .map(|task| governed_by_maker(task, &tasks))
        .collect();
    let drafts = drafts(&tasks, &inheritances)?;
    let mut plans = Vec::with_capacity(tasks.len());
    let tasks = tasks.into_iter().zip(governed_by_makers);
    for ((task, governed_by_maker), mut draft) in tasks.zip(drafts) {
        let vdso = vdso::plan(
            &task.image,
            &facts.vdsos,
            hole,
            &task.instruction_pointers,
            facts.vdso_choice,
        )?;
        let aio = aio::plan(&task.image)?;
        draft.taken = range::union([draft.taken, vec![hole]].concat());
        plans.push(MemoryPlan {
            governed_by_maker,
            nodes: facts.nodes.clone(),
            own_modes: facts.own_modes,
            ..draft.into_plan(task.image, vdso, aio, &facts.fresh)
        });
    }
    Ok(plans)
}

/// Memory of its maker that has a NUMA policy.
fn governed_by_maker(task: &TaskMemory, tasks: &[TaskMemory]) -> Vec<AddressRange> {
    let policies = task.maker.map(|maker| tasks[maker].image.policies());
    let governed = policies.into_iter().flatten();
    governed.map(|(range, _)| *range).collect()
}

/// What is known of a task before its image is moved into its plan.
#[derive(Debug, Default)]
struct Draft {
    unwanted: Vec<AddressRange>,
    dropped: Vec<AddressRange>,
    unprotected: Vec<usize>,
    prot_while_filled: Vec<u32>,
    early: Vec<usize>,
    late: Vec<usize>,
    early_pieces: Vec<Piece>,
    late_pieces: Vec<Piece>,
    shadow_pieces: Vec<Piece>,
    taken: Vec<AddressRange>,
    nr_compared: u64,
    nr_shared: u64,
}

fn drafts(
    tasks: &[TaskMemory],
    inheritances: &[Inheritance],
) -> Result<Vec<Draft>, MemoryPlanError> {
    let none_needed = |task: &TaskMemory| vec![false; task.image.vmas().len()];
    let mut needed: Vec<Vec<bool>> = tasks.iter().map(none_needed).collect();
    let mut is_maker = vec![false; tasks.len()];
    for (inheritance, task) in inheritances.iter().zip(tasks) {
        if let Some(maker) = task.maker {
            is_maker[maker] = true;
            for mapping in &inheritance.mappings {
                needed[maker][mapping.parent] = true;
            }
        }
    }
    let mut drafts: Vec<Draft> = Vec::with_capacity(tasks.len());
    for (index, task) in tasks.iter().enumerate() {
        let image = &task.image;
        let mut draft = Draft::default();
        let inheritance = &inheritances[index];
        let maker = task
            .maker
            .map(|maker| (&tasks[maker].image, &drafts[maker], maker));
        draft.dropped.clone_from(&inheritance.dropped);
        if let Some((parent, parent_draft, maker)) = maker {
            let wanted: Vec<AddressRange> = inheritance
                .mappings
                .iter()
                .map(|mapping| image.vmas()[mapping.child].range)
                .collect();
            let had = had_at_fork(parent, parent_draft, &inheritances[maker]);
            draft.unwanted = range::subtract(&had, &range::union(wanted));
        }
        draft.sort_mappings(
            image,
            inheritance,
            &needed[index],
            maker.map(|(parent, draft, _)| (parent, draft)),
            is_maker[index],
        )?;
        if image.vmas().iter().any(|vma| vma.is_ring) {
            draft.taken = had_at_fork(image, &draft, inheritance);
        }
        drafts.push(draft);
    }
    Ok(drafts)
}

/// What a task has mapped when it forks its children.
fn had_at_fork(image: &MemoryImage, draft: &Draft, inheritance: &Inheritance) -> Vec<AddressRange> {
    let inherited = inheritance.mappings.iter().map(|mapping| mapping.child);
    let indices = inherited.chain(draft.early.iter().copied());
    range::union(indices.map(|index| image.vmas()[index].range).collect())
}

impl Draft {
    fn sort_mappings(
        &mut self,
        image: &MemoryImage,
        inheritance: &Inheritance,
        needed: &[bool],
        parent: Option<(&MemoryImage, &Draft)>,
        is_maker: bool,
    ) -> Result<(), MemoryPlanError> {
        let mut inherited = inheritance.mappings.iter().peekable();
        for (index, vma) in image.vmas().iter().enumerate() {
            let from = inherited.next_if(|mapping| mapping.child == index);
            if let (Some(from), Some((parent, parent_draft))) = (from, parent) {
                let prot = parent_draft.prot_while_filled[from.parent];
                self.take_inherited(parent, image, index, prot, is_maker)?;
                continue;
            }
            if vma.is(status::SHSTK) {
                self.take_shadow_stack(image, index);
                continue;
            }
            let pieces = match is_mapped_by_us(vma) {
                true => piece::pieces_in(image.pages(), vma.range),
                false => Vec::new(),
            };
            self.prot_while_filled.push(match pieces.is_empty() {
                true if vma.is(status::AIORING) => aio::PROT_AT_FIRST,
                true => vma.prot,
                false => prot::READ | prot::WRITE,
            });
            let is_early = needed[index];
            if is_mapped_by_us(vma) {
                match is_early {
                    true => self.early.push(index),
                    false => self.late.push(index),
                }
            }
            match is_early {
                true => self.early_pieces.extend(pieces),
                false => self.late_pieces.extend(pieces),
            }
        }
        Ok(())
    }

    /// A shadow stack comes empty; neither the task nor process_vm_writev can write into it.
    fn take_shadow_stack(&mut self, image: &MemoryImage, index: usize) {
        let pieces = piece::pieces_in(image.pages(), image.vmas()[index].range);
        self.shadow_pieces.extend(pieces);
        self.prot_while_filled.push(shadow_stacks::PROT_AT_FIRST);
        self.late.push(index);
    }

    fn take_inherited(
        &mut self,
        parent: &MemoryImage,
        image: &MemoryImage,
        index: usize,
        mut prot_now: u32,
        is_maker: bool,
    ) -> Result<(), MemoryPlanError> {
        let vma = &image.vmas()[index];
        if vma.has_own_pages() {
            let (different, compared) = compare::different_pages(parent, image, vma.range)
                .map_err(|(path, source)| MemoryPlanError::Read { path, source })?;
            let there = piece::nr_pages(&piece::pieces_in(image.pages(), vma.range));
            self.nr_compared += compared;
            self.nr_shared += there - piece::nr_pages(&different);
            if !different.is_empty() && prot_now & prot::WRITE == 0 {
                self.unprotected.push(index);
                prot_now = prot::READ | prot::WRITE;
            }
            // What the task hands on to children of its own has to be right before it forks them.
            match is_maker {
                true => self.early_pieces.extend(different),
                false => self.late_pieces.extend(different),
            }
        }
        self.prot_while_filled.push(prot_now);
        Ok(())
    }

    fn into_plan(
        self,
        image: MemoryImage,
        vdso: VdsoPlan,
        aio: Vec<AioPlan>,
        facts: &FreshFacts,
    ) -> MemoryPlan {
        let total = piece::nr_pages(&self.early_pieces) + piece::nr_pages(&self.late_pieces);
        let is_large = total * range::PAGE_SIZE > MAX_READ_BY_TASK;
        // What the coordinator does not hold no task inherits.
        let is_filled = is_large || !image.pages().holds_files();
        let phase = |mapped: Vec<usize>, pieces: Vec<Piece>| {
            let (read_by_task, filled) = match is_filled {
                true => (Vec::new(), pieces),
                false => (pieces, Vec::new()),
            };
            let vmas = mapped.iter().map(|&index| &image.vmas()[index]);
            Phase {
                fresh: fresh::choose(vmas, &filled, facts),
                mapped,
                read_by_task,
                filled,
            }
        };
        MemoryPlan {
            early: phase(self.early, self.early_pieces),
            late: phase(self.late, self.late_pieces),
            image,
            unwanted: self.unwanted,
            dropped: self.dropped,
            unprotected: self.unprotected,
            governed_by_maker: Vec::new(),
            nodes: Nodes::default(),
            own_modes: SpaceModes::default(),
            prot_while_filled: self.prot_while_filled,
            shadow: self.shadow_pieces,
            taken: self.taken,
            aio,
            vdso,
            nr_compared: self.nr_compared,
            nr_shared: self.nr_shared,
        }
    }
}

/// False for what the kernel maps: vdso, vvar, vsyscall and rings of contexts have their own ways.
fn is_mapped_by_us(vma: &Vma) -> bool {
    let kernel = status::VDSO | status::VVAR | status::VSYSCALL | status::UPROBES | status::AIORING;
    vma.status & kernel == 0
}

impl MemoryPlan {
    /// The images that it follows.
    pub fn image(&self) -> &MemoryImage {
        &self.image
    }

    /// Whether the coordinator has to fill anything before the task forks its children.
    pub fn needs_fill_before_fork(&self) -> bool {
        !self.early.filled.is_empty()
    }

    /// Whether the coordinator has to fill anything after everything is mapped.
    pub fn needs_fill(&self) -> bool {
        !self.late.filled.is_empty()
    }

    /// Whether the coordinator has to fill anything when it traces the task.
    pub fn needs_fill_when_traced(&self) -> bool {
        !self.shadow.is_empty()
    }

    /// What can't be had of NUMA policies here, in words.
    pub fn policy_losses(&self) -> impl Iterator<Item = &'static str> {
        let policies = self.image.policies().iter();
        policies.filter_map(|(_, policy)| policy.loss(&self.nodes))
    }

    /// Number of pages compared with the parent's, and of those that stay shared with it.
    pub fn shared_pages(&self) -> (u64, u64) {
        (self.nr_compared, self.nr_shared)
    }

    /// Number of pages that are read or written.
    pub fn restored_pages(&self) -> u64 {
        let of_phase =
            |phase: &Phase| piece::nr_pages(&phase.read_by_task) + piece::nr_pages(&phase.filled);
        of_phase(&self.early) + of_phase(&self.late) + piece::nr_pages(&self.shadow)
    }

    pub(super) fn vma(&self, index: usize) -> &Vma {
        &self.image.vmas()[index]
    }

    pub(super) fn indices(&self) -> Range<usize> {
        0..self.image.vmas().len()
    }
}
