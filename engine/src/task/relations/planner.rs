//! Who makes whom.

use std::collections::{HashMap, HashSet};

use firn_sys::Pid;

use super::history::History;
use super::{Birth, BirthId, RelationError, Role};
use crate::tree::{Task, Tree};

/// Tasks that wait for one another to be borne at most: more than a tree has that came about in a usual way, and fewer
/// than the stack has room for.
const MAX_WAITING: usize = 256;

/// The births that are decided so far.
pub(super) struct Planner<'a> {
    pub tree: &'a Tree,
    pub births: Vec<Birth>,
    pub history: History,
    /// Births by pid, helpers that lead included.
    pub by_pid: HashMap<Pid, BirthId>,
    /// The task that adopts each birth, where a midwife makes it.
    pub adopter: Vec<Option<BirthId>>,
    /// Session that each birth is in before its own setsid.
    session_at_birth: Vec<Pid>,
    /// Parent of each birth in the end, by pid.
    parent: Vec<Pid>,
    /// Who is in a session, at birth or later, in the order of births.
    members: HashMap<Pid, Vec<BirthId>>,
    /// The first of them that has a certain parent, which is the second pid.
    member_below: HashMap<(Pid, Pid), BirthId>,
    /// Tasks that are about to be borne, to notice circles.
    waiting: HashSet<usize>,
}

/// Where and as what somebody is to be born.
#[derive(Debug, Clone, Copy)]
struct Place {
    role: Role,
    pid: Option<Pid>,
    session: Pid,
    /// In the end.
    parent: Pid,
}

impl<'a> Planner<'a> {
    /// Begins with the root.
    pub fn new(tree: &'a Tree, shell_job: bool) -> Result<Planner<'a>, RelationError> {
        let root = tree.root();
        if root.sid != root.pid && !shell_job {
            return Err(RelationError::OuterSession {
                pid: root.pid,
                sid: root.sid,
            });
        }
        let mut planner = Planner {
            tree,
            births: Vec::new(),
            history: History::of(tree),
            by_pid: HashMap::new(),
            adopter: Vec::new(),
            session_at_birth: Vec::new(),
            parent: Vec::new(),
            members: HashMap::new(),
            member_below: HashMap::new(),
            waiting: HashSet::new(),
        };
        // A root that leads its session starts in that of the restorer, which no task of the tree has.
        let outer = if root.sid == root.pid {
            Pid::from_raw(0)
        } else {
            root.sid
        };
        let place = Place {
            role: Role::Task(0),
            pid: Some(root.pid),
            session: outer,
            parent: root.ppid,
        };
        planner.add(place, None, false);
        if root.sid == root.pid {
            planner.starts_session(0);
        }
        Ok(planner)
    }

    fn add(&mut self, place: Place, maker: Option<BirthId>, sibling: bool) -> BirthId {
        let id = self.births.len();
        self.births.push(Birth {
            role: place.role,
            pid: place.pid,
            maker,
            sibling,
            setsid: false,
            before: Vec::new(),
            after: Vec::new(),
            group: None,
            reaps: Vec::new(),
            subreaper_until: None,
            exits_after: 0,
            keeper: None,
        });
        self.session_at_birth.push(place.session);
        self.parent.push(place.parent);
        self.adopter.push(None);
        if let Some(pid) = place.pid {
            self.by_pid.insert(pid, id);
        }
        self.note_member(id, place.session);
        id
    }

    fn note_member(&mut self, id: BirthId, session: Pid) {
        if matches!(self.births[id].role, Role::Task(_) | Role::Leader) {
            self.members.entry(session).or_default().push(id);
            let key = (session, self.parent[id]);
            self.member_below.entry(key).or_insert(id);
        }
    }

    fn starts_session(&mut self, id: BirthId) {
        self.births[id].setsid = true;
        let session = self.session(id);
        self.note_member(id, session);
    }

    /// Session of a birth after its own setsid.
    pub fn session(&self, id: BirthId) -> Pid {
        match (self.births[id].setsid, self.births[id].pid) {
            (true, Some(pid)) => pid,
            _ => self.session_at_birth[id],
        }
    }

    fn was_in(&self, id: BirthId, session: Pid) -> bool {
        self.session(id) == session || self.session_at_birth[id] == session
    }

    /// Has `maker` make somebody in a session that it is in before or after its setsid.
    fn make(&mut self, place: Place, maker: BirthId, sibling: bool) -> BirthId {
        let id = self.add(place, Some(maker), sibling);
        let early = self.births[maker].setsid && self.session(maker) != place.session;
        let list = if early {
            &mut self.births[maker].before
        } else {
            &mut self.births[maker].after
        };
        list.push(id);
        id
    }

    /// Makes a helper that is a child of its maker, is in its last session, and is reaped by it.
    pub fn make_helper(&mut self, role: Role, pid: Option<Pid>, maker: BirthId) -> BirthId {
        let place = Place {
            role,
            pid,
            session: self.session(maker),
            parent: self.births[maker].pid.unwrap_or(Pid::from_raw(0)),
        };
        let id = self.make(place, maker, false);
        self.births[maker].reaps.push(id);
        id
    }

    /// Bears a task, and before it those that it needs and that stand behind it in the tree.
    pub fn bear(&mut self, nth: usize) -> Result<(), RelationError> {
        let task = &self.tree.tasks[nth];
        if self.by_pid.contains_key(&task.pid) {
            return Ok(());
        }
        if !self.waiting.insert(nth) || self.waiting.len() > MAX_WAITING {
            return Err(unreachable(task));
        }
        let parent = self.born(task.ppid, task)?;
        let session = self.history.first_session[nth];
        let place = |session| Place {
            role: Role::Task(nth),
            pid: Some(task.pid),
            session,
            parent: task.ppid,
        };
        let id = match self.lower_home(nth) {
            // It led its session below somebody who has adopted members of it, and was adopted itself higher up.
            Some(home) => {
                let home_task = &self.tree.tasks[home];
                let home = self.born(home_task.pid, task)?;
                let session = session.unwrap_or(self.session(home));
                self.bear_orphan(place(session), home, parent, task)?
            }
            None => {
                let session = session.unwrap_or(self.session(parent));
                self.place(place(session), parent, task)?
            }
        };
        if task.sid == task.pid {
            self.starts_session(id);
        }
        self.waiting.remove(&nth);
        Ok(())
    }

    /// The birth of the task with that pid, which another one needs.
    fn born(&mut self, pid: Pid, for_task: &Task) -> Result<BirthId, RelationError> {
        let Some(&nth) = self.history.numbers.get(&pid) else {
            return Err(RelationError::NoParent {
                pid: for_task.pid,
                ppid: pid,
            });
        };
        self.bear(nth)?;
        Ok(self.by_pid[&pid])
    }

    /// The lowest task that has adopted members of the session that a task leads, unless the task is below it
    /// anyway.
    fn lower_home(&self, nth: usize) -> Option<usize> {
        let task = &self.tree.tasks[nth];
        let home = *self.history.homes.get(&task.pid)?;
        let is_elsewhere = task.sid == task.pid && !self.history.is_below(nth, home);
        is_elsewhere.then_some(home)
    }

    fn place(
        &mut self,
        place: Place,
        parent: BirthId,
        task: &Task,
    ) -> Result<BirthId, RelationError> {
        if self.was_in(parent, place.session) {
            return Ok(self.make(place, parent, false));
        }
        let root = self.tree.root();
        let is_outer = place.session == root.sid && root.sid != root.pid;
        if !is_outer {
            self.bear_leader(place.session, task)?;
        }
        if let Some(&maker) = self.member_below.get(&(place.session, place.parent)) {
            return Ok(self.make(place, maker, true));
        }
        let members = self.members.get(&place.session).into_iter().flatten();
        let maker = { members }.find(|member| self.can_leave_to(**member, parent));
        let maker = *maker.ok_or_else(|| unreachable(task))?;
        self.bear_orphan(place, maker, parent, task)
    }

    /// Sees to it that the leader of a session is born, or a helper in its place.
    fn bear_leader(&mut self, session: Pid, task: &Task) -> Result<(), RelationError> {
        if let Some(&nth) = self.history.numbers.get(&session) {
            return self.bear(nth);
        }
        let home = self.history.homes.get(&session);
        let home = *home.ok_or_else(|| unreachable(task))?;
        let home = self.born(self.tree.tasks[home].pid, task)?;
        if !self.by_pid.contains_key(&session) {
            let leader = self.make_helper(Role::Leader, Some(session), home);
            self.starts_session(leader);
        }
        Ok(())
    }

    /// Has a midwife make somebody whom a subreaper above adopts.
    fn bear_orphan(
        &mut self,
        place: Place,
        maker: BirthId,
        adopter: BirthId,
        task: &Task,
    ) -> Result<BirthId, RelationError> {
        if !self.was_in(maker, place.session) || !self.can_leave_to(maker, adopter) {
            return Err(unreachable(task));
        }
        let midwife = Place {
            role: Role::Midwife,
            pid: None,
            parent: self.births[maker].pid.unwrap_or(place.session),
            ..place
        };
        let midwife = self.make(midwife, maker, false);
        self.births[maker].reaps.push(midwife);
        self.births[adopter].subreaper_until = Some(0);
        let id = self.make(place, midwife, false);
        self.adopter[midwife] = Some(adopter);
        self.adopter[id] = Some(adopter);
        Ok(id)
    }

    /// How many tasks are above a birth in the end.
    pub fn depth(&self, id: BirthId) -> u32 {
        match self.births[id].role {
            Role::Task(nth) => self.history.depth[nth],
            Role::Leader | Role::Midwife | Role::Keeper => {
                let parent = self.history.numbers.get(&self.parent[id]);
                parent.map_or(0, |nth| self.history.depth[*nth] + 1)
            }
        }
    }

    /// Whether orphans that a birth leaves come to `adopter`, when the lower adopters have got theirs: who has
    /// been adopted by one of those stands where it stands in the end, others are where they were born.
    fn can_leave_to(&self, id: BirthId, adopter: BirthId) -> bool {
        let depth = self.depth(adopter);
        let mut at = id;
        for _ in 0..=self.births.len() {
            let next = match self.adopter[at] {
                Some(other) if self.depth(other) > depth || other == adopter => Some(other),
                Some(_) => self.births[at].maker,
                None => self.by_pid.get(&self.parent[at]).copied(),
            };
            match next {
                Some(next) if next == adopter => return true,
                Some(next) => at = next,
                None => return false,
            }
        }
        false
    }
}

fn unreachable(task: &Task) -> RelationError {
    RelationError::Unreachable {
        pid: task.pid,
        ppid: task.ppid,
        sid: task.sid,
    }
}
