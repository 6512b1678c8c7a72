//! What only a ring's process can do: make a ring with a thread that submits (IORING_SETUP_SQPOLL), which
//! lives in that process and has its memory, descriptors and rights; and register its memory, files and
//! eventfd.
//!
//! ```text
//! process                                           coordinator
//! everything but timers and dumpable
//! io_uring_setup, dup over the place that was kept
//! mmap (`memory/gap.rs`)                 ── made ──>
//!                                                   fetch the ring, bring its counters to where they were
//!                                        <── turned ──
//! register what is registered
//! watches of epoll sets
//! ```
//!
//! The thread gets some free pid, so all tasks must be there before; and it keeps the rights that its process
//! has at that moment, so these must be the last ones.

use std::collections::BTreeSet;

use firn_proto::{FdTypes, FdinfoEntry, FirnUringEntry};
use firn_sys::io_uring::{register, setup};
use firn_sys::{Pid, epoll, fcntl, file, nr, pidfd};

use super::restore;
use crate::files::error::FileRestoreError;
use crate::files::late::LateFile;
use crate::files::store::FileStore;
use crate::program::{Arg, Program, Rule, Slot};

/// Whether the ring has a thread that submits.
pub(super) fn has_thread(ring: &FirnUringEntry) -> bool {
    ring.setup_flags & setup::SQPOLL != 0
}

fn owner(ring: &FirnUringEntry) -> Option<Pid> {
    ring.owner.map(Pid::from_image)
}

impl FileStore {
    /// Whether the process makes rings itself.
    pub fn makes_rings(&self, pid: Pid) -> bool {
        self.own_rings(pid).any(|(ring, _)| has_thread(ring))
    }

    /// Number of processes that do.
    pub fn nr_ring_makers(&self) -> u32 {
        let makers: BTreeSet<Pid> = self.late_rings().filter_map(owner).collect();
        u32::try_from(makers.len()).expect("fewer than 2^32 tasks")
    }

    /// Whether ring `id` is made by its process, so that it can't be mapped before.
    pub fn is_own_ring(&self, id: u32) -> bool {
        self.late_rings().any(|ring| ring.id == id)
    }

    /// Descriptor of ring `id` in the table of a process.
    pub fn ring_number(&self, pid: Pid, id: u32) -> Option<u32> {
        let mut own = self.own_rings(pid).filter(|(ring, _)| ring.id == id);
        own.next().map(|(_, fd)| fd.fd)
    }

    /// Rings that their processes make.
    fn late_rings(&self) -> impl Iterator<Item = &FirnUringEntry> {
        let late = self.late_files.iter();
        let late = late.filter(|(_, late)| matches!(late, LateFile::Ring));
        late.filter_map(|((_, id), _)| self.entry(FdTypes::FirnUring, *id)?.firn_uring.as_deref())
    }

    /// Rings that belong to a process, each with its first descriptor.
    fn own_rings(&self, pid: Pid) -> impl Iterator<Item = (&FirnUringEntry, &FdinfoEntry)> {
        let table = self.table_of(pid).map_or(&[][..], |id| self.table(id));
        let mut seen = BTreeSet::new();
        let rings = table.iter().filter(|fd| fd.r#type() == FdTypes::FirnUring);
        rings.filter_map(move |fd| {
            let ring = self.entry(FdTypes::FirnUring, fd.id)?;
            let ring = ring.firn_uring.as_deref()?;
            (owner(ring) == Some(pid) && seen.insert(fd.id)).then_some((ring, fd))
        })
    }

    /// Appends the records that make the rings of a process and put them over the places that were kept.
    ///
    /// # Errors
    /// The image makes no sense.
    pub fn plan_own_rings(&self, pid: Pid, p: &mut Program) -> Result<(), FileRestoreError> {
        let made = self.own_rings(pid).filter(|(ring, _)| has_thread(ring));
        for (ring, _) in made {
            let params = restore::params_with_thread(ring, restore::shape(ring)?);
            let params_at = p.data(&params.to_bytes());
            let args = [params.sq_entries.into(), params_at.into()];
            let why = "making an io_uring ring with a thread that submits";
            let made = p.call_to_slot(nr::IO_URING_SETUP, &args, Rule::Ok, why);
            self.plan_places(pid, ring.id, made, p);
            p.call(
                nr::CLOSE,
                &[made.into()],
                Rule::Ok,
                "closing the second number",
            );
        }
        Ok(())
    }

    fn plan_places(&self, pid: Pid, id: u32, made: Slot, p: &mut Program) {
        let table = self.table_of(pid).map_or(&[][..], |id| self.table(id));
        let is_ring = |fd: &&FdinfoEntry| fd.r#type() == FdTypes::FirnUring && fd.id == id;
        for fd in table.iter().filter(is_ring) {
            let is_closed = fd.flags & fcntl::FD_CLOEXEC != 0;
            let flags = if is_closed { file::O_CLOEXEC } else { 0 };
            p.call(
                nr::DUP3,
                &[made.into(), fd.fd.into(), flags.into()],
                Rule::Exact(i64::from(fd.fd)),
                format!("fd {}", fd.fd),
            );
        }
    }

    /// Fetches the rings that processes have made, and brings them to where they were.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn turn_own_rings(&self) -> Result<(), FileRestoreError> {
        let refused = |action| FileRestoreError::refused(action, "an io_uring ring");
        for ring in self.late_rings() {
            let corrupt = || FileRestoreError::corrupt(ring.id, "nobody has the io_uring ring");
            let pid = owner(ring).ok_or_else(corrupt)?;
            let number = self.ring_number(pid, ring.id).ok_or_else(corrupt)?;
            let number = i32::try_from(number).map_err(|_| corrupt())?;
            let process = pidfd::open(pid).map_err(refused("reach the process of"))?;
            let fd = pidfd::getfd(&process, number).map_err(refused("fetch"))?;
            restore::bring(&fd, ring, restore::shape(ring)?)?;
            let place = self.ring_fd(ring.id).expect("it stays here");
            epoll::place(&fd, place).map_err(refused("place"))?;
        }
        Ok(())
    }

    /// Appends the records that register what was registered with the rings of a process, by itself.
    pub fn plan_registrations(&self, pid: Pid, p: &mut Program) {
        for (ring, fd) in self.own_rings(pid) {
            let call = |p: &mut Program, operation: u32, argument: Arg, nr: usize, what| {
                let nr = u32::try_from(nr).expect("bounded by what an image holds");
                let args = [fd.fd.into(), operation.into(), argument, nr.into()];
                let why = format!("registering {what} with the ring of fd {}", fd.fd);
                p.call(nr::IO_URING_REGISTER, &args, Rule::Exact(0), why);
            };
            if !ring.buffers.is_empty() {
                let words = ring.buffers.iter();
                let words =
                    words.flat_map(|buffer| [buffer.address.into(), buffer.len_bytes.into()]);
                let iovecs = p.table(&words.collect::<Vec<Arg>>());
                call(
                    p,
                    register::BUFFERS,
                    iovecs.into(),
                    ring.buffers.len(),
                    "memory",
                );
            }
            if let Some(nr_files) = ring.nr_files {
                let numbers = numbers(ring, nr_files);
                let bytes: Vec<u8> = numbers.iter().flat_map(|fd| fd.to_le_bytes()).collect();
                let argument = p.data(&bytes);
                call(p, register::FILES, argument.into(), numbers.len(), "files");
            }
            if let Some(eventfd) = ring.eventfd {
                let operation = match ring.eventfd_async {
                    Some(true) => register::EVENTFD_ASYNC,
                    _ => register::EVENTFD,
                };
                let argument = p.data(&eventfd.to_le_bytes());
                call(p, operation, argument.into(), 1, "an eventfd");
            }
        }
    }
}

/// Descriptors of registered files, -1 for an empty place.
fn numbers(ring: &FirnUringEntry, nr_files: u32) -> Vec<i32> {
    let len = usize::try_from(nr_files).expect("usize has at least 32 bits");
    let mut numbers = vec![-1; len];
    for file in &ring.files {
        let place = usize::try_from(file.place).expect("usize has at least 32 bits");
        if let (Some(number), Ok(fd)) = (numbers.get_mut(place), i32::try_from(file.fd)) {
            *number = fd;
        }
    }
    numbers
}
