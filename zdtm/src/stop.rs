//! The signal that ends a workload's wait.
//!
//! SIGTERM sets one word and wakes everybody who sleeps on it, so that any number of threads can wait
//! for it in the kernel, in a call that is restarted by itself after a checkpoint.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys;

/// Not zero once SIGTERM has come; the register workloads spin on it without a call.
pub(crate) static STOPPED: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_term(_signal: i32) {
    STOPPED.store(1, Ordering::SeqCst);
    // The handler may have interrupted code that is about to look at errno.
    let errno = io::Error::last_os_error().raw_os_error();
    let _ = sys::futex_wake(&STOPPED, i32::MAX);
    sys::set_errno(errno.unwrap_or(0));
}

/// Installs the handler; forked children have it too.
pub(crate) fn install() -> io::Result<()> {
    sys::handle(libc::SIGTERM, on_term, libc::SA_RESTART)
}

/// Tells whether SIGTERM has come.
pub(crate) fn requested() -> bool {
    STOPPED.load(Ordering::SeqCst) != 0
}

/// Sleeps until SIGTERM has come.
pub(crate) fn wait() {
    while !requested() {
        // An error is EINTR or EAGAIN; the loop looks again.
        let _ = sys::futex_wait(&STOPPED, 0, None);
    }
}
