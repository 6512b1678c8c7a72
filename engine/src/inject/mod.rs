//! Running a syscall program inside stopped tasks, and leaving no trace of it.
//!
//! ```text
//! stopped thread ── mmap by its vdso's call ──────> arena in the task, mapped here as well
//!                ── all threads run their programs and park
//!                ── interrupted again, arena unmapped, registers and masks put back
//! ```
//!
//! Nothing is written into the task's own memory, not even for the first call. From the first changed
//! register to the last one put back the death of the coordinator would harm the task: with its tracer a tracee
//! loses its stop, and the only thing that holds it then, a group stop, is visible to its parent. So all tasks of a
//! tree go through it together, which takes well under a millisecond a task; what is changed stands in a
//! [`Journal`]; and a thread that loses its tracer waits where it comes to no harm, asleep or on a landing
//! ([`arch::Landing`]), until another process puts it back ([`repair`]). The command line has that process
//! (`firn_sys::worker`).

mod journal;
mod landings;
mod remote;
mod repair;
mod room;
mod saved;

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use firn_sys::mapping::SharedMapping;
use firn_sys::{Errno, Pid, ptrace, task as sys_task, wait};

use self::remote::finish_all;
use self::saved::Saved;
use crate::arch::{self, Abi};
use crate::memory::AddressRange;
use crate::program::{Arena, ProgramFailure, ProgramId, ProgramSet, WaitOutcome};

pub(crate) use journal::HeldConnection;
pub use journal::Journal;
pub use remote::{CallSpec, RemoteCall, call_all, find_syscall_instruction};
pub use repair::{Repair, RepairError, repair};
pub use saved::ThreadStop;

/// How long the programs of one task may take; they hold nothing but calls that answer at once.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(20);

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

/// How a process was found.
#[derive(Debug)]
pub struct Found {
    /// Its threads, in the order of the job's.
    pub stops: Vec<ThreadStop>,
    /// The mapping of code in which the first of them is, where that is known.
    pub code: Option<AddressRange>,
}

/// What has answered in a process: the programs' memory, and its threads as they were found.
#[derive(Debug)]
pub struct Answered {
    /// The arena with the answers.
    pub arena: Arena,
    /// The threads, in the order of the job's.
    pub stops: Vec<ThreadStop>,
}

fn trace(tid: Pid, what: &'static str) -> impl Fn(Errno) -> InjectError {
    move |source| match source {
        Errno::ESRCH => InjectError::Died(tid),
        source => InjectError::Trace { tid, what, source },
    }
}

/// A task with an arena in it.
struct Entered {
    saved: Vec<Saved>,
    /// The call that has brought it.
    call: RemoteCall,
    address: u64,
    arena: Arena,
}

/// Runs every job's programs, all tasks together, and returns the arenas with the answers. All threads
/// are back in their stops with the registers and masks they had; what is changed meanwhile is noted in the journal.
///
/// # Errors
/// See [`InjectError`]; registers and masks are put back in any case.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread.
pub fn run(jobs: &[Job], journal: Option<&Journal>) -> Result<Vec<Arena>, InjectError> {
    let answered = run_prepared(jobs, journal, |_| {})?;
    Ok(answered.into_iter().map(|task| task.arena).collect())
}

/// Does what [`run`] does in processes that are known to be as they were `found`, and returns how their threads were,
/// so that nobody has to ask the kernel again.
///
/// # Errors
/// See [`InjectError`]; registers and masks are put back in any case.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread, and what was found stands in the order of the jobs and
/// their threads.
pub fn run_and_tell(
    jobs: &[Job],
    found: Vec<Found>,
    journal: Option<&Journal>,
) -> Result<Vec<Answered>, InjectError> {
    run_stopped(jobs, found, journal, |_| {})
}

/// Does what [`run`] does, and calls `prepare` with the arenas in the order of the jobs, when it is known where
/// they are and before the programs start.
///
/// # Errors
/// See [`InjectError`]; registers and masks are put back in any case.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread.
pub fn run_prepared(
    jobs: &[Job],
    journal: Option<&Journal>,
    prepare: impl FnOnce(&[&Arena]),
) -> Result<Vec<Answered>, InjectError> {
    let found = jobs.iter().map(|job| {
        let tids = job.threads.iter().map(|(tid, _)| *tid);
        let stops: Result<Vec<ThreadStop>, _> = tids.map(ThreadStop::read).collect();
        stops.map(|stops| Found { stops, code: None })
    });
    let found: Result<Vec<Found>, InjectError> = found.collect();
    run_stopped(jobs, found?, journal, prepare)
}

fn run_stopped(
    jobs: &[Job],
    found: Vec<Found>,
    journal: Option<&Journal>,
    prepare: impl FnOnce(&[&Arena]),
) -> Result<Vec<Answered>, InjectError> {
    let mut entered = enter(jobs, found, journal)?;
    prepare(&entered.iter().map(|task| &task.arena).collect::<Vec<_>>());
    for (job, task) in jobs.iter().zip(&mut entered) {
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
    if let Some(journal) = journal {
        journal.clear();
    }
    let answered = entered.into_iter().map(|task| Answered {
        arena: task.arena,
        stops: task.saved.iter().map(|saved| saved.stop).collect(),
    });
    Ok(answered.collect())
}

/// Maps an arena into every task and here.
fn enter(
    jobs: &[Job],
    found: Vec<Found>,
    journal: Option<&Journal>,
) -> Result<Vec<Entered>, InjectError> {
    let lens: Vec<usize> = jobs.iter().map(|job| job.set.place(0).len()).collect();
    let mut saved = Vec::with_capacity(jobs.len());
    let mut calls = Vec::with_capacity(jobs.len());
    for ((job, found), len) in jobs.iter().zip(found).zip(&lens) {
        let stops = job.threads.iter().zip(found.stops);
        let save =
            |((tid, _), stop): (&(Pid, ProgramId), _)| Saved::new(*tid, stop, job, *len, journal);
        let mut threads: Vec<Saved> = stops.map(save).collect();
        calls.push(first_call(job, &mut threads[0], found.code, *len)?);
        saved.push(threads);
    }
    for (call, threads) in calls.iter().zip(&mut saved) {
        threads[0].hold()?;
        call.begin()?;
    }
    finish_all(&mut calls)?;
    let places = calls.iter().zip(&mut saved).zip(&lens);
    let mapped: Vec<Result<u64, InjectError>> = places.map(mapped_at).collect();
    if mapped.iter().any(Result::is_err) {
        take_back(jobs, &calls, &mapped, &lens);
    }
    let mapped = mapped.into_iter().collect::<Result<Vec<u64>, _>>()?;
    let mut entered = Vec::with_capacity(jobs.len());
    let known = saved.into_iter().zip(&lens).zip(mapped);
    for ((job, call), ((mut saved, len), address)) in jobs.iter().zip(calls).zip(known) {
        for thread in &mut saved {
            thread.note(|noted| noted.arena = Some(address));
        }
        let mapping = see(job.speaker(), address, *len)?;
        let mut arena = Arena::attach(mapping, &job.set, job.set.place(address));
        arena.had_no_room = room::is_lacking(&call);
        entered.push(Entered {
            saved,
            call,
            address,
            arena,
        });
    }
    Ok(entered)
}

/// Prepares the call by which the first thread of a process maps an arena, and notes where that leads it.
fn first_call(
    job: &Job,
    thread: &mut Saved,
    code: Option<AddressRange>,
    len: usize,
) -> Result<RemoteCall, InjectError> {
    let (tid, regs) = (thread.tid, thread.stop.regs);
    let instruction = match remote::instruction_just_used(tid, &regs, job.abi) {
        Some(address) => address,
        None => find_syscall_instruction(tid, job.abi)?,
    };
    let call = RemoteCall::new(tid, regs, instruction, CallSpec::map_arena(job.abi, len));
    if !thread.is_noted() {
        return Ok(call);
    }
    let here = code.filter(|code| code.contains(regs.rip));
    let landing = match here {
        Some(code) => landings::find(tid, regs.rip, code, job.abi),
        None => landings::find(tid, instruction, landings::page_of(instruction), job.abi),
    };
    thread.note(|noted| {
        noted.instruction = Some(instruction);
        noted.landing = landing;
    });
    Ok(call.landing_on(landing))
}

/// Where a task has its arena.
fn mapped_at(
    ((call, threads), len): ((&RemoteCall, &mut Vec<Saved>), &usize),
) -> Result<u64, InjectError> {
    match call.result() {
        Ok(address) => Ok(address),
        Err(source) if room::is_lacking(call) => room::map(call, &mut threads[0], *len, source),
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

fn start(job: &Job, task: &mut Entered) -> Result<(), InjectError> {
    for (nth, (saved, (tid, program))) in task.saved.iter_mut().zip(&job.threads).enumerate() {
        if nth > 0 {
            saved.hold()?;
        }
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
        match wait::wait_soon(*tid) {
            Ok(wait::Status::Stopped { .. }) => {}
            Ok(_) => return Err(InjectError::Died(*tid)),
            Err(source) => return Err(trace(*tid, "wait for the stop")(source)),
        }
    }
    Ok(())
}

/// Unmaps the arenas and puts every thread back: first those that would run in what is unmapped. Returns
/// processes whose SIGSTOP was held back.
fn leave(jobs: &[Job], entered: &mut [Entered]) -> Result<Vec<Pid>, InjectError> {
    for saved in entered.iter_mut().flat_map(|task| &mut task.saved[1..]) {
        saved.restore()?;
    }
    let unmap = |(task, job): (&Entered, &Job)| {
        let len = u64::try_from(task.arena.placed().len()).expect("lengths fit 64 bits");
        let munmap = CallSpec::unmap(job.abi, task.address, len);
        task.call.followed_by(munmap)
    };
    let mut calls: Vec<RemoteCall> = entered.iter().zip(jobs).map(unmap).collect();
    call_all(&mut calls)?;
    for (call, job) in calls.iter().zip(jobs) {
        let what = "unmapping the arena";
        call.result().map_err(|source| InjectError::Call {
            tid: job.pid,
            what,
            source,
        })?;
    }
    for task in entered.iter_mut() {
        task.saved[0].restore()?;
    }
    Ok(calls
        .iter()
        .zip(jobs)
        .filter(|(call, _)| call.swallowed_stop())
        .map(|(_, job)| job.pid)
        .collect())
}
