//! Calls that wait for a signal.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};

use super::blocked::{again_when_interrupted, asleep_in};
use crate::{Stage, Workload, sys};

pub static SIGSUSPEND: Workload = Workload::new(
    "syscalls/sigsuspend",
    "sigsuspend with a mask of its own",
    sigsuspend,
);
pub static SIGTIMEDWAIT: Workload = Workload::new(
    "syscalls/sigwaitinfo",
    "sigwaitinfo for a blocked signal",
    sigtimedwait,
);

static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: i32) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

/// While it sleeps, the mask is the call's; afterwards it is the one from before.
fn sigsuspend(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGUSR1, count, 0)?;
    let blocked = sys::bit(libc::SIGUSR1) | sys::bit(libc::SIGUSR2);
    let call = move || -> Result<u64> {
        sys::mask(libc::SIG_BLOCK, blocked)?;
        let error = sys::sigsuspend(sys::bit(libc::SIGTERM) | sys::bit(libc::SIGUSR2));
        ensure!(
            error.raw_os_error() == Some(libc::EINTR),
            "sigsuspend gave {error}"
        );
        Ok(sys::mask(libc::SIG_BLOCK, 0)?)
    };
    let release = |tid| {
        ensure!(
            SEEN.load(Ordering::SeqCst) == 0,
            "the handler has run before the signal"
        );
        Ok(sys::kill_thread(sys::pid(), tid, libc::SIGUSR1)?)
    };
    let mask = asleep_in(stage, libc::SYS_rt_sigsuspend, call, release)??;
    ensure!(
        SEEN.load(Ordering::SeqCst) == 1,
        "the handler has not run exactly once"
    );
    ensure!(
        mask & blocked == blocked,
        "the mask afterwards is {mask:#x}"
    );
    Ok(())
}

/// This call gives EINTR after any stop, so a checkpoint may show; the signal must come all the same.
fn sigtimedwait(stage: &Stage) -> Result<()> {
    let set = sys::bit(libc::SIGUSR2);
    sys::mask(libc::SIG_BLOCK, set)?;
    let call = move || again_when_interrupted(|| sys::wait_for(set));
    let release = |tid| {
        Ok(sys::queue_to_thread(
            sys::pid(),
            tid,
            libc::SIGUSR2,
            0xabcd,
        )?)
    };
    let taken = asleep_in(stage, libc::SYS_rt_sigtimedwait, call, release)??;
    ensure!(
        taken == (libc::SIGUSR2, libc::SI_QUEUE, 0xabcd),
        "sigwaitinfo gave {taken:x?}"
    );
    Ok(())
}
