//! What a process passes on to its descendants and takes over from them.

use crate::{Errno, Result};

/// Makes the calling process the leader of a new session without a terminal.
///
/// # Errors
/// EPERM when it leads a process group. Source: man 2 setsid.
pub fn start() -> Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Makes the calling process the parent of its descendants' orphans.
///
/// # Errors
/// None since Linux 3.4. Source: man 2 PR_SET_CHILD_SUBREAPER.
pub fn adopt_orphans() -> Result<()> {
    // Any pid but none stands for "yes".
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Ok(())
}

/// Keeps every open descriptor from number `first` on from programs that this process executes.
///
/// # Errors
/// EINVAL before Linux 5.11. Source: man 2 close_range, CLOSE_RANGE_CLOEXEC.
pub fn close_on_exec_from(first: u32) -> Result<()> {
    // SAFETY: closes nothing in this process; it takes numbers only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Errno::check(result).map(drop)
}

/// This process adopts orphans of its descendants while the value lives.
///
/// Source: man 2 PR_SET_CHILD_SUBREAPER.
#[derive(Debug)]
pub struct AdoptOrphans {
    did_before: bool,
}

impl AdoptOrphans {
    /// Begins to adopt.
    ///
    /// # Errors
    /// None since Linux 3.4.
    pub fn begin() -> Result<AdoptOrphans> {
        let mut before = 0i32;
        // SAFETY: the kernel writes one int, which outlives the call.
        let result = unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut before) };
        Errno::check(i64::from(result))?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        Ok(AdoptOrphans {
            did_before: before != 0,
        })
    }
}

impl Drop for AdoptOrphans {
    fn drop(&mut self) {
        if !self.did_before {
            // Fails only for arguments that make no sense.
            let _ = rustix::process::set_child_subreaper(None);
        }
    }
}
