//! System V shared memory.

use std::io;

use super::{Region, check};

/// What the kernel tells of a segment, as far as it must stay the same.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment {
    /// Key.
    pub key: i32,
    /// Owner's and creator's user and group.
    pub ids: [u32; 4],
    /// Permissions and what the kernel notes beside them.
    pub mode: u32,
    /// Size in bytes.
    pub size: usize,
    /// Mappings of it.
    pub attached: u64,
}

/// Makes a segment or finds the one with that key; returns its id.
pub fn segment(key: i32, len: usize, flags: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::shmget(key, len, flags) })
}

/// Attaches a segment.
pub fn attach(id: i32, flags: i32) -> io::Result<Region> {
    let len = stat_raw(id)?.shm_segsz.next_multiple_of(super::PAGE);
    // SAFETY: a new mapping at a place the kernel chooses aliases nothing.
    let addr = unsafe { libc::shmat(id, std::ptr::null(), flags) }.addr();
    match addr {
        usize::MAX => Err(io::Error::last_os_error()),
        addr => Ok(Region { addr, len }),
    }
}

/// Detaches what [`attach`] has attached.
pub fn detach(region: Region) -> io::Result<()> {
    let start = std::ptr::without_provenance_mut::<libc::c_void>(region.addr);
    // SAFETY: the mapping is ours and holds no Rust object.
    check(unsafe { libc::shmdt(start) }).map(drop)
}

fn stat_raw(id: i32) -> io::Result<libc::shmid_ds> {
    // SAFETY: a structure of numbers, for which zeros are a value.
    let mut all: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is the one that the call fills.
    check(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut all) })?;
    Ok(all)
}

/// Asks about a segment.
pub fn segment_state(id: i32) -> io::Result<Segment> {
    let all = stat_raw(id)?;
    let perm = all.shm_perm;
    Ok(Segment {
        key: perm.__key,
        ids: [perm.uid, perm.gid, perm.cuid, perm.cgid],
        mode: u32::from(perm.mode),
        size: all.shm_segsz,
        attached: all.shm_nattch,
    })
}

/// Gives a segment another owner.
pub fn own_segment(id: i32, uid: u32, gid: u32) -> io::Result<()> {
    let mut all = stat_raw(id)?;
    (all.shm_perm.uid, all.shm_perm.gid) = (uid, gid);
    // SAFETY: the structure came from the kernel.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut all) }).map(drop)
}

/// Removes a segment; it stays as long as it is attached.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: removing takes no argument structure.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}
