//! Making a ring again.

use std::os::fd::OwnedFd;

use firn_proto::FirnUringEntry;
use firn_sys::io_uring::{self, Params, setup};

use super::layout::{self, Layout};
use super::memory::Memory;
use super::settings;
use super::turns::Turns;
use crate::files::error::FileRestoreError;

/// Bits that a restored ring has as well.
const KEPT: u32 = setup::IOPOLL
    | setup::R_DISABLED
    | setup::SUBMIT_ALL
    | setup::COOP_TASKRUN
    | setup::TASKRUN_FLAG
    | setup::SQE128
    | setup::CQE32
    | setup::NO_SQARRAY
    | setup::HYBRID_IOPOLL
    | setup::CQE_MIXED;
/// Bits by which a program promises more than it has to, so that the kernel has less to do. A ring that only
/// one thread may use can only be made by it.
const PROMISES: u32 = setup::SINGLE_ISSUER | setup::DEFER_TASKRUN;
/// Bits that this restores; others come from images of later versions.
pub(super) const KNOWN: u32 = KEPT | PROMISES | SUBMITTER;
/// Bits of a thread that submits, which only its process can make.
const SUBMITTER: u32 = setup::SQPOLL | setup::SQ_AFF;

/// What a ring is made with, but for a thread that submits.
pub(super) fn params(layout: Layout) -> Params {
    let mut params = layout.params();
    if params.flags & setup::DEFER_TASKRUN != 0 {
        params.flags |= setup::COOP_TASKRUN;
    }
    params.flags &= !(PROMISES | SUBMITTER);
    params
}

/// What is made with a thread that submits.
pub(super) fn params_with_thread(ring: &FirnUringEntry, layout: Layout) -> Params {
    let mut params = params(layout);
    params.flags |= ring.setup_flags & SUBMITTER;
    params.sq_thread_cpu = ring.sq_thread_cpu.unwrap_or(0);
    params.sq_thread_idle = ring.sq_thread_idle.unwrap_or(0);
    params
}

/// The shape of an image's ring, if this can restore it.
///
/// # Errors
/// The image makes no sense or is of a later version.
pub(super) fn shape(ring: &FirnUringEntry) -> Result<Layout, FileRestoreError> {
    let corrupt = |what: &str| FileRestoreError::corrupt(ring.id, what);
    if ring.setup_flags & !KNOWN != 0 {
        return Err(FileRestoreError::Unsupported {
            id: ring.id,
            kind: "io_uring ring with parameters that are not known",
        });
    }
    let layout = layout::of_image(ring).map_err(corrupt)?;
    if layout.has(setup::R_DISABLED) && Turns::of(ring).total() > 0 {
        return Err(corrupt(
            "the io_uring ring is not enabled and has taken requests",
        ));
    }
    Ok(layout)
}

/// Makes the ring and brings it to where it was.
pub(super) fn open(ring: &FirnUringEntry) -> Result<OwnedFd, FileRestoreError> {
    let layout = shape(ring)?;
    let refused = FileRestoreError::refused("create", "an io_uring ring");
    let made = io_uring::create(params(layout)).map_err(refused)?;
    if !layout.fits(&made) {
        return Err(FileRestoreError::Unsupported {
            id: ring.id,
            kind: "io_uring ring of a shape that this kernel gives another layout",
        });
    }
    bring(&made.fd, ring, layout)?;
    Ok(made.fd)
}

/// Brings a new ring to where it was.
pub(super) fn bring(
    fd: &OwnedFd,
    ring: &FirnUringEntry,
    layout: Layout,
) -> Result<(), FileRestoreError> {
    let refused = |action| FileRestoreError::refused(action, "an io_uring ring");
    let memory = Memory::map(fd, layout).map_err(refused("map"))?;
    memory
        .turn(fd, Turns::of(ring))
        .map_err(refused("move the indices of"))?;
    if layout.has(setup::SQPOLL) && ring.sq_tail != ring.sq_head {
        let idle = ring.sq_thread_idle.unwrap_or(1000);
        memory
            .await_sleep(idle)
            .map_err(refused("wait for the thread of"))?;
    }
    memory.write(ring);
    settings::set(fd, ring)?;
    crate::files::open::set_flags(fd, ring.flags, "an io_uring ring")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(flags: u32, sq_entries: u32, cq_entries: u32) -> FirnUringEntry {
        let layout = Layout::new(sq_entries, cq_entries, flags).expect("possible");
        let has_array = flags & setup::NO_SQARRAY == 0;
        FirnUringEntry {
            setup_flags: flags,
            sq_entries,
            cq_entries,
            sq_head: 1003,
            sq_tail: 1005,
            cq_head: 998,
            cq_tail: 1000,
            sq_dropped: Some(3),
            sqes: vec![5; layout.entries_len()],
            cqes: vec![6; layout.completions_len()],
            sq_array: has_array.then(|| vec![0; layout.array_len()]),
            ..FirnUringEntry::default()
        }
    }

    #[test]
    fn a_ring_comes_to_stand_where_it_was() {
        let smallest = Layout::new(1, 2, 0).expect("possible");
        if io_uring::create(smallest.params()).is_err() {
            eprintln!("skipped: no io_uring here");
            return;
        }
        let shapes = [
            (0, 8, 16),
            (setup::NO_SQARRAY, 4, 64),
            (setup::SQE128 | setup::CQE32, 8, 8),
        ];
        for (flags, sq_entries, cq_entries) in shapes {
            let ring = image(flags, sq_entries, cq_entries);
            let fd = open(&ring).expect("a ring");
            let layout = layout::of_image(&ring).expect("sound");
            let memory = Memory::map(&fd, layout).expect("memory");
            let word = |at| {
                memory
                    .rings
                    .word(at)
                    .load(std::sync::atomic::Ordering::Acquire)
            };
            assert_eq!(word(layout::SQ_HEAD), 1003);
            assert_eq!(word(layout::SQ_TAIL), 1005);
            assert_eq!(word(layout::CQ_HEAD), 998);
            assert_eq!(word(layout::CQ_TAIL), 1000);
            assert_eq!(memory.entries.read(0, 2), [5, 5]);
        }
    }

    #[test]
    fn more_completions_than_requests_come_from_another_ring() {
        let smallest = Layout::new(1, 2, 0).expect("possible");
        if io_uring::create(smallest.params()).is_err() {
            eprintln!("skipped: no io_uring here");
            return;
        }
        let flags = setup::SUBMIT_ALL | setup::DEFER_TASKRUN | setup::SINGLE_ISSUER;
        let ring = FirnUringEntry {
            cq_head: 2998,
            cq_tail: 3001,
            ..image(flags, 4, 8)
        };
        let fd = open(&ring).expect("a ring");
        let layout = layout::of_image(&ring).expect("sound");
        let back = Memory::map(&fd, layout).expect("memory").read(flags);
        assert_eq!(back, ring);
    }

    #[test]
    fn what_is_unknown_or_makes_no_sense_is_not_restored() {
        let disabled = image(setup::R_DISABLED, 8, 16);
        assert!(matches!(
            open(&disabled),
            Err(FileRestoreError::Corrupt { .. })
        ));
        let odd = image(1 << 30, 8, 16);
        let result = open(&odd);
        assert!(matches!(result, Err(FileRestoreError::Unsupported { .. })));
    }
}
