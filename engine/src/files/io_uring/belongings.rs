//! What a ring has of one process: the thread that submits, registered memory, files and eventfd.
//!
//! Memory shows in fdinfo, the others in the kernel's own structures only. All of it is looked for in the process that
//! has the ring, which must be the only one.

use firn_proto::{FdTypes, FirnUringBuffer, FirnUringEntry, FirnUringFile};
use firn_sys::io_uring::setup;
use firn_sys::{Pid, clock, file};

use super::fdinfo::Shown;
use super::inner::{Descriptors, Inner};
use crate::files::dump::FileTable;
use crate::files::open_file::{OpenFile, Trouble};
use crate::kernel::Kernel;
use crate::obstacle::Obstacle;

/// Adds to the image of a ring what process `file.pid` has registered with it. Returns what is to be said.
///
/// # Errors
/// Something that can't be saved.
pub(super) fn add(
    file: &OpenFile,
    shown: &Shown,
    seen: Option<(&Kernel, Inner<'_>)>,
    ring: &mut FirnUringEntry,
) -> Result<Option<String>, Trouble> {
    let mut warning = None;
    if shown.sq_thread.is_some() {
        if !has_thread(file.pid) {
            return Err(Trouble::new(
                "the thread that submits for the io_uring ring is another process's, or has ended",
                "let the program close the ring before the dump",
            ));
        }
        ring.setup_flags |= setup::SQPOLL;
        ring.owner = Some(file.pid.to_image());
        // Any thread has run somewhere; the parameter says whether it has to.
        let keeps_to_it = ring.setup_flags & setup::SQ_AFF != 0;
        ring.sq_thread_cpu = shown.sq_thread_cpu.filter(|_| keeps_to_it);
        ring.sq_thread_idle = seen.and_then(|(_, inner)| milliseconds(inner.idle()?));
        if ring.sq_thread_idle.is_none() {
            warning = Some(
                "nothing tells when the thread that submits for an io_uring ring falls asleep; after a restore \
                 it does so after a second"
                    .to_owned(),
            );
        }
    }
    if !shown.buffers.is_empty() {
        if seen.is_some_and(|(_, inner)| inner.has_odd_buffers() == Some(true)) {
            return Err(Trouble::new(
                "memory is registered with the io_uring ring under tags, or is the kernel's",
                "let the program unregister it before the dump",
            ));
        }
        ring.owner = Some(file.pid.to_image());
        let buffers = shown.buffers.iter().map(|(address, len)| FirnUringBuffer {
            address: *address,
            len_bytes: *len,
        });
        ring.buffers = buffers.collect();
    }
    let descriptors = || seen.and_then(|(kernel, _)| Descriptors::of(kernel, file.pid));
    if shown.nr_files > 0 {
        let seen = seen.zip(descriptors());
        let Some(((_, inner), descriptors)) = seen else {
            return Err(Trouble::new(
                "files are registered with the io_uring ring, and nothing tells which open files they are",
                "let the program unregister them before the dump",
            ));
        };
        add_files(&inner, &descriptors, shown, ring)?;
        ring.owner = Some(file.pid.to_image());
    }
    let eventfd = seen.and_then(|(_, inner)| inner.eventfd());
    if let Some((counter, is_async)) = eventfd {
        let fd = descriptors().and_then(|descriptors| descriptors.eventfd(counter));
        ring.eventfd = Some(fd.ok_or_else(|| {
            Trouble::new(
                "the eventfd that is registered with the io_uring ring is not open any more",
                "let the program unregister it before the dump",
            )
        })?);
        ring.eventfd_async = is_async.then_some(true);
        ring.owner = Some(file.pid.to_image());
    }
    Ok(warning)
}

fn add_files(
    inner: &Inner<'_>,
    descriptors: &Descriptors<'_>,
    shown: &Shown,
    ring: &mut FirnUringEntry,
) -> Result<(), Trouble> {
    let hint = "let the program unregister them before the dump";
    let files = inner.files().map_err(|reason| Trouble::new(reason, hint))?;
    for (place, address) in (0u32..).zip(&files).filter(|(_, address)| **address != 0) {
        let Some(fd) = descriptors.file(*address) else {
            let name = shown.files.get(&place).map_or("", String::as_str);
            return Err(Trouble::new(
                format!(
                    "file {place} that is registered with the io_uring ring ({name}) is open nowhere else"
                ),
                "let the program keep a descriptor of it open, or unregister it before the dump",
            ));
        };
        ring.files.push(FirnUringFile { place, fd });
    }
    ring.nr_files = u32::try_from(files.len()).ok();
    Ok(())
}

/// Whether a thread of the process submits for a ring: the kernel names it so.
fn has_thread(pid: Pid) -> bool {
    let tasks = format!("/proc/{pid}/task");
    let threads = file::open(tasks.as_ref(), 0).and_then(file::list_numbers);
    threads.unwrap_or_default().into_iter().any(|tid| {
        let name = firn_sys::procfs::read(format!("{tasks}/{tid}/comm"));
        name.is_ok_and(|name| name.starts_with(b"iou-sqp-"))
    })
}

/// A time that the kernel counts in ticks.
fn milliseconds(jiffies: u64) -> Option<u32> {
    let nanoseconds = u128::from(jiffies) * clock::tick().as_nanos();
    u32::try_from(nanoseconds.div_ceil(1_000_000)).ok()
}

impl FileTable {
    /// Whether a process may map a ring: one that is made by its process is not there for others.
    pub(in crate::files) fn may_map_ring(&self, pid: Pid, id: u32) -> bool {
        let mut entries = self.collected.entries.iter();
        let ring =
            entries.find_map(|entry| entry.firn_uring.as_deref().filter(|ring| ring.id == id));
        ring.is_none_or(|ring| {
            let is_own = ring.owner == Some(pid.to_image());
            is_own || ring.setup_flags & setup::SQPOLL == 0
        })
    }

    /// Rings of one process that another one has, too, or that another thread than its first one has registered
    /// with itself.
    pub(super) fn shared_belongings(&self) -> Vec<Obstacle> {
        let mut found = Vec::new();
        let rings = self.collected.entries.iter();
        for ring in rings.filter_map(|entry| entry.firn_uring.as_deref()) {
            let Some(owner) = ring.owner.map(Pid::from_image) else {
                continue;
            };
            let has = |table: &&(u32, Vec<firn_proto::FdinfoEntry>)| {
                let mut table = table.1.iter();
                table.any(|fd| fd.r#type() == FdTypes::FirnUring && fd.id == ring.id)
            };
            let mut say = |reason: &str, hint: &str| {
                found.push(Obstacle {
                    pid: owner,
                    object: "an io_uring ring".to_owned(),
                    reason: reason.to_owned(),
                    hint: Some(hint.to_owned()),
                });
            };
            if self.tables.iter().filter(has).count() > 1 {
                say(
                    "it has a thread or registrations of this process, and another process has it, too",
                    "let the other process close it before the dump",
                );
            }
            let is_others = |tid: u32| Pid::from_image(tid) != owner;
            let has_thread = ring.setup_flags & setup::SQPOLL != 0;
            if has_thread && ring.registered.iter().any(|own| is_others(own.tid)) {
                say(
                    "a thread that is not the first one has registered its descriptor with itself",
                    "let it call io_uring_unregister_ring_fd before the dump",
                );
            }
        }
        found
    }
}
