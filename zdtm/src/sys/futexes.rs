//! Futexes that pass on priority, and robust mutexes of libc.

use std::cell::UnsafeCell;
use std::io;
use std::sync::atomic::AtomicU32;

use super::{Region, check_long};

const LOCK_PI: i32 = 6;
const UNLOCK_PI: i32 = 7;

/// The futex word says that somebody waits in the kernel.
pub const FUTEX_WAITERS: u32 = 0x8000_0000;
/// The futex word's bits of the owner's thread id.
pub const FUTEX_TID: u32 = 0x3fff_ffff;

fn futex(word: &AtomicU32, operation: i32) -> io::Result<()> {
    let none = std::ptr::null::<u8>();
    let nr = libc::SYS_futex;
    // SAFETY: the word lives through the call.
    check_long(unsafe { libc::syscall(nr, word.as_ptr(), operation, 0, none) }).map(drop)
}

/// Sleeps until this thread owns the word.
pub fn lock_pi(word: &AtomicU32) -> io::Result<()> {
    futex(word, LOCK_PI)
}

/// Hands the word on to a waiter, or frees it.
pub fn unlock_pi(word: &AtomicU32) -> io::Result<()> {
    futex(word, UNLOCK_PI)
}

/// Sleeps while all words are `value`, shared between processes; returns which one it was woken by.
pub fn futex_wait_any(words: &[AtomicU32], value: u32) -> io::Result<u64> {
    const FUTEX2_SIZE_U32: u32 = 2;
    #[repr(C)]
    struct Waiter {
        value: u64,
        word: u64,
        flags: u32,
        reserved: u32,
    }
    let waiter = |word: &AtomicU32| Waiter {
        value: value.into(),
        word: word.as_ptr().addr() as u64,
        flags: FUTEX2_SIZE_U32,
        reserved: 0,
    };
    let waiters: Vec<Waiter> = words.iter().map(waiter).collect();
    let none = std::ptr::null::<libc::timespec>();
    let nr = libc::SYS_futex_waitv;
    // SAFETY: words and their list live through the call.
    check_long(unsafe { libc::syscall(nr, waiters.as_ptr(), waiters.len(), 0, none, 0) })
}

/// A mutex of libc whose next owner is told when one has died.
#[derive(Debug)]
pub struct RobustMutex(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a mutex is made to be used by several threads.
unsafe impl Send for RobustMutex {}
// SAFETY: see Send.
unsafe impl Sync for RobustMutex {}

impl RobustMutex {
    /// Makes one that lives as long as the process; with `inherit` it passes on priority, too.
    pub fn make(inherit: bool) -> &'static RobustMutex {
        let mutex = Box::leak(Box::new(RobustMutex(UnsafeCell::new(
            libc::PTHREAD_MUTEX_INITIALIZER,
        ))));
        mutex.initialize(inherit, libc::PTHREAD_PROCESS_PRIVATE)
    }

    /// Makes one at the beginning of memory that processes share.
    pub fn make_shared(memory: &Region) -> &'static RobustMutex {
        // SAFETY: the memory is aligned to pages, larger than a mutex and stays mapped; zeros are a mutex, too.
        let mutex = unsafe { &*std::ptr::with_exposed_provenance::<RobustMutex>(memory.addr) };
        mutex.initialize(false, libc::PTHREAD_PROCESS_SHARED)
    }

    fn initialize(&'static self, inherit: bool, sharing: i32) -> &'static RobustMutex {
        // SAFETY: an all-zero attribute object is memory enough for libc to initialize.
        let mut kind: libc::pthread_mutexattr_t = unsafe { std::mem::zeroed() };
        // SAFETY: the attributes live through all calls, the mutex for ever; nobody uses it yet.
        unsafe {
            libc::pthread_mutexattr_init(&raw mut kind);
            libc::pthread_mutexattr_setrobust(&raw mut kind, libc::PTHREAD_MUTEX_ROBUST);
            if inherit {
                libc::pthread_mutexattr_setprotocol(&raw mut kind, libc::PTHREAD_PRIO_INHERIT);
            }
            libc::pthread_mutexattr_setpshared(&raw mut kind, sharing);
            libc::pthread_mutex_init(self.0.get(), &raw const kind);
        }
        self
    }

    /// Locks it and returns libc's errno: 0, or EOWNERDEAD.
    pub fn lock(&self) -> i32 {
        // SAFETY: the mutex has been initialized and lives for ever.
        unsafe { libc::pthread_mutex_lock(self.0.get()) }
    }

    /// Unlocks it.
    pub fn unlock(&self) {
        // SAFETY: as above.
        unsafe { libc::pthread_mutex_unlock(self.0.get()) };
    }
}
