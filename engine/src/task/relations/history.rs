//! What must have been before the tree became what it is. Two things follow from how sessions are inherited:
//!
//! * A leader was born in another session than its own. Which one shows where it has a child of that session, since it
//!   made that before its setsid; unless the session has come from below it, with an orphan that it adopted.
//! * A task whose parent was never in its session is an orphan of somebody who was below that parent, and so was the
//!   leader of the session.

use std::collections::HashMap;

use firn_sys::Pid;

use crate::tree::{Task, Tree};

/// What is known of a tree by number of its tasks.
#[derive(Debug)]
pub(super) struct History {
    /// Numbers by pid.
    pub numbers: HashMap<Pid, usize>,
    /// How many tasks are above each.
    pub depth: Vec<u32>,
    /// Session in which each task was born; None where any will do.
    pub first_session: Vec<Option<Pid>>,
    /// The lowest task that has adopted members of a session, by session: whoever began it was born below.
    pub homes: HashMap<Pid, usize>,
    parents: Vec<Option<usize>>,
}

impl History {
    /// Looks through a tree; parents stand before their children.
    pub fn of(tree: &Tree) -> History {
        let numbers: HashMap<Pid, usize> = (tree.tasks.iter().enumerate())
            .map(|(nth, task)| (task.pid, nth))
            .collect();
        // Whoever stands behind is none, or the way up might be a circle in images that contradict themselves.
        let parent = |(nth, task): (usize, &Task)| {
            let parent = numbers.get(&task.ppid).copied();
            parent.filter(|parent| *parent < nth)
        };
        let parents: Vec<Option<usize>> = tree.tasks.iter().enumerate().map(parent).collect();
        let mut depth: Vec<u32> = vec![0; parents.len()];
        for (nth, parent) in parents.iter().enumerate() {
            depth[nth] = parent.map_or(0, |parent| depth[parent] + 1);
        }
        let mut history = History {
            first_session: vec![None; parents.len()],
            homes: HashMap::new(),
            numbers,
            depth,
            parents,
        };
        history.find_first_sessions(tree);
        history.find_homes(tree);
        history
    }

    /// Whether a task stands below another.
    pub fn is_below(&self, nth: usize, other: usize) -> bool {
        let above = std::iter::successors(self.parents[nth], |nth| self.parents[*nth]);
        above
            .take_while(|nth| self.depth[*nth] >= self.depth[other])
            .any(|nth| nth == other)
    }

    fn find_first_sessions(&mut self, tree: &Tree) {
        let mut members: HashMap<Pid, Vec<usize>> = HashMap::new();
        let mut children = vec![Vec::new(); tree.tasks.len()];
        for (nth, task) in tree.tasks.iter().enumerate() {
            members.entry(task.sid).or_default().push(nth);
            if let Some(parent) = self.parents[nth] {
                children[parent].push(nth);
            }
        }
        for (nth, task) in tree.tasks.iter().enumerate().rev() {
            if task.sid != task.pid {
                self.first_session[nth] = Some(task.sid);
                continue;
            }
            let of_children = children[nth]
                .iter()
                .filter_map(|nth| self.first_session[*nth]);
            let from_above = |session: &Pid| {
                let came_from_below = match self.numbers.get(session) {
                    Some(leader) => self.is_below(*leader, nth),
                    None if *session == tree.root().sid => false,
                    None => members[session]
                        .iter()
                        .all(|member| self.is_below(*member, nth)),
                };
                *session != task.pid && !came_from_below
            };
            self.first_session[nth] = { of_children }.find(from_above);
        }
    }

    fn find_homes(&mut self, tree: &Tree) {
        for nth in 1..tree.tasks.len() {
            let (Some(session), Some(parent)) = (self.first_session[nth], self.parents[nth]) else {
                continue;
            };
            let was_there =
                tree.tasks[parent].sid == session || self.first_session[parent] == Some(session);
            let home = self.homes.get(&session);
            if !was_there && home.is_none_or(|home| self.depth[parent] > self.depth[*home]) {
                self.homes.insert(session, parent);
            }
        }
    }
}
