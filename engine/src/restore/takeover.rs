//! From parked programs to running tasks: ptrace sets everything that a program can't set about itself.
//!
//! ```text
//! seize leaders         from here on they die with the coordinator (EXITKILL)
//! release               leaders trade their death-with-parent for the dumped one, and park
//! seize and interrupt   every thread
//! stop                  what was stopped, and settle what its parent knows of it
//! unmap the arena       one call by each leader, through the executor's own instruction
//! shadow stacks         their contents, which only a tracer may write
//! registers, masks      as dumped; a thread that sleeps on keeps the kernel's restart code (`calls.rs`)
//! release               they no longer die with the coordinator
//! let go
//! ```

use std::time::Duration;

use firn_proto::CoreEntry;
use firn_sys::deputy::Deputy;
use firn_sys::ptrace::{self, DispatchConfig};
use firn_sys::wait::Status as WaitStatus;
use firn_sys::{Errno, Pid, task as sys_task, wait};

use super::RestoreError;
use super::deputy::{ALL_LIVE, LETTING_GO};
use super::load::{LivingTask, LoadedTask};
use super::run::{NewTree, SEIZE_OPTIONS};
use super::{calls, thread};
use crate::arch::restart::{self, Resumption};
use crate::arch::{self, Abi, XsaveLayout};
use crate::crew;
use crate::inject::{CallSpec, RemoteCall, call_all};
use crate::memory::{AddressRange, Filling, MemoryPlan, PageFill, Way, When, fill};
use crate::program::ProgramId;
use crate::task::{ia32, shadow_stack};
use crate::tree::{Task, TaskState};

pub(super) const SIGSTOP: i32 = 19;
/// Threads of one task whose registers are worth a thread of their own to lay them out.
const THREADS_PER_THREAD: usize = 64;
/// Tries to find a thread in the call that it is just about to make.
const MAX_TRIES: u32 = 10_000;

/// All threads of a finished tree, stopped and complete; they run when this is let go.
pub(super) struct TakenOver<'a> {
    pub(super) tree: NewTree<'a>,
    threads: Vec<Pid>,
}

/// Threads of a tree that lives on whatever happens; they stand still until this is let go.
#[must_use = "the tree stands still"]
pub(super) struct Released {
    threads: Vec<Pid>,
}

/// Extended state of a thread, ready for ptrace.
pub(super) type XstateOf = Vec<Vec<Vec<u8>>>;

/// What the coordinator brings to the stopped tree.
pub(super) struct Contents<'a> {
    pub xstate: &'a XstateOf,
    /// Of each task; None for zombies.
    pub memory: &'a [Option<MemoryPlan>],
    pub how: &'a PageFill<'a>,
}

/// Lays out the extended state of all threads for this CPU; the check whether it can run them.
pub(super) fn prepare_xstate(
    tasks: &[LoadedTask],
    tree: &crate::tree::Tree,
) -> Result<XstateOf, RestoreError> {
    check_shadow_stacks(tasks, tree)?;
    let layout = XsaveLayout::of_this_cpu();
    let prepare = |(tid, core): &(Pid, &CoreEntry)| {
        let info = core.thread_info.as_ref().expect("checked while loading");
        layout
            .from_image(&info.fpregs)
            .map_err(|source| RestoreError::Cpu { tid: *tid, source })
    };
    let of_task = |(loaded, task): (&LoadedTask, &Task)| match loaded {
        LoadedTask::Dead(_) => Ok(Vec::new()),
        LoadedTask::Living(living) => {
            let threads = task.threads.iter().copied().zip(&living.cores);
            let threads: Vec<(Pid, &CoreEntry)> = threads.collect();
            let prepared = crew::share_out(&threads, THREADS_PER_THREAD, prepare);
            prepared.into_iter().collect()
        }
    };
    tasks.iter().zip(&tree.tasks).map(of_task).collect()
}

/// Looks whether there are shadow stacks here, where a thread needs one.
fn check_shadow_stacks(tasks: &[LoadedTask], tree: &crate::tree::Tree) -> Result<(), RestoreError> {
    let mut is_there = false;
    for (loaded, task) in tasks.iter().zip(&tree.tasks) {
        let LoadedTask::Living(living) = loaded else {
            continue;
        };
        for (tid, core) in task.threads.iter().zip(&living.cores) {
            if let Some(what) = shadow_stack::problem(core) {
                return Err(RestoreError::CoreImage { tid: *tid, what });
            }
            if !is_there && shadow_stack::of_image(core).is_some() {
                firn_sys::shadow_stack::probe()
                    .map_err(|source| RestoreError::NoShadowStack { tid: *tid, source })?;
                is_there = true;
            }
        }
    }
    Ok(())
}

/// Takes the parked tree over.
pub(super) fn take_over<'a>(
    tree: NewTree<'a>,
    hole: AddressRange,
    contents: &Contents<'_>,
    nr_sleepers: u32,
) -> Result<TakenOver<'a>, RestoreError> {
    let nr_threads = tree.checkpoint.tree.nr_threads();
    let mut taken = TakenOver {
        tree,
        threads: Vec::with_capacity(nr_threads),
    };
    let tree = &taken.tree;
    let is_new = |nth: usize| !tree.guarded[nth];
    for (nth, task) in living_tasks(tree) {
        if is_new(nth) {
            let speaker = task.speaker();
            ptrace::seize(speaker, SEIZE_OPTIONS)
                .map_err(failed(speaker, "seize the main thread"))?;
        }
        taken.threads.push(task.speaker());
    }
    for (program, late) in &tree.programs.late_timers {
        tree.arena.write(*program, late.setting, &late.bytes());
    }
    tree.arena.post(tree.programs.words.release);
    tree.wait(tree.programs.words.asleep, nr_sleepers)?;
    taken.await_parked(u32::try_from(nr_threads).unwrap_or(u32::MAX) - nr_sleepers)?;
    for (nth, task) in living_tasks(tree) {
        for &tid in &task.threads[1..] {
            if is_new(nth) {
                ptrace::seize(tid, SEIZE_OPTIONS).map_err(failed(tid, "seize the thread"))?;
            }
            taken.threads.push(tid);
        }
    }
    taken.stop_all()?;
    taken.stop_groups()?;
    taken.unmap_arenas(hole)?;
    taken.fill_shadow_stacks(contents)?;
    taken.set_registers(contents.xstate)?;
    Ok(taken)
}

fn living_tasks<'a>(tree: &NewTree<'a>) -> impl Iterator<Item = (usize, &'a Task)> {
    let tasks = tree.checkpoint.tree.tasks.iter().enumerate();
    tasks.filter(|(_, task)| task.is_alive())
}

pub(super) fn failed(tid: Pid, what: &'static str) -> impl Fn(Errno) -> RestoreError {
    move |source| match source {
        Errno::ESRCH => RestoreError::Died(tid),
        source => RestoreError::Trace { tid, what, source },
    }
}

impl TakenOver<'_> {
    /// The living tasks with their images and number in the tree.
    pub(super) fn living(&self) -> impl Iterator<Item = (usize, &Task, &LivingTask)> {
        let checkpoint = self.tree.checkpoint;
        checkpoint
            .tree
            .tasks
            .iter()
            .zip(&checkpoint.tasks)
            .enumerate()
            .filter_map(|(nth, (task, loaded))| match loaded {
                LoadedTask::Living(living) => Some((nth, task, &**living)),
                LoadedTask::Dead(_) => None,
            })
    }

    /// Native threads that sleep on, with their programs.
    fn sleepers(&self) -> impl Iterator<Item = (Pid, ProgramId)> {
        self.living().flat_map(|(nth, task, living)| {
            let programs = &self.tree.programs.of_threads[nth];
            let threads = task.threads.iter().zip(&living.cores).zip(programs);
            let asleep =
                threads.filter(|((_, core), _)| sleeps(core) && thread::abi(core) == Abi::Native);
            asleep.map(|((tid, _), program)| (*tid, *program))
        })
    }

    /// Waits until that many threads that don't sleep on have parked. A thread whose sleep has ended parks as
    /// well and is counted, so it must not stand for one that is still busy: a leader, for example, that
    /// would die with its maker, which it has not parted from yet.
    fn await_parked(&self, wanted: u32) -> Result<(), RestoreError> {
        let mut awake = 0;
        loop {
            self.tree.wait_parked(wanted + awake)?;
            let is_parked = |&(_, program): &(Pid, ProgramId)| self.tree.arena.is_parked(program);
            let now = u32::try_from(self.sleepers().filter(is_parked).count()).unwrap_or(u32::MAX);
            if now <= awake {
                return Ok(());
            }
            awake = now;
        }
    }

    fn stop_all(&self) -> Result<(), RestoreError> {
        for tid in &self.threads {
            ptrace::interrupt(*tid).map_err(failed(*tid, "interrupt the thread"))?;
        }
        for tid in &self.threads {
            self.await_stop(*tid)?;
        }
        Ok(())
    }

    pub(super) fn await_stop(&self, tid: Pid) -> Result<(), RestoreError> {
        match wait::wait(tid).map_err(failed(tid, "wait for the thread"))? {
            WaitStatus::Stopped { .. } => Ok(()),
            WaitStatus::Ended(_) | WaitStatus::Continued => Err(RestoreError::Died(tid)),
        }
    }

    /// Each leader unmaps the arena by the executor's own `syscall`; it never returns to what is gone,
    /// because its registers are set at the call's exit stop.
    fn unmap_arenas(&self, hole: AddressRange) -> Result<(), RestoreError> {
        self.settle_sleepers()?;
        let instruction = self.tree.arena.placed().base() + arch::executor_syscall_offset();
        let mut calls = Vec::new();
        for (_, task, _) in self.living() {
            let speaker = task.speaker();
            let regs =
                ptrace::general_regs(speaker).map_err(failed(speaker, "read the registers"))?;
            let munmap = CallSpec::unmap(Abi::Native, hole.start, hole.len());
            calls.push(RemoteCall::new(speaker, regs, instruction, munmap));
        }
        call_all(&mut calls)?;
        for call in &calls {
            call.result()
                .map_err(failed(call.tid(), "unmap the arena"))?;
        }
        Ok(())
    }

    /// Makes sure that every thread that sleeps on has really gone to sleep, or has finished.
    fn settle_sleepers(&self) -> Result<(), RestoreError> {
        for (tid, program) in self.sleepers() {
            self.settle(tid, || self.tree.arena.is_parked(program))?;
        }
        Ok(())
    }

    fn settle(&self, tid: Pid, is_parked: impl Fn() -> bool) -> Result<(), RestoreError> {
        for _ in 0..MAX_TRIES {
            let regs = ptrace::general_regs(tid).map_err(failed(tid, "read the registers"))?;
            if restart::is_asleep(&regs) || is_parked() {
                return Ok(());
            }
            ptrace::cont(tid, 0).map_err(failed(tid, "resume the thread"))?;
            std::thread::sleep(Duration::from_micros(50));
            ptrace::interrupt(tid).map_err(failed(tid, "interrupt the thread"))?;
            self.await_stop(tid)?;
        }
        Err(RestoreError::Stuck(format!(
            "thread {tid} does not fall asleep"
        )))
    }

    fn fill_shadow_stacks(&self, contents: &Contents<'_>) -> Result<(), RestoreError> {
        // Some kernels let nobody but the thread that traces write them.
        let how = PageFill {
            workers: 1,
            ..*contents.how
        };
        for (nth, task, _) in self.living() {
            let plan = contents.memory[nth].as_ref();
            if let Some(plan) = plan.filter(|plan| plan.needs_fill_when_traced()) {
                let pid = task.speaker();
                let way = Way::traced(pid).map_err(failed(pid, "open the memory"))?;
                fill(&[Filling { pid, plan, way }], When::Traced, &how)?;
            }
        }
        Ok(())
    }

    fn set_registers(&self, xstate: &XstateOf) -> Result<(), RestoreError> {
        for (nth, task, living) in self.living() {
            for (at, (tid, core)) in task.threads.iter().zip(&living.cores).enumerate() {
                let program = self.tree.programs.of_threads[nth][at];
                // Before a call is made: it says which protection keys the kernel may use for it.
                ptrace::set_xstate(*tid, &xstate[nth][at])
                    .map_err(failed(*tid, "set the extended state"))?;
                let has_slept = self.tree.arena.is_parked(program);
                let regs = calls::go_back(*tid, core, has_slept)?;
                ptrace::set_general_regs(*tid, &regs).map_err(failed(*tid, "set the registers"))?;
                let info = core.thread_info.as_ref().expect("checked while loading");
                ia32::set_segments(*tid, info)
                    .map_err(failed(*tid, "set the thread-local segments"))?;
                shadow_stack::set_pointer(*tid, core)
                    .map_err(failed(*tid, "set the shadow stack pointer"))?;
                ptrace::set_signal_mask(*tid, mask_of(living, core))
                    .map_err(failed(*tid, "set the signal mask"))?;
                set_dispatch(*tid, core)?;
            }
        }
        Ok(())
    }

    /// Number of threads that are held.
    pub(super) fn nr_threads(&self) -> usize {
        self.threads.len()
    }

    /// Ends the hold of the coordinator's life on the tree's: if it dies now, the tasks run. The deputy sees to it
    /// that they do all or none.
    pub fn release(self, leave_stopped: bool, deputy: Option<&Deputy>) -> Released {
        for (_, task, _) in self.living() {
            if leave_stopped && !matches!(task.state, TaskState::Stopped(_)) {
                // Pending before the first instruction.
                let _ = sys_task::kill(task.pid, SIGSTOP);
            }
        }
        let note = |note| deputy.map_or((), |deputy| deputy.note(note));
        note(LETTING_GO);
        for tid in &self.threads {
            let _ = ptrace::set_options(*tid, 0);
        }
        note(ALL_LIVE);
        self.tree.keep();
        Released {
            threads: self.threads,
        }
    }
}

impl Released {
    /// Lets the tree run, or stop where it was told to.
    pub fn let_go(self) {
        for tid in self.threads {
            let _ = ptrace::detach(tid, 0);
        }
    }
}

/// Whether the thread was stopped in a sleep that goes on.
fn sleeps(core: &CoreEntry) -> bool {
    matches!(thread::resumption(core), Resumption::Sleep { .. })
}

/// Syscall user dispatch comes last: it would take the program's own calls away.
fn set_dispatch(tid: Pid, core: &CoreEntry) -> Result<(), RestoreError> {
    let extension = thread::part(core).firn.as_ref();
    let Some(dispatch) = extension.and_then(|extension| extension.dispatch.as_ref()) else {
        return Ok(());
    };
    let config = DispatchConfig {
        mode: dispatch.mode,
        selector: dispatch.selector,
        offset: dispatch.offset,
        len: dispatch.len,
    };
    ptrace::set_syscall_dispatch(tid, config).map_err(failed(tid, "set the syscall user dispatch"))
}

fn mask_of(living: &LivingTask, core: &CoreEntry) -> u64 {
    thread::part(core)
        .blk_sigset
        .unwrap_or(living.process().blk_sigset)
}
