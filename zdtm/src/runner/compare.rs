//! Which differences between two views of a tree matter.

use std::fmt;

use super::snapshot::{Key, Snapshot};

/// What happened between the two views.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// The same tasks went on.
    SameTasks,
    /// They were killed and restored.
    Restored,
}

/// One line that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What it is about.
    pub key: Key,
    /// The line before, if there was one.
    pub before: Option<String>,
    /// The line after, if there is one.
    pub after: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key {
            pid,
            aspect,
            detail,
        } = &self.key;
        write!(f, "task {pid} {aspect} {detail}: ")?;
        match (&self.before, &self.after) {
            (Some(before), Some(after)) => write!(f, "was `{before}`, is `{after}`"),
            (Some(before), None) => write!(f, "was `{before}`, is gone"),
            (None, Some(after)) => write!(f, "is new: `{after}`"),
            (None, None) => write!(f, "nothing"),
        }
    }
}

/// Lists what differs and must not; `moves` names aspects that change by themselves.
pub fn differences(
    before: &Snapshot,
    after: &Snapshot,
    between: Between,
    moves: &[&str],
) -> Vec<Difference> {
    let (before, after) = match between {
        Between::SameTasks => (before.clone(), after.clone()),
        Between::Restored => (before.joined(), after.joined()),
    };
    let keys = before.lines.keys();
    let new_keys = after
        .lines
        .keys()
        .filter(|key| !before.lines.contains_key(key));
    keys.chain(new_keys)
        .filter(|key| !moves.contains(&key.aspect))
        .map(|key| Difference {
            key: key.clone(),
            before: before.lines.get(key).cloned(),
            after: after.lines.get(key).cloned(),
        })
        .filter(|difference| difference.before != difference.after)
        .filter(|difference| !is_by_contract(difference, &before, between))
        .collect()
}

/// Differences that no engine can avoid, or that are nobody's state.
fn is_by_contract(difference: &Difference, whole: &Snapshot, between: Between) -> bool {
    let Difference {
        key,
        before: Some(before),
        after: Some(after),
    } = difference
    else {
        return false;
    };
    let restored = between == Between::Restored;
    match key.aspect {
        // A restored root is a child of whoever restored it.
        "tree" if key.detail == "parent" => restored && key.pid == whole.root,
        // A stopped task comes to stand before or behind the same instruction.
        "syscall" if whole.state_of(key.pid) == Some("T") => true,
        "syscall" => is_restarted(before, after, restored),
        // Neighbours that differ in nothing else are joined before they are compared.
        "vmflags" => lasting_flags(before, restored) == lasting_flags(after, restored),
        _ => false,
    }
}

/// Leaves out the soft-dirty flag, which says what was written since someone asked; and, after a
/// restore, the accounting flag: it tells whether a mapping has ever been writable, no image has a
/// place for it, and where it keeps neighbours apart the comparison of `maps` shows that.
pub(super) fn lasting_flags(flags: &str, restored: bool) -> Vec<&str> {
    let lasting = |flag: &&str| *flag != "sd" && !(restored && *flag == "ac");
    flags.split(' ').filter(lasting).collect()
}

const RESTART_SYSCALL: &str = "219";

/// Calls with a relative timeout continue as `restart_syscall`; in a new task the kernel has nothing
/// to continue, so they may have come back with EINTR, and the task may be anywhere.
fn is_restarted(before: &str, after: &str, restored: bool) -> bool {
    const WITH_TIMEOUT: [&str; 8] = ["7", "35", "128", "202", "219", "230", "271", "449"];
    let number = |text: &str| text.split(' ').next().unwrap_or("").to_owned();
    let (before, after) = (number(before), number(after));
    let timed = WITH_TIMEOUT.contains(&before.as_str());
    let same_call = after == before || after == RESTART_SYSCALL;
    before == "running" || (timed && (restored || same_call))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(lines: &[(&'static str, &str, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::empty(5);
        for (aspect, detail, value) in lines {
            let key = Key {
                pid: 5,
                aspect,
                detail: (*detail).to_owned(),
            };
            snapshot.lines.insert(key, (*value).to_owned());
        }
        snapshot
    }

    fn names(before: &Snapshot, after: &Snapshot, between: Between) -> Vec<String> {
        let found = differences(before, after, between, &["comm"]);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn changed_gone_and_new_lines_are_told_apart() {
        let before = snapshot(&[("fd", "1", "a"), ("fd", "2", "b"), ("comm", "5", "x")]);
        let after = snapshot(&[("fd", "1", "c"), ("fd", "3", "d"), ("comm", "5", "y")]);
        assert_eq!(
            names(&before, &after, Between::SameTasks),
            [
                "task 5 fd 1: was `a`, is `c`",
                "task 5 fd 2: was `b`, is gone",
                "task 5 fd 3: is new: `d`"
            ]
        );
    }

    #[test]
    fn only_a_restored_root_may_have_another_parent() {
        let before = snapshot(&[("tree", "parent", "1")]);
        let after = snapshot(&[("tree", "parent", "9")]);
        assert_eq!(names(&before, &after, Between::SameTasks).len(), 1);
        assert!(names(&before, &after, Between::Restored).is_empty());
    }

    #[test]
    fn timed_calls_may_be_restarted_and_others_must_be_the_same() {
        let nanosleep = snapshot(&[("syscall", "5", "35 0x1")]);
        let restarted = snapshot(&[("syscall", "5", "219 0x1")]);
        let running = snapshot(&[("syscall", "5", "running")]);
        let pause = snapshot(&[("syscall", "5", "34 0x1")]);
        assert!(names(&nanosleep, &restarted, Between::SameTasks).is_empty());
        assert_eq!(names(&nanosleep, &running, Between::SameTasks).len(), 1);
        assert!(names(&nanosleep, &running, Between::Restored).is_empty());
        assert_eq!(names(&pause, &running, Between::Restored).len(), 1);
        assert!(names(&running, &pause, Between::Restored).is_empty());
    }

    #[test]
    fn soft_dirty_and_accounting_are_no_difference_but_other_flags_are() {
        let with = |flags| {
            let line = "-2000 rw-p 0 0 ";
            snapshot(&[("maps", "1000", line), ("vmflags", "1000", flags)])
        };
        let (plain, dirty) = (with("rd wr"), with("rd wr sd"));
        let (counted, locked) = (with("rd wr ac"), with("rd wr lo"));
        assert!(names(&plain, &dirty, Between::Restored).is_empty());
        assert!(names(&plain, &counted, Between::Restored).is_empty());
        assert_eq!(names(&plain, &counted, Between::SameTasks).len(), 1);
        assert_eq!(names(&plain, &locked, Between::Restored).len(), 1);
    }
}
