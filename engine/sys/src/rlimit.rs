//! Limits of this process, and of others for a moment.
//!
//! Source: man 2 getrlimit.

use rustix::process::{Resource, Rlimit, getrlimit, prlimit, setrlimit};

use crate::{Errno, Pid, Result};

/// The soft limit of descriptors raised to the hard one; dropping it puts the old limit back.
#[derive(Debug)]
pub struct RaisedDescriptorLimit {
    old: Rlimit,
    raised: Option<u64>,
}

impl RaisedDescriptorLimit {
    /// The limit of descriptors while this value lives; None is no limit.
    pub fn limit(&self) -> Option<u64> {
        self.raised
    }
}

/// The limit of descriptors of this process; None is no limit.
pub fn descriptor_limit() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Raises the soft limit of descriptors of this process to the hard one; this one, too, where it is below
/// `wanted` and the process may do that (CAP_SYS_RESOURCE, `fs.nr_open`).
///
/// # Errors
/// EPERM where a security module forbids it.
pub fn raise_descriptor_limit(wanted: u64) -> Result<RaisedDescriptorLimit> {
    let old = getrlimit(Resource::Nofile);
    let raise_to = |limit: Option<u64>| {
        let raised = Rlimit {
            current: limit,
            maximum: limit,
        };
        let made = |()| RaisedDescriptorLimit { old, raised: limit };
        setrlimit(Resource::Nofile, raised).map(made)
    };
    let too_low = old.maximum.is_some_and(|hard| hard < wanted);
    let raised = too_low.then(|| raise_to(Some(wanted)).ok()).flatten();
    Ok(raised.map_or_else(|| raise_to(old.maximum), Ok)?)
}

impl Drop for RaisedDescriptorLimit {
    fn drop(&mut self) {
        // Lowering the soft limit is always allowed; open descriptors above it stay open.
        let _ = setrlimit(Resource::Nofile, self.old);
    }
}

/// Something that a process may have only so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// Bytes of its address space (RLIMIT_AS).
    AddressSpace,
    /// Bytes that it has locked (RLIMIT_MEMLOCK).
    LockedMemory,
}

/// A soft limit of another process that was raised to its hard one; dropping it puts the old one back.
#[derive(Debug)]
pub struct RaisedLimit {
    pid: rustix::process::Pid,
    resource: Resource,
    old: Rlimit,
}

/// Raises a soft limit of a process to the hard one, both of which are given in bytes, [`u64::MAX`] for none.
///
/// # Errors
/// EPERM for a process of another user without CAP_SYS_RESOURCE; ESRCH.
pub fn raise_limit_of(pid: Pid, what: Limited, soft: u64, hard: u64) -> Result<RaisedLimit> {
    let resource = match what {
        Limited::AddressSpace => Resource::As,
        Limited::LockedMemory => Resource::Memlock,
    };
    let limit = |bytes: u64| Some(bytes).filter(|bytes| *bytes != u64::MAX);
    let [soft, hard] = [limit(soft), limit(hard)];
    let new = Rlimit {
        current: hard,
        maximum: hard,
    };
    let pid = rustix::process::Pid::from_raw(pid.raw()).ok_or(Errno::ESRCH)?;
    prlimit(Some(pid), resource, new)?;
    Ok(RaisedLimit {
        pid,
        resource,
        old: Rlimit {
            current: soft,
            maximum: hard,
        },
    })
}

impl Drop for RaisedLimit {
    fn drop(&mut self) {
        // What the process has above it stays, as it was before.
        let _ = prlimit(Some(self.pid), self.resource, self.old);
    }
}
