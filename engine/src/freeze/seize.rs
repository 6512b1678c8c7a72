//! Becoming the tracer of threads that may exit or execute a program at that very moment.
//!
//! A thread that executes a program ends all other threads of its process, and the kernel lets it go on only
//! when the tracer has reaped those that are traced. Meanwhile PTRACE_SEIZE of any thread of that process
//! sleeps, as it needs a lock that the execve holds. So a tracer that sleeps there and a thread that waits to
//! be reaped would wait for each other for ever: another thread of the tracer reaps in its place.
//!
//! Source: linux kernel/ptrace.c, ptrace_attach; fs/exec.c, de_thread; kernel/exit.c, do_wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use firn_sys::{Errno, Pid, procfs, ptrace, wait};

use super::FreezeError;
use super::stop::{self, Stopped};
use crate::task::status::{Stat, Status, StatusError};

/// Seizing options: mark syscall stops, so that they can't be taken for a SIGTRAP.
const OPTIONS: u32 = ptrace::O_TRACESYSGOOD;
/// No seccomp filter is to see what is done in a task.
const WITHOUT_SECCOMP: u32 = OPTIONS | ptrace::O_SUSPEND_SECCOMP;
/// A seize that lasts longer sleeps in the kernel.
const LONG_SEIZE: Duration = Duration::from_millis(10);

/// What became of a thread that was to be seized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seized {
    /// It is a zombie or gone, or a worker of io_uring, which is no thread of the program's.
    Dead,
    /// It is traced, and its seccomp filters are suspended.
    Whole,
    /// It is traced, but this process may not suspend its seccomp filters.
    Filtered,
}

/// Seizes and interrupts.
///
/// # Errors
/// Somebody else traces the thread, or this process may not.
pub fn seize(pid: Pid, tid: Pid) -> Result<Seized, FreezeError> {
    let mut seized = Seized::Whole;
    match ptrace::seize(tid, WITHOUT_SECCOMP) {
        Ok(()) => {}
        Err(Errno::ESRCH) => return Ok(Seized::Dead),
        // Suspending needs rights that seizing does not.
        Err(Errno::EPERM) if ptrace::seize(tid, OPTIONS).is_ok() => seized = Seized::Filtered,
        Err(source) => {
            if !is_ours_or_alive(pid, tid, source)? {
                return Ok(Seized::Dead);
            }
        }
    }
    match ptrace::interrupt(tid) {
        Ok(()) | Err(Errno::ESRCH) => Ok(seized),
        Err(source) => Err(FreezeError::Refused { tid, source }),
    }
}

/// Seizes a thread and waits until it has stopped; false when it is dead.
///
/// # Errors
/// As of [`seize`].
pub fn hold(pid: Pid, tid: Pid) -> Result<bool, FreezeError> {
    if seize(pid, tid)? == Seized::Dead {
        return Ok(false);
    }
    loop {
        match stop::poll_stop(tid) {
            Some(stopped) => return Ok(stopped != Stopped::Ended),
            None => std::thread::sleep(stop::SHORTEST_PAUSE),
        }
    }
}

/// Why a seize was refused; true where this very thread is the tracer from an earlier attempt, false where
/// the thread is dead, or a worker of the kernel's.
fn is_ours_or_alive(pid: Pid, tid: Pid, source: Errno) -> Result<bool, FreezeError> {
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
        Status { tracer, .. } if tracer == Pid::this_thread().raw() => Ok(true),
        Status { tracer, .. } if tracer != 0 => {
            let tracer = Pid::from_raw(tracer);
            let name = procfs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            Err(FreezeError::Traced {
                tid,
                tracer,
                tracer_name: name.trim_end().to_owned(),
            })
        }
        // The kernel's own, working for io_uring: nobody can trace it, and it stops with what it works for.
        _ if Stat::read(tid).is_ok_and(|stat| stat.is_io_worker()) => Ok(false),
        _ => Err(FreezeError::Refused { tid, source }),
    }
}

/// The thread that reaps while the tracer sleeps in a seize. It starts with the first process that has
/// several threads, and ends when this is dropped.
#[derive(Debug, Default)]
pub struct Deputy {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    done: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    seized: Vec<Pid>,
    seizing_since: Option<Instant>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|error| error.into_inner())
    }

    fn watch(&self) {
        while !self.done.load(Ordering::Acquire) {
            std::thread::park_timeout(LONG_SEIZE);
            let state = self.lock();
            if state
                .seizing_since
                .is_some_and(|at| at.elapsed() >= LONG_SEIZE)
            {
                for tid in &state.seized {
                    // Most of them live; the tracer finds out about the others by itself.
                    let _ = wait::try_reap(*tid);
                }
            }
        }
    }
}

impl Deputy {
    /// Seizes as [`seize`] does, a thread of a process with several.
    ///
    /// # Errors
    /// As of [`seize`].
    pub fn seize(&mut self, pid: Pid, tid: Pid) -> Result<Seized, FreezeError> {
        let shared = &self.shared;
        if self.thread.is_none() {
            let shared = Arc::clone(shared);
            let named = std::thread::Builder::new().name("firn-reaper".to_owned());
            // Without it all goes well but for an execve at the wrong moment.
            self.thread = named.spawn(move || shared.watch()).ok();
        }
        shared.lock().seizing_since = Some(Instant::now());
        let result = seize(pid, tid);
        let mut state = shared.lock();
        state.seizing_since = None;
        if let Ok(Seized::Whole | Seized::Filtered) = result {
            state.seized.push(tid);
        }
        result
    }
}

impl Drop for Deputy {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
