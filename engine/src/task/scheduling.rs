//! Scheduling policy, priority and nice value of a thread.
//!
//! Source: man 2 sched_setattr.

use firn_proto::ThreadCoreEntry;
use firn_sys::sched::{SchedAttr, sched_getattr};
use firn_sys::{Pid, Result, nr};

use crate::program::{Program, Rule};

/// Reads a thread's scheduling into its image.
///
/// # Errors
/// ESRCH: the thread is gone.
pub fn dump(tid: Pid, core: &mut ThreadCoreEntry) -> Result<()> {
    let attr = sched_getattr(tid)?;
    core.sched_policy = Some(attr.policy);
    core.sched_nice = Some(attr.nice);
    core.sched_prio = Some(attr.priority);
    Ok(())
}

/// Adds the call that sets a thread's scheduling, where it differs from the restoring thread's own.
pub fn plan(program: &mut Program, core: &ThreadCoreEntry, own: &SchedAttr) {
    let (Some(policy), Some(nice)) = (core.sched_policy, core.sched_nice) else {
        return;
    };
    let wanted = SchedAttr {
        policy,
        nice,
        priority: core.sched_prio.unwrap_or(0),
        ..*own
    };
    if wanted == *own {
        return;
    }
    let attr = program.data(&wanted.to_bytes());
    let args = [0.into(), attr.into(), 0.into()];
    program.call(
        nr::SCHED_SETATTR,
        &args,
        Rule::Ok,
        "setting scheduling policy and priority",
    );
}
