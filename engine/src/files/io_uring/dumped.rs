//! What is known of all rings of a tree, beyond their entries in the images.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use firn_sys::{Pid, file};

use super::dump;
use super::in_flight::Progress;
use super::inner::Inner;
use super::operations::States;
use crate::files::open_file::{OpenFile, Trouble, links_of};
use crate::files::outside::{self, Held};
use crate::kernel::LazyKernel;
use crate::obstacle::Obstacle;

/// The rings of a tree.
#[derive(Debug, Default)]
pub(in crate::files) struct DumpedRings {
    pub(in crate::files) kernel: LazyKernel,
    /// Numbers in files.img by the address of the ring in the kernel.
    by_address: HashMap<u64, u32>,
    /// The kernel's numbers for the states of requests, once they were needed.
    pub(super) states: Arc<OnceLock<States>>,
    /// Rings with requests in flight.
    busy: Vec<Busy>,
    /// Rings that others have open. All of /proc has to be looked through for them, so that is done once.
    outside: OnceCell<Vec<Held>>,
}

/// A ring with requests in flight as it was read.
#[derive(Debug)]
pub(super) struct Busy {
    /// The ring in the kernel.
    pub(super) address: u64,
    pub(super) before: Progress,
    /// What is to be said of it when it has gone on.
    pub(super) gone_on: Obstacle,
}

impl DumpedRings {
    /// Waits for what the kernel does for rings in threads of its own: until these have come to an end they open and
    /// close descriptors, so it comes before these are listed. What does not end is found and refused later.
    ///
    /// **Preconditions**: all threads of the process are stopped, `nr_threads` of them.
    pub(in crate::files) fn settle(&self, pid: Pid, nr_threads: usize) {
        if !has_other_threads(pid, nr_threads) {
            return;
        }
        let links = links_of(pid).into_iter();
        for (fd, _) in links.filter(|(_, link)| super::is_ring(link)) {
            // One that can't be looked at now can't be dumped either.
            let _ = dump::settle(self.kernel.get(), pid, fd);
        }
    }

    /// What is to be said of a ring that a process outside the tree, whose processes are `inside`, has open, too.
    /// Kernels before rings got inodes of their own show the same one for all, so that any ring counts.
    pub(super) fn held_outside(&self, ring: &OpenFile, inside: &[Pid]) -> Option<Trouble> {
        let outside = self
            .outside
            .get_or_init(|| outside::holders(&ring.link, inside));
        let is_it = |held: &&Held| held.inode.is_none_or(|inode| inode == ring.info.ino);
        let held = outside.iter().find(is_it)?;
        let hint = "dump the tree that contains both, or let the other side close it";
        let (pid, fd) = (held.pid, held.fd);
        let reason = format!("process {pid} (fd {fd}) outside the tree has it too");
        Some(Trouble::new(reason, hint))
    }

    /// Notes a ring under its number in files.img.
    pub(super) fn note(&mut self, id: u32, address: u64) {
        self.by_address.insert(address, id);
    }

    /// Notes a ring with requests in flight.
    pub(super) fn note_busy(&mut self, busy: Busy) {
        self.busy.push(busy);
    }

    /// Rings that are not any more as they were read: threads have run programs of a dump since, and with them
    /// whatever has come from outside of the tree.
    pub(in crate::files) fn gone_on(&self) -> Vec<Obstacle> {
        // To open the kernel's structures for nothing would cost the stopped tree milliseconds.
        let busy = (!self.busy.is_empty()).then(|| self.kernel.get()).flatten();
        let Some(kernel) = busy else {
            return Vec::new();
        };
        let has_gone_on = |busy: &&Busy| {
            let ring = Inner::at(kernel, busy.address);
            let now = ring.and_then(|ring| Progress::of(&ring));
            now != Some(busy.before)
        };
        let gone_on = self.busy.iter().filter(has_gone_on);
        gone_on.map(|busy| busy.gone_on.clone()).collect()
    }

    /// The ring that a thread has registered with itself under a number; None where that can't be seen.
    pub(super) fn registered(&self, tid: Pid, index: u32) -> Option<u32> {
        let thread = self.kernel.get()?.thread(tid)?;
        let ring = Inner::registered(thread, index)?;
        self.by_address.get(&ring).copied()
    }
}

/// Whether a process has threads that are not the program's. The number of links of the directory of all threads
/// is two more than theirs.
///
/// Source: linux fs/proc/base.c, proc_task_getattr.
fn has_other_threads(pid: Pid, nr_threads: usize) -> bool {
    let seen = file::stat_path(format!("/proc/{pid}/task").as_ref());
    let nr_links = u64::try_from(nr_threads + 2).unwrap_or(u64::MAX);
    seen.is_ok_and(|stat| stat.nlink != nr_links)
}
