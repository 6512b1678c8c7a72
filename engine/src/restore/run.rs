//! Running the programs: the root is forked, everything else follows from the records.
//!
//! [`NewTree`] is the undo guard of a restore: dropped before it is released, it kills whatever lives.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use firn_sys::clone3::{ProgramEntry, spawn_program};
use firn_sys::session::AdoptOrphans;
use firn_sys::uffd::Uffd;
use firn_sys::wait::Status as WaitStatus;
use firn_sys::{Errno, Pid, ptrace, shadow_stack, task as sys_task, wait};

use super::RestoreError;
use super::load::Checkpoint;
use super::programs::Programs;
use crate::cancel::CancelFlag;
use crate::files::FileStore;
use crate::freeze;
use crate::memory::{Filling, MemoryPlan, PageFill, Way, When, fill};
use crate::program::{Arena, Slot, WaitOutcome, Word};
use crate::task::relations::{BirthId, Family, Role};
use crate::task::status::Stat;
use crate::tree::Task;

/// How long the tasks may be without any progress.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long killed tasks may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
const CLONE_PARENT: u64 = 0x8000;
const SIGCHLD: i32 = 17;
const SIGKILL: i32 = 9;
/// How finished threads are seized: they die with the coordinator.
pub(super) const SEIZE_OPTIONS: u32 = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL;
/// Ticks of the arena's liveness interval between looks at all tasks.
const TICKS_BETWEEN_LOOKS: u32 = 20;

/// A tree under construction.
pub(super) struct NewTree<'a> {
    pub programs: &'a Programs,
    pub arena: &'a Arena,
    pub checkpoint: &'a Checkpoint,
    pub family: &'a Family,
    /// Which tasks have seccomp filters.
    pub guarded: &'a [bool],
    pub cancel: &'a CancelFlag,
    root: Pid,
    sibling: bool,
    released: bool,
    /// What is killed after a failure comes to this process, which reaps it, so that no pid stays taken.
    _orphans: Option<AdoptOrphans>,
}

impl<'a> NewTree<'a> {
    /// Forks the root, which begins with its program at once.
    pub fn spawn(
        programs: &'a Programs,
        arena: &'a Arena,
        checkpoint: &'a Checkpoint,
        family: &'a Family,
        guarded: &'a [bool],
        cancel: &'a CancelFlag,
        sibling: bool,
    ) -> Result<NewTree<'a>, RestoreError> {
        let pid = checkpoint.tree.root().pid;
        let (record, context) = arena.entry(programs.of_birth[0]);
        let entry = ProgramEntry {
            executor: arena.placed().base(),
            record,
            context,
        };
        let flags = if sibling { CLONE_PARENT } else { 0 };
        let exit_signal = if sibling { 0 } else { SIGCHLD };
        let orphans = AdoptOrphans::begin().ok();
        // SAFETY: the arena is mapped shared here and holds the executor and the program, whose first
        // records give up the rseq area and the memory of this process.
        let spawned = unsafe { spawn_program(flags, exit_signal, Some(pid), entry) };
        match spawned {
            Ok(_) => {}
            Err(Errno::EEXIST) => {
                return Err(RestoreError::PidTaken {
                    pid,
                    by: super::pids::who_has(pid),
                });
            }
            Err(source) => return Err(RestoreError::Spawn { pid, source }),
        }
        Ok(NewTree {
            programs,
            arena,
            checkpoint,
            family,
            guarded,
            cancel,
            root: pid,
            sibling,
            released: false,
            _orphans: orphans,
        })
    }

    /// The root task.
    pub fn root(&self) -> Pid {
        self.root
    }

    /// Ends the guard: the tree lives on.
    pub fn keep(mut self) {
        self.released = true;
    }

    /// Fills memory whenever a task has mapped it and opens the files that describe tasks, until all
    /// tasks are complete and only wait to be released.
    pub fn build(
        &self,
        memory: &[Option<MemoryPlan>],
        how: &PageFill<'_>,
        mut told: impl FnMut(u64),
        files: &mut FileStore,
    ) -> Result<(), RestoreError> {
        self.unlock_shadow_stack()?;
        let mut early = Vec::new();
        let mut late = Vec::new();
        for (id, birth) in self.family.births.iter().enumerate() {
            let Role::Task(nth) = birth.role else {
                continue;
            };
            let Some(plan) = &memory[nth] else { continue };
            let pid = self.checkpoint.tree.tasks[nth].pid;
            if plan.needs_fill_before_fork() {
                early.push((id, self.programs.births[id].early, pid, plan));
            }
            if plan.needs_fill() {
                late.push((id, self.programs.births[id].late, pid, plan));
            }
        }
        for (work, when) in [(early, When::BeforeFork), (late, When::Mapped)] {
            for (id, meeting, pid, plan) in work {
                self.wait(meeting.mapped, 1)?;
                let way = match meeting.uffd {
                    Some(slot) => Way::Fresh(self.uffd(id, pid, slot)?),
                    None => Way::Written,
                };
                fill(&[Filling { pid, plan, way }], when, how)?;
                told(how.written.load(std::sync::atomic::Ordering::Relaxed));
                self.arena.post(meeting.filled);
            }
        }
        self.describe(files)?;
        self.suspend_seccomp()?;
        self.bury_leaders()?;
        self.turn_rings(files)?;
        let living = self.checkpoint.tree.alive().count();
        self.wait(
            self.programs.words.ready,
            u32::try_from(living).unwrap_or(u32::MAX),
        )
    }

    /// Takes the locks off the shadow stack that the root has inherited of this process, so that it can
    /// leave it: only a tracer may.
    fn unlock_shadow_stack(&self) -> Result<(), RestoreError> {
        if !self.programs.asks_for_unlocking {
            return Ok(());
        }
        let (root, words) = (self.root, self.programs.words);
        let failed = |source| RestoreError::Trace {
            tid: root,
            what: "unlock the shadow stack",
            source,
        };
        self.wait(words.locked, 1)?;
        ptrace::seize(root, SEIZE_OPTIONS).map_err(failed)?;
        ptrace::interrupt(root).map_err(failed)?;
        if !matches!(wait::wait(root), Ok(WaitStatus::Stopped { .. })) {
            return Err(RestoreError::Died(root));
        }
        shadow_stack::unlock(root).map_err(failed)?;
        ptrace::detach(root, 0).map_err(failed)?;
        self.arena.post(words.unlocked);
        Ok(())
    }

    /// The userfaultfd that a task has opened.
    fn uffd(&self, id: BirthId, pid: Pid, slot: Slot) -> Result<Uffd, RestoreError> {
        let fd = self.arena.slot(self.programs.of_birth[id], slot);
        let fd = i32::try_from(fd).map_err(|_| Errno::EBADF);
        fd.and_then(|fd| Uffd::of_task(pid, fd))
            .map_err(|source| RestoreError::Uffd { pid, source })
    }

    /// Traces all threads that are about to install filters, which suspends these until the end.
    fn suspend_seccomp(&self) -> Result<(), RestoreError> {
        let tasks = self.checkpoint.tree.tasks.iter().zip(self.guarded);
        let guarded = tasks.filter(|(_, guarded)| **guarded);
        let tids: Vec<Pid> = guarded.flat_map(|(task, _)| task.threads.clone()).collect();
        if tids.is_empty() {
            return Ok(());
        }
        let nr_threads = u32::try_from(tids.len()).unwrap_or(u32::MAX);
        self.wait(self.programs.words.guarded, nr_threads)?;
        for tid in tids {
            ptrace::seize(tid, SEIZE_OPTIONS | ptrace::O_SUSPEND_SECCOMP)
                .map_err(|source| RestoreError::SuspendSeccomp { tid, source })?;
        }
        self.arena.post(self.programs.words.suspended);
        Ok(())
    }

    /// Waits until the main threads that are to be dead have exited: only then all that depends on them is
    /// settled, such as whose children theirs are.
    fn bury_leaders(&self) -> Result<(), RestoreError> {
        let tasks = &self.checkpoint.tree.tasks;
        let dead: Vec<Pid> = (tasks.iter().filter(|task| !task.has_leader()))
            .map(|task| task.pid)
            .collect();
        if dead.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(dead.len()).unwrap_or(u32::MAX);
        self.wait(self.programs.words.leaving, count)?;
        let begun = Instant::now();
        while !dead.iter().all(|pid| is_zombie(*pid)) {
            if begun.elapsed() > PATIENCE {
                return Err(RestoreError::Stuck(self.positions()));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        self.arena.post(self.programs.words.buried);
        Ok(())
    }

    /// Opens the files that describe tasks, once all of these are there.
    fn describe(&self, files: &mut FileStore) -> Result<(), RestoreError> {
        if !files.has_late() {
            return Ok(());
        }
        let tasks = &self.checkpoint.tree.tasks;
        let count = u32::try_from(tasks.len()).unwrap_or(u32::MAX);
        self.wait(self.programs.words.born, count)?;
        let tids = tasks.iter().flat_map(Task::tids);
        files.open_late(&tids.collect())?;
        self.arena.post(self.programs.words.described);
        Ok(())
    }

    /// Brings the io_uring rings that processes make to where they were.
    fn turn_rings(&self, files: &FileStore) -> Result<(), RestoreError> {
        let makers = files.nr_ring_makers();
        if makers > 0 {
            self.wait(self.programs.words.rings_made, makers)?;
            files.turn_own_rings()?;
            self.arena.post(self.programs.words.rings_turned);
        }
        Ok(())
    }

    /// Sleeps until a word of the arena has that value.
    pub fn wait(&self, word: Word, value: u32) -> Result<(), RestoreError> {
        let mut watch = Watch::new(self);
        let outcome = self
            .arena
            .wait(&self.programs.set, word, value, PATIENCE, || watch.look());
        self.outcome(outcome)
    }

    /// Sleeps until that many programs have parked.
    pub fn wait_parked(&self, value: u32) -> Result<(), RestoreError> {
        let mut watch = Watch::new(self);
        let outcome = self
            .arena
            .wait_parked(&self.programs.set, value, PATIENCE, || watch.look());
        self.outcome(outcome)
    }

    fn outcome(&self, outcome: WaitOutcome<RestoreError>) -> Result<(), RestoreError> {
        match outcome {
            WaitOutcome::Reached => Ok(()),
            WaitOutcome::Failed(failure) => Err(failure.into()),
            WaitOutcome::Dead(error) => Err(error),
            WaitOutcome::TimedOut => Err(RestoreError::Stuck(self.positions())),
        }
    }

    /// Where each task hangs, for the message of a restore that got stuck.
    fn positions(&self) -> String {
        let waiting: Vec<String> = self
            .checkpoint
            .tree
            .alive()
            .map(|task| {
                let call = std::fs::read_to_string(format!("/proc/{}/syscall", task.pid));
                format!("task {} in {}", task.pid, call.unwrap_or_default().trim())
            })
            .collect();
        waiting.join("; ")
    }

    /// Kills everything that was born, and waits until it is gone.
    fn kill(&self) {
        let deadline = Instant::now() + KILL_PATIENCE;
        let mut ours = HashSet::new();
        let mut ended = HashSet::new();
        let mut calm = 0;
        loop {
            let mut left = false;
            for (id, birth) in self.family.births.iter().enumerate() {
                let Some(pid) = birth.pid else { continue };
                if ended.contains(&pid) || !(ours.contains(&pid) || self.is_ours(id, pid)) {
                    continue;
                }
                ours.insert(pid);
                let _ = sys_task::kill(pid, SIGKILL);
                self.reap_threads(birth.role);
                let is_others_child = pid == self.root && self.sibling;
                if reap(pid) || is_others_child {
                    ended.insert(pid);
                } else {
                    left = true;
                }
            }
            // One that was forked while the others were killed is there by the second look.
            calm = if left { 0 } else { calm + 1 };
            if calm == 2 {
                return;
            }
            if Instant::now() > deadline {
                tracing::warn!("tasks of the failed restore have been killed and do not go");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl NewTree<'_> {
    /// Lets dead threads go that were seized already: their leader is not reaped before.
    fn reap_threads(&self, role: Role) {
        if let Role::Task(nth) = role {
            let task = &self.checkpoint.tree.tasks[nth];
            for tid in task.threads.iter().filter(|tid| **tid != task.pid) {
                let _ = wait::try_wait(*tid);
            }
        }
    }

    /// Whether the process with the pid of a birth is that birth and not somebody else's. A newborn task
    /// has not said so yet, but it has the arena, where its parent had it.
    fn is_ours(&self, id: usize, pid: Pid) -> bool {
        pid == self.root
            || self.arena.load(self.programs.births[id].alive) > 0
            || has_mapping_at(pid, self.arena.placed().base())
    }
}

/// Whether a mapping of the process begins at the address.
fn has_mapping_at(pid: Pid, address: u64) -> bool {
    let maps = firn_sys::procfs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let start = format!("{address:x}-");
    maps.lines().any(|line| line.starts_with(&start))
}

impl Drop for NewTree<'_> {
    fn drop(&mut self) {
        if !self.released {
            self.kill();
        }
    }
}

/// Reaps what is a child or tracee of ours; true when the process is gone.
fn reap(pid: Pid) -> bool {
    loop {
        match wait::try_wait(pid) {
            Ok(Some(WaitStatus::Ended(_))) => return true,
            Ok(Some(_)) => {}
            Ok(None) => return false,
            // Not ours to wait for yet: its parent lives, or it was restored as our sibling.
            Err(_) => return !std::fs::exists(format!("/proc/{pid}")).unwrap_or(false),
        }
    }
}

/// Looks whether the tasks still live while their words are waited for.
struct Watch<'a> {
    tree: &'a NewTree<'a>,
    ticks: u32,
}

impl<'a> Watch<'a> {
    fn new(tree: &'a NewTree<'a>) -> Watch<'a> {
        Watch { tree, ticks: 0 }
    }

    fn look(&mut self) -> Result<(), RestoreError> {
        let tree = self.tree;
        if tree.cancel.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        if let Ok(Some(WaitStatus::Ended(_))) = wait::try_wait(tree.root) {
            return Err(RestoreError::Died(tree.root));
        }
        self.ticks += 1;
        if self.ticks.is_multiple_of(TICKS_BETWEEN_LOOKS) {
            for (id, birth) in tree.family.births.iter().enumerate() {
                let Role::Task(nth) = birth.role else {
                    continue;
                };
                let task = &tree.checkpoint.tree.tasks[nth];
                let born = tree.arena.load(tree.programs.births[id].alive) > 0;
                if born && task.is_alive() && is_dead(task) {
                    return Err(RestoreError::Died(task.pid));
                }
            }
        }
        Ok(())
    }
}

/// Whether a task that is to live has died; the main thread of some is a zombie on purpose.
fn is_dead(task: &Task) -> bool {
    let speaker = match task.has_leader() {
        true => task.pid,
        false => freeze::speaker(task.pid),
    };
    is_zombie(speaker)
}

pub(super) fn is_zombie(pid: Pid) -> bool {
    Stat::read(pid).map_or(true, |stat| matches!(stat.state, b'Z' | b'X'))
}

/// How memory is filled.
pub(super) fn page_fill<'a>(written: &'a AtomicU64, cancel: &'a CancelFlag) -> PageFill<'a> {
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(4);
    PageFill {
        written,
        cancel,
        workers,
    }
}
