//! The task tree as data: which tasks there are and how they are related.

use firn_sys::Pid;

use crate::arch::Abi;

/// A process tree, parents before their children, depth first; the root stands first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// All processes, zombies included.
    pub tasks: Vec<Task>,
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
    /// Tids of all threads, the leader first. Only the leader for a zombie.
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
}

impl Tree {
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
