//! System V shared memory segments that tasks have attached.
//!
//! In a memory map a segment is `/SYSV` with its key, its inode number is its id. Image: `ipcns-shm-N.img`
//! describes it, `pagemap-shmem-ID.img` holds its contents. N is the number that the sets of ids give the ipc
//! namespace, here that of the dumper: only what the tree has attached is saved, and a segment that anybody
//! else has attached as well is refused.
//!
//! A segment outlives those who use it. When its id and key are still taken by the one that was dumped, and
//! nobody has it attached, it is replaced; else the restore is refused. The id comes back by
//! /proc/sys/kernel/shm_next_id, the creator by a thread that takes his ids.
//!
//! Source: man 7 sysvipc; linux ipc/shm.c, ipc/util.c (ipc_idr_alloc).

mod dump;
mod restore;

pub(super) use dump::{Attached, check_whole, follows, is_segment};
pub(super) use restore::{Segment, load};

/// The number of the dumper's ipc namespace in images.
pub const OWN_IPC_NAMESPACE: u32 = 3;
