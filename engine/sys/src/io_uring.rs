//! io_uring rings: making one, and what the kernel tells of one by how it refuses.
//!
//! Source: man 2 io_uring_setup, io_uring_enter, io_uring_register; linux include/uapi/linux/io_uring.h.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::mapping::SharedMapping;
use crate::{Errno, Result, pidfd};

/// `IORING_SETUP_*` bits.
pub mod setup {
    /// Completions are polled for.
    pub const IOPOLL: u32 = 1 << 0;
    /// A thread of the kernel submits.
    pub const SQPOLL: u32 = 1 << 1;
    /// That thread keeps to one processor.
    pub const SQ_AFF: u32 = 1 << 2;
    /// The number of completions is given.
    pub const CQSIZE: u32 = 1 << 3;
    /// Numbers of entries that are too large are made smaller.
    pub const CLAMP: u32 = 1 << 4;
    /// Shares workers with another ring.
    pub const ATTACH_WQ: u32 = 1 << 5;
    /// The ring starts disabled.
    pub const R_DISABLED: u32 = 1 << 6;
    /// Submitting goes on behind an entry that fails.
    pub const SUBMIT_ALL: u32 = 1 << 7;
    /// The kernel does not interrupt the program for its work.
    pub const COOP_TASKRUN: u32 = 1 << 8;
    /// The ring says when such work waits.
    pub const TASKRUN_FLAG: u32 = 1 << 9;
    /// Submission entries of 128 bytes.
    pub const SQE128: u32 = 1 << 10;
    /// Completion entries of 32 bytes.
    pub const CQE32: u32 = 1 << 11;
    /// One thread only submits.
    pub const SINGLE_ISSUER: u32 = 1 << 12;
    /// The kernel works only when that thread asks for completions.
    pub const DEFER_TASKRUN: u32 = 1 << 13;
    /// The ring lies in memory of the program.
    pub const NO_MMAP: u32 = 1 << 14;
    /// The ring has a number of its thread and no descriptor.
    pub const REGISTERED_FD_ONLY: u32 = 1 << 15;
    /// Submission entries are taken in order, without an array of indices.
    pub const NO_SQARRAY: u32 = 1 << 16;
    /// Polling sleeps for a while first.
    pub const HYBRID_IOPOLL: u32 = 1 << 17;
    /// Completion entries of 16 and of 32 bytes.
    pub const CQE_MIXED: u32 = 1 << 18;
}

/// Bytes of the request that the kernel reads when an entry is submitted: `IORING_OP_*` and `IOSQE_*`.
pub mod request {
    /// Does nothing.
    pub const NOP: u8 = 0;
    /// Reads into several parts of memory.
    pub const READV: u8 = 1;
    /// Waits for a file to become ready.
    pub const POLL_ADD: u8 = 6;
    /// Receives a message.
    pub const RECVMSG: u8 = 10;
    /// Waits for some time.
    pub const TIMEOUT: u8 = 11;
    /// Accepts a connection.
    pub const ACCEPT: u8 = 13;
    /// Reads.
    pub const READ: u8 = 22;
    /// Receives.
    pub const RECV: u8 = 27;
    /// Puts a completion into another ring.
    pub const MSG_RING: u8 = 40;
    /// Flag: no completion if it succeeds.
    pub const SKIP_SUCCESS: u8 = 1 << 6;
    /// Length of a wait that goes on after each time.
    pub const POLL_MULTISHOT: u32 = 1;
    /// Flag of a time that is a moment.
    pub const TIMEOUT_MOMENT: u32 = 1;
    /// Flag of a time on the clock that counts suspend.
    pub const TIMEOUT_BOOTTIME: u32 = 1 << 2;
    /// Flag of a time on the clock that tells the date.
    pub const TIMEOUT_REALTIME: u32 = 1 << 3;
    /// Flag of a time that is over again and again.
    pub const TIMEOUT_MULTISHOT: u32 = 1 << 6;
}

/// `IORING_REGISTER_*` operations.
pub mod register {
    /// Memory that requests read and write.
    pub const BUFFERS: u32 = 0;
    /// Open files that requests name by their place.
    pub const FILES: u32 = 2;
    /// An eventfd that is told of completions.
    pub const EVENTFD: u32 = 4;
    /// The same, told only of completions that come later than the call that asked for them.
    pub const EVENTFD_ASYNC: u32 = 7;
    /// Which operations the kernel knows.
    pub const PROBE: u32 = 8;
    /// Memory as before, some of it not there yet.
    pub const BUFFERS2: u32 = 15;
    /// Processors of the threads that work for a thread.
    pub const WORKER_PROCESSORS: u32 = 17;
    /// How many of them there are at most.
    pub const WORKER_LIMITS: u32 = 19;
    /// Rings under numbers of the calling thread's own.
    pub const RING_FDS: u32 = 20;
    /// Takes these away.
    pub const UNREGISTER_RING_FDS: u32 = 21;
    /// Polling of network devices.
    pub const NAPI: u32 = 27;
    /// State of a group of provided buffers.
    pub const PBUF_STATUS: u32 = 32;
}

/// Offset in the ring's file of its head, completions and array of indices.
pub const OFFSET_RINGS: u64 = 0;
/// The same under its old name.
pub const OFFSET_COMPLETIONS: u64 = 0x800_0000;
/// Offset in the ring's file of the submission entries.
pub const OFFSET_ENTRIES: u64 = 0x1000_0000;

/// Offset in the ring's file from which on rings of provided buffers are.
pub const OFFSET_BUFFERS: u64 = 0x8000_0000;

/// Flag of io_uring_enter: wakes the thread that submits.
const ENTER_SQ_WAKEUP: u32 = 2;
/// An address that no process has.
const NOWHERE: usize = 8;
const PARAMS_LEN: usize = 120;
/// Offset in the parameters of sq_off.array.
const ARRAY_AT: usize = 64;

/// What a ring is made with, and what the kernel makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Params {
    /// `IORING_SETUP_*` bits.
    pub flags: u32,
    /// Number of submission entries.
    pub sq_entries: u32,
    /// Number of completion entries.
    pub cq_entries: u32,
    /// The processor of the thread that submits.
    pub sq_thread_cpu: u32,
    /// Milliseconds after which that thread sleeps.
    pub sq_thread_idle: u32,
}

impl Params {
    /// As the kernel reads them: struct io_uring_params.
    pub fn to_bytes(self) -> [u8; PARAMS_LEN] {
        let mut bytes = [0; PARAMS_LEN];
        let words = [
            self.sq_entries,
            self.cq_entries,
            self.flags,
            self.sq_thread_cpu,
            self.sq_thread_idle,
        ];
        for (nth, word) in words.iter().enumerate() {
            bytes[4 * nth..4 * nth + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// A new ring.
#[derive(Debug)]
pub struct Ring {
    /// Its descriptor, close-on-exec.
    pub fd: OwnedFd,
    /// Where its array of indices begins; 0 for a ring without.
    pub array: u32,
}

/// Makes a ring.
///
/// # Errors
/// EINVAL for parameters that the kernel does not know, EPERM where rings are forbidden, ENOMEM.
pub fn create(params: Params) -> Result<Ring> {
    let mut bytes = params.to_bytes();
    // SAFETY: the parameters have the kernel's size and live through the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_io_uring_setup,
            params.sq_entries,
            bytes.as_mut_ptr(),
        )
    };
    let fd = i32::try_from(Errno::check(fd)?).map_err(|_| Errno::EINVAL)?;
    let array = bytes[ARRAY_AT..ARRAY_AT + 4].try_into();
    Ok(Ring {
        // SAFETY: the call has just returned it to us alone.
        fd: unsafe { pidfd::own(fd) },
        array: u32::from_le_bytes(array.expect("four bytes")),
    })
}

/// Submits entries; returns how many were taken.
///
/// # Errors
/// EBADFD for a ring that is disabled, EEXIST for one that belongs to another task.
pub fn submit(fd: impl AsFd, nr: u32) -> Result<u32> {
    enter(fd.as_fd(), nr, 0)
}

/// Wakes the thread that submits for a ring.
///
/// # Errors
/// As [`submit`]; EOWNERDEAD when that thread is gone.
pub fn wake(fd: impl AsFd) -> Result<()> {
    enter(fd.as_fd(), 0, ENTER_SQ_WAKEUP).map(drop)
}

fn enter(fd: BorrowedFd<'_>, nr: u32, flags: u32) -> Result<u32> {
    // SAFETY: numbers and no addresses.
    let taken = unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            fd.as_raw_fd(),
            nr,
            0,
            flags,
            std::ptr::null::<u8>(),
            0,
        )
    };
    u32::try_from(Errno::check(taken)?).map_err(|_| Errno::EINVAL)
}

/// How the kernel refuses an operation whose argument is nowhere: nothing comes of it, and what it looks at
/// before the argument shows.
pub fn refusal(fd: impl AsFd, operation: u32) -> Errno {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the address is never valid, so the kernel reads and writes nothing.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, NOWHERE, 1) };
    Errno::check(result).err().unwrap_or(Errno::EIO)
}

/// Makes an operation with an argument that it may change; returns its result.
///
/// # Errors
/// Those of the operation.
pub fn operate(fd: impl AsFd, operation: u32, argument: &mut [u8], nr: u32) -> Result<u64> {
    let fd = fd.as_fd().as_raw_fd();
    let argument = argument.as_mut_ptr();
    // SAFETY: the argument lives through the call; the caller gives the length that the operation has,
    // and operations that keep addresses are not among those used here.
    Errno::check(unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, argument, nr) })
}

/// Maps a part of a ring's file here.
///
/// # Errors
/// EINVAL for a part that it does not have; ENOMEM.
pub fn map(fd: impl AsFd, offset: u64, len: usize) -> Result<SharedMapping> {
    SharedMapping::of_part(fd.as_fd(), offset, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_tell_rings_apart() {
        let params = Params {
            sq_entries: 8,
            ..Params::default()
        };
        let Ok(Ring { fd: plain, array }) = create(params) else {
            eprintln!("skipped: no io_uring here");
            return;
        };
        assert_eq!(refusal(&plain, register::EVENTFD), Errno::EFAULT);
        assert!(array > 0);
        assert_eq!(submit(&plain, 0), Ok(0));
        let flags = setup::R_DISABLED;
        let disabled = create(Params { flags, ..params }).expect("a ring");
        assert!(submit(&disabled.fd, 0).is_err());
        assert!(map(&plain, OFFSET_ENTRIES, 4096).is_ok());
    }
}
