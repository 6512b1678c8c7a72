//! What was set of a ring after it was made: polling of network devices (NAPI), and how many threads of the kernel
//! work for it, on which processors. All of it shows in the kernel's own structures only, and anybody who has the
//! ring may set it.
//!
//! ```text
//! struct io_uring_napi: u32 microseconds, u8 prefer busy poll, u8 operation, u8[2], u32 tracking, u32
//! limits of workers:    u32 for requests that end soon, u32 for others; 0 leaves one as it is
//! ```
//!
//! Source: linux io_uring/napi.c, io_uring/register.c, include/uapi/linux/io_uring.h.

use std::os::fd::OwnedFd;

use firn_proto::{FirnUringEntry, FirnUringNapi};
use firn_sys::Errno;
use firn_sys::io_uring::{self, register, setup};

use super::inner::Inner;
use super::users;
use crate::files::error::FileRestoreError;
use crate::files::open_file::Trouble;
use crate::kernel::Kernel;

/// Adds the settings to the image of a ring. Returns what is to be said.
///
/// # Errors
/// Some that can't be saved.
pub(super) fn add(
    seen: Option<(&Kernel, Inner<'_>)>,
    ring: &mut FirnUringEntry,
) -> Result<Option<String>, Trouble> {
    let Some((kernel, inner)) = seen else {
        return Ok(Some(
            "nothing tells whether an io_uring ring polls network devices, and how many threads of the kernel may \
             work for it; after a restore these are as for a new ring"
                .to_owned(),
        ));
    };
    if let Some(napi) = inner.napi() {
        let unknown = || {
            Trouble::new(
                "network devices that the io_uring ring polls were told by their numbers",
                "let the program unregister them before the dump (IORING_UNREGISTER_NAPI)",
            )
        };
        if napi.has_devices {
            return Err(unknown());
        }
        ring.napi = Some(FirnUringNapi {
            timeout: u32::try_from(napi.timeout).map_err(|_| unknown())?,
            prefer_busy_poll: napi.prefer_busy_poll,
            tracking: u32::try_from(napi.tracking).map_err(|_| unknown())?,
        });
    }
    ring.worker_limits = inner.worker_limits().unwrap_or_default();
    if let Some(submitter) = inner.submitter() {
        ring.worker_processors = users::chosen_processors(kernel, submitter);
    }
    Ok(None)
}

/// Sets them of a new ring.
pub(super) fn set(fd: &OwnedFd, ring: &FirnUringEntry) -> Result<(), FileRestoreError> {
    let refused = |action| FileRestoreError::refused(action, "an io_uring ring");
    if let Some(napi) = &ring.napi {
        let mut argument = napi_argument(napi);
        io_uring::operate(fd, register::NAPI, &mut argument, 1)
            .map_err(refused("set the polling of network devices of"))?;
    }
    if let Some(mut limits) = limits_argument(ring) {
        io_uring::operate(fd, register::WORKER_LIMITS, &mut limits, 2)
            .map_err(refused("limit the workers of"))?;
    }
    if ring.setup_flags & setup::SQPOLL != 0 && !ring.worker_processors.is_empty() {
        let mut mask = users::mask(&ring.worker_processors);
        let len = u32::try_from(mask.len()).unwrap_or(u32::MAX);
        match io_uring::operate(fd, register::WORKER_PROCESSORS, &mut mask, len) {
            // They are not among those that the tree may use here, or there were as many as it may use.
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(source) => return Err(refused("choose the processors of")(source)),
        }
    }
    Ok(())
}

fn napi_argument(napi: &FirnUringNapi) -> [u8; 16] {
    let mut argument = [0; 16];
    argument[..4].copy_from_slice(&napi.timeout.to_le_bytes());
    argument[4] = napi.prefer_busy_poll.into();
    argument[8..12].copy_from_slice(&napi.tracking.to_le_bytes());
    argument
}

/// The argument that sets the limits of workers, where there are some.
pub(super) fn limits_argument(ring: &FirnUringEntry) -> Option<[u8; 8]> {
    let [soon, others] = ring.worker_limits[..] else {
        return None;
    };
    let mut argument = [0; 8];
    argument[..4].copy_from_slice(&soon.to_le_bytes());
    argument[4..].copy_from_slice(&others.to_le_bytes());
    Some(argument)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_have_the_form_of_the_structures() {
        let napi = FirnUringNapi {
            timeout: 0x0102,
            prefer_busy_poll: true,
            tracking: 1,
        };
        let wanted = [2, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(napi_argument(&napi), wanted);
        let mut ring = FirnUringEntry::default();
        assert_eq!(limits_argument(&ring), None);
        ring.worker_limits = vec![3, 0];
        assert_eq!(limits_argument(&ring), Some([3, 0, 0, 0, 0, 0, 0, 0]));
    }
}
