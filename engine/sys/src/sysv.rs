//! System V shared memory segments.
//!
//! Source: man 2 shmget, shmat, shmctl; man 7 sysvipc.

use std::ptr;

use crate::{Errno, Result};

/// Flags of shmget and shmat, and bits that the kernel adds to a mode.
pub mod flag {
    /// Of shmget: huge pages; their size as with mmap.
    pub const HUGETLB: u32 = 0o4000;
    /// Of shmat: for reading only.
    pub const RDONLY: u32 = 0o10000;
    /// Of shmat: executable, too.
    pub const EXEC: u32 = 0o100000;
    /// In a mode: goes with its last user.
    pub const DEST: u32 = 0o1000;
    /// In a mode: locked in memory.
    pub const LOCKED: u32 = 0o2000;
}

/// What the kernel tells of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Key, 0 for one without.
    pub key: i32,
    /// Owner's user and group.
    pub owner: (u32, u32),
    /// Creator's user and group.
    pub creator: (u32, u32),
    /// Permissions, and [`flag::DEST`] and [`flag::LOCKED`].
    pub mode: u32,
    /// Size in bytes, as it was asked for.
    pub size: u64,
    /// Mappings of it, in all processes.
    pub attached: u64,
}

/// Tells about a segment.
///
/// # Errors
/// EINVAL, EIDRM: there is none with that id.
pub fn stat(id: i32) -> Result<Segment> {
    let all = stat_raw(id)?;
    Ok(Segment {
        key: all.shm_perm.__key,
        owner: (all.shm_perm.uid, all.shm_perm.gid),
        creator: (all.shm_perm.cuid, all.shm_perm.cgid),
        mode: u32::from(all.shm_perm.mode),
        size: u64::try_from(all.shm_segsz).unwrap_or(u64::MAX),
        attached: all.shm_nattch,
    })
}

fn stat_raw(id: i32) -> Result<libc::shmid_ds> {
    // SAFETY: a structure of numbers, for which zeros are a value.
    let mut all: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is as large as the call wants it.
    let got = unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut all) };
    Errno::check(got.into())?;
    Ok(all)
}

/// Makes a segment that does not exist yet, as `creator`; returns its id.
///
/// # Errors
/// EEXIST: the key is taken. ENOMEM, ENOSPC, EINVAL: limits.
pub fn create(key: i32, size: usize, flags: u32, creator: (u32, u32)) -> Result<i32> {
    let own = (
        nix::unistd::geteuid().as_raw(),
        nix::unistd::getegid().as_raw(),
    );
    if own == creator {
        return create_here(key, size, flags);
    }
    let other = move || {
        // The raw calls change this one thread, which ends with what it came for.
        become_user(creator)?;
        create_here(key, size, flags)
    };
    std::thread::spawn(other)
        .join()
        .unwrap_or(Err(Errno::EINVAL))
}

fn become_user((uid, gid): (u32, u32)) -> Result<()> {
    // SAFETY: numbers only.
    let got = unsafe { libc::syscall(libc::SYS_setresgid, -1i64, i64::from(gid), -1i64) };
    Errno::check(got)?;
    // SAFETY: numbers only.
    let got = unsafe { libc::syscall(libc::SYS_setresuid, -1i64, i64::from(uid), -1i64) };
    Errno::check(got).map(drop)
}

fn create_here(key: i32, size: usize, flags: u32) -> Result<i32> {
    let flags = flags.cast_signed() | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: numbers only.
    let id = unsafe { libc::shmget(key, size, flags) };
    Errno::check(id.into())?;
    Ok(id)
}

/// Gives a segment its owner and permissions.
///
/// # Errors
/// There is none with that id; EPERM.
pub fn set_owner(id: i32, (uid, gid): (u32, u32), mode: u32) -> Result<()> {
    let mut all = stat_raw(id)?;
    all.shm_perm.uid = uid;
    all.shm_perm.gid = gid;
    all.shm_perm.mode = u16::try_from(mode & 0o777).expect("nine bits");
    // SAFETY: the structure came from the kernel.
    let got = unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut all) };
    Errno::check(got.into()).map(drop)
}

/// Locks a segment in memory.
///
/// # Errors
/// EPERM, ENOMEM.
pub fn lock(id: i32) -> Result<()> {
    control(id, libc::SHM_LOCK)
}

/// Removes a segment; it stays as long as it is mapped.
///
/// # Errors
/// There is none with that id; EPERM.
pub fn remove(id: i32) -> Result<()> {
    control(id, libc::IPC_RMID)
}

fn control(id: i32, command: i32) -> Result<()> {
    // SAFETY: these commands take no structure.
    let got = unsafe { libc::shmctl(id, command, ptr::null_mut()) };
    Errno::check(got.into()).map(drop)
}

/// A segment in this process, for as long as the value lives.
#[derive(Debug)]
pub struct Attachment(ptr::NonNull<libc::c_void>);

impl Attachment {
    /// Attaches a segment where the kernel likes.
    ///
    /// # Errors
    /// There is none with that id; ENOMEM.
    pub fn new(id: i32) -> Result<Attachment> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe { libc::shmat(id, ptr::null(), 0) };
        match ptr::NonNull::new(got) {
            Some(start) if got.addr() != usize::MAX => Ok(Attachment(start)),
            _ => Err(Errno::last()),
        }
    }

    /// Its first address.
    pub fn address(&self) -> u64 {
        u64::try_from(self.0.addr().get()).expect("addresses fit 64 bits")
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, which hands out no references.
        let _ = unsafe { libc::shmdt(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_tells_what_it_was_made_with() {
        let own = (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        );
        let id = create(libc::IPC_PRIVATE, 5000, 0o640, own).expect("segments are allowed");
        let attachment = Attachment::new(id);
        // Goes when the attachment does.
        remove(id).expect("it is ours");
        let attachment = attachment.expect("attached");
        assert_ne!(attachment.address(), 0);
        let found = stat(id).expect("still attached");
        assert_eq!((found.owner, found.creator, found.size), (own, own, 5000));
        assert_eq!(found.mode & 0o777, 0o640);
        assert_eq!((found.mode & flag::DEST, found.attached), (flag::DEST, 1));
        drop(attachment);
        assert!(stat(id).is_err());
    }
}
