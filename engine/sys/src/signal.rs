//! Signal masks and sets, and the flag that termination signals raise.

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask,
};

use crate::Result;

/// Number of signals.
pub const NR_SIGNALS: i32 = 64;
const SIG_IGN: u64 = 1;

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

/// The signals that this process ignores, which a child made by [`crate::clone3`] inherits; bit 0 is
/// signal 1.
///
/// Source: man 2 rt_sigaction; asked of the kernel itself, because libc hides signals 32 and 33.
pub fn ignored() -> u64 {
    let is_ignored = |signal: i32| {
        // struct sigaction of the kernel: handler, flags, restorer, mask.
        let mut action = [0u64; 4];
        // SAFETY: no new action is given, and the old one has the room that the kernel writes.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                null_mut::<u64>(),
                action.as_mut_ptr(),
                size_of::<u64>(),
            )
        };
        result == 0 && action[0] == SIG_IGN
    };
    (1..=NR_SIGNALS)
        .filter(|signal| is_ignored(*signal))
        .fold(0, |set, signal| set | 1 << (signal - 1))
}

/// Signals that ask a program to end: interrupt, termination, hang-up.
pub const TERMINATION: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

static RAISED: AtomicPtr<AtomicBool> = AtomicPtr::new(null_mut());

/// While it lives, signals of [`TERMINATION`] raise a flag instead of ending the process; dropping it
/// puts the old actions back.
#[derive(Debug)]
pub struct TerminationFlag {
    old: Vec<(Signal, SigAction)>,
}

impl TerminationFlag {
    /// Lets the signals raise `flag`. A signal that was ignored, as SIGHUP under nohup, stays ignored.
    ///
    /// # Errors
    /// Those of sigaction(2), which has none for these signals.
    pub fn install(flag: Arc<AtomicBool>) -> Result<TerminationFlag> {
        // Never freed: a handler may be running while the guard goes. One flag is a few bytes.
        RAISED.store(Arc::into_raw(flag).cast_mut(), Ordering::Release);
        let action = SigAction::new(
            SigHandler::Handler(raise_flag),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        let mut guard = TerminationFlag { old: Vec::new() };
        for raw in TERMINATION {
            let signal = Signal::try_from(raw)?;
            // SAFETY: the handler only loads and stores atomics.
            let old = unsafe { sigaction(signal, &action) }?;
            if matches!(old.handler(), SigHandler::SigIgn) {
                // SAFETY: puts the action back that was there.
                unsafe { sigaction(signal, &old) }?;
            } else {
                guard.old.push((signal, old));
            }
        }
        Ok(guard)
    }
}

extern "C" fn raise_flag(_signal: i32) {
    let flag = RAISED.load(Ordering::Acquire);
    if !flag.is_null() {
        // SAFETY: install stored a pointer from Arc::into_raw, which is never released.
        unsafe { &*flag }.store(true, Ordering::Relaxed);
    }
}

impl Drop for TerminationFlag {
    fn drop(&mut self) {
        for (signal, old) in &self.old {
            // SAFETY: puts the action back that was there before install.
            let _ = unsafe { sigaction(*signal, old) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_termination_signal_raises_the_flag_while_the_guard_lives() {
        // Not SIGHUP or SIGINT: whoever runs the tests may ignore those, and then they stay ignored.
        let flag = Arc::new(AtomicBool::new(false));
        let guard = TerminationFlag::install(Arc::clone(&flag)).unwrap();
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(flag.load(Ordering::Relaxed));
        drop(guard);
        // SAFETY: reads the action by setting what install is expected to have put back.
        let now = unsafe {
            sigaction(
                Signal::SIGTERM,
                &SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty()),
            )
        };
        assert!(matches!(now.unwrap().handler(), SigHandler::SigDfl));
    }
}
