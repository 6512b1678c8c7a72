//! What a ring was made with, asked of the kernel without changing anything that lasts.
//!
//! | parameter | how it shows |
//! |---|---|
//! | R_DISABLED | nothing can be submitted: EBADFD |
//! | SINGLE_ISSUER | operations of others are refused: EEXIST |
//! | restrictions | operations are refused: EACCES |
//! | IOPOLL | polling of network devices is refused before its argument is read: EINVAL |
//! | an eventfd | another one is refused before the argument is read: EBUSY |
//! | groups of buffers | their state can be asked for |
//! | NO_SQARRAY, SQE128, CQE32 | how fdinfo prints a waiting entry and a waiting completion |
//! | NO_MMAP | nothing can be mapped |
//!
//! For the last but one there must be one of each. The indices that say so are the program's, and only it and
//! fdinfo read them: for the moment of reading they are moved by one and put back, while all tasks that have the
//! ring are stopped.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use firn_sys::Errno;
use firn_sys::io_uring::{self, Params, register, setup};
use firn_sys::mapping::SharedMapping;

use super::fdinfo::Shown;
use super::layout::{CQ_HEAD, CQ_TAIL, SQ_HEAD, SQ_TAIL};

const EBADFD: i32 = 77;
const MAX_GROUPS: u32 = 65_536;
/// struct io_uring_buf_status: group, head, reserved.
const GROUP_LEN: usize = 40;

/// What keeps a ring from being saved, as far as its own operations tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Special {
    Disabled,
    SingleIssuer,
    Restricted,
    Polled,
    Eventfd,
    Groups,
    Personalities,
}

/// Looks for what can't be saved.
pub(super) fn special(fd: BorrowedFd<'_>) -> Option<Special> {
    if io_uring::submit(fd, 0) == Err(Errno::from_raw(EBADFD)) {
        return Some(Special::Disabled);
    }
    match io_uring::refusal(fd, register::PROBE) {
        Errno::EEXIST => return Some(Special::SingleIssuer),
        Errno::EACCES => return Some(Special::Restricted),
        _ => {}
    }
    match io_uring::refusal(fd, register::EVENTFD) {
        Errno::EBUSY => return Some(Special::Eventfd),
        Errno::EACCES => return Some(Special::Restricted),
        _ => {}
    }
    if io_uring::refusal(fd, register::NAPI) == Errno::EINVAL && knows_napi() {
        return Some(Special::Polled);
    }
    has_groups(fd).then_some(Special::Groups)
}

/// Whether the kernel tells of polling at all, asked of a ring of our own.
fn knows_napi() -> bool {
    let params = Params {
        sq_entries: 1,
        ..Params::default()
    };
    io_uring::create(params)
        .is_ok_and(|own| io_uring::refusal(&own.fd, register::NAPI) == Errno::EFAULT)
}

/// Whether any group of buffers was provided, in a ring or one by one.
fn has_groups(fd: BorrowedFd<'_>) -> bool {
    let state = |group: u32| {
        let mut argument = [0u8; GROUP_LEN];
        argument[..4].copy_from_slice(&group.to_le_bytes());
        io_uring::operate(fd, register::PBUF_STATUS, &mut argument, 1)
    };
    // EINVAL is a group whose buffers were provided one by one; kernels that don't know the question answer it
    // so for a group that can't be.
    if state(u32::MAX) == Err(Errno::EINVAL) {
        return false;
    }
    (0..MAX_GROUPS).any(|group| state(group) != Err(Errno::ENOENT))
}

/// The bits of `IORING_SETUP_*` that decide where everything is. `look` reads fdinfo.
pub(super) fn shape(
    rings: &SharedMapping,
    look: impl FnOnce() -> Result<Shown, Errno>,
) -> Result<u32, Errno> {
    let (head, tail) = (rings.word(SQ_HEAD), rings.word(SQ_TAIL));
    let (taken, put) = (rings.word(CQ_HEAD), rings.word(CQ_TAIL));
    let (old_tail, old_taken) = (tail.load(Ordering::Acquire), taken.load(Ordering::Acquire));
    tail.store(
        head.load(Ordering::Acquire).wrapping_add(1),
        Ordering::Release,
    );
    taken.store(
        put.load(Ordering::Acquire).wrapping_sub(1),
        Ordering::Release,
    );
    let shown = look();
    tail.store(old_tail, Ordering::Release);
    taken.store(old_taken, Ordering::Release);
    let shown = shown?;
    let mut flags = 0;
    match shown.entries.first() {
        None => flags |= setup::NO_SQARRAY,
        Some(entry) if entry.contains(" e0:") => flags |= setup::SQE128,
        Some(_) => {}
    }
    let completion = shown.completions.first().ok_or(Errno::EINVAL)?;
    if completion.contains("extra1:") {
        flags |= setup::CQE32;
    }
    Ok(flags)
}

/// Maps the head of a ring, which every ring has that has not been given memory of the program's.
pub(super) fn head(fd: impl AsFd) -> Result<SharedMapping, Errno> {
    io_uring::map(fd, io_uring::OFFSET_RINGS, 4096)
}
