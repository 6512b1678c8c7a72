//! How the program of a main thread ends: it speaks for its process to the last, or it exits before the
//! others as it did, and another thread speaks.
//!
//! ```text
//! leader that lives        its queues, tail, credentials; then it completes the process
//! leader that has exited   the process's queue, timers, tail, credentials; its children are weaned;
//!                          when all others have their credentials: dumpable, exit
//! its speaker              its queue, tail, credentials; when the leader is dead it completes the process
//! completing               dumpable, ready, release, timers, park
//! ```
//!
//! A task dies with its parent until the end of the restore; what counts as parent is the *thread* that made
//! it. So the children of a main thread that is to exit lose that bond first.
//!
//! Source: linux kernel/exit.c, forget_original_parent; man 2 PR_SET_PDEATHSIG.

use firn_proto::CoreEntry;
use firn_sys::{Pid, nr};

use super::RestoreError;
use super::load::LivingTask;
use super::programs::{Builder, Process, count};
use super::thread;
use super::threads::{at_home, pending_signals, plan_pending, timers_of};
use crate::program::{Program, ProgramId, Rule};
use crate::task::posix_timers::{self, TimerIds};
use crate::task::relations::{BirthId, Role};
use crate::task::{attributes, itimers, limits, signals};

impl Builder<'_> {
    /// The end of a leader that lives.
    pub(super) fn plan_leader_end(
        &mut self,
        p: &mut Program,
        process: Process<'_>,
    ) -> Result<(), RestoreError> {
        let Process { id, nth, task, .. } = process;
        let (pid, leader) = (self.pid(nth), &task.cores[0]);
        let info = leader.thread_info.as_ref().expect("checked while loading");
        p.call(
            nr::SET_TID_ADDRESS,
            &[info.clear_tid_addr.into()],
            Rule::Ok,
            "setting the tid address",
        );
        self.plan_own_state(p, pid, task);
        plan_pending(p, pid, pid, leader);
        if !self.files.makes_rings(pid) {
            self.files.plan_registered_rings(pid, pid, p);
        }
        thread::plan_tail(p, leader, self.from.own, |p| {
            self.from.labels.plan_coming(p, process.labels);
            self.plan_seccomp(p, id, nth, 0);
        });
        self.plan_table_owners(p, id, nth);
        self.plan_weaning(p, nth);
        let program = self.out.of_birth[id];
        self.plan_completion(p, process, program)
    }

    /// The end of a leader that has exited before other threads of its process.
    pub(super) fn plan_exit_of_leader(
        &self,
        p: &mut Program,
        process: Process<'_>,
        leader: &CoreEntry,
    ) {
        let Process { id, nth, task, .. } = process;
        let pid = self.pid(nth);
        self.plan_own_state(p, pid, task);
        thread::plan_tail(p, leader, self.from.own, |_| {});
        self.plan_table_owners(p, id, nth);
        // The kernel does not forget what a dead thread wanted at its parent's death.
        attributes::plan_pdeath_signal(p, 0);
        self.plan_weaning(p, nth);
        let children = self.nr_living_children(pid);
        if children > 0 {
            let weaned = self.out.births[id].weaned;
            p.wait(weaned, children, "waiting until no child dies with it");
        }
        // What it is when it dies decides for good who may see its exit code. Dumpable, others may trace a
        // process: not before each of its threads has only the rights that it is to have.
        let done = self.out.births[id].threads_done;
        let others = count(task.cores.len());
        p.wait(done, others, "waiting for the threads' credentials");
        process.memory.set_dumpable(p);
        p.post(self.out.words.leaving, "saying that it leaves");
        let code = task.process().exit_code >> 8 & 0xff;
        p.call(nr::EXIT, &[code.into()], Rule::Ok, "exiting as it did");
    }

    /// The program of the thread that speaks for a process whose leader has exited.
    pub(super) fn speaker(&mut self, process: Process<'_>) -> Result<ProgramId, RestoreError> {
        let Process { id, nth, task, .. } = process;
        let (pid, tid, core) = (self.pid(nth), self.tid(nth, 0), &task.cores[0]);
        let mut p = Program::new(format!("thread {tid}, the first of task {pid}"));
        if self.chooses_ids(task) {
            let timers = at_home(timers_of(task), tid, pid);
            posix_timers::plan_creation(&mut p, timers.iter().copied());
        }
        plan_pending(&mut p, pid, tid, core);
        if !self.files.makes_rings(pid) {
            self.files.plan_registered_rings(pid, tid, &mut p);
        }
        thread::plan_tail(&mut p, core, self.from.own, |p| {
            self.from.labels.plan_coming(p, process.labels);
            self.plan_seccomp(p, id, nth, 0);
        });
        p.post(
            self.out.births[id].threads_done,
            "saying that its credentials are set",
        );
        p.wait(
            self.out.words.buried,
            1,
            "waiting for the exit of the main thread",
        );
        let program = self.out.set.reserve();
        self.plan_completion(&mut p, process, program)?;
        self.out.set.set(program, p);
        Ok(program)
    }

    /// What only the leader can do: the process's pending signals, and timers without a thread of their own.
    fn plan_own_state(&self, p: &mut Program, pid: Pid, task: &LivingTask) {
        if let Some(queue) = &task.process().signals_s {
            signals::plan_queue(p, pid, signals::Queue::Process, queue);
        }
        if self.chooses_ids(task) {
            let timers = at_home(timers_of(task), pid, pid);
            posix_timers::plan_creation(p, timers.iter().copied());
        }
    }

    fn chooses_ids(&self, task: &LivingTask) -> bool {
        self.from.timer_ids == TimerIds::Wanted && !timers_of(task).is_empty()
    }

    fn plan_table_owners(&self, p: &mut Program, id: BirthId, nth: usize) {
        if let Some((owner, files_id)) = self.table_owners[nth]
            && owner == id
        {
            self.plan_owners(p, files_id);
        }
    }

    /// A child of a main thread that is to exit must not die with it.
    fn plan_weaning(&self, p: &mut Program, nth: usize) {
        let tasks = &self.from.checkpoint.tree.tasks;
        let parent = self.relatives.number(tasks[nth].ppid);
        let parent = parent.filter(|parent| !tasks[*parent].has_leader());
        if let Some(parent) = parent {
            attributes::plan_pdeath_signal(p, 0);
            let weaned = self.out.births[self.from.family.of_task(parent)].weaned;
            p.post(weaned, "saying that it does not die with its parent");
        }
    }

    fn nr_living_children(&self, pid: Pid) -> u32 {
        let tasks = &self.from.checkpoint.tree.tasks;
        let children = self.relatives.children(pid).iter();
        count(children.filter(|child| tasks[**child].is_alive()).count())
    }

    /// What comes when all threads of the process have their state.
    fn plan_completion(
        &mut self,
        p: &mut Program,
        process: Process<'_>,
        program: ProgramId,
    ) -> Result<(), RestoreError> {
        let Process { id, nth, task, .. } = process;
        let (pid, words, speaker) = (self.pid(nth), self.out.words, &task.cores[0]);
        let others = task.cores.len() - 1;
        if others > 0 && task.dead_leader.is_none() {
            let done = self.out.births[id].threads_done;
            p.wait(done, count(others), "waiting for the threads' credentials");
        }
        self.plan_stack_limit_again(p, task);
        if self.chooses_ids(task) {
            posix_timers::plan_choice_of_ids(p, false);
        }
        self.plan_rings(p, process)?;
        if let Some(wanted) = &task.process().rlimits {
            limits::plan_late(p, wanted, self.from.own_limits, self.from.may_raise_limits);
        }
        process.memory.set_dumpable(p);
        p.post(words.ready, "saying that it is complete");
        p.wait(words.release, 1, "waiting for its release");
        if let Some(timers) = &task.process().timers {
            itimers::plan(p, timers);
        }
        let mut timers = at_home(timers_of(task), pid, pid);
        let tid = self.tid(nth, 0);
        if tid != pid {
            timers.extend(at_home(timers_of(task), tid, pid));
        }
        let late = posix_timers::plan_start(p, timers, &pending_signals(task, 0));
        self.start_late(program, late);
        self.note_stopped_children(p, nth, program);
        attributes::plan_pdeath_signal(p, thread::part(speaker).pdeath_sig.unwrap_or(0));
        thread::plan_sleep(p, speaker, words.asleep);
        p.park();
        Ok(())
    }

    /// Rings with a thread of their own, and what is registered with any.
    fn plan_rings(&mut self, p: &mut Program, process: Process<'_>) -> Result<(), RestoreError> {
        let Process {
            id, nth, memory, ..
        } = process;
        let (pid, words) = (self.pid(nth), self.out.words);
        let makes_rings = self.files.makes_rings(pid);
        if makes_rings {
            self.files.plan_own_rings(pid, p)?;
            memory.map_own_rings(p, &self.descriptors());
            p.post(words.rings_made, "saying that its io_uring rings are there");
            let why = "waiting until its io_uring rings are where they were";
            p.wait(words.rings_turned, 1, why);
            self.files.plan_registered_rings(pid, self.tid(nth, 0), p);
        }
        self.files.plan_registrations(pid, p);
        if let Some((owner, files_id)) = self.table_owners[nth]
            && makes_rings
            && owner == id
        {
            self.files.plan_watches(files_id, p);
        }
        Ok(())
    }

    /// Owners of descriptors may be any task of the tree, so all of them must be there.
    fn plan_owners(&self, p: &mut Program, files_id: u32) {
        let mut owners = Program::new("");
        self.files.plan_owners(files_id, &mut owners);
        if owners.is_empty() {
            return;
        }
        for (id, birth) in self.from.family.births.iter().enumerate() {
            if matches!(birth.role, Role::Task(_)) {
                p.wait(
                    self.out.births[id].alive,
                    1,
                    "waiting for a task that may own files",
                );
            }
        }
        self.files.plan_owners(files_id, p);
    }
}
