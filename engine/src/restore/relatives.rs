//! Who is whose child, and how many lead and join process groups: asked for every task, so found once.

use std::collections::HashMap;

use firn_sys::Pid;

use super::programs::count;
use crate::task::relations::{Birth, Family};
use crate::tree::Tree;

/// What is known of a tree by pid.
pub(super) struct Relatives {
    numbers: HashMap<Pid, usize>,
    children: HashMap<Pid, Vec<usize>>,
    /// How many births lead process groups.
    pub(super) nr_leaders: u32,
    /// How many join one that another leads.
    pub(super) nr_joiners: u32,
}

impl Relatives {
    /// Looks through a tree and how it is made.
    pub(super) fn of(tree: &Tree, family: &Family) -> Relatives {
        let (mut numbers, mut children) = (HashMap::new(), HashMap::<Pid, Vec<usize>>::new());
        for (nth, task) in tree.tasks.iter().enumerate() {
            numbers.insert(task.pid, nth);
            children.entry(task.ppid).or_default().push(nth);
        }
        let in_groups = || family.births.iter().filter(|birth| birth.group.is_some());
        let nr_leaders = in_groups().filter(|birth| leads(birth)).count();
        let nr_keepers = family.births.iter().filter(|birth| birth.keeper.is_some());
        Relatives {
            numbers,
            children,
            nr_leaders: count(nr_leaders + nr_keepers.count()),
            nr_joiners: count(in_groups().count() - nr_leaders),
        }
    }

    /// The number of a task in the tree; None for one outside.
    pub(super) fn number(&self, pid: Pid) -> Option<usize> {
        self.numbers.get(&pid).copied()
    }

    /// Numbers of a task's children, ascending.
    pub(super) fn children(&self, pid: Pid) -> &[usize] {
        self.children.get(&pid).map_or(&[], Vec::as_slice)
    }
}

/// Whether a newborn leads the process group that it is in.
pub(super) fn leads(birth: &Birth) -> bool {
    birth.group.is_some() && birth.group == birth.pid
}
