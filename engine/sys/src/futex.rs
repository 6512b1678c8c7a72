//! Shared futexes on words that several processes map.
//!
//! Source: man 2 futex, FUTEX_WAIT, FUTEX_WAKE.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `word` holds `seen`; false when `timeout` passed first.
///
/// Returns true for a wake-up, a changed word and a signal alike: callers look at the word again.
pub fn wait_timeout(word: &AtomicU32, seen: u32, timeout: Duration) -> bool {
    let timeout = libc::timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: the word and the timespec outlive the call; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
        )
    };
    result == 0 || crate::Errno::last() != crate::Errno::ETIMEDOUT
}

/// Wakes everybody who waits on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
