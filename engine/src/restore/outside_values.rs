//! Values of a task that are files in /proc: they are written by this process once all tasks stand there.

use firn_sys::Pid;

use super::load::Checkpoint;
use super::threads::Losses;
use crate::task::{attributes, autogroup};

/// Sets them; what could not be set is lost.
pub(super) fn set(checkpoint: &Checkpoint) -> Losses {
    let mut losses = Losses::default();
    let own = attributes::oom_score_adj(Pid::this());
    for (pid, task) in checkpoint.living() {
        let process = task.process();
        let score = process.oom_score_adj.filter(|score| Some(*score) != own);
        if let Some(value) = score
            && let Err(error) = attributes::set_oom_score_adj(pid, value)
        {
            let what = format!("oom_score_adj stays as it is here, {value} can't be set: {error}");
            losses.add(pid, what);
        }
        let nice = process.firn.as_ref().and_then(|more| more.autogroup_nice);
        if let Some(nice) = nice
            && let Err(error) = autogroup::set_nice(pid, nice)
        {
            let what = format!(
                "its session's autogroup weighs as usual, nice {nice} can't be set: {error}"
            );
            losses.add(pid, what);
        }
    }
    losses
}
