//! The core image: one per thread, put together from what the other modules read.
//!
//! Source: facts of CRIU's format: the leader's image carries the process (`tc`), every thread's its own
//! part (`thread_core`), a zombie's only `tc`.

use firn_images::{ImageKind, ImageSetWriter, ImageWriteError};
use firn_proto::{
    CoreEntry, FirnDispatchEntry, FirnRestartEntry, FirnTaskEntry, RseqEntry, TaskCoreEntry,
    ThreadCoreEntry, ThreadInfoX86, ThreadSasEntry, core_entry,
};
use firn_sys::ptrace::{DispatchConfig, GeneralRegs, RseqConfig, SiginfoBytes, SignalQueue};
use firn_sys::{Errno, Pid, process_vm, ptrace};

use super::attributes::ThreadAnswers;
use super::child_events::ChildEvent;
use super::outside::Outside;
use super::questions::TaskAnswers;
use super::seccomp::{SeccompDump, SeccompDumpError};
use super::semaphores::SemaphoreDump;
use super::status::{Stat, Status, StatusError};
use super::traced::{self, Called, Readings, Told};
use super::{connects, creds, notes, scheduling, signals};
use crate::arch::restart::{self, Remainder, Restart};
use crate::arch::waits;
use crate::arch::{Abi, XsaveError, XsaveLayout, regs};
use crate::crew;
use crate::inject::ThreadStop;
use crate::kernel::LazyKernel;
use crate::tree::{Task, TaskState};

/// States as images number them.
pub mod state {
    /// It runs or sleeps.
    pub const ALIVE: u32 = 1;
    /// A zombie.
    pub const DEAD: u32 = 2;
    /// Stopped by a signal.
    pub const STOPPED: u32 = 3;
    /// Firn's own: its leader has exited, others of its threads live. CRIU, which does not know such tasks,
    /// refuses the number. A signal that has stopped it stands in `stop_signo`.
    pub const LEADER_EXITED: u32 = 20_000;
}

/// The cgroup set of the dumper, which all tasks are taken to be in.
pub const ROOT_CG_SET: u32 = 1;
/// Length of a robust list head.
const ROBUST_LIST_LEN: u64 = 24;

/// Threads that are worth a thread of our own to make their images.
const THREADS_PER_WRITER: usize = 32;

/// Failure to dump per-task state.
#[derive(Debug, thiserror::Error)]
pub enum CoreDumpError {
    /// ptrace or another call about a thread failed.
    #[error("can't read {what} of task {tid}")]
    Thread {
        /// The thread.
        tid: Pid,
        /// What was read.
        what: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The extended state can't be understood.
    #[error("task {tid}")]
    Xsave {
        /// The thread.
        tid: Pid,
        /// Cause.
        source: XsaveError,
    },
    /// Seccomp filters could not be read.
    #[error(transparent)]
    Seccomp(#[from] SeccompDumpError),
    /// /proc could not be read.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// An image could not be written.
    #[error(transparent)]
    Write(#[from] ImageWriteError),
}

/// What is known of a thread before its image is made.
struct FoundOut<'a> {
    answers: &'a ThreadAnswers,
    stop: &'a ThreadStop,
    status: &'a Status,
    called: &'a Called,
    told: &'a Told,
    /// Its extended state, as ptrace gives it.
    area: &'a [u8],
}

/// The two parts of a thread's image.
struct ThreadState {
    core: ThreadCoreEntry,
    info: ThreadInfoX86,
}

/// What the images of all tasks are made with.
#[derive(Clone, Copy)]
pub(crate) struct Means<'a> {
    pub layout: &'a XsaveLayout,
    pub seccomp: &'a SeccompDump,
    pub semaphores: &'a SemaphoreDump,
    pub kernel: &'a LazyKernel,
}

/// Writes the core images of all living tasks that have been asked, threads and all, several at a time.
///
/// # Errors
/// See [`CoreDumpError`].
pub(crate) fn dump(
    subjects: &[Subject<'_>],
    means: Means<'_>,
    images: &ImageSetWriter,
) -> Result<(), CoreDumpError> {
    let mut threads = Vec::new();
    for subject in subjects {
        threads.extend((0..subject.task.threads.len()).map(|nth| (subject, nth)));
    }
    let write = |(subject, nth): &(&Subject<'_>, usize)| subject.write_thread(*nth, means, images);
    let written = crew::share_out(&threads, THREADS_PER_WRITER, write);
    written.into_iter().collect()
}

pub(super) fn failed(tid: Pid, what: &'static str) -> impl Fn(Errno) -> CoreDumpError {
    move |source| CoreDumpError::Thread { tid, what, source }
}

/// A task whose images are to be made: all that is known of it.
pub(crate) struct Subject<'a> {
    pub task: &'a Task,
    pub answers: &'a TaskAnswers,
    pub outside: &'a Outside,
    readings: &'a Readings,
    /// Signals that wait for the process.
    process_queue: Vec<SiginfoBytes>,
    /// About each thread, in the order of the task's threads.
    told: Vec<Told>,
}

impl<'a> Subject<'a> {
    /// Asks what is missing yet.
    ///
    /// # Errors
    /// A thread died.
    ///
    /// # Preconditions
    /// All threads are in ptrace stops of the calling thread, with the registers they were stopped with.
    pub(crate) fn ask(
        task: &'a Task,
        answers: &'a TaskAnswers,
        outside: &'a Outside,
        readings: &'a Readings,
    ) -> Result<Subject<'a>, CoreDumpError> {
        Ok(Subject {
            task,
            answers,
            outside,
            readings,
            process_queue: ptrace::pending_signals(task.speaker(), SignalQueue::Process)
                .map_err(failed(task.speaker(), "the process's pending signals"))?,
            told: traced::ask(task, &answers.threads, outside)?,
        })
    }

    /// Writes the image of the `nth` thread, with that of the process if it is the first.
    fn write_thread(
        &self,
        nth: usize,
        means: Means<'_>,
        images: &ImageSetWriter,
    ) -> Result<(), CoreDumpError> {
        let Subject {
            task,
            answers,
            outside,
            readings,
            ..
        } = *self;
        let tid = task.threads[nth];
        let found = FoundOut {
            answers: &answers.threads[nth],
            stop: &answers.stops[nth],
            status: &outside.threads[nth],
            called: &readings.called[nth],
            told: &self.told[nth],
            area: readings.state(nth),
        };
        let mut state = describe_thread(tid, task.abi, &found, means)?;
        outside.labels[nth].describe(&mut state.core);
        let policy = &answers.mempolicies[nth];
        if policy.is_some() {
            state.core.firn.get_or_insert_default().mempolicy = Some(policy.to_image());
        }
        let mut tc = None;
        if nth == 0 {
            let mut process = self.describe_process(&state);
            process.firn.get_or_insert_default().semaphores = means.semaphores.of_task(task.pid);
            tc = Some(process);
        }
        if !task.has_leader()
            && let Some(process) = tc.take()
        {
            let leader = dead_leader(task, process, found.answers.securebits)?;
            write_entry(images, task.pid, &leader)?;
        }
        let entry = CoreEntry {
            mtype: core_entry::March::X8664.into(),
            thread_info: Some(state.info),
            tc,
            thread_core: Some(state.core),
            ..CoreEntry::default()
        };
        write_entry(images, tid, &entry)
    }

    /// What the image of the first living thread has of the process.
    fn describe_process(&self, speaker: &ThreadState) -> TaskCoreEntry {
        let (task, answers, outside) = (self.task, self.answers, self.outside);
        let stop_signo = match task.state {
            TaskState::Stopped(signal) => Some(signal.cast_unsigned()),
            TaskState::Alive | TaskState::Zombie(_) => None,
        };
        let membarrier = answers.process.membarrier;
        TaskCoreEntry {
            task_state: if stop_signo.is_some() {
                state::STOPPED
            } else {
                state::ALIVE
            },
            personality: outside.personality,
            blk_sigset: speaker.core.blk_sigset.unwrap_or(0),
            comm: outside.threads[0].name.clone(),
            timers: Some(answers.timers.clone()),
            rlimits: Some(outside.limits.clone()),
            signals_s: Some(signals::queue_to_image(&self.process_queue)),
            loginuid: Some(outside.loginuid),
            oom_score_adj: outside.oom_score_adj,
            sigactions: signals::actions_to_image(&answers.actions, task.abi),
            child_subreaper: answers.process.subreaper.then_some(true),
            stop_signo,
            membarrier_registration_mask: (membarrier != 0).then_some(membarrier),
            firn: Some(FirnTaskEntry {
                child_event: child_event(task.state, answers.event),
                ..extension(answers, outside)
            }),
            ..TaskCoreEntry::default()
        }
    }
}

fn write_entry(images: &ImageSetWriter, tid: Pid, entry: &CoreEntry) -> Result<(), CoreDumpError> {
    let id = u64::from(tid.to_image());
    Ok(images.write_one(ImageKind::Core, id, entry)?)
}

/// The core image of a leader that has exited before other threads: the process, how the leader has
/// ended, and what /proc goes on showing of it.
fn dead_leader(
    task: &Task,
    mut process: TaskCoreEntry,
    securebits: u32,
) -> Result<CoreEntry, CoreDumpError> {
    let status = Status::read(task.pid, task.pid)?;
    let creds = creds::to_image(&status, securebits);
    let mut core = ThreadCoreEntry {
        creds: Some(creds),
        comm: Some(status.name.clone()),
        cg_set: Some(ROOT_CG_SET),
        ..ThreadCoreEntry::default()
    };
    scheduling::dump(task.pid, &mut core).map_err(failed(task.pid, "the scheduling"))?;
    process.task_state = state::LEADER_EXITED;
    process.exit_code = Stat::read_thread(task.pid, task.pid)?
        .exit_code
        .cast_unsigned();
    process.comm = status.name;
    Ok(CoreEntry {
        mtype: core_entry::March::X8664.into(),
        tc: Some(process),
        thread_core: Some(core),
        ..CoreEntry::default()
    })
}

/// Writes the core image of a zombie: how it died and what it was called.
///
/// # Errors
/// See [`CoreDumpError`].
pub fn dump_zombie(pid: Pid, status: i32, images: &ImageSetWriter) -> Result<(), CoreDumpError> {
    let stat = Stat::read(pid)?;
    let name = Status::read(pid, pid)?.name;
    let tc = TaskCoreEntry {
        task_state: state::DEAD,
        exit_code: status.cast_unsigned(),
        comm: name,
        firn: Some(FirnTaskEntry {
            exit_signal: Some(stat.exit_signal.cast_unsigned()),
            ..FirnTaskEntry::default()
        }),
        ..TaskCoreEntry::default()
    };
    let mtype = core_entry::March::X8664.into();
    let entry = CoreEntry {
        mtype,
        tc: Some(tc),
        ..CoreEntry::default()
    };
    images.write_one(ImageKind::Core, u64::from(pid.to_image()), &entry)?;
    Ok(())
}

fn describe_thread(
    tid: Pid,
    abi: Abi,
    found: &FoundOut<'_>,
    means: Means<'_>,
) -> Result<ThreadState, CoreDumpError> {
    let Means {
        layout,
        seccomp,
        kernel,
        ..
    } = means;
    let failed = |what| failed(tid, what);
    let FoundOut {
        answers,
        stop,
        status,
        called,
        told,
        area,
    } = found;
    let ThreadStop { regs, mask, .. } = **stop;
    let regs = connects::settled(tid, regs, abi);
    let mut fpregs = layout
        .to_image(area)
        .map_err(|source| CoreDumpError::Xsave { tid, source })?;
    let (robust, robust_len) = match answers.ia32_robust_list {
        Some(list) => list,
        None => called
            .robust_list
            .map_err(failed("the robust futex list"))?,
    };
    let (sp, flags, size) = answers.altstack;
    let scheduling = called.scheduling.clone();
    let mut core = ThreadCoreEntry {
        futex_rla: robust,
        futex_rla_len: u32::try_from(robust_len.min(ROBUST_LIST_LEN)).unwrap_or(0),
        blk_sigset: Some(mask),
        sas: Some(ThreadSasEntry {
            ss_sp: sp,
            ss_size: size,
            ss_flags: flags,
        }),
        pdeath_sig: (answers.pdeath_signal != 0).then_some(answers.pdeath_signal),
        signals_p: Some(signals::queue_to_image(&told.queue)),
        creds: Some(creds::to_image(status, answers.securebits)),
        comm: Some(status.name.clone()),
        rseq_entry: stop.rseq.and_then(dump_rseq),
        cg_set: Some(ROOT_CG_SET),
        firn_restart: restart(tid, &regs, abi, kernel),
        ..scheduling.map_err(failed("the scheduling"))?
    };
    let extension = core.firn.get_or_insert_default();
    answers.modes.describe(extension);
    extension.dispatch = stop.dispatch.and_then(dump_dispatch);
    if let Some(shadow_stack) = told.shadow_stack {
        let described = shadow_stack.describe(&mut fpregs, extension);
        described.map_err(failed("the shadow stack"))?;
    }
    seccomp.describe(tid, &mut core);
    let info = ThreadInfoX86 {
        clear_tid_addr: answers.tid_address,
        gpregs: regs::to_image(&regs, abi),
        fpregs,
        tls: told.segments.clone(),
    };
    Ok(ThreadState { core, info })
}

/// Before Linux 6.4 nobody but the task knows.
fn dump_dispatch(config: DispatchConfig) -> Option<FirnDispatchEntry> {
    (config.mode != 0).then_some(FirnDispatchEntry {
        mode: config.mode,
        selector: config.selector,
        offset: config.offset,
        len: config.len,
    })
}

/// On kernels that can't tell, a restored thread has no rseq, which libc tolerates.
fn dump_rseq(config: RseqConfig) -> Option<RseqEntry> {
    (config.address != 0).then_some(RseqEntry {
        rseq_abi_pointer: config.address,
        rseq_abi_size: config.len,
        signature: config.signature,
        rseq_cs_pointer: None,
    })
}

/// What the kernel has promised to a thread interrupted in a system call.
fn restart(
    tid: Pid,
    regs: &GeneralRegs,
    abi: Abi,
    kernel: &LazyKernel,
) -> Option<FirnRestartEntry> {
    let mut restart = restart::pending(regs)?;
    if restart.is_second(abi)
        && let Some(nr) = restart::first_call(regs, abi, |at, bytes| read_all(tid, at, bytes))
            .or_else(|| notes::first_call(kernel, tid, regs, abi))
    {
        restart = Restart { nr, ..restart };
    }
    let remaining = if let Some(at) = restart::sleep_remainder(restart, regs, abi) {
        read_timespec(tid, at)
    } else if restart::is_untold_sleep(restart, regs, abi) {
        notes::sleep_left(kernel, tid)
    } else {
        let wait = waits::of_stopped(restart, regs, abi);
        wait.and_then(|wait| notes::wait_left(kernel, tid, wait))
    };
    Some(FirnRestartEntry {
        nr: restart.nr,
        result: restart.result,
        remaining_sec: remaining.map(|(sec, _)| sec),
        remaining_nsec: remaining.map(|(_, nsec)| nsec),
    })
}

/// Seconds and nanoseconds of a timespec in the task's memory.
fn read_timespec(tid: Pid, at: Remainder) -> Option<(u64, u64)> {
    let mut bytes = [0u8; 16];
    read_all(tid, at.address, &mut bytes[..2 * at.width])?;
    let number = |from: usize| {
        let mut number = [0u8; 8];
        number[..at.width].copy_from_slice(&bytes[from..from + at.width]);
        u64::from_le_bytes(number)
    };
    let (sec, nsec) = (number(0), number(at.width));
    (nsec < 1_000_000_000).then_some((sec, nsec))
}

fn read_all(tid: Pid, address: u64, bytes: &mut [u8]) -> Option<()> {
    let len = bytes.len();
    let range = process_vm::RemoteRange { address, len };
    let got = process_vm::read(tid, &[range], bytes).ok()?;
    (got == len).then_some(())
}

/// What the parent has yet to be told, as far as that is not what a restore does by itself.
fn child_event(state: TaskState, event: Option<ChildEvent>) -> Option<u32> {
    let nothing = matches!(state, TaskState::Stopped(_)).then_some(0);
    event.map(ChildEvent::to_image).or(nothing)
}

fn extension(answers: &TaskAnswers, outside: &Outside) -> FirnTaskEntry {
    let mut entry = FirnTaskEntry {
        exit_signal: Some(outside.exit_signal.cast_unsigned()),
        cmdline: outside.cmdline.clone(),
        exe: outside.exe.clone(),
        autogroup_nice: outside.autogroup_nice,
        lock_future: Some(answers.process.lock_future).filter(|flags| *flags != 0),
        ..FirnTaskEntry::default()
    };
    answers.process.modes.describe(&mut entry);
    entry
}
