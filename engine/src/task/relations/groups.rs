//! Who leads and who joins which process group, with helpers for leaders that are gone or have gone elsewhere.

use super::planner::Planner;
use super::{RelationError, Role};
use crate::tree::Task;

/// Decides it for all tasks.
pub(super) fn plan(planner: &mut Planner<'_>) -> Result<(), RelationError> {
    for task in &planner.tree.tasks {
        let id = planner.by_pid[&task.pid];
        if planner.births[id].setsid && task.pgid == task.pid || is_outer(planner, task) {
            continue;
        }
        match planner.history.numbers.get(&task.pgid) {
            Some(&namesake) if planner.tree.tasks[namesake].pgid != task.pgid => {
                keep(planner, namesake)?;
            }
            None if !planner.by_pid.contains_key(&task.pgid) => {
                let helper = planner.make_helper(Role::Leader, Some(task.pgid), id);
                planner.births[helper].group = Some(task.pgid);
            }
            Some(_) | None => {}
        }
        planner.births[id].group = Some(task.pgid);
    }
    Ok(())
}

/// Has a task lead the group of its pid for a moment, and leave a helper there when it goes to its own.
fn keep(planner: &mut Planner<'_>, namesake: usize) -> Result<(), RelationError> {
    let task = &planner.tree.tasks[namesake];
    if is_outer(planner, task) {
        return Err(RelationError::OuterGroup {
            pid: task.pid,
            pgid: task.pgid,
        });
    }
    let id = planner.by_pid[&task.pid];
    if planner.births[id].keeper.is_none() {
        let keeper = planner.make_helper(Role::Keeper, None, id);
        // It is made between two other steps, not with the children.
        planner.births[id].after.retain(|made| *made != keeper);
        planner.births[id].keeper = Some(keeper);
    }
    Ok(())
}

/// True for groups that the root brought along from outside, its own or that of the session's leader: everybody in
/// them inherits the restorer's instead.
fn is_outer(planner: &Planner<'_>, task: &Task) -> bool {
    let root = planner.tree.root();
    let is_from_outside = |group| group == root.pgid || group == root.sid;
    let is_job = root.sid != root.pid && task.sid == root.sid;
    is_job && is_from_outside(task.pgid) && !planner.history.numbers.contains_key(&task.pgid)
}
