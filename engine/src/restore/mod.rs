//! The restore, as a story.
//!
//! ```text
//! load        every image is read and understood
//! check       CPU, pids, files, rights: whatever would fail is found before anything is made
//! open        files, pipes and shared memory, by this process, once each
//! plan        a program for every task, thread and helper
//! fork        the root jumps into its program; the tree makes itself
//! fill        memory, as soon as a task has mapped it
//! take over   ptrace gives every thread its registers; the arena goes
//! release     from here on the tree lives without this process
//! free        the network lock goes
//! let go
//! ```
//!
//! Until the release an error kills what was made and removes it, and so does the death of this process.
//! Before it the network lock is up, and stays, so that no connection is ended. What is left to do after it is done by
//! a deputy if this process dies (`deputy.rs`).

mod births;
mod calls;
mod deputy;
mod error;
mod hole;
mod leader;
mod load;
mod options;
mod outside_values;
mod pids;
mod programs;
mod relatives;
mod report;
mod run;
mod stops;
mod takeover;
mod thread;
mod threads;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use firn_images::{ImageDir, ImageKind};
use firn_proto::{CredsEntry, SeccompEntry};
use firn_sys::{Pid, fcntl, rlimit};

use crate::arch::Abi;
use crate::cancel::CancelFlag;
use crate::files::{FileRestoreError, FileStore};
use crate::memory::{AddressRange, MemoryFacts, MemoryPlan, SharedRestore, TaskMemory, plan_tree};
use crate::program::Arena;
use crate::progress::{Phase, Reporter};
use crate::script::{ScriptAction, ScriptContext};
use crate::task::lsm::LabelPlan;
use crate::task::modes::{self, ThreadModes};
use crate::task::posix_timers::TimerIds;
use crate::task::relations::Family;
use crate::task::scheduling::OwnScheduling;
use crate::task::seccomp::SeccompPlan;
use crate::task::status::Status;
use crate::task::{attributes, creds, limits, scheduling, seccomp, semaphores};
use crate::tree::Task;
use load::{Checkpoint, LoadedTask};
use programs::{Ingredients, Programs};
use run::NewTree;
use thread::Inherited;
use threads::Losses;

pub use error::RestoreError;
pub use options::{Restore, RestoreOptions};
pub use report::RestoreReport;

const CAP_SYS_RESOURCE: u32 = 24;
/// The arena begins this far behind the start of the hole; the vdso is parked before it.
const PARKING_LEN: u64 = 2 << 20;

/// Descriptors that the table of this process has room for from the start, when it has no other threads.
const DESCRIPTORS: i32 = 4096;

/// Runs a restore.
pub(crate) fn run(
    options: &RestoreOptions,
    reporter: Reporter,
    cancel: &CancelFlag,
) -> Result<RestoreReport, RestoreError> {
    // Every task has images that are open at once. Where that is forbidden the old limit may do.
    let _limit = rlimit::raise_descriptor_limit(0).ok();
    // Where the limit is lower, or more are wanted, the table grows when it has to.
    let _ = fcntl::make_room(DESCRIPTORS);
    Operation {
        options,
        reporter,
        cancel,
        started: Instant::now(),
    }
    .run()
}

/// Builds the programs of a restore and returns them in words; makes no task.
pub(crate) fn plan(options: &RestoreOptions) -> Result<String, RestoreError> {
    let cancel = CancelFlag::new();
    let mut operation = Operation {
        options,
        reporter: Reporter::none(),
        cancel: &cancel,
        started: Instant::now(),
    };
    let images = ImageDir::open(&options.images_dir)?;
    let loaded = operation.load(&images)?;
    let written = AtomicU64::new(0);
    let (prepared, _) = operation.prepare(&images, loaded, &written)?;
    Ok(prepared.programs.set.to_string())
}

struct Operation<'a> {
    options: &'a RestoreOptions,
    reporter: Reporter,
    cancel: &'a CancelFlag,
    started: Instant,
}

/// Everything that is there before the first task is made.
struct Prepared {
    checkpoint: Checkpoint,
    family: Family,
    memory: Vec<Option<MemoryPlan>>,
    shared: SharedRestore,
    hole: AddressRange,
    programs: Programs,
    /// Which tasks have seccomp filters.
    guarded: Vec<bool>,
    /// What was found out about files.
    warnings: Vec<String>,
}

impl Operation<'_> {
    fn run(&mut self) -> Result<RestoreReport, RestoreError> {
        self.reporter.phase(Phase::Load);
        let images = ImageDir::open(&self.options.images_dir)?;
        let checkpoint = self.load(&images)?;
        pids::check_free(&checkpoint)?;
        self.script(ScriptAction::PreRestore, None)?;
        let xstate = takeover::prepare_xstate(&checkpoint.tasks, &checkpoint.tree)?;
        let nr_sleepers = threads::nr_sleepers(&checkpoint);
        let written = AtomicU64::new(0);
        let (prepared, mut files) = self.prepare(&images, checkpoint, &written)?;
        self.check_cancel()?;

        self.reporter.phase(Phase::Fork);
        let begun = Instant::now();
        let placed = prepared
            .programs
            .set
            .place(prepared.hole.start + PARKING_LEN);
        let len = u64::try_from(placed.len()).expect("lengths fit 64 bits");
        if placed.base() + len > prepared.hole.end {
            return Err(RestoreError::NoHole);
        }
        let arena = Arena::create(&prepared.programs.set, placed)?;
        let how = run::page_fill(&written, self.cancel);
        let tree = NewTree::spawn(
            &prepared.programs,
            &arena,
            &prepared.checkpoint,
            &prepared.family,
            &prepared.guarded,
            self.cancel,
            self.options.sibling,
        )?;
        self.reporter.phase(Phase::Fill);
        let pages = prepared
            .memory
            .iter()
            .flatten()
            .map(MemoryPlan::restored_pages)
            .sum::<u64>();
        let reporter = &mut self.reporter;
        let told = |done| reporter.bytes(done, pages * 4096);
        tree.build(&prepared.memory, &how, told, &mut files)?;
        files.finish()?;
        let fork_time = begun.elapsed();
        let warnings = self.outside_values(&prepared)?;
        prepared.shared.seal()?;

        self.reporter.phase(Phase::Resume);
        let root = tree.root();
        let contents = takeover::Contents {
            xstate: &xstate,
            memory: &prepared.memory,
            how: &how,
        };
        let taken = takeover::take_over(tree, prepared.hole, &contents, nr_sleepers)?;
        self.script(ScriptAction::PostRestore, Some(root))?;
        self.check_cancel()?;
        self.gentle_script(ScriptAction::PreResume, root);
        files.wake_connections()?;
        files.ask_again(&prepared.checkpoint.tree)?;
        prepared.shared.keep();
        let mut deputy = deputy::appoint(&taken, &mut files);
        let released = taken.release(self.options.leave_stopped, deputy.as_ref());
        files.free_network();
        files.keep_mounts();
        released.let_go();
        files.remove_link_remaps();
        if let Some(deputy) = &mut deputy {
            deputy.dismiss();
        }
        self.gentle_script(ScriptAction::PostResume, root);
        let report = self.report(&prepared, root, pages, fork_time, warnings);
        report.write_stats(&self.options.work_dir())?;
        Ok(report)
    }

    fn load(&mut self, images: &ImageDir) -> Result<Checkpoint, RestoreError> {
        let checkpoint = load::load(images)?;
        self.reporter.tasks(checkpoint.tree.tasks.len());
        Ok(checkpoint)
    }

    /// Opens and plans everything. The files are to stay open until the tasks have them.
    fn prepare(
        &mut self,
        images: &ImageDir,
        mut checkpoint: Checkpoint,
        written: &AtomicU64,
    ) -> Result<(Prepared, FileStore), RestoreError> {
        let family = Family::plan(&checkpoint.tree, self.options.shell_job)?;
        let family = pids::with_midwife_pids(family, &checkpoint);
        let mut files = FileStore::load(images)?;
        let executables: Vec<u32> = checkpoint
            .living()
            .map(|(_, task)| task.memory().exe_file_id())
            .collect();
        for (pid, task) in checkpoint.living() {
            files.assign_table(pid, task.ids.files_id);
        }
        let tids = checkpoint.tree.tasks.iter().flat_map(Task::tids);
        let helpers = family.births.iter().filter_map(|birth| birth.pid);
        files.expect_pids(tids.chain(helpers).collect());
        semaphores::check(
            checkpoint
                .living()
                .map(|(pid, task)| (pid, task.semaphores())),
        )?;
        let mut warnings = files.check(&self.options.file_options(), &executables)?;

        let memory_images = checkpoint.living().map(|(_, task)| task.memory());
        let mut shared = SharedRestore::load(images, memory_images)?;
        shared.open_all(images, &run::page_fill(written, self.cancel))?;
        files.open_all(&self.options.file_options(), &shared)?;
        let lost = files.losses()?;
        self.accept(&lost)?;
        warnings.extend(lost);

        let mut used: Vec<AddressRange> = checkpoint
            .living()
            .flat_map(|(_, task)| task.memory().used_ranges())
            .collect();
        used.extend(hole::own_ranges());
        let has_ia32 = has_ia32(&checkpoint)?;
        let reach = match has_ia32 {
            true => hole::Reach::Ia32,
            false => hole::Reach::Native,
        };
        let hole = hole::find(&used, reach).ok_or(RestoreError::NoHole)?;
        let directories = open_directories(&checkpoint, &mut files)?;
        let facts = MemoryFacts {
            vdso_choice: self.options.vdso,
            ..MemoryFacts::probe(has_ia32)?
        };
        let memory = plan_memory(&mut checkpoint, &family, hole, &facts)?;
        let own = inherited()?;
        let filters = plan_seccomp(images, &checkpoint)?;
        let timer_ids = if firn_sys::task::can_choose_timer_ids() {
            TimerIds::Wanted
        } else {
            TimerIds::Walked
        };
        let ingredients = Ingredients {
            checkpoint: &checkpoint,
            family: &family,
            memory: &memory,
            kernel_vdso: facts.vdsos.native.as_ref(),
            parked_vdso: hole.start,
            hole,
            shared: &shared,
            directories: &directories,
            own: &own,
            own_limits: &limits::read(Pid::this())?,
            may_raise_limits: creds::permits(&own.creds, CAP_SYS_RESOURCE),
            seccomp: &filters,
            timer_ids,
            labels: &LabelPlan::new(checkpoint.lsmtype, &self.options.labels)?,
            nodes: &facts.nodes,
            is_own_root: &is_own_root,
        };
        let mut programs = programs::build(&ingredients, &mut files)?;
        for (pid, task) in checkpoint.living() {
            let lost = |core| scheduling::affinity_warning(thread::part(core), &own.sched);
            for what in task.cores.iter().filter_map(lost) {
                programs.losses.add(pid, what);
            }
            if own.is_filtered {
                programs.losses.add(pid, seccomp::INHERITED);
            }
            for creds in task.credentials() {
                if let Some(capabilities) = creds::missing(creds, &own.creds) {
                    return Err(RestoreError::Capabilities { pid, capabilities });
                }
                for what in creds::losses(creds, &own.creds) {
                    programs.losses.add(pid, what);
                }
            }
            let modes = task
                .cores
                .iter()
                .filter_map(|core| thread::part(core).firn.as_ref());
            for what in modes.filter_map(|modes| modes::loss(modes, &own.modes)) {
                programs.losses.add(pid, what);
            }
            let policies = task.cores.iter().filter_map(thread::mempolicy);
            for what in policies.filter_map(|policy| policy.loss(&facts.nodes)) {
                programs.losses.add(pid, what);
            }
        }
        for memory in memory.iter().flatten() {
            for what in memory.policy_losses() {
                programs.losses.add(memory.image().pid(), what);
            }
        }
        self.accept_losses(&programs.losses)?;
        let guarded = filters.iter().map(Option::is_some).collect();
        let prepared = Prepared {
            checkpoint,
            family,
            memory,
            shared,
            hole,
            programs,
            guarded,
            warnings,
        };
        Ok((prepared, files))
    }

    /// Sets what is a file in /proc; returns what could not be set.
    fn outside_values(&self, prepared: &Prepared) -> Result<Vec<String>, RestoreError> {
        let losses = outside_values::set(&prepared.checkpoint);
        self.accept_losses(&losses)?;
        let planned = prepared.programs.losses.sentences();
        Ok([planned, losses.sentences(), prepared.warnings.clone()].concat())
    }

    /// What can't come back as it was is only said, unless nothing may be lost.
    fn accept_losses(&self, losses: &Losses) -> Result<(), RestoreError> {
        self.accept(&losses.sentences())
    }

    fn accept(&self, lost: &[String]) -> Result<(), RestoreError> {
        if self.options.strict && !lost.is_empty() {
            return Err(RestoreError::Losses(lost.to_vec()));
        }
        Ok(())
    }

    fn report(
        &self,
        prepared: &Prepared,
        root: Pid,
        pages: u64,
        fork_time: Duration,
        warnings: Vec<String>,
    ) -> RestoreReport {
        let shared = prepared
            .memory
            .iter()
            .flatten()
            .map(MemoryPlan::shared_pages);
        let (compared, skipped) = shared.fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        RestoreReport {
            pid: root,
            tasks: prepared.checkpoint.tree.tasks.len(),
            threads: prepared.checkpoint.tree.nr_threads(),
            pages,
            bytes: pages * 4096,
            pages_compared: compared,
            pages_shared: skipped,
            fork_time,
            total: self.started.elapsed(),
            warnings,
        }
    }

    fn check_cancel(&self) -> Result<(), RestoreError> {
        if self.cancel.is_cancelled() {
            Err(RestoreError::Cancelled)
        } else {
            Ok(())
        }
    }

    fn script(&self, action: ScriptAction, root: Option<Pid>) -> Result<(), RestoreError> {
        if self.options.scripts.is_empty() {
            return Ok(());
        }
        let path = &self.options.images_dir;
        let dir = std::fs::File::open(path).map_err(|source| RestoreError::ImagesDir {
            path: path.clone(),
            source,
        })?;
        let context = ScriptContext {
            images_dir: dir.as_fd(),
            init_pid: root,
        };
        Ok(self.options.scripts.run(action, &context)?)
    }

    /// A script whose failure is only logged.
    fn gentle_script(&self, action: ScriptAction, root: Pid) {
        if let Err(error) = self.script(action, Some(root)) {
            tracing::error!("{action} script: {error}");
        }
    }
}

/// Whether there are 32-bit programs, which the kernel has to run then.
fn has_ia32(checkpoint: &Checkpoint) -> Result<bool, RestoreError> {
    let mut alive = checkpoint.tree.alive();
    let Some(task) = alive.find(|task| task.abi == Abi::Ia32) else {
        return Ok(false);
    };
    let pid = task.pid;
    let is_run = firn_sys::probe::ia32_calls();
    is_run.map_err(|_| RestoreError::NoIa32 { pid })?;
    Ok(true)
}

fn plan_memory(
    checkpoint: &mut Checkpoint,
    family: &Family,
    hole: AddressRange,
    facts: &MemoryFacts,
) -> Result<Vec<Option<MemoryPlan>>, RestoreError> {
    // Makers come before those they make, which may stand behind them in the tree.
    let mut in_order: Vec<usize> = (0..checkpoint.tasks.len()).collect();
    in_order.sort_by_key(|nth| family.of_task(*nth));
    let mut tasks = Vec::new();
    let mut position = HashMap::new();
    for nth in in_order {
        let maker = (family.makers(nth)).find_map(|maker| position.get(&maker).copied());
        if let LoadedTask::Living(task) = &mut checkpoint.tasks[nth] {
            position.insert(nth, tasks.len());
            tasks.push(TaskMemory {
                instruction_pointers: task.instruction_pointers(),
                image: task.take_memory(),
                maker,
            });
        }
    }
    let mut plans: Vec<Option<MemoryPlan>> =
        (plan_tree(tasks, hole, facts)?.into_iter().map(Some)).collect();
    let mut plan_of = |nth| position.get(&nth).and_then(|at| plans[*at].take());
    Ok((0..checkpoint.tasks.len()).map(&mut plan_of).collect())
}

/// Credentials and scheduling of this thread, which every restored task starts with.
fn inherited() -> Result<Inherited, RestoreError> {
    let me = Pid::this();
    let status = Status::read(me, firn_sys::task::gettid())?;
    let creds: CredsEntry = creds::to_image(&status, firn_sys::task::securebits());
    let sched = OwnScheduling::read().map_err(|source| RestoreError::Spawn { pid: me, source })?;
    let personality = attributes::personality(me).unwrap_or(0);
    Ok(Inherited {
        creds,
        sched,
        modes: ThreadModes::own(),
        is_filtered: status.seccomp != 0,
        personality,
        ignored_signals: firn_sys::signal::ignored(),
        shadow_stack: status.shadow_stack,
    })
}

/// Seccomp of each process that has some, in the order of the tree.
fn plan_seccomp(
    images: &ImageDir,
    checkpoint: &Checkpoint,
) -> Result<Vec<Option<SeccompPlan>>, RestoreError> {
    let image: SeccompEntry = images
        .read_one_if_there(ImageKind::Seccomp, 0)?
        .unwrap_or_default();
    let tasks = checkpoint.tree.tasks.iter().zip(&checkpoint.tasks);
    let plan = |(task, loaded): (&Task, &LoadedTask)| {
        let LoadedTask::Living(living) = loaded else {
            return Ok(None);
        };
        let threads = task.threads.iter().copied();
        let threads = threads.zip(living.cores.iter().map(thread::part));
        let plan = SeccompPlan::of_process(&image, threads)?;
        Ok(Some(plan).filter(|plan| !plan.is_empty()))
    };
    tasks.map(plan).collect()
}

/// Descriptors of working and root directory of each task.
fn open_directories(
    checkpoint: &Checkpoint,
    files: &mut FileStore,
) -> Result<Vec<Option<(i32, i32)>>, FileRestoreError> {
    checkpoint
        .tasks
        .iter()
        .map(|loaded| match loaded {
            LoadedTask::Dead(_) => Ok(None),
            LoadedTask::Living(task) => {
                let cwd = files.link_fd(task.fs.cwd_id, None)?;
                Ok(Some((cwd, files.link_fd(task.fs.root_id, None)?)))
            }
        })
        .collect()
}

/// True when the descriptor is this process's own root directory.
fn is_own_root(fd: i32) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same =
        |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    match (
        std::fs::metadata(format!("/proc/self/fd/{fd}")),
        std::fs::metadata("/proc/self/root/"),
    ) {
        (Ok(a), Ok(b)) => same(a, b),
        _ => false,
    }
}
