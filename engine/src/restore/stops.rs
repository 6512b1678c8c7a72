//! Stopped tasks stop again, while the tree is still held, and their parents know of it what they knew.
//!
//! ```text
//! SIGSTOP is sent; a thread takes it and is given the signal that had stopped the task
//! the group stops; the kernel tells the parent: a SIGCHLD, and something for wait
//! the parent, held as well, makes two calls: it takes the SIGCHLD, and the stop if it had been told of it
//! ```
//!
//! A child that has gone on, of which its parent has yet to be told, is part of the programs: it stops itself
//! and its parent continues it, before the parent forgets the SIGCHLDs of the restore.
//!
//! Source: man 2 ptrace, "Group-stop"; linux kernel/signal.c, do_signal_stop and do_notify_parent_cldstop.

use std::time::{Duration, Instant};

use firn_proto::{SaEntry, TaskCoreEntry};
use firn_sys::ptrace::{self, EVENT_STOP};
use firn_sys::wait::Status as WaitStatus;
use firn_sys::{Pid, nr, task as sys_task, wait};

use super::RestoreError;
use super::load::{LivingTask, LoadedTask};
use super::programs::{Builder, WALL};
use super::takeover::{SIGSTOP, TakenOver, failed};
use crate::arch::{self, Abi};
use crate::inject::{CallSpec, RemoteCall, call_all};
use crate::program::{Program, ProgramId, Rule};
use crate::task::child_events::ChildEvent;
use crate::task::relations::BirthId;
use crate::task::signals;
use crate::tree::{Task, TaskState};

const P_PID: u32 = 1;
const WNOHANG: u64 = 1;
const WSTOPPED: u32 = 2;
const SIGTRAP: i32 = 5;
const SIGCHLD: u32 = 17;
const SIGCONT: u32 = 18;
const SIG_IGN: u64 = 1;
const SA_NOCLDSTOP: u64 = 1;
const EAGAIN: i32 = 11;
/// Size of a signal set as the calls take it.
const SET_SIZE: u64 = 8;
/// How long a stop may take; it needs no more than each thread's next look at its signals.
const PATIENCE: Duration = Duration::from_secs(5);
/// After this long a signal other than SIGSTOP was not taken for a stop: the group is orphaned here.
const DOUBT: Duration = Duration::from_millis(200);
/// How long the parent waits for a SIGCHLD that must come.
const NOTICE_NANOS: u64 = 100_000_000;
const PAUSE: Duration = Duration::from_micros(50);

/// What the parent has yet to be told of a task.
fn event_of(process: &TaskCoreEntry) -> Option<u32> {
    process.firn.as_ref().and_then(|firn| firn.child_event)
}

fn has_yet_to_tell(process: &TaskCoreEntry, event: ChildEvent) -> bool {
    event_of(process).and_then(ChildEvent::from_image) == Some(event)
}

impl Builder<'_> {
    /// A task that has gone on, of which its parent has yet to be told, stops itself and is continued.
    pub(super) fn plan_stop_and_go(
        &self,
        p: &mut Program,
        id: BirthId,
        nth: usize,
        task: &LivingTask,
    ) {
        if nth == 0 || !has_yet_to_tell(task.process(), ChildEvent::Continued) {
            return;
        }
        let pid = self.pid(nth).to_image();
        let args = [pid.into(), SIGSTOP.into()];
        p.call(nr::KILL, &args, Rule::Ok, "stopping as it had");
        let set = p.data(&(1u64 << (SIGCONT - 1)).to_le_bytes());
        let at_once = p.space(16);
        let args = [set.into(), 0.into(), at_once.into(), SET_SIZE.into()];
        let why = "taking the signal that has continued it";
        p.call(nr::RT_SIGTIMEDWAIT, &args, Rule::OkOr(EAGAIN), why);
        p.post(self.out.births[id].continued, "saying that it goes on");
    }

    /// Lets children go on that have stopped themselves, and takes their stop but not their going on.
    pub(super) fn plan_going_on(&self, p: &mut Program, nth: usize) {
        for &at in self.relatives.children(self.pid(nth)) {
            let LoadedTask::Living(living) = self.task(at) else {
                continue;
            };
            if at == 0 || !has_yet_to_tell(living.process(), ChildEvent::Continued) {
                continue;
            }
            let child = self.pid(at).to_image();
            let options = WSTOPPED | WALL;
            let args = [P_PID.into(), child.into(), 0.into(), options.into()];
            p.call_retrying(nr::WAITID, &args, Rule::Ok, "waiting until a child stops");
            let args = [child.into(), SIGCONT.into()];
            p.call(nr::KILL, &args, Rule::Ok, "letting it go on");
            let continued = self.out.births[self.from.family.of_task(at)].continued;
            p.wait(continued, 1, "waiting until it goes on");
        }
    }

    /// Leaves room for the arguments of the call that takes a SIGCHLD about stopped children.
    pub(super) fn note_stopped_children(
        &mut self,
        p: &mut Program,
        nth: usize,
        program: ProgramId,
    ) {
        let own = self.pid(nth);
        let tasks = &self.from.checkpoint.tree.tasks;
        let is_stopped = |child: &usize| matches!(tasks[*child].state, TaskState::Stopped(_));
        if self.relatives.children(own).iter().any(is_stopped) {
            let set = (1u64 << (SIGCHLD - 1)).to_le_bytes();
            let timeout = [0u64.to_le_bytes(), NOTICE_NANOS.to_le_bytes()].concat();
            let data = p.data(&[&set[..], &timeout].concat());
            self.out.taking.insert(own, (program, data));
        }
    }
}

impl TakenOver<'_> {
    /// Stops what was stopped, and settles what its parents know of it.
    pub(super) fn stop_groups(&self) -> Result<(), RestoreError> {
        for (_, task, living) in self.living() {
            if let TaskState::Stopped(signal) = task.state {
                stop_group(task, usable_signal(signal, living.process()))?;
                self.settle_parent(task, living)?;
            }
        }
        Ok(())
    }

    fn settle_parent(&self, task: &Task, living: &LivingTask) -> Result<(), RestoreError> {
        let found = self.living().find(|(_, parent, _)| parent.pid == task.ppid);
        // The root's parent is outside of the tree.
        let Some((_, parent, knows)) = found.filter(|(_, parent, _)| parent.pid != task.pid) else {
            return Ok(());
        };
        if hears_of_stops(knows.process()) && !has_pending_sigchld(knows.process()) {
            self.take_sigchld(parent)?;
        }
        if event_of(living.process()) == Some(0) {
            let options = WNOHANG | u64::from(WSTOPPED | WALL);
            let pid = u64::from(task.pid.to_image());
            self.call(parent, nr::WAITID, [P_PID.into(), pid, 0, options, 0, 0])?;
        }
        Ok(())
    }

    fn take_sigchld(&self, parent: &Task) -> Result<(), RestoreError> {
        let Some((program, data)) = self.tree.programs.taking.get(&parent.pid) else {
            return Ok(());
        };
        let placed = self.tree.arena.placed();
        let set = placed.address(placed.data_offset(*program, *data));
        let timeout = set + SET_SIZE;
        self.call(
            parent,
            nr::RT_SIGTIMEDWAIT,
            [set, 0, timeout, SET_SIZE, 0, 0],
        )
    }

    /// Makes a call in a held task; what it returns does not matter.
    fn call(&self, task: &Task, nr: i64, args: [u64; 6]) -> Result<(), RestoreError> {
        let tid = task.speaker();
        let instruction = self.tree.arena.placed().base() + arch::executor_syscall_offset();
        let regs = ptrace::general_regs(tid).map_err(failed(tid, "read the registers"))?;
        let abi = Abi::Native;
        let call = CallSpec { abi, nr, args };
        let mut calls = [RemoteCall::new(tid, regs, instruction, call)];
        call_all(&mut calls)?;
        ptrace::set_general_regs(tid, &regs).map_err(failed(tid, "put back the registers"))
    }
}

/// The signal that stops a task as it was stopped: its own where nothing catches it now.
fn usable_signal(signal: i32, process: &TaskCoreEntry) -> i32 {
    let is_stop = matches!(signal, 20..=22);
    let action = u32::try_from(signal)
        .ok()
        .and_then(|signal| action_of(process, signal));
    let is_default = action.is_some_and(|action| action.sigaction == 0);
    if is_stop && is_default {
        signal
    } else {
        SIGSTOP
    }
}

fn action_of(process: &TaskCoreEntry, signal: u32) -> Option<&SaEntry> {
    process.sigactions.get(signals::action_index(signal)?)
}

/// Whether the kernel sends the process a SIGCHLD when a child stops.
fn hears_of_stops(process: &TaskCoreEntry) -> bool {
    action_of(process, SIGCHLD)
        .is_none_or(|action| action.sigaction != SIG_IGN && action.flags & SA_NOCLDSTOP == 0)
}

fn has_pending_sigchld(process: &TaskCoreEntry) -> bool {
    let queue = process.signals_s.iter().flat_map(|queue| &queue.signals);
    let mut numbers = queue.filter_map(|signal| signal.siginfo.first_chunk::<4>());
    numbers.any(|number| u32::from_le_bytes(*number) == SIGCHLD)
}

/// Brings all threads of a held process into a group stop.
fn stop_group(task: &Task, signal: i32) -> Result<(), RestoreError> {
    let _ = sys_task::kill(task.pid, SIGSTOP);
    for &tid in &task.threads {
        if signal != SIGSTOP {
            let others = !(1u64 << (signal - 1));
            ptrace::set_signal_mask(tid, others).map_err(failed(tid, "set the signal mask"))?;
        }
        ptrace::cont(tid, 0).map_err(failed(tid, "resume the thread"))?;
    }
    let begun = Instant::now();
    let mut signal = signal;
    let mut running: Vec<Pid> = task.threads.clone();
    while !running.is_empty() {
        let mut left = Vec::with_capacity(running.len());
        for tid in running {
            if !has_stopped(tid, signal)? {
                left.push(tid);
            }
        }
        running = left;
        if begun.elapsed() > PATIENCE {
            let what = format!("task {} does not stop again", task.pid);
            return Err(RestoreError::Stuck(what));
        }
        if signal != SIGSTOP && begun.elapsed() > DOUBT {
            signal = SIGSTOP;
            let _ = sys_task::kill(task.pid, SIGSTOP);
        }
        std::thread::sleep(PAUSE);
    }
    tracing::debug!("task {}: stopped again, by signal {signal}", task.pid);
    Ok(())
}

/// Whether a thread is in a group stop by now; the one that takes the SIGSTOP is given `signal` in its place.
fn has_stopped(tid: Pid, signal: i32) -> Result<bool, RestoreError> {
    match wait::try_wait(tid).map_err(failed(tid, "wait for the thread"))? {
        None | Some(WaitStatus::Continued) => Ok(false),
        Some(WaitStatus::Ended(_)) => Err(RestoreError::Died(tid)),
        Some(WaitStatus::Stopped {
            signal: stop,
            event,
        }) if event == EVENT_STOP && stop != SIGTRAP => Ok(true),
        Some(WaitStatus::Stopped { event, .. }) => {
            let given = if event == 0 { signal } else { 0 };
            ptrace::cont(tid, given).map_err(failed(tid, "resume the thread"))?;
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(signal: u32, action: SaEntry) -> TaskCoreEntry {
        let mut process = TaskCoreEntry {
            sigactions: vec![SaEntry::default(); signals::NR_ACTIONS],
            ..TaskCoreEntry::default()
        };
        process.sigactions[signals::action_index(signal).expect("catchable")] = action;
        process
    }

    #[test]
    fn a_caught_stop_signal_is_replaced() {
        let caught = SaEntry {
            sigaction: 0x1000,
            ..SaEntry::default()
        };
        assert_eq!(usable_signal(20, &process(20, caught)), SIGSTOP);
        assert_eq!(usable_signal(20, &process(21, caught)), 20);
        assert_eq!(usable_signal(0, &process(21, caught)), SIGSTOP);
    }

    #[test]
    fn some_parents_hear_of_no_stop() {
        let silent = SaEntry {
            flags: SA_NOCLDSTOP,
            ..SaEntry::default()
        };
        assert!(!hears_of_stops(&process(SIGCHLD, silent)));
        assert!(hears_of_stops(&process(18, silent)));
    }
}
