//! What kind of failure an error is: it decides exit codes, retries, and what a caller does next.

use std::io;

use firn_sys::Errno;

/// Kind of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The kernel, this machine or Firn can't do it.
    Unsupported,
    /// A call was refused: rights, space, limits, or somebody said no.
    Refused,
    /// A task, file or peer is gone, or a name is taken.
    Gone,
    /// An image makes no sense.
    Corrupt,
    /// The request itself makes no sense.
    Usage,
    /// The caller asked to stop.
    Cancelled,
    /// An invariant of ours does not hold.
    Bug,
}

/// What the user can do when this errno is at the bottom of a failure.
pub(crate) fn hint_for(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(hint) = errno_of(error).and_then(errno_hint) {
            return Some(hint.to_owned());
        }
        at = error.source();
    }
    None
}

fn errno_of(error: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    if let Some(errno) = error.downcast_ref::<Errno>() {
        return Some(*errno);
    }
    let error = error.downcast_ref::<io::Error>()?;
    error.raw_os_error().map(Errno::from_raw)
}

fn errno_hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::EPERM | Errno::EACCES => Some(
            "run as root, or with CAP_CHECKPOINT_RESTORE, CAP_SYS_PTRACE and CAP_SYS_ADMIN; \
             `firn check` says what is missing",
        ),
        Errno::ENOSPC => Some("free some space, or choose another directory with --images-dir"),
        _ => None,
    }
}
