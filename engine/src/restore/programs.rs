//! The programs of a whole tree: one for every task, thread and helper, in the order that works.
//!
//! ```text
//! every task                                        why there
//! leave rseq, clear the address space (root only)   nothing of this process stays
//! die with the parent until the end                 no orphan survives a failed restore
//! what children inherit copy-on-write               it must be there before they are made
//! children, setsid, children                        sessions are inherited at birth
//! groups                                            leaders first, then those who join
//! memory, vdso, limits of the mm                    before rights and limits go
//! directories, descriptors                          after the last use of an inherited one
//! zombies are dead, helpers are reaped              their SIGCHLD is thrown away next
//! signal actions, limits, threads                   threads need rights, so before credentials
//! each thread: lists, name, seccomp, credentials
//! leader: its io_uring rings                        with its last rights
//! leader: dumpable, wait for release, timers, park  timers late, all signals blocked
//! ```

use std::collections::HashMap;

use firn_sys::{Pid, nr};

use super::RestoreError;
use super::load::{Checkpoint, LivingTask, LoadedTask};
use super::relatives::Relatives;
use super::thread::{self, Inherited};
use super::threads::{LateTimers, Losses};
use crate::files::FileStore;
use crate::memory::{AddressRange, Descriptors, KernelVdso, MemoryPlan, SharedRestore};
use crate::program::{Arg, Data, Program, ProgramId, ProgramSet, Rule, Slot, Word};
use crate::task::lsm::{LabelPlan, Labels};
use crate::task::mempolicy::{self, Nodes};
use crate::task::posix_timers::TimerIds;
use crate::task::relations::{Birth, BirthId, Family, Role};
use crate::task::seccomp::SeccompPlan;

const CLONE_FILES: u64 = 0x400;
pub(super) const CLONE_CHILD_CLEARTID: u64 = 0x20_0000;
/// CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_THREAD and CLONE_SYSVSEM.
pub(super) const CLONE_THREAD: u64 = 0x100 | 0x200 | CLONE_FILES | 0x800 | 0x1_0000 | 0x4_0000;
const P_PID: u32 = 1;
const WEXITED: u32 = 4;
const WNOWAIT: u32 = 0x0100_0000;
pub(super) const WALL: u32 = 0x4000_0000;

/// Words through which programs and coordinator keep step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words {
    /// Group leaders that lead, and tasks that have joined.
    pub led: Word,
    pub joined: Word,
    /// Steps by which orphans come to their parents.
    pub orphaned: Word,
    /// Processes that only wait to be released, and the release.
    pub ready: Word,
    pub release: Word,
    /// Threads that sleep on.
    pub asleep: Word,
    /// Threads that are about to install seccomp filters, and that these are suspended.
    pub guarded: Word,
    pub suspended: Word,
    /// Main threads that are about to exit before their process, and that they have done so.
    pub leaving: Word,
    pub buried: Word,
    /// Tasks that have made all their threads, and that what describes tasks has been opened.
    pub born: Word,
    pub described: Word,
    /// Processes that have made their io_uring rings, and that these are where they were.
    pub rings_made: Word,
    pub rings_turned: Word,
    /// That the shadow stack which the root has inherited is locked, and that it is not any more.
    pub locked: Word,
    pub unlocked: Word,
}

/// Where a task waits for the coordinator to fill its memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meeting {
    /// It is mapped, and it is filled.
    pub mapped: Word,
    pub filled: Word,
    /// The task's userfaultfd to fill it through.
    pub uffd: Option<Slot>,
}

/// Words of one birth.
#[derive(Debug, Clone, Copy)]
pub(super) struct BirthWords {
    /// It runs.
    pub alive: Word,
    /// It has mapped what its children inherit.
    pub early: Meeting,
    /// It has mapped everything.
    pub late: Meeting,
    /// Sharers of its descriptor table that don't need inherited descriptors any more.
    files_done: Word,
    /// Threads whose credentials are set.
    pub threads_done: Word,
    /// The seccomp filters that all threads share are installed.
    pub filtered: Word,
    /// Children that don't die with its main thread any more.
    pub weaned: Word,
    /// It has stopped and gone on again, which its parent has yet to be told.
    pub continued: Word,
}

/// A living process whose program is planned.
#[derive(Clone, Copy)]
pub(super) struct Process<'a> {
    pub id: BirthId,
    /// Its number in the tree.
    pub nth: usize,
    pub task: &'a LivingTask,
    pub memory: &'a MemoryPlan,
    /// Security labels of its first thread.
    pub labels: &'a Labels,
}

/// What the programs are made of.
pub(super) struct Ingredients<'a> {
    pub checkpoint: &'a Checkpoint,
    pub family: &'a Family,
    pub memory: &'a [Option<MemoryPlan>],
    pub kernel_vdso: Option<&'a KernelVdso>,
    pub parked_vdso: u64,
    pub hole: AddressRange,
    pub shared: &'a SharedRestore,
    /// Working and root directory of each task, as descriptors.
    pub directories: &'a [Option<(i32, i32)>],
    pub own: &'a Inherited,
    pub own_limits: &'a firn_proto::TaskRlimitsEntry,
    pub may_raise_limits: bool,
    /// Seccomp of each process that has some.
    pub seccomp: &'a [Option<SeccompPlan>],
    pub timer_ids: TimerIds,
    pub labels: &'a LabelPlan,
    /// NUMA nodes that are here.
    pub nodes: &'a Nodes,
    /// The root directory of the restored tree is this process's, so chroot is not needed.
    pub is_own_root: &'a dyn Fn(i32) -> bool,
}

/// The programs and how to follow them.
#[derive(Debug)]
pub(super) struct Programs {
    pub set: ProgramSet,
    pub words: Words,
    pub births: Vec<BirthWords>,
    /// Program of each birth.
    pub of_birth: Vec<ProgramId>,
    /// Programs of the threads of each task, leader first; empty for zombies.
    pub of_threads: Vec<Vec<ProgramId>>,
    pub losses: Losses,
    pub late_timers: LateTimers,
    /// Where parents of stopped tasks keep the arguments of the call that takes a SIGCHLD.
    pub taking: HashMap<Pid, (ProgramId, Data)>,
    /// The root waits until the locks of its shadow stack are off.
    pub asks_for_unlocking: bool,
}

/// Builds all programs; `files` opens what mappings need.
pub(super) fn build(
    from: &Ingredients<'_>,
    files: &mut FileStore,
) -> Result<Programs, RestoreError> {
    let mut set = ProgramSet::new();
    let words = Words {
        led: set.word(),
        joined: set.word(),
        orphaned: set.word(),
        ready: set.word(),
        release: set.word(),
        asleep: set.word(),
        guarded: set.word(),
        suspended: set.word(),
        leaving: set.word(),
        buried: set.word(),
        born: set.word(),
        described: set.word(),
        rings_made: set.word(),
        rings_turned: set.word(),
        locked: set.word(),
        unlocked: set.word(),
    };
    let births = from
        .family
        .births
        .iter()
        .map(|_| BirthWords {
            alive: set.word(),
            early: Meeting::new(&mut set),
            late: Meeting::new(&mut set),
            files_done: set.word(),
            threads_done: set.word(),
            filtered: set.word(),
            weaned: set.word(),
            continued: set.word(),
        })
        .collect();
    let of_birth = from.family.births.iter().map(|_| set.reserve()).collect();
    let nr_tasks = from.checkpoint.tasks.len();
    let programs = Programs {
        set,
        words,
        births,
        of_birth,
        of_threads: vec![Vec::new(); nr_tasks],
        losses: Losses::default(),
        late_timers: Vec::new(),
        taking: HashMap::new(),
        asks_for_unlocking: from.own.shadow_stack.is_locked_on(),
    };
    let mut builder = Builder {
        from,
        files,
        out: programs,
        relatives: Relatives::of(&from.checkpoint.tree, from.family),
        table_owners: Vec::new(),
        sharers: HashMap::new(),
    };
    builder.assign_tables()?;
    for id in 0..from.family.births.len() {
        let program = builder.birth(id)?;
        let program_id = builder.out.of_birth[id];
        builder.out.set.set(program_id, program);
    }
    builder.files.check_automounts()?;
    Ok(builder.out)
}

impl Meeting {
    fn new(set: &mut ProgramSet) -> Meeting {
        Meeting {
            mapped: set.word(),
            filled: set.word(),
            uffd: None,
        }
    }
}

pub(super) struct Builder<'a> {
    pub(super) from: &'a Ingredients<'a>,
    pub(super) files: &'a mut FileStore,
    pub(super) out: Programs,
    /// Birth that owns the descriptor table of each task, and the table's number.
    pub(super) table_owners: Vec<Option<(BirthId, u32)>>,
    /// Numbers of the tasks that have a table, by its owner.
    sharers: HashMap<BirthId, Vec<usize>>,
    pub(super) relatives: Relatives,
}

impl<'a> Builder<'a> {
    pub(super) fn task(&self, nth: usize) -> &'a LoadedTask {
        &self.from.checkpoint.tasks[nth]
    }

    pub(super) fn descriptors(&mut self) -> Descriptors<'_> {
        Descriptors {
            files: self.files,
            shared: self.from.shared,
        }
    }

    pub(super) fn pid(&self, nth: usize) -> Pid {
        self.from.checkpoint.tree.tasks[nth].pid
    }

    pub(super) fn birth_of(&self, id: BirthId) -> &'a Birth {
        &self.from.family.births[id]
    }

    /// Which task fills each descriptor table: the first of those that share it; the others are made by
    /// it, directly or through one that shares it too.
    fn assign_tables(&mut self) -> Result<(), RestoreError> {
        let family = self.from.family;
        self.table_owners = vec![None; self.from.checkpoint.tasks.len()];
        let mut first: HashMap<u32, usize> = HashMap::new();
        for nth in 0..self.from.checkpoint.tasks.len() {
            let LoadedTask::Living(living) = self.task(nth) else {
                continue;
            };
            let files_id = living.ids.files_id;
            let id = family.of_task(nth);
            let earlier = first.get(&files_id).copied();
            first.entry(files_id).or_insert(nth);
            let owner = match earlier {
                None => id,
                Some(other) => {
                    let maker = family.births[id]
                        .maker
                        .map(|maker| family.births[maker].role);
                    let is_shared_by_maker = matches!(maker, Some(Role::Task(maker))
                        if self.table_owners[maker].is_some_and(|(_, id)| id == files_id));
                    if !is_shared_by_maker {
                        let (pid, with) = (self.pid(nth), self.pid(other));
                        return Err(RestoreError::SharedTable { pid, with });
                    }
                    self.table_owners[other].expect("found above").0
                }
            };
            self.table_owners[nth] = Some((owner, files_id));
            self.sharers.entry(owner).or_default().push(nth);
        }
        Ok(())
    }

    fn birth(&mut self, id: BirthId) -> Result<Program, RestoreError> {
        match self.birth_of(id).role {
            Role::Task(nth) => match self.task(nth) {
                LoadedTask::Living(_) => self.living(id, nth),
                LoadedTask::Dead(_) => Ok(self.dead(id, nth)),
            },
            Role::Leader | Role::Keeper => Ok(self.stand_in(id)),
            Role::Midwife => Ok(self.midwife(id)),
        }
    }

    fn living(&mut self, id: BirthId, nth: usize) -> Result<Program, RestoreError> {
        let from = self.from;
        let LoadedTask::Living(task) = self.task(nth) else {
            unreachable!("a living task")
        };
        let memory = from.memory[nth].as_ref().expect("a living task has memory");
        let words = self.out.births[id];
        let mut p = self.prologue(id);
        let p = &mut p;
        memory.unmap_not_inherited(p);
        let uffd = memory.map_before_fork(p, &mut self.descriptors())?;
        if memory.needs_fill_before_fork() {
            p.post(
                words.early.mapped,
                "saying that what children inherit is mapped",
            );
            p.wait(words.early.filled, 1, "waiting until it is filled");
        }
        memory.settle(p, uffd);
        self.out.births[id].early.uffd = uffd;
        self.make_children(p, id);
        self.plan_groups(p, id);
        // Children have been made, which don't inherit it; memory comes by it.
        if let Some(policy) = thread::mempolicy(&task.cores[0]) {
            mempolicy::plan(p, &policy, self.from.nodes);
        }
        let uffd = memory.map(p, &mut self.descriptors())?;
        memory.place_vdso(p, from.kernel_vdso, from.parked_vdso);
        if memory.needs_fill() {
            p.post(words.late.mapped, "saying that everything is mapped");
            p.wait(words.late.filled, 1, "waiting until it is filled");
        }
        memory.settle(p, uffd);
        self.out.births[id].late.uffd = uffd;
        memory.finish(p, &mut self.descriptors())?;
        self.plan_directories(p, nth, task);
        self.plan_foreground(p, nth);
        self.plan_files(p, id, nth);
        self.plan_stop_and_go(p, id, nth, task);
        self.plan_deaths(p, id, nth);
        self.plan_going_on(p, nth);
        self.plan_process(p, nth, task);
        let labels = self.labels(nth, task, 0)?;
        self.from.labels.plan_own(p, &labels, None);
        let process = Process {
            id,
            nth,
            task,
            memory,
            labels: &labels,
        };
        let threads = self.plan_threads(p, process)?;
        self.plan_late_files(p, id, nth);
        match &task.dead_leader {
            None => self.plan_leader_end(p, process)?,
            Some(leader) => self.plan_exit_of_leader(p, process, leader),
        }
        self.out.of_threads[nth] = threads;
        Ok(std::mem::replace(p, Program::new("")))
    }

    fn plan_directories(&self, p: &mut Program, nth: usize, task: &LivingTask) {
        if let Some((cwd, root)) = self.from.directories[nth] {
            if !(self.from.is_own_root)(root) {
                p.call(
                    nr::FCHDIR,
                    &[root.into()],
                    Rule::Ok,
                    "entering the root directory",
                );
                let here = p.string(b".");
                p.call(
                    nr::CHROOT,
                    &[here.into()],
                    Rule::Ok,
                    "changing the root directory",
                );
            }
            p.call(
                nr::FCHDIR,
                &[cwd.into()],
                Rule::Ok,
                "entering the working directory",
            );
        }
        if let Some(umask) = task.fs.umask {
            p.call(nr::UMASK, &[umask.into()], Rule::Ok, "setting the umask");
        }
    }

    /// The groups of a session must be there before one of them can be in the foreground.
    fn plan_foreground(&self, p: &mut Program, nth: usize) {
        if self.files.leads_terminal(self.pid(nth)) {
            let why = "waiting for all process groups";
            p.wait(self.out.words.led, self.relatives.nr_leaders, why);
            self.files.plan_foreground(self.pid(nth), p);
        }
    }

    /// The owner of a table fills it when nobody needs the inherited descriptors any more.
    fn plan_files(&self, p: &mut Program, id: BirthId, nth: usize) {
        let Some((owner, files_id)) = self.table_owners[nth] else {
            return;
        };
        let done = self.out.births[owner].files_done;
        if owner != id {
            p.post(done, "saying that it needs no inherited descriptor");
            return;
        }
        let sharers = self.sharers[&id].len();
        if sharers > 1 {
            p.wait(
                done,
                count(sharers - 1),
                "waiting for those who share the descriptors",
            );
        }
        self.files.plan_table(files_id, p);
    }

    /// Files that describe tasks come when all tasks are there, and only then all targets of epoll sets.
    fn plan_late_files(&mut self, p: &mut Program, id: BirthId, nth: usize) {
        if self.files.has_late() {
            p.post(self.out.words.born, "saying that its threads are there");
        }
        let Some((owner, files_id)) = self.table_owners[nth] else {
            return;
        };
        if owner != id {
            return;
        }
        if self.files.has_late() {
            let why = "waiting until what describes tasks is open";
            p.wait(self.out.words.described, 1, why);
            self.files.plan_late(files_id, p);
        }
        let pgid = self.from.checkpoint.tree.tasks[nth].pgid;
        self.files.plan_automounts(pgid, files_id, p);
        // What is watched must be there.
        if !self.files.makes_rings(self.pid(nth)) {
            self.files.plan_watches(files_id, p);
        }
        // POSIX locks belong to the table, so whoever shares it has set them as well.
        for sharer in &self.sharers[&id] {
            self.files.plan_locks(self.pid(*sharer), p);
        }
    }

    /// Zombies have died and helpers are reaped, before their SIGCHLD is forgotten.
    fn plan_deaths(&self, p: &mut Program, id: BirthId, nth: usize) {
        self.plan_adoptions(p, id);
        let tasks = &self.from.checkpoint.tree.tasks;
        let children = self.relatives.children(self.pid(nth)).iter();
        for &child in children {
            let task = &tasks[child];
            if !task.is_alive() {
                // Somebody else may make it.
                let born = self.out.births[self.from.family.of_task(child)].alive;
                p.wait(born, 1, "waiting for a child that is to die");
                let options = WEXITED | WNOWAIT | WALL;
                let args: [Arg; 5] = [
                    P_PID.into(),
                    task.pid.to_image().into(),
                    0.into(),
                    options.into(),
                    0.into(),
                ];
                let why = format!("waiting for the death of task {}", task.pid);
                p.call_retrying(nr::WAITID, &args, Rule::Ok, why);
            }
        }
        self.plan_reaping(p, id);
    }
}

pub(super) fn count(nr: usize) -> u32 {
    u32::try_from(nr).expect("fewer than 2^32 tasks")
}
