//! Who makes whom: how a tree with its sessions and process groups is born again.
//!
//! A child inherits its session from the task that makes it, so the maker must be in that session at that
//! moment, and only a task that leads no group may start one. Four ways cover what Linux can bring about:
//!
//! ```text
//! plain      the parent makes the child, before or after its own setsid
//! sibling    a task of the wanted session makes it with CLONE_PARENT, and both have one parent
//! helper     the session's (or group's) leader is gone: a helper with its pid stands in, then exits
//! orphan     a task of the session makes a helper that makes the child and exits, so that the child goes
//!            to the subreaper that is its parent
//! ```
//!
//! All of it is decided here, from numbers alone; `restore` turns the result into programs.
//!
//! ```text
//! history    what must have been: the session a leader was born in, whom a session's leader came from
//! planner    who makes whom
//! orphans    in which order orphans go to their parents, where subreapers are above subreapers
//! groups     who leads and who joins which process group
//! ```
//!
//! Source: man 2 setsid, setpgid, clone; linux kernel/fork.c, copy_process; kernel/exit.c,
//! find_new_reaper.

mod groups;
mod history;
mod orphans;
mod planner;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use firn_sys::Pid;

use crate::tree::Tree;
use planner::Planner;

/// A relation that can't be made again.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RelationError {
    /// The tree belongs to a session that started outside of it.
    #[error(
        "task {pid} belongs to session {sid}, whose leader is not in the tree; \
         add --shell-job to restore it into the present session"
    )]
    OuterSession {
        /// The task.
        pid: Pid,
        /// Its session.
        sid: Pid,
    },
    /// No task can make this one so that parent and session come out right.
    #[error("task {pid}, child of {ppid}, can't be put into session {sid} again")]
    Unreachable {
        /// The task.
        pid: Pid,
        /// Its parent.
        ppid: Pid,
        /// Its session.
        sid: Pid,
    },
    /// A task can't be put into the group that the tree brought along after it has led one.
    #[error(
        "task {pid} has led the process group of its pid and gone back into group {pgid}, \
         which comes from outside of the tree"
    )]
    OuterGroup {
        /// The task.
        pid: Pid,
        /// The group it is in.
        pgid: Pid,
    },
    /// The parent of a task is not in the image.
    #[error("task {pid} has parent {ppid}, which is not in the image")]
    NoParent {
        /// The task.
        pid: Pid,
        /// Its parent.
        ppid: Pid,
    },
}

/// Index of a [`Birth`] in its [`Family`].
pub type BirthId = usize;

/// What a newborn is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The task of the tree with this index.
    Task(usize),
    /// A stand-in for a leader that is gone; it exits when all have joined their groups.
    Leader,
    /// A stand-in that exits as soon as it has made its child, which becomes an orphan.
    Midwife,
    /// It stays in the process group whose namesake, its maker, is in another one, until all have joined.
    Keeper,
}

/// How a task is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Birth {
    /// What it is for.
    pub role: Role,
    /// The pid it gets; None lets the kernel choose (a midwife's is nobody's business).
    pub pid: Option<Pid>,
    /// Who makes it; None for the root.
    pub maker: Option<BirthId>,
    /// Made with CLONE_PARENT, so that it becomes the maker's sibling.
    pub sibling: bool,
    /// It starts a session.
    pub setsid: bool,
    /// Those it makes before its setsid, in order.
    pub before: Vec<BirthId>,
    /// Those it makes after its setsid, in order.
    pub after: Vec<BirthId>,
    /// The process group it leads or joins; None leaves the inherited one.
    pub group: Option<Pid>,
    /// Helpers that become its children and must be reaped by it.
    pub reaps: Vec<BirthId>,
    /// It must be a subreaper until its orphans have come, and is to be none from then on until all have: see
    /// [`Family::orphan_steps`]. That many steps are done then.
    pub subreaper_until: Option<u32>,
    /// A midwife exits when that many steps are done.
    pub exits_after: u32,
    /// Keeps the group that it leads for a moment before it joins its own.
    pub keeper: Option<BirthId>,
}

/// The whole family, the root first, makers before those they make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    /// All births.
    pub births: Vec<Birth>,
    /// Steps by which all orphans come to their parents. A step is done when a midwife has been reaped, or when a
    /// task is a subreaper no more.
    pub orphan_steps: u32,
    /// Birth of each task of the tree.
    of_task: Vec<BirthId>,
}

impl Family {
    /// Decides how the tree is made.
    ///
    /// # Errors
    /// See [`RelationError`].
    pub fn plan(tree: &Tree, shell_job: bool) -> Result<Family, RelationError> {
        let mut planner = Planner::new(tree, shell_job)?;
        for nth in 1..tree.tasks.len() {
            planner.bear(nth)?;
        }
        groups::plan(&mut planner)?;
        let orphan_steps = orphans::order(&mut planner);
        let mut of_task = vec![0; tree.tasks.len()];
        for (id, birth) in planner.births.iter().enumerate() {
            if let Role::Task(nth) = birth.role {
                of_task[nth] = id;
            }
        }
        Ok(Family {
            births: planner.births,
            orphan_steps,
            of_task,
        })
    }

    /// The birth of the task with that index in the tree.
    ///
    /// # Panics
    /// If the tree has no such task.
    pub fn of_task(&self, nth: usize) -> BirthId {
        self.of_task[nth]
    }

    /// The tasks that made the one with that index in the tree, the nearest first. Helpers between them pass on what
    /// they have got, such as memory.
    pub fn makers(&self, nth: usize) -> impl Iterator<Item = usize> {
        let maker = |id: &BirthId| self.births[*id].maker;
        let makers = std::iter::successors(maker(&self.of_task(nth)), maker);
        makers.filter_map(|id| match self.births[id].role {
            Role::Task(maker) => Some(maker),
            Role::Leader | Role::Midwife | Role::Keeper => None,
        })
    }
}
