//! System V semaphores.

use std::io;

use super::{call, check};

/// Makes a set without a key; returns its id.
pub fn semaphores(len: i32) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::semget(libc::IPC_PRIVATE, len, libc::IPC_CREAT | 0o600) })
}

/// Changes semaphores of a set, all at once: number and what is added.
pub fn change_semaphores(id: i32, changes: &[(u16, i16)], flags: i32) -> io::Result<()> {
    let flags = i16::try_from(flags).map_err(io::Error::other)?;
    let operation = |(number, by): &(u16, i16)| libc::sembuf {
        sem_num: *number,
        sem_op: *by,
        sem_flg: flags,
    };
    let operations: Vec<_> = changes.iter().map(operation).collect();
    // Registers that the call does not use are the same each time, for who looks at it.
    let id = usize::try_from(id).map_err(io::Error::other)?;
    let operations_at = operations.as_ptr().expose_provenance();
    // SAFETY: the operations live through the call, which is told their number.
    unsafe {
        call(
            libc::SYS_semop,
            [id, operations_at, operations.len(), 0, 0, 0],
        )
    }
    .map(drop)
}

/// The values of all semaphores of a set.
pub fn semaphore_values(id: i32, len: u16) -> io::Result<Vec<i32>> {
    // SAFETY: the command takes no fourth argument.
    let value = |number: u16| check(unsafe { libc::semctl(id, number.into(), libc::GETVAL) });
    (0..len).map(value).collect()
}

/// Removes a set.
pub fn remove_semaphores(id: i32) -> io::Result<()> {
    // SAFETY: the command takes no fourth argument.
    check(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}
