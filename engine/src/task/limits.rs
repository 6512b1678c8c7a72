//! Resource limits.
//!
//! Read from /proc, because prlimit of another user's task needs CAP_SYS_RESOURCE; set by the task
//! itself after its memory work, and those of descriptors and queued signals last of all: a program may have
//! lowered them below what it has. A hard limit above the restoring process's own can be set only with
//! that capability: without it the limit stays lower and the restore says so.
//!
//! Source: man 2 prlimit, man 5 proc_pid_limits.

use std::path::PathBuf;

use firn_proto::{RlimitEntry, TaskRlimitsEntry};
use firn_sys::rlimit::Limited;
use firn_sys::{Pid, nr, procfs};

use super::status::StatusError;
use crate::program::{Program, Rule};

/// Names by resource number, and their lines in /proc/PID/limits.
const RESOURCES: [(&str, &str); 16] = [
    ("RLIMIT_CPU", "Max cpu time"),
    ("RLIMIT_FSIZE", "Max file size"),
    ("RLIMIT_DATA", "Max data size"),
    ("RLIMIT_STACK", "Max stack size"),
    ("RLIMIT_CORE", "Max core file size"),
    ("RLIMIT_RSS", "Max resident set"),
    ("RLIMIT_NPROC", "Max processes"),
    ("RLIMIT_NOFILE", "Max open files"),
    ("RLIMIT_MEMLOCK", "Max locked memory"),
    ("RLIMIT_AS", "Max address space"),
    ("RLIMIT_LOCKS", "Max file locks"),
    ("RLIMIT_SIGPENDING", "Max pending signals"),
    ("RLIMIT_MSGQUEUE", "Max msgqueue size"),
    ("RLIMIT_NICE", "Max nice priority"),
    ("RLIMIT_RTPRIO", "Max realtime priority"),
    ("RLIMIT_RTTIME", "Max realtime timeout"),
];

/// RLIMIT_NOFILE and RLIMIT_SIGPENDING: descriptors and signals are made by the task itself to the end.
const LATE: [u32; 2] = [7, 11];

/// Infinity, as image and kernel store it.
const INFINITY: u64 = u64::MAX;

/// Reads all limits of a process.
///
/// # Errors
/// The process is gone, or /proc has another form than documented.
pub fn read(pid: Pid) -> Result<TaskRlimitsEntry, StatusError> {
    let path = PathBuf::from(format!("/proc/{pid}/limits"));
    let text = procfs::read_to_string(&path).map_err(|source| StatusError::Read {
        path: path.clone(),
        source,
    })?;
    parse(&text).map_err(|field| StatusError::Field { path, field })
}

/// One of them.
pub fn of(limits: &TaskRlimitsEntry, what: Limited) -> Option<RlimitEntry> {
    let name = match what {
        Limited::AddressSpace => "RLIMIT_AS",
        Limited::LockedMemory => "RLIMIT_MEMLOCK",
    };
    let at = RESOURCES.iter().position(|(other, _)| *other == name)?;
    limits.rlimits.get(at).copied()
}

fn parse(text: &str) -> Result<TaskRlimitsEntry, &'static str> {
    let rlimits = RESOURCES
        .iter()
        .map(|(_, label)| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(label))
                .ok_or(*label)?;
            let mut values = line.split_whitespace().map(|value| match value {
                "unlimited" => Some(INFINITY),
                number => number.parse().ok(),
            });
            let mut next = || values.next().flatten().ok_or(*label);
            Ok(RlimitEntry {
                cur: next()?,
                max: next()?,
            })
        })
        .collect::<Result<_, &'static str>>()?;
    Ok(TaskRlimitsEntry { rlimits })
}

/// Adds the calls that set the limits that differ from the restoring process's own; returns a sentence
/// for each that has to stay lower than it was. Those that [`plan_late`] sets become as high as they may be.
pub fn plan(
    program: &mut Program,
    wanted: &TaskRlimitsEntry,
    own: &TaskRlimitsEntry,
    may_raise: bool,
) -> Vec<String> {
    let mut lowered = Vec::new();
    let pairs = wanted.rlimits.iter().zip(&own.rlimits).zip(RESOURCES);
    for (resource, ((wanted, own), (name, _))) in (0u32..).zip(pairs) {
        let (cur, max) = possible(wanted, own, may_raise);
        if max != wanted.max {
            lowered.push(format!(
                "{name} stays at {max}: raising the hard limit to {} needs CAP_SYS_RESOURCE",
                wanted.max
            ));
        }
        let first = match LATE.contains(&resource) {
            true => highest(max, own),
            false => (cur, max),
        };
        if first != (own.cur, own.max) {
            set(program, resource, first);
        }
    }
    lowered
}

/// Adds the calls that set the limits of what the task itself has made until then.
pub fn plan_late(
    program: &mut Program,
    wanted: &TaskRlimitsEntry,
    own: &TaskRlimitsEntry,
    may_raise: bool,
) {
    let pairs = wanted.rlimits.iter().zip(&own.rlimits);
    let late = (0u32..)
        .zip(pairs)
        .filter(|(resource, _)| LATE.contains(resource));
    for (resource, (wanted, own)) in late {
        let last = possible(wanted, own, may_raise);
        if last != highest(last.1, own) {
            set(program, resource, last);
        }
    }
}

/// What a limit is until it is lowered to its hard limit `max`.
fn highest(max: u64, own: &RlimitEntry) -> (u64, u64) {
    let highest = max.max(own.max);
    (highest, highest)
}

fn set(program: &mut Program, resource: u32, (soft, hard): (u64, u64)) {
    let limit = program.data(&[soft.to_le_bytes(), hard.to_le_bytes()].concat());
    let args = [0.into(), resource.into(), limit.into(), 0.into()];
    let names = (0u32..).zip(RESOURCES);
    let name = names
        .filter(|(nth, _)| *nth == resource)
        .map(|(_, (name, _))| name);
    let why = format!("setting {}", name.collect::<String>());
    program.call(nr::PRLIMIT64, &args, Rule::Ok, why);
}

/// Soft and hard limit as far as they can be had.
fn possible(wanted: &RlimitEntry, own: &RlimitEntry, may_raise: bool) -> (u64, u64) {
    let max = match may_raise {
        true => wanted.max,
        false => wanted.max.min(own.max),
    };
    (wanted.cur.min(max), max)
}

/// RLIMIT_STACK after [`plan`]: soft and hard.
pub fn of_stack(
    wanted: Option<&TaskRlimitsEntry>,
    own: &TaskRlimitsEntry,
    may_raise: bool,
) -> (u64, u64) {
    const STACK: usize = 3;
    let own = &own.rlimits[STACK];
    let wanted = wanted.and_then(|wanted| wanted.rlimits.get(STACK));
    possible(wanted.unwrap_or(own), own, may_raise)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_limits_parse_and_need_no_record() {
        let own = read(Pid::this()).unwrap();
        assert_eq!(own.rlimits.len(), 16);
        let mut program = Program::new("test");
        assert!(plan(&mut program, &own, &own, false).is_empty());
        let late = LATE.map(|nth| &own.rlimits[usize::try_from(nth).unwrap()]);
        let raised = late.iter().filter(|own| own.cur != own.max);
        assert_eq!(program.len(), raised.count());
    }

    #[test]
    fn limits_of_what_is_still_made_are_set_last() {
        let limit = |cur, max| TaskRlimitsEntry {
            rlimits: vec![RlimitEntry { cur, max }; 16],
        };
        let late = |wanted: &TaskRlimitsEntry| {
            let mut program = Program::new("test");
            plan_late(&mut program, wanted, &limit(5, 10), false);
            program.len()
        };
        assert_eq!((late(&limit(3, 8)), late(&limit(10, 10))), (2, 0));
    }

    #[test]
    fn a_hard_limit_that_cannot_rise_is_reported() {
        let limit = |cur, max| TaskRlimitsEntry {
            rlimits: vec![RlimitEntry { cur, max }; 16],
        };
        let mut program = Program::new("test");
        let said = plan(&mut program, &limit(20, 30), &limit(5, 10), false);
        assert_eq!((said.len(), program.len()), (16, 16));
        assert!(
            said[7].starts_with("RLIMIT_NOFILE stays at 10"),
            "{}",
            said[7]
        );
        let mut program = Program::new("test");
        assert!(plan(&mut program, &limit(20, 30), &limit(5, 10), true).is_empty());
        assert_eq!(program.len(), 16);
    }
}
