//! Putting back what a dump has changed in tasks, when the process that dumped was killed in the middle.
//!
//! A thread is where its note says that it was led, or is as it was already: its registers tell. Nothing is
//! done to a process that has begun after the dump, and so only has the pid of one that was noted.

use std::collections::BTreeMap;

use firn_sys::ptrace::GeneralRegs;
use firn_sys::rlimit::{self, Limited};
use firn_sys::{Pid, pidfd, procfs, ptrace};

use super::journal::{Journal, Noted};
use super::remote::{self, CallSpec, RemoteCall, call_all};
use super::saved::ALL_SIGNALS;
use super::{InjectError, trace};
use crate::arch::Landing;
use crate::files;
use crate::freeze::{self, FreezeError};
use crate::task::limits;

/// How the kernel shows memory that is shared without a file.
const SHARED_MEMORY: &str = "/dev/zero (deleted)";

/// What was put back.
#[derive(Debug, Default)]
pub struct Repair {
    /// Threads that are as they were again.
    pub put_back: usize,
    /// The cgroup of the tree was frozen, and is not any more.
    pub thawed: bool,
    /// TCP connections that were held, and go on.
    pub connections: usize,
    /// The signal that the whole tree was to get, and has now.
    pub signal: Option<i32>,
    /// Threads that could not be put back, and why.
    pub failures: Vec<(Pid, RepairError)>,
}

/// Why a thread could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// It could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// It could not be changed.
    #[error(transparent)]
    Inject(#[from] InjectError),
}

/// Puts back what a journal says, and lets the tasks go on.
///
/// # Preconditions
/// The process that wrote the journal is dead.
pub fn repair(journal: &Journal) -> Repair {
    let mut repair = Repair::default();
    // First, since tasks that run are told EPERM by them. Those of a tree that is to die end without a word, and the
    // lock stays for its restore.
    if let Some((run_id, mut held)) = journal.held().filter(|_| !is_to_die(journal)) {
        held.retain(|connection| journal.knows(connection.pid));
        repair.connections = files::let_connections_go_on(&run_id, &held);
    }
    if let Some(group) = journal.frozen() {
        // Frozen tasks would not stop for a signal, nor go on after it.
        repair.thawed = freeze::thaw(&group).is_ok();
    }
    let mut processes: BTreeMap<i32, Vec<Noted>> = BTreeMap::new();
    for thread in journal.noted() {
        processes.entry(thread.pid.raw()).or_default().push(thread);
    }
    for threads in processes.into_values() {
        if journal.knows(threads[0].tid) {
            put_back_process(threads, &mut repair);
        }
    }
    if let Some((signal, pids)) = journal.signalled() {
        for pid in pids {
            // It can't become another process as long as it is held.
            let process = pidfd::open(pid).ok().filter(|_| journal.knows(pid));
            let _ = process.map(|process| pidfd::send_signal(process, signal));
        }
        repair.signal = Some(signal);
    }
    repair
}

fn is_to_die(journal: &Journal) -> bool {
    const SIGKILL: i32 = 9;
    let signalled = journal.signalled();
    signalled.is_some_and(|(signal, _)| signal == SIGKILL)
}

fn put_back_process(mut threads: Vec<Noted>, repair: &mut Repair) {
    // The thread that makes the calls unmaps the arena last, when no other runs in it any more.
    threads.sort_by_key(|thread| thread.instruction.is_some());
    let mut held = Vec::with_capacity(threads.len());
    for thread in threads {
        match freeze::hold(thread.pid, thread.tid) {
            Ok(true) => held.push(thread),
            // It has ended, as it might have at any time.
            Ok(false) => {}
            Err(error) => repair.failures.push((thread.tid, error.into())),
        }
    }
    for thread in &held {
        match put_back(thread) {
            Ok(()) => repair.put_back += 1,
            Err(error) => repair.failures.push((thread.tid, error.into())),
        }
    }
    for thread in &held {
        let _ = ptrace::detach(thread.tid, 0);
    }
}

fn put_back(thread: &Noted) -> Result<(), InjectError> {
    let tid = thread.tid;
    if let Some((what, soft)) = thread.limit {
        lower(tid, what, soft);
    }
    let regs = ptrace::general_regs(tid).map_err(trace(tid, "read the registers"))?;
    let mask = ptrace::signal_mask(tid).map_err(trace(tid, "read the signal mask"))?;
    if mask | remote::NEVER_BLOCKED != ALL_SIGNALS {
        // It has not been led anywhere, or was put back already.
        return Ok(());
    }
    let is_led = is_led(thread, &regs);
    if let Some(instruction) = thread.instruction.filter(|_| is_led)
        && let Some(arena) = arena_of(thread, &regs)
    {
        let munmap = CallSpec::unmap(thread.abi, arena, thread.arena_len);
        let call = RemoteCall::new(tid, thread.regs, instruction, munmap);
        call_all(&mut [call.landing_on(thread.landing)])?;
    }
    if let Some(config) = thread.dispatch {
        ptrace::set_syscall_dispatch(tid, config)
            .map_err(trace(tid, "put back the syscall user dispatch"))?;
    }
    if is_led {
        ptrace::set_general_regs(tid, &thread.regs)
            .map_err(trace(tid, "put back the registers"))?;
    }
    ptrace::set_signal_mask(tid, thread.mask).map_err(trace(tid, "put back the signal mask"))
}

/// Puts a soft limit back that was raised.
fn lower(tid: Pid, what: Limited, soft: u64) {
    let limit = limits::read(tid)
        .ok()
        .and_then(|all| limits::of(&all, what));
    let raised = limit.and_then(|limit| rlimit::raise_limit_of(tid, what, soft, limit.max).ok());
    drop(raised);
}

/// Whether the thread is where it was led, and not where it was, or further on.
fn is_led(thread: &Noted, regs: &GeneralRegs) -> bool {
    let has_landed = |landing: Landing| landing.address == regs.rip;
    let is_inside = |arena| regs.rip.wrapping_sub(arena) < thread.arena_len;
    thread.landing.is_some_and(has_landed)
        || thread.arena.is_some_and(is_inside)
        || remote::sleeps_for_us(regs)
}

/// Where the arena is, if it is mapped. One that has just been made, and is not noted yet, is the result of the call
/// that the thread has made.
fn arena_of(thread: &Noted, regs: &GeneralRegs) -> Option<u64> {
    let maps = procfs::read_to_string(format!("/proc/{}/maps", thread.tid)).ok()?;
    let address = thread.arena.unwrap_or(regs.rax);
    let start = format!("{address:x}-");
    let line = maps.lines().find(|line| line.starts_with(&start))?;
    line.ends_with(SHARED_MEMORY).then_some(address)
}
