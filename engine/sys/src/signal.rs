//! Signal masks and sets.

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

/// Number of signals.
pub const NR_SIGNALS: i32 = 64;

/// All signals of this thread blocked; dropping it puts the old mask back.
#[derive(Debug)]
pub struct BlockedSignals {
    old: SigSet,
}

/// Blocks every signal of the calling thread.
pub fn block_all() -> BlockedSignals {
    let mut old = SigSet::empty();
    // rt_sigprocmask with valid arguments does not fail.
    let _ = sigprocmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut old),
    );
    BlockedSignals { old }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.old), None);
    }
}
