//! Adjustments of System V semaphores: what the kernel adds to them when a process ends that has changed them
//! with SEM_UNDO.
//!
//! The sets belong to the machine and stay; the adjustments go with the process, and no interface shows them,
//! so they are read in the kernel's memory. The kernel applies them when a dump kills the process: a lock that
//! it holds is free then, and somebody may take it. A restore makes the same changes again, with SEM_UNDO, which
//! brings back values and adjustments, or is refused where a semaphore has been taken meanwhile.
//!
//! | | |
//! |---|---|
//! | whose adjustments they are | those of a `struct sem_undo_list`, which the threads of a process share |
//! | refused | lists that only some threads have, or several processes (CLONE_SYSVSEM) |
//! | refused | semaphores whose value would be cut off at 0 or 32,767 by the ends of the tasks |
//! | refused, where the kernel's memory can't be read | processes that were the last to change a semaphore |
//!
//! Source: man 2 semop; linux ipc/sem.c, struct sem_undo, exit_sem.

use std::collections::{BTreeMap, HashMap};

use firn_proto::{FirnSemaphoreSet, FirnSemaphoreUndo};
use firn_sys::semaphores::{self, IPC_NOWAIT, MAX_VALUE, SEM_UNDO};
use firn_sys::{Errno, Pid, nr, procfs};

use crate::kernel::{Kernel, LazyKernel, Object};
use crate::obstacle::Obstacle;
use crate::program::{Program, Rule};
use crate::tree::{Task, Tree};

/// Sets that a process may have changed; the kernel has no more.
const MAX_SETS: usize = 32_768;
/// Operations in one call: the smallest limit (SEMOPM) that kernels have had.
const AT_ONCE: usize = 32;

/// What the tasks of a tree have changed with SEM_UNDO.
#[derive(Debug, Default)]
pub(crate) struct SemaphoreDump {
    by_task: HashMap<Pid, Vec<FirnSemaphoreSet>>,
    obstacles: Vec<Obstacle>,
}

/// Why changes can't be made again.
#[derive(Debug, thiserror::Error)]
pub enum SemaphoreError {
    /// It is not there.
    #[error("task {pid} has changed {set}, which is not here")]
    NoSet {
        /// The task.
        pid: Pid,
        /// The set.
        set: String,
    },
    /// Others have changed it.
    #[error(
        "task {pid} had changed semaphore {number} of {set}, whose value does not allow it again: {value}, last \
         changed by process {by}"
    )]
    Taken {
        /// The task.
        pid: Pid,
        /// The semaphore.
        number: u32,
        /// The set.
        set: String,
        /// What it is now.
        value: i64,
        /// Who has changed it.
        by: i32,
    },
    /// The image makes no sense.
    #[error("core-{pid}.img has an impossible change of {set}")]
    Corrupt {
        /// The task.
        pid: Pid,
        /// The set.
        set: String,
    },
}

/// Sets that somebody has worked with; without one there is nothing to look for.
fn used_sets() -> Vec<(i32, u32)> {
    used_in(&procfs::read_to_string("/proc/sysvipc/sem").unwrap_or_default())
}

/// Id and length of those sets in /proc/sysvipc/sem: key, semid, perms, nsems, uid, gid, cuid, cgid, otime.
fn used_in(table: &str) -> Vec<(i32, u32)> {
    let set = |line: &str| {
        let mut words = line.split_whitespace();
        let id = words.nth(1)?.parse().ok()?;
        let len = words.nth(1)?.parse().ok()?;
        (words.nth(4)? != "0").then_some((id, len))
    };
    table.lines().skip(1).filter_map(set).collect()
}

/// Opens the kernel's structures, where they will be needed, before the tree stops; says what will be missing
/// where they can't be had.
pub(crate) fn survey(kernel: &LazyKernel) -> Option<String> {
    let is_blind = !used_sets().is_empty() && kernel.get().is_none();
    is_blind.then(|| {
        "System V semaphores are in use here, and whether tasks have changed some with SEM_UNDO can't be seen \
         without reading the kernel's memory: such changes are lost"
            .to_owned()
    })
}

impl SemaphoreDump {
    /// Reads the adjustments of all tasks.
    ///
    /// **Preconditions**: the tree is frozen.
    pub(crate) fn collect(tree: &Tree, kernel: &LazyKernel) -> SemaphoreDump {
        let used = used_sets();
        let mut dump = SemaphoreDump::default();
        if used.is_empty() {
            return dump;
        }
        let suspects = match kernel.get() {
            Some(_) => HashMap::new(),
            None => last_to_change(&used),
        };
        for task in tree.alive() {
            let read = kernel.get().map(|kernel| read(kernel, task));
            match (read, suspects.get(&task.pid)) {
                (Some(Ok(sets)), _) if sets.is_empty() => {}
                (Some(Ok(sets)), _) => drop(dump.by_task.insert(task.pid, sets)),
                (Some(Err(obstacle)), _) => dump.obstacles.push(*obstacle),
                (None, Some(semaphore)) => dump.obstacles.push(suspicion(task.pid, *semaphore)),
                (None, None) => {}
            }
        }
        dump.obstacles.extend(dump.cut_off());
        dump
    }

    /// What can't be dumped.
    pub(crate) fn take_obstacles(&mut self) -> Vec<Obstacle> {
        std::mem::take(&mut self.obstacles)
    }

    /// The sets that a task has changed.
    pub(crate) fn of_task(&self, pid: Pid) -> Vec<FirnSemaphoreSet> {
        self.by_task.get(&pid).cloned().unwrap_or_default()
    }

    /// Semaphores whose value does not survive that the kernel undoes the changes of the tasks in any order.
    fn cut_off(&self) -> Vec<Obstacle> {
        let mut sums: BTreeMap<(u32, u32), (Pid, &FirnSemaphoreSet, i64, i64)> = BTreeMap::new();
        for (pid, set, undo) in changes(
            self.by_task
                .iter()
                .map(|(pid, sets)| (*pid, sets.as_slice())),
        ) {
            let sum = sums
                .entry((set.id, undo.semaphore))
                .or_insert((pid, set, 0, 0));
            match i64::from(undo.adjustment) {
                down if down < 0 => sum.2 += down,
                up => sum.3 += up,
            }
        }
        let cut = sums.into_iter().filter_map(|((_, number), (pid, set, down, up))| {
            let value = value(set, number).ok()?;
            let is_cut = value + down < 0 || value + up > MAX_VALUE;
            is_cut.then(|| Obstacle {
                pid,
                object: format!("semaphore {number} of {}", title(set)),
                reason: "its value would be cut off when the kernel undoes at the tasks' end what they did with \
                         SEM_UNDO"
                    .to_owned(),
                hint: Some("dump when others have given back what they took of it".to_owned()),
            })
        });
        cut.collect()
    }
}

/// A set for messages.
fn title(set: &FirnSemaphoreSet) -> String {
    format!("System V semaphore set {} with key {:#x}", set.id, set.key)
}

fn value(set: &FirnSemaphoreSet, number: u32) -> Result<i64, Errno> {
    let number = u16::try_from(number).map_err(|_| Errno::EINVAL)?;
    semaphores::value(set.id.cast_signed(), number).map(i64::from)
}

/// All changes, one after another.
fn changes<'a>(
    tasks: impl Iterator<Item = (Pid, &'a [FirnSemaphoreSet])>,
) -> impl Iterator<Item = (Pid, &'a FirnSemaphoreSet, &'a FirnSemaphoreUndo)> {
    let sets = tasks.flat_map(|(pid, sets)| sets.iter().map(move |set| (pid, set)));
    sets.flat_map(|(pid, set)| set.undo.iter().map(move |undo| (pid, set, undo)))
}

/// A semaphore that each process was the last to change.
fn last_to_change(used: &[(i32, u32)]) -> HashMap<Pid, (i32, u16)> {
    let numbers = |(id, len): &(i32, u32)| {
        let (id, len) = (*id, u16::try_from(*len).unwrap_or(u16::MAX));
        (0..len).map(move |number| (id, number))
    };
    let last = |(id, number)| {
        let pid = semaphores::last_pid(id, number).ok()?;
        Some((Pid::from_raw(pid), (id, number)))
    };
    used.iter().flat_map(numbers).filter_map(last).collect()
}

fn suspicion(pid: Pid, (id, number): (i32, u16)) -> Obstacle {
    Obstacle {
        pid,
        object: format!("semaphore {number} of System V semaphore set {id}"),
        reason: "it was the last to change it, and whether with SEM_UNDO can't be seen without reading the \
                 kernel's memory"
            .to_owned(),
        hint: Some("dump as root, or with CAP_BPF and CAP_PERFMON".to_owned()),
    }
}

/// The list that a thread has.
struct List<'a> {
    object: Option<Object<'a>>,
    sets: Vec<FirnSemaphoreSet>,
}

/// The adjustments of a stopped process.
fn read(kernel: &Kernel, task: &Task) -> Result<Vec<FirnSemaphoreSet>, Box<Obstacle>> {
    let refused = |reason: &str| {
        Box::new(Obstacle {
            pid: task.pid,
            object: "changes of System V semaphores with SEM_UNDO".to_owned(),
            reason: reason.to_owned(),
            hint: None,
        })
    };
    let mut lists: Vec<List<'_>> = Vec::new();
    for tid in &task.threads {
        let address = |list: &List<'_>| list.object.map_or(0, Object::address);
        let unread = || refused("they can't be read in the kernel's memory");
        let thread = kernel.thread(*tid).ok_or_else(unread)?;
        let list = thread.number("sysvsem.undo_list").ok_or_else(unread)?;
        if !lists.iter().any(|known| address(known) == list) {
            let object = thread.follow("sysvsem.undo_list");
            let sets = object
                .map_or(Some(Vec::new()), sets_of)
                .ok_or_else(unread)?;
            lists.push(List { object, sets });
        }
    }
    if lists.iter().all(|list| list.sets.is_empty()) {
        return Ok(Vec::new());
    }
    if lists.len() > 1 {
        return Err(refused(
            "only some of its threads share them (unshare, clone without CLONE_SYSVSEM)",
        ));
    }
    let list = lists.pop().expect("counted above");
    let users = list
        .object
        .and_then(|list| list.word("refcnt.refs.counter"));
    if users.map(|users| usize::try_from(users).ok()) != Some(Some(task.threads.len())) {
        return Err(refused(
            "other processes share them (clone with CLONE_SYSVSEM)",
        ));
    }
    Ok(list.sets)
}

/// The sets of a `struct sem_undo_list`.
fn sets_of(list: Object<'_>) -> Option<Vec<FirnSemaphoreSet>> {
    let entries = list.entries("list_proc", "sem_undo", "list_proc", MAX_SETS)?;
    let sets = entries.into_iter().map(set_of);
    let sets: Option<Vec<_>> = sets.collect();
    Some(sets?.into_iter().flatten().collect())
}

/// What a `struct sem_undo` says, if anything.
#[expect(clippy::option_option, reason = "can't be read, or says nothing")]
fn set_of(entry: Object<'_>) -> Option<Option<FirnSemaphoreSet>> {
    let id = entry.word("semid")?;
    let set = match semaphores::stat(id.cast_signed()) {
        Ok(set) => set,
        // It has been removed.
        Err(Errno::EINVAL | Errno::EIDRM) => return Some(None),
        Err(_) => return None,
    };
    let adjustments = entry.numbers("semadj", usize::try_from(set.len).ok()?)?;
    let undo = (0u32..).zip(adjustments).map(|(semaphore, number)| {
        let half = u16::try_from(number).ok()?;
        Some(FirnSemaphoreUndo {
            semaphore,
            adjustment: half.cast_signed().into(),
        })
    });
    let undo: Option<Vec<_>> = undo.collect();
    let undo: Vec<_> = undo?
        .into_iter()
        .filter(|undo| undo.adjustment != 0)
        .collect();
    Some((!undo.is_empty()).then(|| FirnSemaphoreSet {
        id,
        key: set.key.cast_unsigned(),
        len: set.len,
        undo,
    }))
}

/// Checks that the semaphores are there, and that the changes of all tasks can be made again.
///
/// # Errors
/// They are not, or can't.
pub fn check<'a>(
    tasks: impl Iterator<Item = (Pid, &'a [FirnSemaphoreSet])>,
) -> Result<(), SemaphoreError> {
    let mut after: BTreeMap<(u32, u32), i64> = BTreeMap::new();
    let mut last = Vec::new();
    for (pid, set, undo) in changes(tasks) {
        let there = semaphores::stat(set.id.cast_signed());
        let is_same =
            |there: semaphores::Set| there.key.cast_unsigned() == set.key && there.len == set.len;
        let now = value(set, undo.semaphore);
        let (Ok(true), Ok(now)) = (there.map(is_same), now) else {
            return Err(SemaphoreError::NoSet {
                pid,
                set: title(set),
            });
        };
        if change(undo).is_none() {
            return Err(SemaphoreError::Corrupt {
                pid,
                set: title(set),
            });
        }
        let sum = after.entry((set.id, undo.semaphore)).or_insert(now);
        *sum -= i64::from(undo.adjustment);
        last.push((pid, set, undo.semaphore, now));
    }
    let is_impossible = |at: &(Pid, &FirnSemaphoreSet, u32, i64)| {
        !(0..=MAX_VALUE).contains(&after[&(at.1.id, at.2)])
    };
    match last.into_iter().find(is_impossible) {
        None => Ok(()),
        Some((pid, set, number, value)) => Err(SemaphoreError::Taken {
            pid,
            number,
            set: title(set),
            value,
            by: u16::try_from(number)
                .ok()
                .and_then(|number| semaphores::last_pid(set.id.cast_signed(), number).ok())
                .unwrap_or(0),
        }),
    }
}

/// The semaphore and what is added to it.
fn change(undo: &FirnSemaphoreUndo) -> Option<(u16, i16)> {
    let change = i16::try_from(undo.adjustment.checked_neg()?).ok()?;
    Some((u16::try_from(undo.semaphore).ok()?, change))
}

/// Adds the calls that change the semaphores again, while the process has the restorer's rights. Nothing waits:
/// what was taken meanwhile fails the restore.
pub fn plan(p: &mut Program, sets: &[FirnSemaphoreSet]) {
    for set in sets {
        let changes: Vec<_> = set.undo.iter().filter_map(change).collect();
        for some in changes.chunks(AT_ONCE) {
            let operation = |(number, by): &(u16, i16)| {
                semaphores::operation(*number, *by, SEM_UNDO | IPC_NOWAIT)
            };
            let operations: Vec<u8> = some.iter().flat_map(operation).collect();
            let operations = p.data(&operations);
            let nr_operations = u32::try_from(some.len()).expect("few at once");
            let args = [set.id.into(), operations.into(), nr_operations.into()];
            let why = format!("changing {} again", title(set));
            p.call(nr::SEMOP, &args, Rule::Exact(0), why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(id: u32, undo: &[(u32, i32)]) -> FirnSemaphoreSet {
        let undo = undo
            .iter()
            .map(|(semaphore, adjustment)| FirnSemaphoreUndo {
                semaphore: *semaphore,
                adjustment: *adjustment,
            });
        FirnSemaphoreSet {
            id,
            key: 0x4649,
            len: 40,
            undo: undo.collect(),
        }
    }

    #[test]
    fn only_sets_that_were_used_count() {
        let table = "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n\
                     \x20        0          3   600          2     0     0     0     0          0 1764425000\n\
                     1179210318      32772   660         17   107   115   107   115 1764425110 1764425000\n";
        assert_eq!(used_in(table), [(32772, 17)]);
        assert!(used_in("").is_empty() && used_in("head\n1 2 3\n").is_empty());
    }

    #[test]
    fn many_changes_take_several_calls() {
        let mut p = Program::new("test");
        let undo: Vec<(u32, i32)> = (0..40).map(|number| (number, 1)).collect();
        plan(&mut p, &[set(5, &undo)]);
        assert_eq!(p.len(), 2);
        assert!(p.describe(0).starts_with("semop(5, "), "{}", p.describe(0));
    }

    #[test]
    fn a_change_is_the_opposite_of_its_adjustment() {
        let of = |adjustment| {
            change(&FirnSemaphoreUndo {
                semaphore: 2,
                adjustment,
            })
        };
        assert_eq!(of(1), Some((2, -1)));
        assert_eq!(of(-32_767), Some((2, 32_767)));
        assert_eq!(of(-32_768), None);
        assert_eq!(of(i32::MIN), None);
    }

    #[test]
    fn sets_that_are_not_there_are_told() {
        let sets = [set(u32::MAX, &[(0, 1)])];
        let checked = check(std::iter::once((Pid::from_raw(7), sets.as_slice())));
        assert!(matches!(checked, Err(SemaphoreError::NoSet { .. })));
    }
}
