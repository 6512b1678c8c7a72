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
//! Source: man 2 setsid, setpgid, clone; linux kernel/fork.c, copy_process; kernel/exit.c,
//! find_new_reaper.

use std::collections::{HashMap, HashSet};

use firn_sys::Pid;

use crate::tree::{Task, Tree};

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
    /// It must be a subreaper while orphans are made for it.
    pub subreaper: bool,
}

/// The whole family, the root first, makers before those they make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    /// All births.
    pub births: Vec<Birth>,
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
        planner.groups();
        let mut of_task = vec![0; tree.tasks.len()];
        for (id, birth) in planner.births.iter().enumerate() {
            if let Role::Task(nth) = birth.role {
                of_task[nth] = id;
            }
        }
        Ok(Family {
            births: planner.births,
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
            Role::Leader | Role::Midwife => None,
        })
    }
}

struct Planner<'a> {
    tree: &'a Tree,
    births: Vec<Birth>,
    /// Births by pid, helpers that lead included.
    by_pid: HashMap<Pid, BirthId>,
    /// Session that each birth is in before its own setsid.
    session_at_birth: Vec<Pid>,
    /// Parent of each birth, by pid.
    parent: Vec<Pid>,
    indices: HashMap<Pid, usize>,
}

impl<'a> Planner<'a> {
    fn new(tree: &'a Tree, shell_job: bool) -> Result<Planner<'a>, RelationError> {
        let root = tree.root();
        if root.sid != root.pid && !shell_job {
            return Err(RelationError::OuterSession {
                pid: root.pid,
                sid: root.sid,
            });
        }
        let indices = tree
            .tasks
            .iter()
            .enumerate()
            .map(|(nth, task)| (task.pid, nth))
            .collect();
        let mut planner = Planner {
            tree,
            births: Vec::new(),
            by_pid: HashMap::new(),
            session_at_birth: Vec::new(),
            parent: Vec::new(),
            indices,
        };
        // A root that leads its session starts in that of the restorer, which no task of the tree has.
        let outer = if root.sid == root.pid {
            Pid::from_raw(0)
        } else {
            root.sid
        };
        planner.add(Role::Task(0), Some(root.pid), None, false, outer, root.ppid);
        planner.births[0].setsid = root.sid == root.pid;
        Ok(planner)
    }

    fn add(
        &mut self,
        role: Role,
        pid: Option<Pid>,
        maker: Option<BirthId>,
        sibling: bool,
        session: Pid,
        parent: Pid,
    ) -> BirthId {
        let id = self.births.len();
        self.births.push(Birth {
            role,
            pid,
            maker,
            sibling,
            setsid: false,
            before: Vec::new(),
            after: Vec::new(),
            group: None,
            reaps: Vec::new(),
            subreaper: false,
        });
        self.session_at_birth.push(session);
        self.parent.push(parent);
        if let Some(pid) = pid {
            self.by_pid.insert(pid, id);
        }
        id
    }

    /// Session of a birth after its own setsid.
    fn session(&self, id: BirthId) -> Pid {
        match (self.births[id].setsid, self.births[id].pid) {
            (true, Some(pid)) => pid,
            _ => self.session_at_birth[id],
        }
    }

    /// Makes `role` by `maker`, in the session `sid`, which the maker is in before or after its setsid.
    fn make(
        &mut self,
        role: Role,
        pid: Option<Pid>,
        maker: BirthId,
        sibling: bool,
        sid: Pid,
        parent: Pid,
    ) -> BirthId {
        let id = self.add(role, pid, Some(maker), sibling, sid, parent);
        let early = self.births[maker].setsid && self.session(maker) != sid;
        let list = if early {
            &mut self.births[maker].before
        } else {
            &mut self.births[maker].after
        };
        list.push(id);
        id
    }

    /// Bears a task, and before it those that it needs and that stand behind it in the tree.
    fn bear(&mut self, nth: usize) -> Result<(), RelationError> {
        let task = &self.tree.tasks[nth];
        if self.by_pid.contains_key(&task.pid) {
            return Ok(());
        }
        let Some(&parent) = self.by_pid.get(&task.ppid) else {
            return Err(RelationError::NoParent {
                pid: task.pid,
                ppid: task.ppid,
            });
        };
        let role = Role::Task(nth);
        if task.sid == task.pid {
            // Born in its parent's session, then on its own. Children that the leader made before its
            // setsid are in that first session.
            let first = self.first_session(task, parent);
            let id = self.make(role, Some(task.pid), parent, false, first, task.ppid);
            self.births[id].setsid = true;
            return Ok(());
        }
        if self.session(parent) == task.sid || self.session_at_birth[parent] == task.sid {
            self.make(role, Some(task.pid), parent, false, task.sid, task.ppid);
            return Ok(());
        }
        self.bear_in_foreign_session(role, task, parent)
    }

    /// The session a leader was born in: that of its parent, early or late, whichever a child of the
    /// leader still shows.
    fn first_session(&self, leader: &Task, parent: BirthId) -> Pid {
        let early = self.session_at_birth[parent];
        let has_early_child = self
            .tree
            .tasks
            .iter()
            .any(|task| task.ppid == leader.pid && task.sid == early && task.sid != leader.sid);
        if has_early_child {
            early
        } else {
            self.session(parent)
        }
    }

    fn bear_in_foreign_session(
        &mut self,
        role: Role,
        task: &Task,
        parent: BirthId,
    ) -> Result<(), RelationError> {
        let pid = Some(task.pid);
        let leader = match self.by_pid.get(&task.sid) {
            Some(&leader) => leader,
            None if self.indices.contains_key(&task.sid) => self.bear_leader(task)?,
            None => self.make_leader(task.sid, parent, task.ppid),
        };
        let siblings: Vec<BirthId> = (0..self.births.len())
            .filter(|id| self.parent[*id] == task.ppid && self.session(*id) == task.sid)
            .collect();
        if let Some(&maker) = siblings.first() {
            self.make(role, pid, maker, true, task.sid, task.ppid);
            return Ok(());
        }
        if !self.is_below(leader, parent) {
            return Err(unreachable(task));
        }
        self.births[parent].subreaper = true;
        let leader_pid = self.births[leader].pid.unwrap_or(task.sid);
        let midwife = self.make(Role::Midwife, None, leader, false, task.sid, leader_pid);
        self.births[leader].reaps.push(midwife);
        self.make(role, pid, midwife, false, task.sid, task.ppid);
        Ok(())
    }

    /// Bears the leader of a task's session before the task, where its pid is the higher one: pids wrap.
    fn bear_leader(&mut self, task: &Task) -> Result<BirthId, RelationError> {
        let nth = self.indices[&task.sid];
        let leader = &self.tree.tasks[nth];
        if leader.sid != leader.pid || !self.by_pid.contains_key(&leader.ppid) {
            return Err(unreachable(task));
        }
        self.bear(nth)?;
        Ok(self.by_pid[&leader.pid])
    }

    /// A helper that leads the session `sid`, as a child of `parent`.
    fn make_leader(&mut self, sid: Pid, parent: BirthId, parent_pid: Pid) -> BirthId {
        let session = self.session(parent);
        let id = self.make(Role::Leader, Some(sid), parent, false, session, parent_pid);
        self.births[id].setsid = true;
        self.births[parent].reaps.push(id);
        id
    }

    fn is_below(&self, id: BirthId, ancestor: BirthId) -> bool {
        let mut seen = HashSet::new();
        let mut at = id;
        while seen.insert(at) {
            match self.by_pid.get(&self.parent[at]) {
                Some(&parent) if parent == ancestor => return true,
                Some(&parent) => at = parent,
                None => return false,
            }
        }
        false
    }

    /// Decides who leads and who joins which group, with helpers for leaders that are gone.
    fn groups(&mut self) {
        for nth in 0..self.tree.tasks.len() {
            let task = &self.tree.tasks[nth];
            let id = self.by_pid[&task.pid];
            if self.births[id].setsid && task.pgid == task.pid {
                continue;
            }
            if !self.by_pid.contains_key(&task.pgid) {
                if self.is_outer_group(task) {
                    continue;
                }
                let session = self.session(id);
                let helper = self.make(Role::Leader, Some(task.pgid), id, false, session, task.pid);
                self.births[helper].group = Some(task.pgid);
                self.births[id].reaps.push(helper);
            }
            self.births[id].group = Some(task.pgid);
        }
    }

    /// True for the group that the root brought along from outside: everybody in it inherits the
    /// restorer's instead.
    fn is_outer_group(&self, task: &Task) -> bool {
        let root = self.tree.root();
        root.sid != root.pid && task.pgid == root.pgid && task.sid == root.sid
    }
}

fn unreachable(task: &Task) -> RelationError {
    RelationError::Unreachable {
        pid: task.pid,
        ppid: task.ppid,
        sid: task.sid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Abi;
    use crate::tree::TaskState;

    fn tree(tasks: &[(i32, i32, i32, i32)]) -> Tree {
        let pid = Pid::from_raw;
        let task = |&(own, ppid, pgid, sid): &(i32, i32, i32, i32)| Task {
            pid: pid(own),
            ppid: pid(ppid),
            pgid: pid(pgid),
            sid: pid(sid),
            state: TaskState::Alive,
            abi: Abi::Native,
            threads: vec![pid(own)],
        };
        Tree {
            tasks: tasks.iter().map(task).collect(),
        }
    }

    fn plan(tasks: &[(i32, i32, i32, i32)]) -> Family {
        Family::plan(&tree(tasks), false).unwrap()
    }

    #[test]
    fn a_shell_with_jobs_is_plain() {
        let family = plan(&[(10, 1, 10, 10), (11, 10, 11, 10), (12, 10, 11, 10)]);
        assert!(family.births[0].setsid);
        assert_eq!(family.births[0].after, [1, 2]);
        assert_eq!(family.births[1].group, Some(Pid::from_raw(11)));
        assert_eq!(family.births[2].group, Some(Pid::from_raw(11)));
        assert_eq!(family.births.len(), 3);
    }

    #[test]
    fn a_child_made_before_setsid_keeps_the_first_session() {
        // 11 made 12, then started its own session.
        let family = plan(&[(10, 1, 10, 10), (11, 10, 11, 11), (12, 11, 10, 10)]);
        assert!(family.births[1].setsid);
        assert_eq!(
            (
                family.births[1].before.as_slice(),
                family.births[1].after.len()
            ),
            (&[2][..], 0)
        );
    }

    #[test]
    fn a_dead_session_leader_gets_a_helper() {
        // A daemon made by a double fork whose middle process, 20, is gone.
        let family = plan(&[(10, 1, 10, 10), (21, 10, 20, 20)]);
        let helper = &family.births[1];
        assert_eq!(
            (helper.role, helper.pid),
            (Role::Leader, Some(Pid::from_raw(20)))
        );
        assert!(helper.setsid);
        let daemon = &family.births[2];
        assert_eq!((daemon.maker, daemon.sibling), (Some(1), true));
        assert_eq!(daemon.group, Some(Pid::from_raw(20)));
        assert_eq!(family.births[0].reaps, [1]);
    }

    #[test]
    fn a_dead_group_leader_gets_a_helper_in_the_same_session() {
        let family = plan(&[(10, 1, 10, 10), (12, 10, 11, 10), (13, 10, 11, 10)]);
        let helper = family
            .births
            .iter()
            .position(|b| b.role == Role::Leader)
            .unwrap();
        assert_eq!(family.births[helper].maker, Some(1));
        assert_eq!(family.births[1].reaps, [helper]);
        assert_eq!(family.births[2].group, Some(Pid::from_raw(11)));
    }

    #[test]
    fn an_orphan_of_a_living_session_comes_by_a_midwife() {
        // 12 leads a session; its grandchild 14 lost its parent and went to the subreaper 10.
        let family = plan(&[
            (10, 1, 10, 10),
            (11, 10, 10, 10),
            (12, 11, 12, 12),
            (14, 10, 12, 12),
        ]);
        let orphan = &family.births[family.of_task(3)];
        let midwife = &family.births[orphan.maker.unwrap()];
        assert_eq!(midwife.role, Role::Midwife);
        assert_eq!(midwife.maker, Some(family.of_task(2)));
        assert!(family.births[0].subreaper);
    }

    #[test]
    fn an_orphan_with_a_lower_pid_than_its_leader_comes_after_it() {
        let family = plan(&[(10, 1, 10, 10), (14, 10, 30, 30), (30, 10, 30, 30)]);
        let leader = family.of_task(2);
        assert!(family.births[leader].setsid);
        let orphan = &family.births[family.of_task(1)];
        assert_eq!((orphan.maker, orphan.sibling), (Some(leader), true));
    }

    #[test]
    fn a_sibling_of_the_session_makes_it() {
        let family = plan(&[(10, 1, 10, 10), (11, 10, 11, 11), (12, 10, 11, 11)]);
        let second = &family.births[2];
        assert_eq!((second.maker, second.sibling), (Some(1), true));
    }

    #[test]
    fn an_outer_session_needs_shell_job() {
        let outer = tree(&[(10, 1, 10, 5), (11, 10, 10, 5)]);
        assert!(matches!(
            Family::plan(&outer, false),
            Err(RelationError::OuterSession { .. })
        ));
        let family = Family::plan(&outer, true).unwrap();
        assert!(!family.births[0].setsid);
        assert_eq!(family.births[0].group, Some(Pid::from_raw(10)));
    }

    #[test]
    fn an_outer_group_is_inherited() {
        let outer = tree(&[(10, 1, 7, 5), (11, 10, 7, 5), (12, 10, 12, 5)]);
        let family = Family::plan(&outer, true).unwrap();
        assert_eq!(family.births[0].group, None);
        assert_eq!(family.births[1].group, None);
        assert_eq!(family.births[2].group, Some(Pid::from_raw(12)));
    }

    #[test]
    fn a_missing_parent_is_named() {
        let error = Family::plan(&tree(&[(10, 1, 10, 10), (11, 9, 10, 10)]), false).unwrap_err();
        assert!(matches!(error, RelationError::NoParent { .. }));
    }
}
