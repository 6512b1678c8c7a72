//! The task tree as data: which tasks there are and how they are related.

use firn_sys::Pid;

use crate::arch::Abi;
use crate::inject::Journal;

/// A process tree, parents before their children, depth first; the root stands first.
#[derive(Debug, Clone)]
pub struct Tree {
    /// All processes, zombies included.
    pub tasks: Vec<Task>,
    /// Where is noted what is changed in them for a moment.
    pub journal: Option<Journal>,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its pid, which is also the tid of its leader.
    pub pid: Pid,
    /// Parent's pid; for the root a task outside the tree.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// Whether it runs, is stopped, or waits to be reaped.
    pub state: TaskState,
    /// Which kind of program it runs; unknown of a zombie.
    pub abi: Abi,
    /// Tids of all threads that live, the leader first; without it where it has exited before the others.
    /// Only the leader for a zombie.
    pub threads: Vec<Pid>,
}

/// What a process was doing when the tree was frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// Running or sleeping.
    Alive,
    /// Stopped by this signal.
    Stopped(i32),
    /// Dead, with this raw wait status, waiting for its parent.
    Zombie(i32),
}

impl Task {
    /// False for a zombie, which has no memory, files or threads any more.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, TaskState::Zombie(_))
    }

    /// The thread through which the process is looked at and changed: its leader, or another one where the
    /// leader has exited. A dead leader is a zombie that /proc shows without memory and files.
    ///
    /// # Panics
    /// If the task has no thread, which no constructor produces.
    pub fn speaker(&self) -> Pid {
        *self.threads.first().expect("a task has a thread")
    }

    /// False where the leader has exited before other threads.
    pub fn has_leader(&self) -> bool {
        self.speaker() == self.pid
    }

    /// Tids of all threads, the leader first, also a dead one: the ids that the process holds.
    pub fn tids(&self) -> impl Iterator<Item = Pid> {
        let dead = (!self.has_leader()).then_some(self.pid);
        dead.into_iter().chain(self.threads.iter().copied())
    }
}

impl Tree {
    /// A tree of tasks in which nothing is noted.
    pub fn new(tasks: Vec<Task>) -> Tree {
        Tree {
            tasks,
            journal: None,
        }
    }

    /// The root task.
    ///
    /// # Panics
    /// If the tree is empty, which no constructor produces.
    pub fn root(&self) -> &Task {
        self.tasks.first().expect("a tree has a root")
    }

    /// The task with that pid.
    pub fn task(&self, pid: Pid) -> Option<&Task> {
        self.tasks.iter().find(|task| task.pid == pid)
    }

    /// All tasks that are not zombies.
    pub fn alive(&self) -> impl Iterator<Item = &Task> {
        self.tasks.iter().filter(|task| task.is_alive())
    }

    /// Number of threads of all living tasks.
    pub fn nr_threads(&self) -> usize {
        self.alive().map(|task| task.threads.len()).sum()
    }
}
