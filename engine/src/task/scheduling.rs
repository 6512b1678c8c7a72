//! Scheduling of a thread: policy, priority, nice value, deadline, clamps, affinity, I/O priority.
//!
//! Read by the coordinator, set by the thread itself before its credentials go; records are added only
//! for what differs from the restoring thread, which every restored one inherits. The autogroup is not
//! a thread's but its session's: see the module `autogroup`.
//!
//! Source: man 2 sched_setattr, sched_setaffinity, ioprio_set.

use firn_proto::{FirnThreadEntry, ThreadCoreEntry};
use firn_sys::sched::{self, SchedAttr};
use firn_sys::{Pid, Result, nr};

use crate::program::{Program, Rule};

const SCHED_DEADLINE: u32 = 6;
/// Policies that share CPUs by weight: normal, batch, idle, and sched_ext.
const FAIR: [u32; 4] = [0, 3, 5, 7];
/// Stands in the policy that sched_getscheduler tells, which is what CRIU saves; sched_getattr has it in
/// its flags.
const POLICY_RESET_ON_FORK: u32 = 0x4000_0000;
const FLAG_RESET_ON_FORK: u64 = 0x01;
const FLAG_UTIL_MIN: u64 = 0x20;
const FLAG_UTIL_MAX: u64 = 0x40;
const IOPRIO_WHO_PROCESS: u32 = 1;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;

/// Scheduling of the restoring thread.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnScheduling {
    attr: SchedAttr,
    affinity: Vec<u64>,
    io_priority: u32,
}

impl OwnScheduling {
    /// Reads that of the calling thread.
    ///
    /// # Errors
    /// As sched_getattr.
    pub fn read() -> Result<OwnScheduling> {
        let me = Pid::from_raw(0);
        Ok(OwnScheduling {
            attr: sched::sched_getattr(me)?,
            affinity: sched::sched_getaffinity(me)?,
            io_priority: sched::ioprio_get(me).unwrap_or(0),
        })
    }
}

/// Reads a thread's scheduling into its image.
///
/// # Errors
/// ESRCH: the thread is gone.
pub fn dump(tid: Pid, core: &mut ThreadCoreEntry) -> Result<()> {
    let attr = sched::sched_getattr(tid)?;
    core.sched_policy = Some(attr.policy);
    core.sched_nice = Some(attr.nice);
    core.sched_prio = Some(attr.priority);
    let extension = core.firn.get_or_insert_default();
    extension.sched_flags = Some(attr.flags);
    extension.sched_runtime = Some(attr.runtime);
    extension.sched_deadline = Some(attr.deadline);
    extension.sched_period = Some(attr.period);
    extension.util_min = Some(attr.util_min);
    extension.util_max = Some(attr.util_max);
    extension.affinity = sched::sched_getaffinity(tid)?;
    // ENOSYS without CONFIG_BLOCK.
    extension.io_priority = sched::ioprio_get(tid).ok();
    Ok(())
}

/// Adds the calls that set a thread's scheduling, where it differs from the restoring thread's own.
pub fn plan(program: &mut Program, core: &ThreadCoreEntry, own: &OwnScheduling) {
    let nothing = FirnThreadEntry::default();
    let extension = core.firn.as_ref().unwrap_or(&nothing);
    plan_affinity(program, extension, own);
    if let Some(priority) = extension
        .io_priority
        .filter(|wanted| *wanted != own.io_priority)
    {
        let args = [IOPRIO_WHO_PROCESS.into(), 0.into(), priority.into()];
        program.call(nr::IOPRIO_SET, &args, Rule::Ok, "setting the I/O priority");
    }
    let (Some(policy), Some(nice)) = (core.sched_policy, core.sched_nice) else {
        return;
    };
    let is_reset = policy & POLICY_RESET_ON_FORK != 0;
    let flags = extension.sched_flags.unwrap_or(own.attr.flags);
    let wanted = SchedAttr {
        policy: policy & !POLICY_RESET_ON_FORK,
        nice,
        priority: core.sched_prio.unwrap_or(0),
        flags: flags | if is_reset { FLAG_RESET_ON_FORK } else { 0 },
        runtime: extension.sched_runtime.unwrap_or(own.attr.runtime),
        deadline: extension.sched_deadline.unwrap_or(own.attr.deadline),
        period: extension.sched_period.unwrap_or(own.attr.period),
        ..own.attr
    };
    if wanted != own.attr {
        let attr = program.data(&settable(wanted, &own.attr).to_bytes());
        let args = [0.into(), attr.into(), 0.into()];
        let why = "setting scheduling policy and priority";
        program.call(nr::SCHED_SETATTR, &args, Rule::Ok, why);
    }
    plan_clamps(program, extension, wanted, own);
}

/// What the kernel takes: it tells a fair thread's slice always, but to set it makes it the thread's own.
fn settable(wanted: SchedAttr, own: &SchedAttr) -> SchedAttr {
    let is_fair = FAIR.contains(&wanted.policy);
    let keeps_slice = is_fair && (wanted.runtime == own.runtime || !FAIR.contains(&own.policy));
    SchedAttr {
        runtime: if keeps_slice || !is_fair && wanted.policy != SCHED_DEADLINE {
            0
        } else {
            wanted.runtime
        },
        ..wanted
    }
}

fn plan_clamps(
    program: &mut Program,
    extension: &FirnThreadEntry,
    wanted: SchedAttr,
    own: &OwnScheduling,
) {
    let (Some(util_min), Some(util_max)) = (extension.util_min, extension.util_max) else {
        return;
    };
    let is_same = (util_min, util_max) == (own.attr.util_min, own.attr.util_max);
    // A kernel without clamps tells zeros for both.
    if is_same || util_max == 0 || wanted.policy == SCHED_DEADLINE {
        return;
    }
    let attr = SchedAttr {
        flags: wanted.flags | FLAG_UTIL_MIN | FLAG_UTIL_MAX,
        util_min,
        util_max,
        ..settable(wanted, &own.attr)
    };
    let attr = program.data(&attr.to_bytes());
    let args = [0.into(), attr.into(), 0.into()];
    let why = "setting the utilization clamps";
    program.call(nr::SCHED_SETATTR, &args, Rule::OkOr(EOPNOTSUPP), why);
}

fn plan_affinity(program: &mut Program, extension: &FirnThreadEntry, own: &OwnScheduling) {
    let wanted = &extension.affinity;
    if wanted.is_empty() || *wanted == own.affinity {
        return;
    }
    let mask: Vec<u8> = wanted.iter().flat_map(|word| word.to_le_bytes()).collect();
    let len = u64::try_from(mask.len()).expect("few CPUs");
    let mask = program.data(&mask);
    let args = [0.into(), len.into(), mask.into()];
    // EINVAL: none of these CPUs is here; the thread runs where the restorer may.
    let why = "setting the CPU affinity";
    program.call(nr::SCHED_SETAFFINITY, &args, Rule::OkOr(EINVAL), why);
}

/// What becomes of an affinity to CPUs that this machine does not have.
pub fn affinity_warning(core: &ThreadCoreEntry, own: &OwnScheduling) -> Option<&'static str> {
    let wanted = &core.firn.as_ref()?.affinity;
    let here = wanted.iter().zip(&own.affinity).any(|(a, b)| a & b != 0);
    (!wanted.is_empty() && !here)
        .then_some("none of the CPUs that it was bound to can be used here: it may run on all")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_restorers_own_scheduling_needs_no_record() {
        let own = OwnScheduling::read().unwrap();
        let mut core = ThreadCoreEntry::default();
        dump(Pid::from_raw(0), &mut core).unwrap();
        let mut program = Program::new("test");
        plan(&mut program, &core, &own);
        assert!(program.is_empty(), "{}", program.describe(0));
        assert_eq!(affinity_warning(&core, &own), None);
    }

    #[test]
    fn policies_of_criu_may_say_that_children_start_anew() {
        let own = OwnScheduling::read().unwrap();
        let core = ThreadCoreEntry {
            sched_policy: Some(POLICY_RESET_ON_FORK | own.attr.policy),
            sched_nice: Some(own.attr.nice),
            ..ThreadCoreEntry::default()
        };
        let mut program = Program::new("test");
        plan(&mut program, &core, &own);
        let flags = own.attr.flags | FLAG_RESET_ON_FORK;
        let wanted = SchedAttr { flags, ..own.attr };
        let expected = settable(wanted, &own.attr).to_bytes();
        let mut other = Program::new("test");
        let attr = other.data(&expected);
        let args = [0.into(), attr.into(), 0.into()];
        let why = "setting scheduling policy and priority";
        other.call(nr::SCHED_SETATTR, &args, Rule::Ok, why);
        assert_eq!(program.describe(0), other.describe(0));
    }

    #[test]
    fn another_nice_value_keeps_the_default_slice() {
        let own = OwnScheduling::read().unwrap();
        let wanted = SchedAttr {
            nice: 7,
            ..own.attr
        };
        assert_eq!(settable(wanted, &own.attr).runtime, 0);
        let sliced = SchedAttr {
            runtime: own.attr.runtime + 1,
            ..own.attr
        };
        assert_eq!(settable(sliced, &own.attr).runtime, own.attr.runtime + 1);
    }

    #[test]
    fn absent_cpus_are_warned_of() {
        let own = OwnScheduling {
            affinity: vec![3],
            ..OwnScheduling::read().unwrap()
        };
        let mut core = ThreadCoreEntry::default();
        core.firn.get_or_insert_default().affinity = vec![4];
        assert!(affinity_warning(&core, &own).is_some());
    }
}
