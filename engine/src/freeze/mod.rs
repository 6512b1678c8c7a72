//! Stopping a whole tree, so that nothing in it moves until it is let go.
//!
//! Every thread is seized by ptrace and interrupted, level by level: a process whose threads have all
//! stopped can't make children, so its list of children is final, and the children come next. What is
//! born or orphaned meanwhile is found by going round until nothing new appears. Where the tree has a
//! cgroup (v2) to itself, that group is frozen first, which stops even a fork storm at once.
//!
//! A task that has lent its memory to a child by vfork can't be stopped before the child gives it back; and
//! a process that executes a program in one of its threads, or dies, while it is being stopped is not what it
//! was. Both let the whole tree go on, and it is stopped once more.
//!
//! A frozen tree is its own undo guard: dropped, it lets every thread go on exactly where it was.

mod cgroup;
mod seize;
mod stop;
mod walk;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use firn_sys::ptrace::GeneralRegs;
use firn_sys::{Errno, Pid, task as sys_task};

use self::cgroup::FrozenGroup;
use self::stop::{Deadline, Setback};
use crate::inject::Journal;
use crate::task::status::StatusError;
use crate::tree::{Task, TaskState, Tree};

pub use cgroup::CgroupFreezeError;
pub(crate) use cgroup::thaw;
pub(crate) use seize::hold;
pub use walk::{check_root, children, running_tree, speaker, threads};

/// Why a tree could not be frozen. Nothing of it stays stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No such process.
    #[error("there is no process {0}")]
    Gone(Pid),
    /// The root is dead already.
    #[error("process {0} is a zombie: it is dead and only waits for its parent")]
    RootIsZombie(Pid),
    /// A kernel thread has no user state.
    #[error("task {0} is a kernel thread, which can't be dumped")]
    KernelThread(Pid),
    /// The dumper itself is part of the tree.
    #[error(
        "process {0} is this very process or one of its ancestors, so it would stop its own dump"
    )]
    OwnAncestor(Pid),
    /// Somebody else traces a task.
    #[error("task {tid} is traced by process {tracer} ({tracer_name}); detach that first")]
    Traced {
        /// The task.
        tid: Pid,
        /// Its tracer.
        tracer: Pid,
        /// The tracer's command name.
        tracer_name: String,
    },
    /// A task does not come to a stop.
    #[error(
        "task {tid} did not stop within {} s: it is in an uninterruptible state ({state}); \
         try again when that is over", timeout.as_secs()
    )]
    WontStop {
        /// The task.
        tid: Pid,
        /// State letter and what it waits for.
        state: String,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// A task waits for the child that borrows its memory.
    #[error(
        "task {tid} waits in vfork for task {child} to execute a program or to exit; \
         try again when it has"
    )]
    Vfork {
        /// The task.
        tid: Pid,
        /// Its child.
        child: Pid,
    },
    /// ptrace refused.
    #[error("can't trace task {tid}")]
    Refused {
        /// The task.
        tid: Pid,
        /// Cause.
        source: Errno,
    },
    /// The tree never stopped growing.
    #[error("the tree of process {0} kept changing while it was being stopped")]
    NeverSettled(Pid),
    /// The cgroup freezer failed.
    #[error(transparent)]
    Cgroup(#[from] CgroupFreezeError),
    /// /proc could not be read.
    #[error(transparent)]
    Status(#[from] StatusError),
}

/// How to freeze.
#[derive(Debug, Clone)]
pub struct FreezeOptions {
    /// How long all of it may take.
    pub timeout: Duration,
    /// Freeze this cgroup instead of the one found for the tree.
    pub cgroup: Option<PathBuf>,
    /// Where is noted what is changed in the tasks.
    pub journal: Option<Journal>,
}

/// What is to become of the tasks of a frozen tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// They go on as if nothing had happened.
    Resume,
    /// They stay, stopped by SIGSTOP.
    Stop,
    /// They die.
    Kill,
}

/// A tree whose threads are all in ptrace stops of the calling thread.
#[derive(Debug)]
pub struct FrozenTree {
    tree: Arc<Tree>,
    /// General registers of all threads, as they stopped.
    regs: HashMap<Pid, GeneralRegs>,
    seized: Vec<Pid>,
    since: Instant,
    freezing: Duration,
    /// False where this process may not suspend the seccomp filters of others.
    seccomp_suspended: bool,
    /// Threads that use segments of their process's own table, with their processes.
    with_local_segments: Vec<(Pid, Pid)>,
    released: bool,
}

impl FrozenTree {
    /// Stops the tree below `root`.
    ///
    /// # Errors
    /// See [`FreezeError`]; whatever had been stopped goes on.
    ///
    /// # Preconditions
    /// [`check_root`] has found nothing against it: of all that it looks for only the death of the root can come
    /// later, which is found here, too. The calling thread becomes the tracer and must make all further ptrace
    /// calls.
    pub fn freeze(root: Pid, options: &FreezeOptions) -> Result<FrozenTree, FreezeError> {
        let deadline = Deadline {
            at: Instant::now() + options.timeout,
            timeout: options.timeout,
        };
        loop {
            let group = cgroup::find(root, options)?;
            let begun = Instant::now();
            let mut frozen = FrozenTree {
                tree: Arc::new(Tree {
                    tasks: Vec::new(),
                    journal: options.journal.clone(),
                }),
                regs: HashMap::new(),
                seized: Vec::new(),
                since: begun,
                freezing: Duration::ZERO,
                seccomp_suspended: true,
                with_local_segments: Vec::new(),
                released: false,
            };
            let journal = options.journal.as_ref();
            let freeze = |path| FrozenGroup::freeze(path, deadline.at, journal);
            let group = group.map(freeze).transpose()?;
            match stop::stop_all(&mut frozen, root, group, deadline) {
                Ok(()) => {
                    frozen.freezing = begun.elapsed();
                    return Ok(frozen);
                }
                Err(Setback::Failed(error)) => return Err(error),
                Err(Setback::Vfork { tid, child }) => {
                    tracing::info!(%tid, %child, "waiting for a vfork");
                    drop(frozen);
                    stop::await_vfork(tid, child, deadline)?;
                }
                Err(Setback::Changed) if deadline.has_passed() => {
                    return Err(FreezeError::NeverSettled(root));
                }
                Err(Setback::Changed) => tracing::info!("the tree has changed, once more"),
            }
        }
    }

    /// The tasks.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The tasks, for a thread that has been there before them.
    pub fn shared_tree(&self) -> Arc<Tree> {
        Arc::clone(&self.tree)
    }

    /// General registers of all threads, as they stopped.
    pub fn regs(&self) -> &HashMap<Pid, GeneralRegs> {
        &self.regs
    }

    /// Whether seccomp filters don't see what is done in the tasks.
    pub fn is_seccomp_suspended(&self) -> bool {
        self.seccomp_suspended
    }

    /// Threads that use segments of their process's own table, each behind its process.
    pub fn with_local_segments(&self) -> &[(Pid, Pid)] {
        &self.with_local_segments
    }

    /// When freezing began; the tree has been held since then or later.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// How long it took until everything had stopped.
    pub fn freezing(&self) -> Duration {
        self.freezing
    }

    /// Lets the tree go.
    pub fn release(mut self, fate: Fate) -> Released {
        self.let_go(fate);
        Released {
            held: self.since.elapsed(),
            killed: (fate == Fate::Kill)
                .then(|| (Arc::clone(&self.tree), std::mem::take(&mut self.seized))),
        }
    }

    fn let_go(&mut self, fate: Fate) {
        if std::mem::replace(&mut self.released, true) {
            return;
        }
        match fate {
            Fate::Kill => self.kill(),
            Fate::Stop => {
                let running = |task: &&Task| task.state == TaskState::Alive;
                self.note(libc_signal::SIGSTOP, self.tree.alive().filter(running));
                for task in self.tree.alive().filter(running) {
                    // Pending before anybody runs again, so no instruction is executed in between.
                    let _ = sys_task::kill(task.pid, libc_signal::SIGSTOP);
                }
                self.detach();
            }
            Fate::Resume => self.detach(),
        }
    }

    fn detach(&self) {
        stop::let_go(&self.seized);
    }

    /// Notes that tasks are about to get a signal, all of them or none.
    fn note<'a>(&self, signal: i32, tasks: impl Iterator<Item = &'a Task>) {
        if let Some(journal) = &self.tree.journal {
            journal.will_signal(signal, tasks.map(|task| task.pid));
        }
    }

    fn kill(&self) {
        self.note(libc_signal::SIGKILL, self.tree.tasks.iter());
        for task in &self.tree.tasks {
            let _ = sys_task::kill(task.pid, libc_signal::SIGKILL);
        }
    }
}

/// A tree that was let go. Dropped, it waits for the end of tasks that were killed, which give their memory back
/// meanwhile.
#[derive(Debug)]
pub struct Released {
    /// How long it was held, which ends when all run, or are doomed: what it takes to die is nobody's pause.
    pub held: Duration,
    killed: Option<(Arc<Tree>, Vec<Pid>)>,
}

impl Drop for Released {
    fn drop(&mut self) {
        if let Some((tree, seized)) = self.killed.take() {
            stop::reap_killed(&tree, &seized);
        }
    }
}

impl Drop for FrozenTree {
    fn drop(&mut self) {
        self.let_go(Fate::Resume);
    }
}

mod libc_signal {
    pub const SIGKILL: i32 = 9;
    pub const SIGSTOP: i32 = 19;
}

impl FrozenTree {
    fn add(&mut self, task: Task) {
        Arc::make_mut(&mut self.tree).tasks.push(task);
    }

    /// Sorts the tasks so that every parent stands before its children, depth first.
    fn sort(&mut self, root: Pid) {
        let mut children: HashMap<Pid, Vec<Task>> = HashMap::new();
        let mut stack = Vec::new();
        let tree = Arc::make_mut(&mut self.tree);
        for task in std::mem::take(&mut tree.tasks) {
            if task.pid == root {
                stack.push(task);
            } else {
                children.entry(task.ppid).or_default().push(task);
            }
        }
        while let Some(task) = stack.pop() {
            let mut below = children.remove(&task.pid).unwrap_or_default();
            below.sort_by_key(|child| std::cmp::Reverse(child.pid));
            stack.extend(below);
            tree.tasks.push(task);
        }
    }
}
