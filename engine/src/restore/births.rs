//! Beginnings and ends: what every new process does first, whom it makes, which session and group it is
//! in, and how those die that are not to live.

use firn_sys::{Pid, nr, task as sys_task};

use super::load::{DeadTask, LoadedTask};
use super::programs::{Builder, WALL};
use super::relatives::leads;
use crate::program::{CloneSpec, Program, Rule};
use crate::task::relations::{BirthId, Role};
use crate::task::{attributes, shadow_stack};

/// End of the address space with four levels of page tables.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
const CLONE_FILES: u64 = 0x400;
const CLONE_PARENT: u64 = 0x8000;
const SIGCHLD: u32 = 17;
const SIGKILL: u32 = 9;
const RSEQ_FLAG_UNREGISTER: u32 = 1;
const RLIMIT_CORE: u32 = 4;
const SIG_UNBLOCK: u32 = 1;

impl Builder<'_> {
    fn name(&self, id: BirthId) -> String {
        let birth = self.birth_of(id);
        let pid = birth
            .pid
            .map_or_else(|| "?".to_owned(), |pid| pid.to_string());
        match birth.role {
            Role::Task(_) => format!("task {pid}"),
            Role::Leader => format!("helper {pid} for a leader that is gone"),
            Role::Midwife => "helper that makes an orphan".to_owned(),
            Role::Keeper => "helper that keeps a process group".to_owned(),
        }
    }

    /// What every new process does first.
    pub(super) fn prologue(&self, id: BirthId) -> Program {
        let mut p = Program::new(self.name(id));
        let birth = self.birth_of(id);
        if birth.maker.is_none() {
            self.leave_this_process(&mut p);
        }
        let is_orphan = birth
            .maker
            .is_some_and(|maker| self.birth_of(maker).role == Role::Midwife);
        // An orphan's first parent dies on purpose.
        if !is_orphan {
            attributes::plan_pdeath_signal(&mut p, SIGKILL);
        }
        p.post(self.out.births[id].alive, "saying that it lives");
        p
    }

    /// Gives up everything of the process that was forked: rseq area, vdso, memory.
    fn leave_this_process(&self, p: &mut Program) {
        if let Some((address, len, signature)) = sys_task::own_rseq() {
            let args = [
                address.into(),
                len.into(),
                RSEQ_FLAG_UNREGISTER.into(),
                signature.into(),
            ];
            p.call(nr::RSEQ, &args, Rule::Ok, "leaving the inherited rseq area");
        }
        self.leave_shadow_stack(p);
        if let Some(vdso) = self.from.kernel_vdso {
            vdso.park(p, self.from.parked_vdso);
        }
        let hole = self.from.hole;
        let below = [0u64.into(), hole.start.into()];
        p.call(
            nr::MUNMAP,
            &below,
            Rule::Ok,
            "clearing the memory below the arena",
        );
        let above = [hole.end.into(), (TASK_SIZE - hole.end).into()];
        p.call(
            nr::MUNMAP,
            &above,
            Rule::Ok,
            "clearing the memory above the arena",
        );
    }

    /// Threads of a task that has a shadow stack would be given one each, somewhere.
    fn leave_shadow_stack(&self, p: &mut Program) {
        let (own, words) = (self.from.own.shadow_stack, self.out.words);
        if own.is_locked_on() {
            p.post(words.locked, "saying that its shadow stack is locked");
            p.wait(words.unlocked, 1, "waiting until it is unlocked");
        }
        if own.uses_shadow_stack() {
            shadow_stack::plan_leaving(p);
        }
    }

    /// Children before setsid, setsid, children after it.
    pub(super) fn make_children(&self, p: &mut Program, id: BirthId) {
        let birth = self.birth_of(id);
        if birth.subreaper_until.is_some() {
            attributes::plan_subreaper(p, true);
        }
        for &child in &birth.before {
            self.make(p, child);
        }
        if birth.setsid {
            p.call(nr::SETSID, &[], Rule::Ok, "starting a session");
            if let Some(pid) = birth.pid {
                self.files.plan_controlling_terminal(pid, p);
            }
        }
        for &child in &birth.after {
            self.make(p, child);
        }
    }

    fn make(&self, p: &mut Program, child: BirthId) {
        let birth = self.birth_of(child);
        let mut flags = if birth.sibling { CLONE_PARENT } else { 0 };
        if self.shares_files_with_maker(child) {
            flags |= CLONE_FILES;
        }
        // A sibling takes over its maker's exit signal.
        let exit_signal = if birth.sibling {
            0
        } else {
            u64::from(self.exit_signal(child))
        };
        let spec = CloneSpec {
            flags,
            exit_signal,
            set_tid: birth.pid.iter().map(|pid| pid.raw()).collect(),
            ..CloneSpec::default()
        };
        p.fork(
            &spec,
            self.out.of_birth[child],
            format!("making {}", self.name(child)),
        );
    }

    fn shares_files_with_maker(&self, child: BirthId) -> bool {
        match self.birth_of(child).role {
            Role::Task(nth) => self.table_owners[nth].is_some_and(|(owner, _)| owner != child),
            Role::Leader | Role::Midwife | Role::Keeper => false,
        }
    }

    fn exit_signal(&self, id: BirthId) -> u32 {
        let Role::Task(nth) = self.birth_of(id).role else {
            return SIGCHLD;
        };
        let process = match self.task(nth) {
            LoadedTask::Living(task) => task.process(),
            LoadedTask::Dead(task) => &task.core,
        };
        process
            .firn
            .as_ref()
            .and_then(|firn| firn.exit_signal)
            .unwrap_or(SIGCHLD)
    }

    /// Leaders lead, then the others join.
    pub(super) fn plan_groups(&self, p: &mut Program, id: BirthId) {
        let words = self.out.words;
        let birth = self.birth_of(id);
        if let Some(keeper) = birth.keeper {
            self.lead_group(p);
            self.make(p, keeper);
            p.post(words.led, "saying that the group is there");
        }
        let Some(group) = birth.group else {
            return;
        };
        if leads(birth) {
            self.lead_group(p);
            p.post(words.led, "saying that the group is there");
        } else {
            p.wait(
                words.led,
                self.relatives.nr_leaders,
                "waiting for all process groups",
            );
            let args = [0.into(), group.to_image().into()];
            p.call(
                nr::SETPGID,
                &args,
                Rule::Ok,
                format!("joining process group {group}"),
            );
            p.post(words.joined, "saying that it has joined");
        }
    }

    fn lead_group(&self, p: &mut Program) {
        let args = [0.into(), 0.into()];
        p.call(nr::SETPGID, &args, Rule::Ok, "leading a process group");
    }

    /// Gets its orphans, and is no subreaper from then on: those above it get theirs.
    pub(super) fn plan_adoptions(&self, p: &mut Program, id: BirthId) {
        if let Some(steps) = self.birth_of(id).subreaper_until {
            self.wait_for_orphans(p, steps);
            attributes::plan_subreaper(p, false);
            let why = "saying that it takes no orphans any more";
            p.post(self.out.words.orphaned, why);
        }
    }

    /// Waits until that many of the steps are done by which orphans come to their parents.
    pub(super) fn wait_for_orphans(&self, p: &mut Program, steps: u32) {
        if steps > 0 {
            let why = "waiting until orphans are with their parents";
            p.wait(self.out.words.orphaned, steps, why);
        }
    }

    /// A zombie: it makes whom it has to make, joins its group, and dies the way it died.
    pub(super) fn dead(&mut self, id: BirthId, nth: usize) -> Program {
        let LoadedTask::Dead(task) = self.task(nth) else {
            unreachable!("a dead task")
        };
        let mut p = self.prologue(id);
        attributes::plan_name(&mut p, &task.core.comm);
        self.make_children(&mut p, id);
        self.plan_groups(&mut p, id);
        if self.files.has_late() {
            p.post(self.out.words.born, "saying that it was there");
        }
        // They would become zombies of whoever takes its children over.
        self.plan_reaping(&mut p, id);
        plan_death(&mut p, self.pid(nth), task);
        p
    }

    /// Waits for the helpers that end as children of this task.
    pub(super) fn plan_reaping(&self, p: &mut Program, id: BirthId) {
        for &helper in &self.birth_of(id).reaps {
            let pid = self.birth_of(helper).pid.map_or(-1, Pid::raw);
            let args = [pid.into(), 0.into(), WALL.into(), 0.into()];
            p.call_retrying(nr::WAIT4, &args, Rule::Ok, "reaping a helper");
            if self.birth_of(helper).role == Role::Midwife {
                let why = "saying that an orphan is with its parent";
                p.post(self.out.words.orphaned, why);
            }
        }
    }

    /// A helper that leads a session or group in place of somebody who is gone, or keeps a group.
    pub(super) fn stand_in(&self, id: BirthId) -> Program {
        let mut p = self.prologue(id);
        self.make_children(&mut p, id);
        self.plan_groups(&mut p, id);
        p.wait(
            self.out.words.joined,
            self.relatives.nr_joiners,
            "waiting until all have joined",
        );
        self.plan_reaping(&mut p, id);
        p.call(nr::EXIT_GROUP, &[0.into()], Rule::Ok, "leaving");
        p
    }

    pub(super) fn midwife(&self, id: BirthId) -> Program {
        let mut p = self.prologue(id);
        self.make_children(&mut p, id);
        self.wait_for_orphans(&mut p, self.birth_of(id).exits_after);
        p.call(nr::EXIT_GROUP, &[0.into()], Rule::Ok, "leaving");
        p
    }
}

fn plan_death(p: &mut Program, pid: Pid, task: &DeadTask) {
    let signal = task.status.cast_unsigned() & 0x7f;
    if signal == 0 {
        let code = task.status.cast_unsigned() >> 8 & 0xff;
        p.call(
            nr::EXIT_GROUP,
            &[code.into()],
            Rule::Ok,
            "exiting as it did",
        );
        return;
    }
    // It must not leave a second core file.
    let none = p.data(&[0; 16]);
    let args = [0.into(), RLIMIT_CORE.into(), none.into(), 0.into()];
    p.call(nr::PRLIMIT64, &args, Rule::Ok, "forbidding a core file");
    if signal != SIGKILL {
        let default = p.data(&[0; 32]);
        let args = [signal.into(), default.into(), 0.into(), 8.into()];
        p.call(
            nr::RT_SIGACTION,
            &args,
            Rule::Ok,
            "making the signal deadly",
        );
        let only = p.data(&(1u64 << (signal - 1)).to_le_bytes());
        let args = [SIG_UNBLOCK.into(), only.into(), 0.into(), 8.into()];
        p.call(nr::RT_SIGPROCMASK, &args, Rule::Ok, "unblocking the signal");
    }
    let args = [pid.to_image().into(), signal.into()];
    p.call(nr::KILL, &args, Rule::Ok, "dying as it did");
}
