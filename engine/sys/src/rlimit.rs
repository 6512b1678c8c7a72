//! Limits of this process.
//!
//! Source: man 2 getrlimit.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Result;

/// The soft limit of descriptors raised to the hard one; dropping it puts the old limit back.
#[derive(Debug)]
pub struct RaisedDescriptorLimit {
    old: Rlimit,
}

impl RaisedDescriptorLimit {
    /// The limit of descriptors while this value lives; None is no limit.
    pub fn limit(&self) -> Option<u64> {
        self.old.maximum
    }
}

/// Raises the soft limit of descriptors of this process to the hard one.
///
/// # Errors
/// EPERM where a security module forbids it.
pub fn raise_descriptor_limit() -> Result<RaisedDescriptorLimit> {
    let old = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: old.maximum,
        maximum: old.maximum,
    };
    setrlimit(Resource::Nofile, raised)?;
    Ok(RaisedDescriptorLimit { old })
}

impl Drop for RaisedDescriptorLimit {
    fn drop(&mut self) {
        // Lowering the soft limit is always allowed; open descriptors above it stay open.
        let _ = setrlimit(Resource::Nofile, self.old);
    }
}
