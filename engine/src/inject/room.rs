//! Room for the arena in a task that is at one of its limits.
//!
//! The arena counts as address space of the task (RLIMIT_AS), and as locked memory where it has locked all
//! that comes (MCL_FUTURE, RLIMIT_MEMLOCK). Both are looked at by mmap only, so the soft limit is raised to the hard one
//! for the one call. Nothing helps where the hard one is reached too, or the number of mappings (vm.max_map_count).
//!
//! Source: man 2 getrlimit, man 2 mmap.

use firn_sys::rlimit::{self, Limited};
use firn_sys::{Errno, procfs};

use super::InjectError;
use super::remote::{self, RemoteCall, call_all};
use super::saved::Saved;
use crate::task::limits;

/// Whether a call failed for want of room, or in any other way but that memory may not be writable and executable.
pub(super) fn is_lacking(call: &RemoteCall) -> bool {
    call.result().is_err_and(|error| error != Errno::EACCES)
}

/// Makes the refused call of a thread that maps an arena of `len` bytes once more, with a higher limit.
///
/// # Errors
/// There is no higher limit, or it is another one that is reached.
pub(super) fn map(
    refused: &RemoteCall,
    thread: &mut Saved,
    len: usize,
    refusal: Errno,
) -> Result<u64, InjectError> {
    let tid = refused.tid();
    let what = match refusal {
        Errno::ENOMEM => Limited::AddressSpace,
        Errno::EAGAIN => Limited::LockedMemory,
        source => {
            return Err(InjectError::Call {
                tid,
                what: "mapping the arena",
                source,
            });
        }
    };
    let no_room = |reason| InjectError::NoRoom { tid, len, reason };
    let limit = limits::read(tid)
        .ok()
        .and_then(|all| limits::of(&all, what));
    let limit = limit.ok_or_else(|| no_room("its limits can't be read".to_owned()))?;
    if limit.cur >= limit.max {
        return Err(no_room(reason(what, limit.max)));
    }
    thread.note(|noted| noted.limit = Some((what, limit.cur)));
    let raised = rlimit::raise_limit_of(tid, what, limit.cur, limit.max);
    let raised = raised.map_err(|error| {
        no_room(format!(
            "its {} is {} bytes, and raising it for the moment failed ({error}); raise it by prlimit(1)",
            title(what),
            limit.cur
        ))
    })?;
    let mut calls = [refused.again()];
    call_all(&mut calls)?;
    let mapped = match calls[0].result() {
        Err(Errno::EACCES) => remote::map_in_two_parts(&calls[0], len),
        mapped => mapped.map_err(|_| no_room(reason(what, limit.max))),
    };
    drop(raised);
    thread.note(|noted| noted.limit = None);
    mapped
}

fn title(what: Limited) -> &'static str {
    match what {
        Limited::AddressSpace => "limit of address space (RLIMIT_AS)",
        Limited::LockedMemory => "limit of locked memory (RLIMIT_MEMLOCK)",
    }
}

fn reason(what: Limited, hard: u64) -> String {
    if hard != u64::MAX {
        return format!(
            "its {} is {hard} bytes; raise it by prlimit(1)",
            title(what)
        );
    }
    let most = procfs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    format!(
        "it has as many mappings as it may have ({}); raise vm.max_map_count by sysctl(8)",
        most.trim()
    )
}
