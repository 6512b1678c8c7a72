//! Seizing threads and waiting until each has stopped.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::ptrace::GeneralRegs;
use firn_sys::wait::Status as WaitStatus;
use firn_sys::{Errno, Pid, procfs, ptrace, wait};

use super::cgroup::FrozenGroup;
use super::seize::{self, Deputy, Seized};
use super::{FreezeError, FrozenTree, walk};
use crate::arch;
use crate::crew;
use crate::task::ia32;
use crate::task::status::{Stat, Status};
use crate::tree::{Task, TaskState, Tree};

/// Rounds after which a tree that still grows is given up.
const MAX_ROUNDS: usize = 10_000;
/// How long a vfork may take while everything else is stopped.
const VFORK_PATIENCE: Duration = Duration::from_millis(100);
/// How often one is looked for.
const VFORK_INTERVAL: Duration = Duration::from_millis(25);
/// How long tasks that are let go, but have not stopped yet, may take to do so.
const CATCH_PATIENCE: Duration = Duration::from_millis(200);
/// How long threads of a large tree on a busy machine may take, one after the other, beyond the deadline.
const LAST_PATIENCE: Duration = Duration::from_secs(1);
/// Looks at a few threads that have not stopped yet before the first pause.
const QUICK_LOOKS: u32 = 64;
/// Killed threads that are worth a thread of our own to reap them.
const THREADS_PER_REAPER: usize = 64;
pub(super) const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// Why a tree has not been stopped.
#[derive(Debug)]
pub enum Setback {
    /// A task waits for the child that borrows its memory: to be tried again when it has it back.
    Vfork {
        /// The task.
        tid: Pid,
        /// Its child.
        child: Pid,
    },
    /// A process that had stopped has executed a program or has died: to be tried again.
    Changed,
    /// There is no use in trying again.
    Failed(FreezeError),
}

impl<E: Into<FreezeError>> From<E> for Setback {
    fn from(error: E) -> Setback {
        Setback::Failed(error.into())
    }
}

/// When to give up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    /// That moment.
    pub at: Instant,
    /// How long it was from the beginning, for messages.
    pub timeout: Duration,
}

impl Deadline {
    /// Whether it has passed.
    pub fn has_passed(&self) -> bool {
        Instant::now() > self.at
    }
}

/// How a thread came to its stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// By our interrupt.
    Interrupted,
    /// It belongs to a group stopped by this signal.
    Group(i32),
    /// It ended before.
    Ended,
}

/// A process on its way into the tree.
struct Open {
    pid: Pid,
    known: HashSet<Pid>,
    state: TaskState,
}

/// Stops the tree level by level and fills `frozen`. A frozen cgroup is thawed when it has served.
pub fn stop_all(
    frozen: &mut FrozenTree,
    root: Pid,
    group: Option<FrozenGroup>,
    deadline: Deadline,
) -> Result<(), Setback> {
    let mut stopper = Stopper {
        frozen,
        group,
        deadline,
        deputy: Deputy::default(),
        known: HashSet::new(),
        traced: HashSet::new(),
    };
    stopper.stop_tree(root)?;
    if let Some(group) = stopper.group.take() {
        group.thaw().map_err(FreezeError::from)?;
    }
    finish(frozen, root).map_err(Setback::Failed)
}

fn finish(frozen: &mut FrozenTree, root: Pid) -> Result<(), FreezeError> {
    frozen.sort(root);
    match frozen.tree.tasks.first() {
        Some(task) if task.pid == root && task.is_alive() => Ok(()),
        Some(task) if task.pid == root => Err(FreezeError::RootIsZombie(root)),
        _ => Err(FreezeError::Gone(root)),
    }
}

struct Stopper<'a> {
    frozen: &'a mut FrozenTree,
    group: Option<FrozenGroup>,
    deadline: Deadline,
    deputy: Deputy,
    /// Pids of the processes that are in the tree.
    known: HashSet<Pid>,
    /// Threads that are traced and have not ended.
    traced: HashSet<Pid>,
}

impl Stopper<'_> {
    fn stop_tree(&mut self, root: Pid) -> Result<(), Setback> {
        let mut level = vec![root];
        let mut from = 0;
        for _ in 0..MAX_ROUNDS {
            self.stop_level(&level)?;
            // Most newcomers are children of those that have just stopped; orphans may have come to others.
            level = self.newcomers(from);
            let has_others = from > 0;
            from = self.frozen.tree.tasks.len();
            if level.is_empty() && has_others {
                level = self.newcomers(0);
            }
            if level.is_empty() {
                return Ok(());
            }
            if self.deadline.has_passed() {
                break;
            }
        }
        Err(Setback::Failed(FreezeError::NeverSettled(root)))
    }

    /// Children of frozen tasks, from the `from`th on, that are not frozen themselves.
    fn newcomers(&self, from: usize) -> Vec<Pid> {
        let mut new = Vec::new();
        let tasks = &self.frozen.tree.tasks[from..];
        for task in tasks.iter().filter(|task| task.is_alive()) {
            new.extend(walk::children(task.pid, &task.threads));
        }
        new.retain(|pid| !self.known.contains(pid));
        new
    }

    /// Stops all threads of the given processes: first all are interrupted, then all are waited for.
    fn stop_level(&mut self, pids: &[Pid]) -> Result<(), Setback> {
        let mut open: Vec<Open> = pids
            .iter()
            .map(|pid| Open {
                pid: *pid,
                known: HashSet::new(),
                state: TaskState::Alive,
            })
            .collect();
        while !open.is_empty() {
            let mut new_threads = Vec::new();
            let mut left = Vec::with_capacity(open.len());
            for mut process in open {
                let listed = walk::threads(process.pid);
                let is_new = |tid: &&Pid| !process.known.contains(tid);
                let new: Vec<Pid> = listed.iter().filter(is_new).copied().collect();
                if new.is_empty() {
                    self.settle(&process, &listed)?;
                } else {
                    process.known.extend(&new);
                    new_threads.extend(new.iter().map(|tid| (left.len(), process.pid, *tid)));
                    left.push(process);
                }
            }
            open = left;
            let pending = self.seize_all(&open, new_threads)?;
            for (nth, signal) in self.await_stops(pending)? {
                open[nth].state = TaskState::Stopped(signal);
            }
        }
        Ok(())
    }

    fn seize_all(
        &mut self,
        open: &[Open],
        threads: Vec<(usize, Pid, Pid)>,
    ) -> Result<Vec<(usize, Pid)>, FreezeError> {
        let mut pending = Vec::with_capacity(threads.len());
        for (nth, pid, tid) in threads {
            let seized = match open[nth].known.len() {
                0 | 1 => seize::seize(pid, tid)?,
                _ => self.deputy.seize(pid, tid)?,
            };
            if seized == Seized::Filtered {
                self.frozen.seccomp_suspended = false;
            }
            if seized != Seized::Dead {
                self.frozen.seized.push(tid);
                self.traced.insert(tid);
                pending.push((nth, tid));
            }
        }
        Ok(pending)
    }

    /// Waits until all interrupted threads have stopped, in whatever order: one that executes a program
    /// stops only when the others of its process have been seen dead. Returns the signals of stopped groups.
    fn await_stops(
        &mut self,
        mut pending: Vec<(usize, Pid)>,
    ) -> Result<Vec<(usize, i32)>, Setback> {
        let (begun, mut progress) = (Instant::now(), Instant::now());
        let mut next_look = begun + VFORK_INTERVAL;
        let mut groups = Vec::new();
        let (mut pause, mut nr_looks) = (SHORTEST_PAUSE, 0);
        loop {
            let before = pending.len();
            pending.retain(|(nth, tid)| match poll_stop(*tid) {
                None => true,
                Some(Stopped::Interrupted) => false,
                Some(Stopped::Group(signal)) => {
                    groups.push((*nth, signal));
                    false
                }
                Some(Stopped::Ended) => {
                    self.traced.remove(tid);
                    false
                }
            });
            if pending.is_empty() {
                return Ok(groups);
            }
            if pending.len() < before {
                (pause, nr_looks) = (SHORTEST_PAUSE, 0);
                progress = Instant::now();
                continue;
            }
            if Instant::now() > next_look {
                self.check_vforks(&pending, begun.elapsed())?;
                next_look += VFORK_INTERVAL;
            }
            if self.deadline.has_passed() && progress.elapsed() > LAST_PATIENCE {
                let (_, tid) = pending[0];
                return Err(Setback::Failed(wont_stop(tid, self.deadline.timeout)));
            }
            nr_looks += 1;
            if nr_looks < QUICK_LOOKS {
                // Most stop within microseconds; any sleep is longer than that.
                std::thread::yield_now();
                continue;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Lets the child of a task in vfork come to its end, or gives this attempt up.
    fn check_vforks(&mut self, pending: &[(usize, Pid)], waited: Duration) -> Result<(), Setback> {
        let Some((tid, child)) = find_vfork(pending) else {
            return Ok(());
        };
        if let Some(group) = self.group.take() {
            group.thaw().map_err(FreezeError::from)?;
        } else if waited > VFORK_PATIENCE {
            return Err(Setback::Vfork { tid, child });
        }
        Ok(())
    }

    /// Reads the registers of the threads of a process, which shows that they have stopped, the leader first.
    ///
    /// Workers of io_uring are given free, where the kernel has let them be traced at all. They are no threads of
    /// the program's, and what they work on has to end before the rings can be dumped.
    fn stopped_threads(&mut self, process: &Open) -> Result<Vec<(Pid, GeneralRegs)>, Setback> {
        let is_traced = |tid: &&Pid| self.traced.contains(tid);
        let mut tids: Vec<Pid> = process.known.iter().filter(is_traced).copied().collect();
        tids.sort_by_key(|tid| (*tid != process.pid, *tid));
        let mut threads = Vec::with_capacity(tids.len());
        let mut workers = Vec::new();
        for tid in tids {
            // Something killed it, or a thread that nobody knew yet has executed a program.
            let regs = ptrace::general_regs(tid).map_err(|_| Setback::Changed)?;
            match tid != process.pid && is_io_worker(tid, &regs) {
                true => workers.push(tid),
                false => threads.push((tid, regs)),
            }
        }
        for tid in &workers {
            let _ = ptrace::detach(*tid, 0);
            self.traced.remove(tid);
        }
        self.frozen.seized.retain(|tid| !workers.contains(tid));
        Ok(threads)
    }

    /// Enters a process whose threads have all stopped, or which has died, into the tree.
    fn settle(&mut self, process: &Open, listed: &[Pid]) -> Result<(), Setback> {
        let pid = process.pid;
        // Gone: it has died and been reaped since; its children show up under their new parent.
        let Ok(stat) = Stat::read(pid) else {
            return Ok(());
        };
        let stopped = self.stopped_threads(process)?;
        if stopped.len() > listed.len() {
            return Err(Setback::Changed);
        }
        let abi = ia32::abi(&stopped);
        let has_segments = |(_, regs): &&(Pid, GeneralRegs)| arch::uses_local_segments(regs);
        let with_segments = stopped
            .iter()
            .filter(has_segments)
            .map(|(tid, _)| (pid, *tid));
        self.frozen.with_local_segments.extend(with_segments);
        let mut threads: Vec<Pid> = stopped.iter().map(|(tid, _)| *tid).collect();
        self.frozen.regs.extend(stopped);
        let state = match threads.is_empty() {
            true => TaskState::Zombie(stat.exit_code),
            false => process.state,
        };
        if threads.is_empty() {
            threads.push(pid);
        }
        self.known.insert(pid);
        self.frozen.add(Task {
            pid,
            ppid: stat.ppid,
            pgid: stat.pgid,
            sid: stat.sid,
            state,
            abi,
            threads,
        });
        Ok(())
    }
}

/// Whether a stopped thread is one that the kernel has made to work for io_uring: it has never been in user space,
/// so nothing can be run in it.
fn is_io_worker(tid: Pid, regs: &GeneralRegs) -> bool {
    let is_nowhere = regs.rip == 0 && regs.rsp == 0;
    is_nowhere && Stat::read(tid).is_ok_and(|stat| stat.is_io_worker())
}

/// Looks whether an interrupted thread has stopped, letting through the signals it was about to take.
pub(super) fn poll_stop(tid: Pid) -> Option<Stopped> {
    loop {
        return match wait::try_wait(tid) {
            Ok(Some(WaitStatus::Stopped {
                signal,
                event: ptrace::EVENT_STOP,
            })) => Some(match signal {
                5 => Stopped::Interrupted,
                stop => Stopped::Group(stop),
            }),
            // A signal was about to be delivered: the task takes it (its handler's frame is built, or it
            // stops, or dies of it), and the interrupt that is still pending stops it right after.
            Ok(Some(WaitStatus::Stopped { signal, event })) => {
                let _ = ptrace::cont(tid, if event == 0 { signal } else { 0 });
                continue;
            }
            Ok(Some(WaitStatus::Continued) | None) => None,
            Ok(Some(WaitStatus::Ended(_))) | Err(_) => Some(Stopped::Ended),
        };
    }
}

fn find_vfork(pending: &[(usize, Pid)]) -> Option<(Pid, Pid)> {
    pending
        .iter()
        .find_map(|(_, tid)| Some((*tid, vfork_child(*tid)?)))
}

/// The child that a task in vfork waits for: the one that uses its memory.
fn vfork_child(tid: Pid) -> Option<Pid> {
    let waits = Status::read(tid, tid).is_ok_and(|status| status.state == b'D');
    let children = if waits {
        walk::children(tid, &walk::threads(tid))
    } else {
        Vec::new()
    };
    let shares = |child: &Pid| kcmp(tid, *child, Resource::Vm).is_ok_and(|order| order.is_eq());
    children.into_iter().find(shares)
}

/// Waits, with the rest of the tree running, for the end of a vfork of an interrupted task.
pub fn await_vfork(tid: Pid, child: Pid, deadline: Deadline) -> Result<(), FreezeError> {
    while poll_stop(tid).is_none() {
        if deadline.has_passed() {
            return Err(FreezeError::Vfork { tid, child });
        }
        std::thread::sleep(LONGEST_PAUSE);
    }
    // ESRCH: it has ended instead.
    let _ = ptrace::detach(tid, 0);
    Ok(())
}

fn wont_stop(tid: Pid, timeout: Duration) -> FreezeError {
    let state = Status::read(tid, tid).map_or('?', |status| char::from(status.state));
    let place = procfs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
    FreezeError::WontStop {
        tid,
        state: format!("{state} in {}", place.trim_end()),
        timeout,
    }
}

/// Lets traced threads go on. Those that have been interrupted and have not stopped yet would do so later,
/// when nobody looks: they are caught first.
pub fn let_go(seized: &[Pid]) {
    let mut running: Vec<Pid> = Vec::new();
    for &tid in seized {
        if ptrace::detach(tid, 0) != Err(Errno::ESRCH) {
            continue;
        }
        match ptrace::interrupt(tid) {
            Ok(()) => running.push(tid),
            // Killed meanwhile by somebody else, which is not ours to undo; its parent waits for us to know.
            Err(_) => drop(wait::try_reap(tid)),
        }
    }
    let begun = Instant::now();
    while !running.is_empty() && begun.elapsed() < CATCH_PATIENCE {
        running.retain(|tid| match poll_stop(*tid) {
            None => true,
            Some(Stopped::Ended) => false,
            Some(_) => {
                let _ = ptrace::detach(*tid, 0);
                false
            }
        });
        std::thread::sleep(SHORTEST_PAUSE);
    }
}

/// Waits for the tracer's part of the death of killed tasks, so that nothing of them is left when their
/// own parents have reaped them.
///
/// Leaders come last: the kernel reports a leader's end only when its tracer has seen those of all its other threads.
/// Any thread of the tracer may see them; what takes the time is that the kernel gives back what it knew of them.
pub fn reap_killed(tree: &Tree, seized: &[Pid]) {
    let leaders: HashSet<Pid> = tree.tasks.iter().map(|task| task.pid).collect();
    let mut tids = seized.to_vec();
    tids.sort_by_key(|tid| leaders.contains(tid));
    crew::share_out(&tids, THREADS_PER_REAPER, |tid| {
        while matches!(wait::wait(*tid), Ok(status) if !matches!(status, WaitStatus::Ended(_))) {}
    });
    tracing::debug!(tasks = tree.tasks.len(), "killed");
}
