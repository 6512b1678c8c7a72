//! Running a syscall program inside stopped tasks, and leaving no trace of it.
//!
//! ```text
//! stopped thread ── mmap by its vdso's call ──────> arena in the task, mapped here as well
//!                ── all threads run their programs and park
//!                ── interrupted again, arena unmapped, registers and masks put back
//! ```
//!
//! Nothing is written into the task's own memory, not even for the first call. From the first changed
//! register to the last one put back is the only time in which the death of the coordinator would harm
//! the task, so all tasks of a tree go through it together and it takes well under a millisecond a task.
//! The kernel offers no remedy: with its tracer a tracee loses its stop, and the only thing that holds it
//! then, a group stop, is visible to its parent. The command line keeps the coordinator in a process
//! that nobody has a reason to kill (`firn_sys::worker`).

mod remote;
mod room;

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use firn_sys::mapping::SharedMapping;
use firn_sys::ptrace::{DispatchConfig, GeneralRegs, RseqConfig};
use firn_sys::{Errno, Pid, process_vm, ptrace, task as sys_task, wait};

use crate::arch::{self, Abi, regs};
use crate::program::{Arena, ProgramFailure, ProgramId, ProgramSet, WaitOutcome};

pub use remote::{CallSpec, RemoteCall, call_all, find_syscall_instruction};

/// How long the programs of one task may take; they hold nothing but calls that answer at once.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(20);
const ALL_SIGNALS: u64 = u64::MAX;

/// Why a program could not be run inside a task.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// ptrace or wait failed for a stopped thread.
    #[error("can't {what} of task {tid}")]
    Trace {
        /// The thread.
        tid: Pid,
        /// What was tried, such as `read the registers`.
        what: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The thread died under our hands.
    #[error("task {0} died while it was inspected")]
    Died(Pid),
    /// The thread stopped in a way that none of our requests explains.
    #[error("task {tid} stopped unexpectedly (signal {signal}, event {event})")]
    UnexpectedStop {
        /// The thread.
        tid: Pid,
        /// Stop signal.
        signal: i32,
        /// ptrace event.
        event: i32,
    },
    /// No executable memory of the task holds an instruction that makes a system call.
    #[error("task {0} has no executable mapping with a system call instruction to start from")]
    NoSyscallInstruction(Pid),
    /// A remote call failed.
    #[error("task {tid}: {what} failed")]
    Call {
        /// The thread.
        tid: Pid,
        /// What the call was for.
        what: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The task has no room for the arena.
    #[error("task {tid} has no room for the {} KiB that are needed in it for a moment: {reason}", len >> 10)]
    NoRoom {
        /// The thread.
        tid: Pid,
        /// Bytes of the arena.
        len: usize,
        /// What is at its limit, and what to do.
        reason: String,
    },
    /// The arena can't be seen from here.
    #[error("can't map {} here (needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN)", path.display())]
    MapFiles {
        /// The map_files link.
        path: PathBuf,
        /// Cause.
        source: Errno,
    },
    /// A record failed.
    #[error(transparent)]
    Program(#[from] ProgramFailure),
    /// The programs did not end.
    #[error("the program inside task {0} did not end in time")]
    Stuck(Pid),
}

/// One process to run programs in: its stopped threads, each with its program.
#[derive(Debug)]
pub struct Job {
    /// The process.
    pub pid: Pid,
    /// Whose calls bring the arena; the programs run as 64-bit code in any case.
    pub abi: Abi,
    /// Threads and their programs.
    pub threads: Vec<(Pid, ProgramId)>,
    /// The programs.
    pub set: ProgramSet,
}

impl Job {
    /// The thread by which the process is seen in /proc, also when its main thread is dead.
    fn speaker(&self) -> Pid {
        self.threads.first().map_or(self.pid, |(tid, _)| *tid)
    }
}

/// How a stopped thread was found, and is left.
#[derive(Debug, Clone, Copy)]
pub struct ThreadStop {
    /// General registers; out of a critical section that the stop has ended.
    pub regs: GeneralRegs,
    /// Blocked signals.
    pub mask: u64,
    /// Where its rseq area is; None where the kernel does not tell.
    pub rseq: Option<RseqConfig>,
    /// Its syscall user dispatch; None where the kernel does not tell.
    pub dispatch: Option<DispatchConfig>,
}

/// What has answered in a process: the programs' memory, and its threads as they were found.
#[derive(Debug)]
pub struct Answered {
    /// The arena with the answers.
    pub arena: Arena,
    /// The threads, in the order of the job's.
    pub stops: Vec<ThreadStop>,
}

/// A thread's state before it was touched, put back on drop.
#[derive(Debug)]
struct Saved {
    tid: Pid,
    stop: ThreadStop,
    /// Syscall user dispatch was on.
    has_dispatched: bool,
    restored: bool,
}

impl Saved {
    fn save(tid: Pid) -> Result<Saved, InjectError> {
        let mut regs = ptrace::general_regs(tid).map_err(trace(tid, "read the registers"))?;
        let rseq = ptrace::rseq_config(tid).ok();
        // Critical sections make no calls.
        if let Some(rseq) = rseq
            && regs::call_instruction(&regs).is_none()
        {
            leave_critical_section(tid, rseq, &mut regs);
        }
        let mask = ptrace::signal_mask(tid).map_err(trace(tid, "read the signal mask"))?;
        ptrace::set_signal_mask(tid, ALL_SIGNALS).map_err(trace(tid, "set the signal mask"))?;
        let dispatch = ptrace::syscall_dispatch(tid).ok();
        Ok(Saved {
            tid,
            stop: ThreadStop {
                regs,
                mask,
                rseq,
                dispatch,
            },
            has_dispatched: dispatch.is_some_and(|config| stop_dispatch(tid, config)),
            restored: false,
        })
    }

    fn restore(&mut self) -> Result<(), InjectError> {
        self.restored = true;
        if let Some(config) = self.stop.dispatch.filter(|_| self.has_dispatched) {
            ptrace::set_syscall_dispatch(self.tid, config)
                .map_err(trace(self.tid, "put back the syscall user dispatch"))?;
        }
        ptrace::set_general_regs(self.tid, &self.stop.regs)
            .map_err(trace(self.tid, "put back the registers"))?;
        ptrace::set_signal_mask(self.tid, self.stop.mask)
            .map_err(trace(self.tid, "put back the signal mask"))
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        if self.restored {
            return;
        }
        // After an error the thread may still run its program: stop it, then put it back.
        if ptrace::general_regs(self.tid).is_err() {
            let _ = ptrace::interrupt(self.tid);
            let _ = wait::wait(self.tid);
        }
        let _ = self.restore();
    }
}

fn trace(tid: Pid, what: &'static str) -> impl Fn(Errno) -> InjectError {
    move |source| match source {
        Errno::ESRCH => InjectError::Died(tid),
        source => InjectError::Trace { tid, what, source },
    }
}

/// A thread stopped inside an rseq critical section would complete it unprotected once it had run
/// anything else, because the kernel clears the section then: send it to its abort handler instead, as
/// the kernel does at any preemption.
///
/// Source: linux include/uapi/linux/rseq.h, struct rseq and struct rseq_cs.
fn leave_critical_section(tid: Pid, config: RseqConfig, regs: &mut GeneralRegs) {
    if config.address == 0 {
        return;
    }
    let Some(section) = read_u64(tid, config.address + 8).filter(|section| *section != 0) else {
        return;
    };
    let (Some(start), Some(len), Some(abort)) = (
        read_u64(tid, section + 8),
        read_u64(tid, section + 16),
        read_u64(tid, section + 24),
    ) else {
        return;
    };
    if regs.rip.wrapping_sub(start) < len {
        regs.rip = abort;
    }
}

/// Switches syscall user dispatch off, which would hand our calls to the task's SIGSYS handler. Returns whether it was
/// on.
fn stop_dispatch(tid: Pid, config: DispatchConfig) -> bool {
    let off = DispatchConfig::default();
    config.mode != 0 && ptrace::set_syscall_dispatch(tid, off).is_ok()
}

fn read_u64(tid: Pid, address: u64) -> Option<u64> {
    let mut bytes = [0u8; 8];
    let range = process_vm::RemoteRange { address, len: 8 };
    (process_vm::read(tid, &[range], &mut bytes).ok()? == 8).then(|| u64::from_le_bytes(bytes))
}

/// A task with an arena in it.
struct Entered {
    saved: Vec<Saved>,
    syscall_at: u64,
    address: u64,
    arena: Arena,
}

/// Runs every job's programs, all tasks together, and returns the arenas with the answers. All threads
/// are back in their stops with the registers and masks they had.
///
/// # Errors
/// See [`InjectError`]; registers and masks are put back in any case.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread.
pub fn run(jobs: &[Job]) -> Result<Vec<Arena>, InjectError> {
    let answered = run_and_tell(jobs)?;
    Ok(answered.into_iter().map(|task| task.arena).collect())
}

/// Does what [`run`] does, and returns as well how the threads were found, so that nobody has to ask the kernel again.
///
/// # Errors
/// See [`InjectError`]; registers and masks are put back in any case.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread.
pub fn run_and_tell(jobs: &[Job]) -> Result<Vec<Answered>, InjectError> {
    run_prepared(jobs, |_| {})
}

/// Does what [`run_and_tell`] does, and calls `prepare` with the arenas in the order of the jobs, when it is known where
/// they are and before the programs start.
///
/// # Errors
/// See [`InjectError`]; registers and masks are put back in any case.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread.
pub fn run_prepared(
    jobs: &[Job],
    prepare: impl FnOnce(&[&Arena]),
) -> Result<Vec<Answered>, InjectError> {
    let mut saved = Vec::with_capacity(jobs.len());
    for job in jobs {
        let threads: Result<Vec<Saved>, _> = job
            .threads
            .iter()
            .map(|(tid, _)| Saved::save(*tid))
            .collect();
        saved.push(threads?);
    }
    let mut entered = enter(jobs, saved)?;
    prepare(&entered.iter().map(|task| &task.arena).collect::<Vec<_>>());
    for (job, task) in jobs.iter().zip(&entered) {
        start(job, task)?;
    }
    let mut held_back = Vec::new();
    for (job, task) in jobs.iter().zip(&entered) {
        held_back.extend(await_end(job, task)?);
    }
    stop_again(jobs)?;
    held_back.extend(leave(jobs, &mut entered)?);
    for pid in held_back {
        let _ = sys_task::kill(pid, remote::SIGSTOP);
    }
    let answered = entered.into_iter().map(|task| Answered {
        arena: task.arena,
        stops: task.saved.iter().map(|saved| saved.stop).collect(),
    });
    Ok(answered.collect())
}

/// Maps an arena into every task and here.
fn enter(jobs: &[Job], saved: Vec<Vec<Saved>>) -> Result<Vec<Entered>, InjectError> {
    let lens: Vec<usize> = jobs.iter().map(|job| job.set.place(0).len()).collect();
    let mut calls = Vec::with_capacity(jobs.len());
    for ((job, threads), len) in jobs.iter().zip(&saved).zip(&lens) {
        let leader = &threads[0];
        let syscall_at = match remote::instruction_just_used(leader.tid, &leader.stop.regs, job.abi)
        {
            Some(address) => address,
            None => find_syscall_instruction(leader.tid, job.abi)?,
        };
        calls.push(RemoteCall::new(
            leader.tid,
            leader.stop.regs,
            syscall_at,
            CallSpec::map_arena(job.abi, *len),
        ));
    }
    call_all(&mut calls)?;
    let mapped: Vec<Result<u64, InjectError>> = calls.iter().zip(&lens).map(mapped_at).collect();
    if mapped.iter().any(Result::is_err) {
        take_back(jobs, &calls, &mapped, &lens);
    }
    let mapped = mapped.into_iter().collect::<Result<Vec<u64>, _>>()?;
    let mut entered = Vec::with_capacity(jobs.len());
    let known = saved.into_iter().zip(&lens).zip(mapped);
    for ((job, call), ((saved, len), address)) in jobs.iter().zip(&calls).zip(known) {
        let mapping = see(job.speaker(), address, *len)?;
        let mut arena = Arena::attach(mapping, &job.set, job.set.place(address));
        arena.had_no_room = room::is_lacking(call);
        entered.push(Entered {
            saved,
            syscall_at: call.instruction(),
            address,
            arena,
        });
    }
    Ok(entered)
}

/// Where a task has its arena.
fn mapped_at((call, len): (&RemoteCall, &usize)) -> Result<u64, InjectError> {
    match call.result() {
        Ok(address) => Ok(address),
        Err(source) if room::is_lacking(call) => room::map(call, *len, source),
        Err(_) => remote::map_in_two_parts(call, *len),
    }
}

/// Unmaps the arenas of tasks beside which another one could not get any.
fn take_back(
    jobs: &[Job],
    calls: &[RemoteCall],
    mapped: &[Result<u64, InjectError>],
    lens: &[usize],
) {
    let known = jobs.iter().zip(calls).zip(mapped).zip(lens);
    let unmapping = known.filter_map(|(((job, call), mapped), len)| {
        let (address, len) = (*mapped.as_ref().ok()?, u64::try_from(*len).ok()?);
        Some(call.followed_by(CallSpec::unmap(job.abi, address, len)))
    });
    // The failure that is being told is the one to know of.
    let _ = call_all(&mut unmapping.collect::<Vec<_>>());
}

/// Maps the arena of a task into this process.
fn see(pid: Pid, address: u64, len: usize) -> Result<SharedMapping, InjectError> {
    const PAGE: u64 = 4096;
    let end = address + u64::try_from(len).expect("lengths fit 64 bits");
    let open = |start: u64, end: u64| {
        let path = PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
        let file = OpenOptions::new().read(true).write(true).open(&path);
        file.map_err(|error| InjectError::MapFiles {
            path,
            source: error.into(),
        })
    };
    let here = |source| InjectError::Call {
        tid: pid,
        what: "mapping its arena here",
        source,
    };
    match open(address, end) {
        Ok(whole) => SharedMapping::of_file(whole.as_fd(), len).map_err(here),
        Err(error) => {
            let (Ok(code), Ok(rest)) = (open(address, address + PAGE), open(address + PAGE, end))
            else {
                return Err(error);
            };
            SharedMapping::of_two_files(code.as_fd(), 4096, rest.as_fd(), len).map_err(here)
        }
    }
}

fn start(job: &Job, task: &Entered) -> Result<(), InjectError> {
    for (saved, (tid, program)) in task.saved.iter().zip(&job.threads) {
        let (record, context) = task.arena.entry(*program);
        let regs = arch::at_executor(&saved.stop.regs, task.address, record, context);
        ptrace::set_general_regs(*tid, &regs).map_err(trace(*tid, "set the registers"))?;
        ptrace::cont(*tid, 0).map_err(trace(*tid, "start the program"))?;
    }
    Ok(())
}

/// Returns the process if a SIGSTOP was held back meanwhile.
fn await_end(job: &Job, task: &Entered) -> Result<Option<Pid>, InjectError> {
    let nr = u32::try_from(job.threads.len()).expect("fewer than 2^32 threads");
    let mut held_back = None;
    let alive = || {
        for (tid, _) in &job.threads {
            match wait::try_wait(*tid) {
                Ok(None) => {}
                // SIGSTOP can't be blocked: hold it back until the program is done.
                Ok(Some(wait::Status::Stopped { event, .. })) => {
                    if event == 0 {
                        held_back = Some(job.pid);
                    }
                    let _ = ptrace::cont(*tid, 0);
                }
                Ok(Some(_)) | Err(_) => return Err(*tid),
            }
        }
        Ok(())
    };
    match task.arena.wait_parked(&job.set, nr, PROGRAM_TIMEOUT, alive) {
        WaitOutcome::Reached => Ok(held_back),
        WaitOutcome::Failed(failure) => Err(failure.into()),
        WaitOutcome::Dead(tid) => Err(InjectError::Died(tid)),
        WaitOutcome::TimedOut => Err(InjectError::Stuck(job.pid)),
    }
}

/// Brings every parked thread back into a ptrace stop.
fn stop_again(jobs: &[Job]) -> Result<(), InjectError> {
    for (tid, _) in jobs.iter().flat_map(|job| &job.threads) {
        ptrace::interrupt(*tid).map_err(trace(*tid, "stop the program"))?;
    }
    for (tid, _) in jobs.iter().flat_map(|job| &job.threads) {
        match wait::wait(*tid) {
            Ok(wait::Status::Stopped { .. }) => {}
            Ok(_) => return Err(InjectError::Died(*tid)),
            Err(source) => return Err(trace(*tid, "wait for the stop")(source)),
        }
    }
    Ok(())
}

/// Unmaps the arenas and puts every thread back. Returns processes whose SIGSTOP was held back.
fn leave(jobs: &[Job], entered: &mut [Entered]) -> Result<Vec<Pid>, InjectError> {
    let mut calls: Vec<RemoteCall> = entered
        .iter()
        .zip(jobs)
        .map(|(task, job)| {
            let len = u64::try_from(task.arena.placed().len()).expect("lengths fit 64 bits");
            let leader = &task.saved[0];
            let munmap = CallSpec::unmap(job.abi, task.address, len);
            RemoteCall::new(leader.tid, leader.stop.regs, task.syscall_at, munmap)
        })
        .collect();
    call_all(&mut calls)?;
    for (call, job) in calls.iter().zip(jobs) {
        let what = "unmapping the arena";
        call.result().map_err(|source| InjectError::Call {
            tid: job.pid,
            what,
            source,
        })?;
    }
    for saved in entered.iter_mut().flat_map(|task| &mut task.saved) {
        saved.restore()?;
    }
    Ok(calls
        .iter()
        .zip(jobs)
        .filter(|(call, _)| call.swallowed_stop())
        .map(|(_, job)| job.pid)
        .collect())
}
