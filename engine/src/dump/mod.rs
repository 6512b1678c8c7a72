//! The dump, as a story.
//!
//! ```text
//! survey      look at the running tree; everything in the way is listed before anything stops
//! freeze      every thread stops
//! ask         one program in each task answers what only it can tell; it leaves no trace
//! files       descriptors, paths, contents of pipes and deleted files
//! describe    core, ids, fs, pstree images
//! memory      pages, straight from the stopped tasks
//! seal        the images are complete on disk; the inventory makes them a checkpoint
//! let go      kill, resume or leave stopped
//! ```
//!
//! Until the last step an error lets the tree go on as it was and removes what was written.

mod error;
mod increment;
mod inventory;
mod memory_images;
mod options;
mod reader;
pub(crate) mod report;
mod small_images;

use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use firn_images::ImageSetWriter;
use firn_sys::{Pid, fcntl};

pub(crate) use inventory::root_ids;

use crate::arch::XsaveLayout;
use crate::cancel::CancelFlag;
use crate::crew;
use crate::files::{self, Depth, FileTable, LockWatch, Told};
use crate::freeze::{self, Fate, FreezeOptions, FrozenTree};
use crate::kernel::LazyKernel;
use crate::memory::{self, AddressSpace, Buffers, PageStats, SharedDump, policies};
use crate::obstacle::Obstacle;
use crate::progress::{Phase, Reporter};
use crate::script::{ScriptAction, ScriptContext};
use crate::task::core_image::{self, CoreDumpError, Subject};
use crate::task::ia32;
use crate::task::lsm;
use crate::task::notes;
use crate::task::questions::{self, AskError};
use crate::task::relations::Family;
use crate::task::semaphores::{self, SemaphoreDump};
use crate::task::survey::{self, OwnNamespaces};
use crate::task::traced::Readings;

use increment::{Increment, Trackable};
use memory_images::describe_spaces;
use reader::Reader;
use small_images::{check_answers, describe};

pub use error::DumpError;
pub use options::{Dump, DumpOptions, Leave};
pub use report::DumpReport;
pub(crate) use report::micros;

/// Flags to open directories and executables of tasks with.
const O_PATH_LIKE: u32 = 0;
/// A tree in motion may be in its own way for a moment.
const MAX_TRIES: u32 = 3;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);
/// Descriptors that are open at a time while those of the tasks are looked at, and some more.
const DESCRIPTORS: i32 = 256;
/// How often a caller hears of copied bytes.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);
/// Tasks that are worth a thread of their own to look at them.
const TASKS_PER_THREAD: usize = 4;

/// What was done while the tree was frozen.
struct Captured {
    trackable: Trackable,
    pages: PageStats,
    shared_pages: PageStats,
    memory_time: Duration,
    files: FileTable,
    warnings: Vec<String>,
}

/// What outlasts the thread beside the tracer.
struct Place<'a> {
    images: &'a ImageSetWriter,
    increment: &'a Increment,
    /// The address spaces of the stopped tasks.
    spaces: OnceLock<Vec<AddressSpace>>,
}

/// Runs a dump.
pub(crate) fn run(
    options: &DumpOptions,
    reporter: Reporter,
    cancel: &CancelFlag,
) -> Result<DumpReport, DumpError> {
    let mut operation = Operation {
        options,
        reporter,
        cancel,
        started: Instant::now(),
        warnings: Vec::new(),
        kernel: LazyKernel::default(),
        namespaces: OwnNamespaces::read(),
        told: Told::default(),
        has_rings: false,
        lock_watch: None,
        buffers: Arc::default(),
    };
    operation.run()
}

struct Operation<'a> {
    options: &'a DumpOptions,
    reporter: Reporter,
    cancel: &'a CancelFlag,
    started: Instant,
    /// Found while the tree was running.
    warnings: Vec<String>,
    /// For what no interface of the kernel shows.
    kernel: LazyKernel,
    /// What the tasks must share.
    namespaces: OwnNamespaces,
    /// Descriptors that the survey has seen.
    told: Told,
    /// It has seen io_uring rings.
    has_rings: bool,
    /// Reads all locks from the survey on, where that is worth it.
    lock_watch: Option<LockWatch>,
    /// What memory is copied through.
    buffers: Arc<Buffers>,
}

impl<'a> Operation<'a> {
    fn run(&mut self) -> Result<DumpReport, DumpError> {
        // Where the limit is lower, the table grows when it has to.
        let _ = fcntl::make_room(DESCRIPTORS);
        self.survey(Depth::Quick)?;
        self.script(ScriptAction::PreDump)?;
        for _ in 1..MAX_TRIES {
            match self.try_once() {
                // What the survey did not see may be on its way out, such as a child that has lost its
                // parent and still holds a pipe; the survey tells what stays.
                Err(DumpError::Obstacles(found)) => {
                    tracing::info!(
                        count = found.len(),
                        "in the way of a stopped tree, once more"
                    );
                    std::thread::sleep(BETWEEN_TRIES);
                    self.survey(Depth::Full)?;
                }
                result => return result,
            }
        }
        self.try_once()
    }

    fn try_once(&mut self) -> Result<DumpReport, DumpError> {
        let images = ImageSetWriter::create(&self.options.images_dir)?;
        let mut warnings = self.warnings.clone();
        let mut increment = Increment::begin(self.options, &images, &mut warnings)?;
        let place = Place {
            images: &images,
            increment: &increment,
            spaces: OnceLock::new(),
        };
        let buffers = Arc::clone(&self.buffers);
        let (frozen, captured) = std::thread::scope(|scope| {
            let reader = Reader::start(scope, &increment, buffers);
            // What can be known before the tree stops is not asked while it stands still.
            questions::know_host();
            let shared = SharedDump::new()?;
            let files =
                FileTable::new(&self.options.file_options()).with_kernel(self.kernel.clone());
            let files = files.with_lock_watch(self.lock_watch.take());
            self.reporter.phase(Phase::Freeze);
            let frozen = FrozenTree::freeze(self.options.pid, &self.freeze_options())?;
            let captured = self.capture(&frozen, shared, files, &place, &reader)?;
            Ok::<_, DumpError>((frozen, captured))
        })?;
        self.script(ScriptAction::PostDump)?;
        self.check_cancel()?;
        warnings.extend_from_slice(captured.files.warnings());
        warnings.extend_from_slice(&captured.warnings);
        self.finish(frozen, images, captured, &mut increment, warnings)
    }

    /// Lists everything that can't be dumped, before anything is stopped.
    fn survey(&mut self, depth: Depth) -> Result<(), DumpError> {
        self.reporter.phase(Phase::Survey);
        // A tree with this very process in it would be full of obstacles that are none.
        freeze::check_root(self.options.pid)?;
        let pids = freeze::running_tree(self.options.pid);
        let options = self.options.file_options();
        self.lock_watch = files::watch_locks(&pids);
        let mut has_rings = false;
        let mut look = |depth| -> (Vec<Obstacle>, Told) {
            let tasks = || {
                // The stopped tree would wait while these are opened.
                if pids.iter().any(|pid| notes::are_wanted(*pid)) {
                    self.kernel.get();
                }
                survey_tasks(&pids, &self.namespaces)
            };
            let locks = self.lock_watch.as_ref();
            let files = || files::survey(&pids, &options, depth, locks);
            // A single task with few descriptors has been seen before another thread has begun.
            let (mut found, files) = match pids.len() == 1 && locks.is_none() {
                true => (tasks(), files()),
                false => crew::both(tasks, files),
            };
            if files.has_rings {
                self.kernel.get();
            }
            has_rings |= files.has_rings;
            found.extend(files.obstacles);
            (found, files.told)
        };
        self.warnings = survey::cgroup_warnings(&pids);
        self.warnings.extend(semaphores::survey(&self.kernel));
        let (mut found, mut told) = look(depth);
        if !found.is_empty() && depth == Depth::Quick {
            (found, told) = look(Depth::Full);
        }
        // A task that runs may change a descriptor between two questions about it: what counts stays.
        for _ in 1..MAX_TRIES {
            if !found.is_empty() {
                std::thread::sleep(BETWEEN_TRIES);
                let again;
                (again, told) = look(Depth::Full);
                found.retain(|obstacle| again.contains(obstacle));
            }
        }
        self.told = told;
        self.has_rings = has_rings;
        if found.is_empty() {
            Ok(())
        } else {
            Err(DumpError::Obstacles(found))
        }
    }

    fn freeze_options(&self) -> FreezeOptions {
        FreezeOptions {
            timeout: self.options.timeout,
            cgroup: self.options.freeze_cgroup.clone(),
            journal: self.options.journal.clone(),
        }
    }

    /// Everything that needs the tree to stand still.
    fn capture<'scope>(
        &mut self,
        frozen: &FrozenTree,
        mut shared: SharedDump,
        mut files: FileTable,
        place: &'scope Place<'_>,
        reader: &Reader<'scope>,
    ) -> Result<Captured, DumpError>
    where
        'a: 'scope,
    {
        let (images, increment) = (place.images, place.increment);
        let tree = frozen.tree();
        reader.begin(frozen.shared_tree());
        let mut told = std::mem::take(&mut self.told);
        self.reporter.tasks(tree.tasks.len());
        self.reporter.phase(Phase::Inspect);
        self.check_frozen(frozen)?;
        let looked = questions::look(tree, frozen.regs()).map_err(AskError::from)?;
        let readings = tree.alive().map(Readings::read);
        let readings = readings.collect::<Result<Vec<_>, _>>()?;
        let mut semaphores = SemaphoreDump::collect(tree, &self.kernel);
        // Descriptors that no task is asked for are looked at while the reader reads. Requests of rings may end only
        // where their task executes something, as it does when it is asked.
        let with_answers = !told.is_empty() || self.has_rings;
        if !with_answers {
            files.add_tasks(tree, &mut shared)?;
        }
        let read = reader.spaces()?;
        let spaces = place.spaces.get_or_init(|| read);
        let mut answers = questions::ask(tree, looked, spaces, &told)?;
        self.reporter.phase(Phase::Files);
        if with_answers {
            for (task, answers) in tree.alive().zip(&mut answers) {
                if let Some(close_on_exec) = answers.close_on_exec.take() {
                    files.recall(task.speaker(), &mut told, close_on_exec);
                }
            }
            files.add_tasks(tree, &mut shared)?;
        }
        let mut outside = reader.outside().map_err(CoreDumpError::from)?;
        for ((task, answers), outside) in tree.alive().zip(&answers).zip(&mut outside) {
            if answers.limit_was_raised {
                outside.read_limits(task).map_err(CoreDumpError::from)?;
            }
        }
        self.check_cancel()?;
        self.reporter.phase(Phase::Describe);
        let seccomp = check_answers(tree, &answers, &outside, &mut semaphores)?;
        // These run programs, too.
        files.ask_for_rings(tree)?;
        memory::settle_aio(tree, spaces)?;
        files.check_rings()?;

        self.reporter.phase(Phase::Memory);
        let begun = Instant::now();
        let described =
            describe_spaces(tree, spaces, &answers, increment, &mut files, &mut shared)?;
        let writing = self.begin_memory(described, images, reader);
        let means = core_image::Means {
            layout: XsaveLayout::of_this_cpu(),
            seccomp: &seccomp,
            semaphores: &semaphores,
            kernel: &self.kernel,
        };
        let known = tree
            .alive()
            .zip(answers.iter().zip(&outside).zip(&readings));
        let subjects = known.map(|(task, ((answers, outside), readings))| {
            Subject::ask(task, answers, outside, readings)
        });
        let subjects = subjects.collect::<Result<Vec<_>, _>>()?;
        describe(tree, &subjects, means, &mut files, images)?;
        files.write(images)?;
        let (pages, shared_pages) = self.end_memory(&writing, &shared, images)?;
        let memory_time = begun.elapsed();
        let policies = tree.alive().zip(&answers);
        let policies = policies.map(|(task, answers)| (task.pid, answers.policies.as_slice()));
        Ok(Captured {
            trackable: increment.trackable(spaces, &files),
            pages,
            shared_pages,
            memory_time,
            files,
            warnings: policies::home_warning(policies).into_iter().collect(),
        })
    }

    fn check_frozen(&self, frozen: &FrozenTree) -> Result<(), DumpError> {
        let tree = frozen.tree();
        let mut found = survey::survey_frozen(tree, &self.namespaces);
        let with_segments = frozen.with_local_segments().iter();
        found.extend(with_segments.map(|(pid, tid)| ia32::local_segments(*pid, *tid)));
        if !frozen.is_seccomp_suspended() {
            found.extend(survey::survey_seccomp(tree));
        }
        if !found.is_empty() {
            return Err(DumpError::Obstacles(found));
        }
        let root = tree.root();
        if root.sid != root.pid && !self.options.shell_job {
            return Err(DumpError::OuterSession {
                pid: root.pid,
                sid: root.sid,
            });
        }
        // A restore decides it anew; what it would refuse must not be killed here.
        Family::plan(tree, self.options.shell_job)?;
        Ok(())
    }

    fn finish(
        &mut self,
        frozen: FrozenTree,
        images: ImageSetWriter,
        captured: Captured,
        increment: &mut Increment,
        mut warnings: Vec<String>,
    ) -> Result<DumpReport, DumpError> {
        let (tasks, threads) = (frozen.tree().tasks.len(), frozen.tree().nr_threads());
        let freezing = frozen.freezing();
        self.reporter.phase(Phase::Seal);
        let begun = Instant::now();
        let mut files = captured.files;
        let network = inventory::Network {
            run_id: files.run_id().to_owned(),
            lock_method: files.lock_method(),
            closes_tcp: self.options.sockets.tcp_close,
        };
        let inventory = inventory::inventory(network);
        let tracker = increment.arm(frozen.tree(), &captured.trackable, files.run_id())?;
        let (released, sealed);
        if self.options.leave == Leave::Running {
            // Everything has been read: the tree need not wait for the disk.
            files.release_connections(false);
            released = frozen.release(Fate::Resume);
            sealed = images.seal(&inventory)?;
        } else {
            sealed = images.seal(&inventory)?;
            let killed = self.options.leave == Leave::Killed;
            files.release_connections(killed);
            released = frozen.release(if killed { Fate::Kill } else { Fate::Stop });
        }
        drop(sealed);
        files.keep();
        increment.keep(tracker, &mut warnings);
        let report = DumpReport {
            tasks,
            threads,
            pages: captured.pages.written + captured.shared_pages.written,
            pages_in_parent: captured.pages.in_parent + captured.shared_pages.in_parent,
            bytes: 4096 * (captured.pages.written + captured.shared_pages.written),
            frozen: released.held,
            freezing,
            memory_time: captured.memory_time,
            write_time: begun.elapsed(),
            total: self.started.elapsed(),
            warnings,
        };
        report.write_stats(
            &self.options.work_dir(),
            &captured.pages,
            &captured.shared_pages,
        )?;
        // Whoever hears that the dump is done may count on it that they are gone.
        drop(released);
        Ok(report)
    }

    fn check_cancel(&self) -> Result<(), DumpError> {
        if self.cancel.is_cancelled() {
            Err(DumpError::Cancelled)
        } else {
            Ok(())
        }
    }

    fn script(&self, action: ScriptAction) -> Result<(), DumpError> {
        if self.options.scripts.is_empty() {
            return Ok(());
        }
        let dir = std::fs::File::open(&self.options.images_dir).map_err(|source| {
            DumpError::ImagesDir {
                path: self.options.images_dir.clone(),
                source,
            }
        })?;
        let context = ScriptContext {
            images_dir: dir.as_fd(),
            init_pid: Some(self.options.pid),
        };
        Ok(self.options.scripts.run(action, &context)?)
    }
}

fn survey_tasks(pids: &[Pid], own: &OwnNamespaces) -> Vec<Obstacle> {
    let module = lsm::Module::of_host();
    let of_task = |pid: &Pid| {
        let Some(speaker) = survey::speaker(*pid) else {
            return Vec::new();
        };
        let threads = freeze::threads(speaker);
        let of_threads = || survey::survey(speaker, &threads, own);
        let of_process = || {
            let mut found = memory::survey(speaker);
            found.extend(ia32::survey(speaker));
            found.extend(lsm::survey(speaker, module));
            found
        };
        let (mut found, more) = match threads.len() < survey::MANY_THREADS {
            true => (of_threads(), of_process()),
            false => crew::both(of_threads, of_process),
        };
        found.extend(more);
        let named = |obstacle| Obstacle {
            pid: *pid,
            ..obstacle
        };
        found.into_iter().map(named).collect()
    };
    crew::share_out(pids, TASKS_PER_THREAD, of_task).concat()
}
