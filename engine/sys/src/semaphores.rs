//! System V semaphores, as far as they can be looked at.
//!
//! Source: man 2 semctl, semop; man 7 sysvipc.

use crate::{Errno, Result};

/// Of an operation: fails where it would have to wait.
pub const IPC_NOWAIT: u16 = 0o4000;
/// Of an operation: the kernel undoes it when the process ends.
pub const SEM_UNDO: u16 = 0x1000;
/// The largest value of a semaphore.
pub const MAX_VALUE: i64 = 32_767;

/// What the kernel tells of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set {
    /// Key, 0 for one without.
    pub key: i32,
    /// Number of semaphores.
    pub len: u32,
}

/// Tells about a set.
///
/// # Errors
/// EINVAL, EIDRM: there is none with that id. EACCES.
pub fn stat(id: i32) -> Result<Set> {
    // SAFETY: a structure of numbers, for which zeros are a value.
    let mut all: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is as large as the call wants it.
    let got = unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut all) };
    Errno::check(got.into())?;
    Ok(Set {
        key: all.sem_perm.__key,
        len: u32::try_from(all.sem_nsems).map_err(|_| Errno::EINVAL)?,
    })
}

/// The value of a semaphore.
///
/// # Errors
/// As [`stat`]; EINVAL for a semaphore that the set does not have.
pub fn value(id: i32, number: u16) -> Result<i32> {
    get(id, number, libc::GETVAL)
}

/// The process that was the last to change a semaphore, 0 for none.
///
/// # Errors
/// As [`value`].
pub fn last_pid(id: i32, number: u16) -> Result<i32> {
    get(id, number, libc::GETPID)
}

fn get(id: i32, number: u16, command: i32) -> Result<i32> {
    // SAFETY: these commands take no fourth argument.
    let got = unsafe { libc::semctl(id, number.into(), command) };
    Errno::check(got.into())?;
    Ok(got)
}

/// A `struct sembuf`: an operation on one semaphore, as `semop` reads it.
pub fn operation(number: u16, change: i16, flags: u16) -> [u8; 6] {
    let [a, b] = number.to_ne_bytes();
    let [c, d] = change.to_ne_bytes();
    let [e, f] = flags.to_ne_bytes();
    [a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_tells_its_size_and_values() {
        // SAFETY: numbers only.
        let id = unsafe { libc::semget(libc::IPC_PRIVATE, 3, 0o600 | libc::IPC_CREAT) };
        assert!(id >= 0, "{:?}", Errno::last());
        let seen = (stat(id), value(id, 2), last_pid(id, 2), value(id, 3));
        // SAFETY: removing takes no structure.
        unsafe { libc::semctl(id, 0, libc::IPC_RMID) };
        let set = Set { key: 0, len: 3 };
        assert_eq!(seen, (Ok(set), Ok(0), Ok(0), Err(Errno::EINVAL)));
        assert!(stat(id).is_err());
    }

    #[test]
    fn operations_have_the_form_of_the_structure() {
        assert_eq!(size_of::<libc::sembuf>(), operation(1, 2, 3).len());
        assert_eq!(operation(1, -1, SEM_UNDO), [1, 0, 255, 255, 0, 16]);
    }
}
