//! Pids: those that the tasks had must be free, and helpers get others.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use firn_sys::Pid;

use super::RestoreError;
use super::load::Checkpoint;
use crate::task::relations::Family;
use crate::task::status::Status;
use crate::tree::Task;

/// How long dead tasks that hold a wanted pid are waited for.
const ZOMBIE_PATIENCE: Duration = Duration::from_secs(3);

/// Refuses a restore whose pids are taken, before anything is made.
pub(super) fn check_free(checkpoint: &Checkpoint) -> Result<(), RestoreError> {
    let zombies_until = Instant::now() + ZOMBIE_PATIENCE;
    let tids = checkpoint.tree.tasks.iter().flat_map(Task::tids);
    for pid in tids {
        if is_taken(pid, zombies_until) {
            let by = who_has(pid);
            return Err(RestoreError::PidTaken { pid, by });
        }
    }
    Ok(())
}

/// Gives helpers that may have any pid one that no task of the tree has, so that they can be waited for.
pub(super) fn with_midwife_pids(mut family: Family, checkpoint: &Checkpoint) -> Family {
    let tree = &checkpoint.tree;
    let of_births = family.births.iter().filter_map(|birth| birth.pid);
    let of_threads = tree.tasks.iter().flat_map(Task::tids);
    let taken: HashSet<Pid> = of_births.chain(of_threads).collect();
    let mut next = (2..).map(Pid::from_raw).filter(|pid| {
        !taken.contains(pid) && !std::fs::exists(format!("/proc/{pid}")).unwrap_or(true)
    });
    for birth in family.births.iter_mut().filter(|birth| birth.pid.is_none()) {
        birth.pid = next.next();
    }
    family
}

/// Whether somebody has a pid. What was killed by a dump just before may still wait for its parent, or for
/// init, to reap it: zombies get until then to go.
fn is_taken(pid: Pid, zombies_until: Instant) -> bool {
    loop {
        if !std::fs::exists(format!("/proc/{pid}")).unwrap_or(false) {
            return false;
        }
        let is_zombie = Status::read(pid, pid).is_ok_and(|status| status.state == b'Z');
        if !is_zombie || Instant::now() >= zombies_until {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Who has a pid, in words.
pub(super) fn who_has(pid: Pid) -> String {
    match Status::read(pid, pid) {
        Ok(status) if status.state == b'Z' => format!(
            "a zombie of `{}`, which its parent has not reaped yet",
            String::from_utf8_lossy(&status.name)
        ),
        Ok(status) => format!("process `{}`", String::from_utf8_lossy(&status.name)),
        Err(_) => "a thread or process that has just gone".to_owned(),
    }
}
