//! What is known of all rings of a tree, beyond their entries in the images.

use std::collections::HashMap;

use firn_sys::Pid;

use super::inner::Inner;
use crate::kernel::LazyKernel;

/// The rings of a tree.
#[derive(Debug, Default)]
pub(in crate::files) struct DumpedRings {
    pub(super) kernel: LazyKernel,
    /// Numbers in files.img by the address of the ring in the kernel.
    by_address: HashMap<u64, u32>,
}

impl DumpedRings {
    /// Notes a ring under its number in files.img.
    pub(super) fn note(&mut self, id: u32, address: u64) {
        self.by_address.insert(address, id);
    }

    /// The ring that a thread has registered with itself under a number; None where that can't be seen.
    pub(super) fn registered(&self, tid: Pid, index: u32) -> Option<u32> {
        let thread = self.kernel.get()?.thread(tid)?;
        let ring = Inner::registered(thread, index)?;
        self.by_address.get(&ring).copied()
    }
}
