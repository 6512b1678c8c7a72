//! A ring as the kernel has it, where the kernel's own structures can be read.
//!
//! Source: linux include/linux/io_uring_types.h, struct io_ring_ctx.

use std::os::fd::BorrowedFd;

use firn_sys::{Pid, file};

use super::probe::Special;
use crate::kernel::{Kernel, Object};

/// More requests than a ring keeps for later use.
const MAX_KEPT: u32 = 1 << 20;

/// What the kernel has of a ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inner<'a> {
    pub(super) ring: Object<'a>,
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

    /// The ring at an address, which a stopped task keeps there.
    pub(super) fn at(kernel: &'a Kernel, address: u64) -> Option<Inner<'a>> {
        let ring = kernel.object("io_ring_ctx", address)?;
        let flags = ring.word("flags")?;
        Some(Inner { ring, flags })
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
        } else if is_there("io_bl_xa.xa_head")? {
            Some(Special::Groups)
        } else if is_there("personalities.xa_head")? {
            Some(Special::Personalities)
        } else {
            None
        };
        Some(special)
    }

    /// Jiffies without work after which the thread that submits sleeps.
    pub(super) fn idle(&self) -> Option<u64> {
        self.ring.follow("sq_data")?.number("sq_thread_idle")
    }

    /// Registered files: the address of each in the kernel, 0 for a place that is empty.
    ///
    /// # Errors
    /// What is registered can't be saved or not be seen.
    pub(super) fn files(&self) -> Result<Vec<u64>, &'static str> {
        const UNSEEN: &str = "the files that are registered with the io_uring ring can't be seen";
        /// Bits of the pointer that say more of the file.
        const BITS: u64 = 7;
        let nr = self.ring.word("file_table.data.nr").ok_or(UNSEEN)?;
        let mut files = Vec::new();
        for place in 0..nr.min(MAX_KEPT) {
            let Some(node) = self.ring.element("file_table.data.nodes", place) else {
                files.push(0);
                continue;
            };
            if node.number("tag").ok_or(UNSEEN)? != 0 {
                return Err("files are registered with the io_uring ring under tags");
            }
            files.push(node.number("file_ptr").ok_or(UNSEEN)? & !BITS);
        }
        let range = [
            self.ring.word("file_alloc_start"),
            self.ring.word("file_alloc_end"),
        ];
        if nr > 0 && range != [Some(0), Some(nr)] {
            return Err("a part of the registered files of the io_uring ring is set aside");
        }
        Ok(files)
    }

    /// Whether registered memory has tags, or is not the program's.
    pub(super) fn has_odd_buffers(&self) -> Option<bool> {
        let nr = self.ring.word("buf_table.nr")?;
        for place in 0..nr {
            if let Some(node) = self.ring.element("buf_table.nodes", place) {
                let is_kernels = node.follow("buf")?.number("is_kbuf")? != 0;
                if node.number("tag")? != 0 || is_kernels {
                    return Some(true);
                }
            }
        }
        Some(false)
    }

    /// The registered eventfd, as [`Descriptors::eventfd`] knows it, and whether it is told only of what comes
    /// later. None without.
    pub(super) fn eventfd(&self) -> Option<(u64, bool)> {
        let registered = self.ring.follow("io_ev_fd")?;
        let counter = registered.number("cq_ev_fd")?;
        Some((counter, registered.number("eventfd_async")? != 0))
    }
}

/// Polling of network devices, where it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Napi {
    pub(super) timeout: u64,
    pub(super) prefer_busy_poll: bool,
    pub(super) tracking: u64,
    /// It has been told devices by their numbers.
    pub(super) has_devices: bool,
}

impl<'a> Inner<'a> {
    /// How the ring polls network devices.
    pub(super) fn napi(&self) -> Option<Napi> {
        const INACTIVE: u64 = 255;
        const STATIC: u64 = 1;
        let of_old_kernels = || Some(0).filter(|_| self.ring.number("napi_enabled") == Some(1));
        let tracking = match self.ring.number("napi_track_mode") {
            Some(tracking) => Some(tracking).filter(|tracking| *tracking != INACTIVE),
            None => of_old_kernels(),
        }?;
        let timeout = match self.ring.number("napi_busy_poll_dt") {
            Some(nanoseconds) => nanoseconds / 1000,
            None => self.ring.number("napi_busy_poll_to")?,
        };
        Some(Napi {
            timeout,
            prefer_busy_poll: self.ring.number("napi_prefer_busy_poll")? != 0,
            tracking,
            has_devices: tracking == STATIC && self.ring.is_list_empty("napi_list") == Some(false),
        })
    }

    /// How many threads of the kernel work for the ring at most; None where that was never said.
    pub(super) fn worker_limits(&self) -> Option<Vec<u32>> {
        if self.ring.number("iowq_limits_set")? == 0 {
            return None;
        }
        let limits = self.ring.numbers("iowq_limits", 2)?;
        limits
            .into_iter()
            .map(|limit| u32::try_from(limit).ok())
            .collect()
    }

    /// The thread that submits.
    pub(super) fn submitter(&self) -> Option<Object<'a>> {
        self.ring.follow("sq_data")?.follow("thread")
    }
}

/// The processors of the threads that work for a thread, a bit each; None for one that has not used io_uring.
pub(super) fn processors(thread: Object<'_>, nr_words: usize) -> Option<Vec<u64>> {
    let workers = thread.follow("io_uring")?.follow("io_wq")?;
    // The mask, or a pointer to it on kernels for thousands of processors.
    let inside = workers.numbers("cpu_mask.bits", nr_words);
    inside.or_else(|| workers.follow("cpu_mask")?.numbers("bits", nr_words))
}

/// How many threads may work for a thread that has used io_uring: for requests that end soon, and for others.
pub(super) fn limits(thread: Object<'_>) -> Option<[u32; 2]> {
    let workers = thread.follow("io_uring")?.follow("io_wq")?;
    let limit = |nth| workers.item("acct", nth)?.word("max_workers");
    Some([limit(0)?, limit(1)?])
}

/// The open files of a process, as the kernel has them.
pub(super) struct Descriptors<'a>(Vec<(u32, Object<'a>)>);

impl<'a> Descriptors<'a> {
    /// Those of a process that is stopped.
    pub(super) fn of(kernel: &'a Kernel, pid: Pid) -> Option<Descriptors<'a>> {
        Descriptors::of_thread(kernel.thread(pid)?, pid)
    }

    /// Those of a thread that is stopped, and its number.
    pub(super) fn of_thread(thread: Object<'a>, tid: Pid) -> Option<Descriptors<'a>> {
        let table = thread.follow("files")?.follow("fdt")?;
        let nr = table.word("max_fds")?;
        let numbers =
            file::open(format!("/proc/{tid}/fd").as_ref(), 0).and_then(file::list_numbers);
        let numbers = numbers.ok()?.into_iter();
        let numbers = numbers.filter_map(|fd| u32::try_from(fd).ok().filter(|fd| *fd < nr));
        let open = numbers.filter_map(|fd| Some((fd, table.element("fd", fd)?)));
        Some(Descriptors(open.collect()))
    }

    /// The descriptor of an open file.
    pub(super) fn file(&self, address: u64) -> Option<u32> {
        let mut same = self.0.iter().filter(|(_, file)| file.address() == address);
        same.next().map(|(fd, _)| *fd)
    }

    /// The descriptor of an eventfd, by its counter.
    pub(super) fn eventfd(&self, counter: u64) -> Option<u32> {
        let is_same = |file: &Object<'_>| file.number("private_data") == Some(counter);
        let mut same = self.0.iter().filter(|(_, file)| is_same(file));
        same.next().map(|(fd, _)| *fd)
    }
}
