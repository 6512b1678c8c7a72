//! What is mapped, and what is in it.

mod advice;
mod anonymous;
mod copy_on_write;
mod file;
mod huge;
mod memfd;
mod numa;
mod odd;
mod random;
mod shared;
mod space_modes;
mod special;
mod stack;
mod sysv;
mod vdso;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &anonymous::PATTERNS,
    &anonymous::PROTECTIONS,
    &anonymous::SPARSE,
    &anonymous::MANY,
    &anonymous::MOST,
    &anonymous::LARGE,
    &anonymous::ZERO_PAGES,
    &stack::MAIN,
    &stack::THREAD,
    &stack::GROWS_DOWN,
    &stack::GROWS_DOWN_EDGES,
    &stack::MALLOC,
    &sysv::SEGMENTS,
    &sysv::PARTS,
    &sysv::HUGE,
    &sysv::OUTSIDE,
    &sysv::DETACHED_PART,
    &random::SPACES,
    &odd::SEALED,
    &odd::DROPPABLE,
    &odd::REPLACED,
    &odd::OVERLAY,
    &odd::DEVICE,
    &odd::KERNEL,
    &odd::PERSONALITY,
    &file::PRIVATE,
    &file::PRIVATE_READ_ONLY,
    &file::SHARED,
    &file::SHARED_READ_ONLY,
    &file::DELETED,
    &file::BEYOND_END,
    &file::DEV_ZERO,
    &shared::FAMILY,
    &shared::PARTS,
    &shared::BIG,
    &shared::THOUSANDS,
    &memfd::MAPPED,
    &memfd::DESCRIPTORS,
    &memfd::PRIVATE,
    &memfd::FLAGS,
    &memfd::HUGE,
    &memfd::SEALED,
    &memfd::SEALED_MAPPED,
    &copy_on_write::READ_ONLY,
    &copy_on_write::CHAIN,
    &copy_on_write::PARTLY,
    &huge::TRANSPARENT,
    &huge::PRIVATE,
    &huge::SHARED,
    &huge::MEMFD,
    &advice::FLAGS,
    &advice::WIPE_ON_FORK,
    &advice::GUARDS,
    &advice::LOCKED,
    &advice::LOCK_ALL,
    &numa::POLICIES,
    &space_modes::MERGED,
    &space_modes::HUGE_IF_ADVISED,
    &space_modes::NAMED,
    &special::NO_RESERVE,
    &special::EDGES,
    &vdso::CALLS,
    &vdso::PLACE,
    &vdso::MOVED,
    &vdso::UNMAPPED,
];
