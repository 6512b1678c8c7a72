//! A ring as the kernel has it, where the kernel's own structures can be read.
//!
//! Source: linux include/linux/io_uring_types.h, struct io_ring_ctx.

use std::os::fd::BorrowedFd;

use super::probe::Special;
use crate::kernel::{Kernel, Object};

/// More requests than a ring keeps for later use.
const MAX_KEPT: u32 = 1 << 20;

/// What the kernel has of a ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inner<'a> {
    ring: Object<'a>,
    /// `IORING_SETUP_*` bits.
    pub(super) flags: u32,
}

impl<'a> Inner<'a> {
    /// The ring behind a descriptor of this process; None where that can't be seen.
    pub(super) fn of(kernel: &'a Kernel, fd: BorrowedFd<'_>) -> Option<Inner<'a>> {
        let ring = kernel.file(fd)?.follow_as("private_data", "io_ring_ctx")?;
        let flags = ring.word("flags")?;
        let inner = Inner { ring, flags };
        // All of it or nothing: a kernel with other structures is asked in other ways.
        inner.special()?;
        inner.in_flight()?;
        Some(inner)
    }

    /// Its address, as [`Inner::registered`] tells it.
    pub(super) fn address(&self) -> u64 {
        self.ring.address()
    }

    /// Address of the ring that a thread has registered with itself under a number.
    pub(super) fn registered(thread: Object<'_>, index: u32) -> Option<u64> {
        let rings = thread.follow("io_uring")?;
        let file = rings.element("registered_rings", index)?;
        file.number("private_data")
    }

    /// Requests that the kernel has taken and not ended. It keeps memory of ended ones for others.
    pub(super) fn in_flight(&self) -> Option<u32> {
        let made = self.ring.word("nr_req_allocated")?;
        let mut kept = 0;
        // Nothing tells an end of the list from a member that is not there, so ask for the member itself.
        self.ring.number("submit_state.free_list.next")?;
        let mut node = self.ring.follow("submit_state.free_list.next");
        while let Some(found) = node {
            kept += 1;
            if kept > MAX_KEPT {
                return None;
            }
            found.number("next")?;
            node = found.follow("next");
        }
        made.checked_sub(kept)
    }

    /// What keeps the ring from being saved; None where that can't be seen.
    pub(super) fn special(&self) -> Option<Option<Special>> {
        let is_there = |path| Some(self.ring.number(path)? != 0);
        let special = if is_there("restricted")? {
            Some(Special::Restricted)
        } else if is_there("io_ev_fd")? {
            Some(Special::Eventfd)
        } else if is_there("io_bl_xa.xa_head")? {
            Some(Special::Buffers)
        } else if is_there("personalities.xa_head")? {
            Some(Special::Personalities)
        } else {
            None
        };
        Some(special)
    }
}
