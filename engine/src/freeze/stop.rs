//! Seizing threads and waiting until each has stopped.

use std::time::{Duration, Instant};

use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::wait::Status as WaitStatus;
use firn_sys::{Errno, Pid, procfs, ptrace, wait};

use super::{FreezeError, FrozenTree, walk};
use crate::task::status::{Stat, Status, StatusError};
use crate::tree::{Task, TaskState, Tree};

/// Rounds after which a tree that still grows is given up.
const MAX_ROUNDS: usize = 10_000;
/// How long a vfork may take before it is taken for one that does not end.
const VFORK_PATIENCE: Duration = Duration::from_millis(500);
/// Seizing options: mark syscall stops, so that they can't be taken for a SIGTRAP.
const OPTIONS: u32 = ptrace::O_TRACESYSGOOD;

/// How a thread came to its stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    /// By our interrupt.
    Interrupted,
    /// It belongs to a group stopped by this signal.
    Group(i32),
    /// It ended before.
    Ended,
}

/// Stops the tree level by level and fills `frozen`.
pub fn stop_all(frozen: &mut FrozenTree, root: Pid, timeout: Duration) -> Result<(), FreezeError> {
    let deadline = Instant::now() + timeout;
    let mut level = vec![root];
    for _ in 0..MAX_ROUNDS {
        stop_level(frozen, &level, deadline, timeout)?;
        level = newcomers(frozen);
        if level.is_empty() {
            return finish(frozen, root);
        }
        if Instant::now() > deadline {
            break;
        }
    }
    Err(FreezeError::NeverSettled(root))
}

/// Children of frozen tasks that are not frozen themselves.
fn newcomers(frozen: &FrozenTree) -> Vec<Pid> {
    let mut new = Vec::new();
    for task in &frozen.tree.tasks {
        if task.is_alive() {
            new.extend(walk::children(task.pid, &task.threads));
        }
    }
    new.retain(|pid| !frozen.knows(*pid));
    new
}

fn finish(frozen: &mut FrozenTree, root: Pid) -> Result<(), FreezeError> {
    frozen.sort(root);
    match frozen.tree.tasks.first() {
        Some(task) if task.pid == root && task.is_alive() => Ok(()),
        Some(task) if task.pid == root => Err(FreezeError::RootIsZombie(root)),
        _ => Err(FreezeError::Gone(root)),
    }
}

/// Stops all threads of the given processes: first all are interrupted, then all are waited for.
fn stop_level(
    frozen: &mut FrozenTree,
    pids: &[Pid],
    deadline: Instant,
    timeout: Duration,
) -> Result<(), FreezeError> {
    let mut open: Vec<(Pid, Vec<Pid>, TaskState)> = pids
        .iter()
        .map(|pid| (*pid, Vec::new(), TaskState::Alive))
        .collect();
    while !open.is_empty() {
        let mut interrupted = Vec::new();
        open.retain_mut(|(pid, known, state)| {
            let new: Vec<Pid> = walk::threads(*pid)
                .into_iter()
                .filter(|tid| !known.contains(tid))
                .collect();
            known.extend(&new);
            interrupted.extend(new.iter().map(|tid| (*pid, *tid)));
            if new.is_empty() {
                settle(frozen, *pid, std::mem::take(known), *state);
            }
            !new.is_empty()
        });
        let mut seized = Vec::new();
        for (pid, tid) in interrupted {
            if seize(pid, tid)? {
                frozen.seized.push(tid);
                seized.push((pid, tid));
            }
        }
        for (pid, tid) in seized {
            match await_stop(tid, deadline, timeout)? {
                Stopped::Interrupted => {}
                Stopped::Group(signal) => {
                    if let Some(task) = open.iter_mut().find(|(known, ..)| *known == pid) {
                        task.2 = TaskState::Stopped(signal);
                    }
                }
                Stopped::Ended => frozen.seized.retain(|known| *known != tid),
            }
        }
    }
    Ok(())
}

/// Enters a process whose threads have all stopped, or which has died, into the tree.
fn settle(frozen: &mut FrozenTree, pid: Pid, known: Vec<Pid>, state: TaskState) {
    // ESRCH: it has died and been reaped since; its children show up under their new parent.
    let Ok(stat) = Stat::read(pid) else { return };
    let mut threads: Vec<Pid> = known
        .into_iter()
        .filter(|tid| frozen.seized.contains(tid))
        .collect();
    threads.sort_by_key(|tid| (*tid != pid, *tid));
    let state = if threads.is_empty() {
        TaskState::Zombie(stat.exit_code)
    } else {
        state
    };
    if threads.is_empty() {
        threads.push(pid);
    }
    frozen.add(Task {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgid,
        sid: stat.sid,
        state,
        threads,
    });
}

/// Seizes and interrupts; false when the thread is a zombie or gone.
fn seize(pid: Pid, tid: Pid) -> Result<bool, FreezeError> {
    match ptrace::seize(tid, OPTIONS) {
        Ok(()) => {}
        Err(Errno::ESRCH) => return Ok(false),
        Err(source) => return why_not_seized(pid, tid, source),
    }
    match ptrace::interrupt(tid) {
        Ok(()) | Err(Errno::ESRCH) => Ok(true),
        Err(source) => Err(FreezeError::Refused { tid, source }),
    }
}

fn why_not_seized(pid: Pid, tid: Pid, source: Errno) -> Result<bool, FreezeError> {
    let status = match Status::read(pid, tid) {
        Ok(status) => status,
        Err(StatusError::Read { .. }) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    match status {
        Status {
            state: b'Z' | b'X', ..
        } => Ok(false),
        Status { kthread: true, .. } => Err(FreezeError::KernelThread(tid)),
        Status { tracer, .. } if tracer != 0 => {
            let tracer = Pid::from_raw(tracer);
            let name = procfs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            Err(FreezeError::Traced {
                tid,
                tracer,
                tracer_name: name.trim_end().to_owned(),
            })
        }
        _ => Err(FreezeError::Refused { tid, source }),
    }
}

/// Waits until an interrupted thread has stopped, letting through the signals it was about to take.
fn await_stop(tid: Pid, deadline: Instant, timeout: Duration) -> Result<Stopped, FreezeError> {
    let mut pause = Duration::from_micros(10);
    let begun = Instant::now();
    loop {
        match wait::try_wait(tid) {
            Ok(Some(WaitStatus::Stopped {
                signal,
                event: ptrace::EVENT_STOP,
            })) => {
                return Ok(match signal {
                    5 => Stopped::Interrupted,
                    stop => Stopped::Group(stop),
                });
            }
            // A signal was about to be delivered: the task takes it (its handler's frame is built, or it
            // stops, or dies of it), and the interrupt that is still pending stops it right after.
            Ok(Some(WaitStatus::Stopped { signal, event: 0 })) => {
                let _ = ptrace::cont(tid, signal);
            }
            Ok(Some(WaitStatus::Stopped { .. })) => {
                let _ = ptrace::cont(tid, 0);
            }
            Ok(Some(WaitStatus::Continued) | None) => {
                if begun.elapsed() > VFORK_PATIENCE
                    && let Some(child) = vfork_child(tid)
                {
                    return Err(FreezeError::Vfork { tid, child });
                }
                if Instant::now() > deadline {
                    return Err(wont_stop(tid, timeout));
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(1));
            }
            Ok(Some(WaitStatus::Ended(_))) | Err(_) => return Ok(Stopped::Ended),
        }
    }
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

fn wont_stop(tid: Pid, timeout: Duration) -> FreezeError {
    let state = Status::read(tid, tid).map_or('?', |status| char::from(status.state));
    let place = procfs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
    FreezeError::WontStop {
        tid,
        state: format!("{state} in {}", place.trim_end()),
        timeout,
    }
}

/// Waits for the tracer's part of the death of killed tasks, so that nothing of them is left when their
/// own parents have reaped them.
///
/// Threads come before their leader, which was seized first: the kernel reports a leader's end only when
/// its tracer has seen those of all its other threads.
pub fn reap_killed(tree: &Tree, seized: &[Pid]) {
    for &tid in seized.iter().rev() {
        while matches!(wait::wait(tid), Ok(status) if !matches!(status, WaitStatus::Ended(_))) {}
    }
    tracing::debug!(tasks = tree.tasks.len(), "killed");
}
