//! The autogroup of a session: the scheduler weighs all tasks of one session together against those of others, and
//! `nice` of the group is the weight. The group itself comes with the session, its nice value only by being written.
//!
//! It is read of one task of each session whose leader is in the tree, or is dead: a restore makes these anew. Other
//! sessions are those of a terminal that the tree was started from, and are not the tree's to change.
//!
//! Source: man 7 sched, "The autogroup feature"; kernel/sched/autogroup.c.

use std::collections::HashSet;
use std::path::Path;

use firn_sys::{Pid, procfs};

use crate::tree::Tree;

/// The tasks that tell of their sessions: the first living one of each.
pub fn speakers(tree: &Tree) -> HashSet<Pid> {
    let pids: HashSet<Pid> = tree.tasks.iter().map(|task| task.pid).collect();
    let is_made_anew =
        |leader: Pid| pids.contains(&leader) || !Path::new(&format!("/proc/{leader}")).exists();
    let mut seen = HashSet::new();
    let first = tree.alive().filter(|task| seen.insert(task.sid));
    let made = first.filter(|task| is_made_anew(task.sid));
    made.map(|task| task.pid).collect()
}

/// Nice value of a task's autogroup; none where it is 0 or the kernel has no such groups.
pub fn nice(pid: Pid) -> Option<i32> {
    parse(&procfs::read_to_string(file(pid)).ok()?).filter(|nice| *nice != 0)
}

/// Gives a task's autogroup a nice value.
///
/// # Errors
/// EPERM: to lower it needs CAP_SYS_NICE. EAGAIN: without CAP_SYS_ADMIN the whole machine may do so ten times a second.
/// ENOENT: the kernel has no such groups.
pub fn set_nice(pid: Pid, nice: i32) -> std::io::Result<()> {
    std::fs::write(file(pid), nice.to_string())
}

fn file(pid: Pid) -> String {
    format!("/proc/{pid}/autogroup")
}

/// Reads `/autogroup-12 nice -5`.
fn parse(text: &str) -> Option<i32> {
    let (_, nice) = text.trim_end().rsplit_once(" nice ")?;
    nice.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_nice_value() {
        assert_eq!(parse("/autogroup-288233 nice 0\n"), Some(0));
        assert_eq!(parse("/autogroup-1 nice -20\n"), Some(-20));
        assert_eq!(parse(""), None);
        assert_eq!(parse("/autogroup-1 nice \n"), None);
    }
}
