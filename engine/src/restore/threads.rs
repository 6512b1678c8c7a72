//! The second half of every living task's program: what belongs to the process, and its threads. How the
//! program of a leader ends stands in `leader.rs`.
//!
//! ```text
//! signal actions, limits, modes              need rights, and no thread there yet
//! ids of POSIX timers become a choice
//! threads
//! each thread: its timers, its pending signals, tail, credentials
//! leader: the same, and pending signals of the process
//! seccomp, in each tail before credentials   when the coordinator has suspended it
//! release
//! timers start, all signals blocked
//! ```

use firn_proto::{CoreEntry, PosixTimerEntry, SignalQueueEntry};
use firn_sys::Pid;

use super::RestoreError;
use super::load::{Checkpoint, LivingTask, LoadedTask};
use super::programs::{Builder, CLONE_CHILD_CLEARTID, CLONE_THREAD, Process, count};
use super::thread;
use crate::arch::Abi;
use crate::arch::restart::Resumption;
use crate::program::{CloneSpec, Program, ProgramId};
use crate::task::lsm::Labels;
use crate::task::mempolicy::{self, Policy};
use crate::task::posix_timers::{self, LateStart, TimerIds};
use crate::task::relations::BirthId;
use crate::task::{attributes, limits, modes, semaphores, shadow_stack, signals};

impl Builder<'_> {
    /// What belongs to the whole process and needs the rights it starts with.
    pub(super) fn plan_process(&mut self, p: &mut Program, nth: usize, task: &LivingTask) {
        let process = task.process();
        signals::plan_forget_sigchld(p);
        let abi = self.from.checkpoint.tree.tasks[nth].abi;
        signals::plan_actions(p, &process.sigactions, self.from.own.ignored_signals, abi);
        attributes::plan_personality(p, process.personality, self.from.own.personality);
        if process.child_subreaper == Some(true) {
            // Before, it would take those that are to come to a task above it.
            self.wait_for_orphans(p, self.from.family.orphan_steps);
            attributes::plan_subreaper(p, true);
        }
        attributes::plan_membarrier(p, process.membarrier_registration_mask.unwrap_or(0));
        if let Some(extension) = &process.firn {
            modes::plan_process(p, extension);
            attributes::plan_lock_future(p, extension.lock_future.unwrap_or(0));
            semaphores::plan(p, &extension.semaphores);
        }
        if let Some(wanted) = &process.rlimits {
            let raise = self.from.may_raise_limits;
            for said in limits::plan(p, wanted, self.from.own_limits, raise) {
                self.out.losses.add(self.pid(nth), said);
            }
        }
        if uses_shadow_stacks(task) {
            shadow_stack::plan_small(p, self.stack_limit(task));
        }
    }

    fn stack_limit(&self, task: &LivingTask) -> (u64, u64) {
        let wanted = task.process().rlimits.as_ref();
        limits::of_stack(wanted, self.from.own_limits, self.from.may_raise_limits)
    }

    /// When all threads of the process have their shadow stacks.
    pub(super) fn plan_stack_limit_again(&self, p: &mut Program, task: &LivingTask) {
        if uses_shadow_stacks(task) {
            shadow_stack::plan_limit_again(p, self.stack_limit(task));
        }
    }

    /// Makes the other threads; returns the programs of all.
    pub(super) fn plan_threads(
        &mut self,
        p: &mut Program,
        process: Process<'_>,
    ) -> Result<Vec<ProgramId>, RestoreError> {
        let Process { id, nth, task, .. } = process;
        let pid = self.pid(nth);
        let timers = timers_of(task);
        let chosen = self.from.timer_ids == TimerIds::Wanted;
        if !timers.is_empty() && chosen {
            posix_timers::plan_choice_of_ids(p, true);
        }
        let tids = self.from.checkpoint.tree.tasks[nth].threads.clone();
        let leads = task.dead_leader.is_none();
        let mut all: Vec<ProgramId> = leads.then_some(self.out.of_birth[id]).into_iter().collect();
        for (at, (tid, core)) in tids.iter().zip(&task.cores).enumerate().skip(all.len()) {
            let program = match at {
                0 => self.speaker(process)?,
                _ => self.thread(process, at)?,
            };
            let info = core.thread_info.as_ref().expect("checked while loading");
            let clear = if info.clear_tid_addr == 0 {
                0
            } else {
                CLONE_CHILD_CLEARTID
            };
            let spec = CloneSpec {
                flags: CLONE_THREAD | clear,
                child_tid: info.clear_tid_addr,
                set_tid: vec![tid.raw()],
                ..CloneSpec::default()
            };
            p.fork(&spec, program, format!("making thread {tid}"));
            all.push(program);
        }
        if !timers.is_empty() && !chosen {
            posix_timers::plan_walk(p, pid, timers)?;
        }
        Ok(all)
    }

    /// The security labels that a thread is to have.
    pub(super) fn labels(
        &self,
        nth: usize,
        task: &LivingTask,
        at: usize,
    ) -> Result<Labels, RestoreError> {
        let tid = self.from.checkpoint.tree.tasks[nth].threads[at];
        let thread = thread::part(&task.cores[at]);
        Ok(self.from.labels.wanted(tid, thread)?)
    }

    /// A thread comes with the NUMA policy of its process.
    fn plan_own_policy(&self, p: &mut Program, task: &LivingTask, core: &CoreEntry) {
        let [common, own] = [&task.cores[0], core].map(thread::mempolicy);
        if common != own {
            let own = own.unwrap_or_else(Policy::none);
            mempolicy::plan(p, &own, self.from.nodes);
        }
    }

    /// The program of a thread that is neither leader nor speaks for its process.
    fn thread(&mut self, process: Process<'_>, at: usize) -> Result<ProgramId, RestoreError> {
        let Process { id, nth, task, .. } = process;
        let (pid, tid, core) = (self.pid(nth), self.tid(nth, at), &task.cores[at]);
        let mut thread = Program::new(format!("thread {tid} of task {pid}"));
        let own_timers = at_home(timers_of(task), tid, pid);
        if self.from.timer_ids == TimerIds::Wanted {
            posix_timers::plan_creation(&mut thread, own_timers.iter().copied());
        }
        self.plan_own_policy(&mut thread, task, core);
        plan_pending(&mut thread, pid, tid, core);
        self.files.plan_registered_rings(pid, tid, &mut thread);
        let labels = self.labels(nth, task, at)?;
        thread::plan_tail(&mut thread, core, self.from.own, |p| {
            self.from.labels.plan_own(p, &labels, Some(process.labels));
            self.from.labels.plan_coming(p, &labels);
            self.plan_seccomp(p, id, nth, at);
        });
        if let Some(signal) = thread::part(core).pdeath_sig {
            attributes::plan_pdeath_signal(&mut thread, signal);
        }
        thread.post(
            self.out.births[id].threads_done,
            "saying that its credentials are set",
        );
        let mut late = Vec::new();
        if !own_timers.is_empty() {
            thread.wait(self.out.words.release, 1, "waiting for its release");
            let pending = pending_signals(task, at);
            late = posix_timers::plan_start(&mut thread, own_timers, &pending);
        }
        thread::plan_sleep(&mut thread, core, self.out.words.asleep);
        thread.park();
        let program = self.out.set.add(thread);
        self.start_late(program, late);
        Ok(program)
    }

    pub(super) fn tid(&self, nth: usize, at: usize) -> Pid {
        self.from.checkpoint.tree.tasks[nth].threads[at]
    }

    /// Notes timers of a program whose start is computed when it is released.
    pub(super) fn start_late(&mut self, program: ProgramId, late: Vec<LateStart>) {
        let late = late.into_iter().map(|start| (program, start));
        self.out.late_timers.extend(late);
    }

    /// Filters go on while the coordinator traces all threads of the process: none of them is called
    /// before the tree is let go.
    pub(super) fn plan_seccomp(&self, p: &mut Program, id: BirthId, nth: usize, at: usize) {
        let Some(plan) = &self.from.seccomp[nth] else {
            return;
        };
        let words = self.out.words;
        p.post(words.guarded, "asking for the suspension of seccomp");
        p.wait(words.suspended, 1, "waiting until seccomp is suspended");
        let filtered = self.out.births[id].filtered;
        if at == 0 {
            plan.plan_shared(p);
            p.post(
                filtered,
                "saying that all threads have the filters they share",
            );
        } else {
            p.wait(
                filtered,
                1,
                "waiting for the filters that all threads share",
            );
        }
        plan.plan_own(p, at);
    }
}

fn uses_shadow_stacks(task: &LivingTask) -> bool {
    let of_image = |core| shadow_stack::of_image(core).is_some();
    task.cores.iter().any(of_image)
}

/// Each thread queues its pending signals itself: the kernel lets nobody else claim that a signal came
/// from it, or from tgkill.
pub(super) fn plan_pending(p: &mut Program, pid: Pid, tid: Pid, core: &CoreEntry) {
    if let Some(queue) = &thread::part(core).signals_p {
        signals::plan_queue(p, pid, signals::Queue::Thread(tid), queue);
    }
}

pub(super) fn timers_of(task: &LivingTask) -> &[PosixTimerEntry] {
    let timers = task.process().timers.as_ref();
    timers.map_or(&[], |timers| timers.posix.as_slice())
}

/// Timers that a thread of process `pid` makes.
pub(super) fn at_home(timers: &[PosixTimerEntry], tid: Pid, pid: Pid) -> Vec<&PosixTimerEntry> {
    let is_home = |timer: &&PosixTimerEntry| posix_timers::home(timer, pid) == tid;
    timers.iter().filter(is_home).collect()
}

/// Pending signals that a thread could take.
pub(super) fn pending_signals(task: &LivingTask, at: usize) -> Vec<&SignalQueueEntry> {
    let own = thread::part(&task.cores[at]).signals_p.as_ref();
    own.into_iter().chain(&task.process().signals_s).collect()
}

/// Timers whose start is computed at the last moment, with the programs that start them.
pub(super) type LateTimers = Vec<(ProgramId, LateStart)>;

/// What some tasks don't get back as it was, each said once for all of them.
#[derive(Debug, Default)]
pub(super) struct Losses(Vec<(String, Vec<Pid>)>);

impl Losses {
    /// Notes what a task loses.
    pub fn add(&mut self, pid: Pid, what: impl Into<String>) {
        let what = what.into();
        match self.0.iter_mut().find(|(said, _)| *said == what) {
            Some((_, pids)) if pids.last() == Some(&pid) => {}
            Some((_, pids)) => pids.push(pid),
            None => self.0.push((what, vec![pid])),
        }
    }

    /// A sentence for each loss.
    pub fn sentences(&self) -> Vec<String> {
        let sentence = |(what, pids): &(String, Vec<Pid>)| {
            let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
            let plural = if pids.len() == 1 { "" } else { "s" };
            format!("task{plural} {}: {what}", pids.join(", "))
        };
        self.0.iter().map(sentence).collect()
    }
}

/// Number of threads whose programs end with a sleep that goes on, instead of parking.
pub(super) fn nr_sleepers(checkpoint: &Checkpoint) -> u32 {
    let sleeps = |task: &LoadedTask| match task {
        LoadedTask::Living(task) => {
            let is_sleep = |core| {
                let resumption = thread::resumption(core);
                matches!(resumption, Resumption::Sleep { .. }) && thread::abi(core) == Abi::Native
            };
            task.cores.iter().filter(|core| is_sleep(core)).count()
        }
        LoadedTask::Dead(_) => 0,
    };
    count(checkpoint.tasks.iter().map(sleeps).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_said_once_for_all_tasks() {
        let mut losses = Losses::default();
        for pid in [5, 6] {
            losses.add(Pid::from_raw(pid), "no luck");
        }
        losses.add(Pid::from_raw(6), "no luck");
        losses.add(Pid::from_raw(7), "worse");
        assert_eq!(losses.sentences(), ["tasks 5, 6: no luck", "task 7: worse"]);
    }
}
