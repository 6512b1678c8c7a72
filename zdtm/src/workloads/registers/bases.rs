//! Segment bases, and floating point modes that compiled code sees.

use std::arch::asm;
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::{Stage, Workload, sys};

pub static FS_BASE: Workload = Workload::new(
    "registers/fs-base",
    "the thread pointer of every thread",
    fs_base,
);
pub static GS_BASE: Workload = Workload::new(
    "registers/gs-base",
    "a GS base of its own in every thread",
    gs_base,
);
pub static ROUNDING: Workload = Workload::new(
    "registers/rounding",
    "rounding modes, while asleep in a call",
    rounding,
);

/// Reads the word that FS points to: glibc keeps the thread pointer itself there.
fn word_at_fs() -> u64 {
    let word: u64;
    // SAFETY: the thread control block starts at FS in every thread of a glibc program.
    unsafe { asm!("mov {}, fs:[0]", out(reg) word, options(nostack, readonly)) };
    word
}

fn word_at_gs() -> u64 {
    let word: u64;
    // SAFETY: only called after GS has been pointed to a word of our own.
    unsafe { asm!("mov {}, gs:[0]", out(reg) word, options(nostack, readonly)) };
    word
}

/// Runs `body` in four threads and in this one; each says when it is set up, then waits for SIGTERM.
fn everywhere(stage: &Stage, body: fn(u64, &dyn Fn() -> Result<()>) -> Result<()>) -> Result<()> {
    let (send, receive) = mpsc::channel();
    let handles: Vec<_> = (1..5)
        .map(|index| {
            let send = send.clone();
            thread::spawn(move || {
                body(index, &|| {
                    send.send(()).map_err(|_| anyhow!("nobody listens"))?;
                    crate::stop::wait();
                    Ok(())
                })
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    body(0, &|| stage.ready_and_wait())?;
    handles
        .into_iter()
        .try_for_each(|handle| handle.join().map_err(|_| anyhow!("a thread panicked"))?)
}

fn fs_base(stage: &Stage) -> Result<()> {
    everywhere(stage, |index, wait| {
        let base = sys::fs_base()?;
        wait()?;
        let (now, word) = (sys::fs_base()?, word_at_fs());
        ensure!(
            now == base,
            "thread {index}: the FS base was {base:#x}, is {now:#x}"
        );
        ensure!(
            word == base,
            "thread {index}: FS points to {word:#x}, should be {base:#x}"
        );
        Ok(())
    })
}

fn gs_base(stage: &Stage) -> Result<()> {
    everywhere(stage, |index, wait| {
        let word: &'static u64 = Box::leak(Box::new(0x1234_5678 + index));
        let base = std::ptr::from_ref(word).addr() as u64;
        sys::set_gs_base(base)?;
        wait()?;
        let now = sys::gs_base()?;
        ensure!(
            now == base,
            "thread {index}: the GS base was {base:#x}, is {now:#x}"
        );
        let seen = word_at_gs();
        ensure!(
            seen == *word,
            "thread {index}: GS points to {seen:#x}, not {word:#x}"
        );
        Ok(())
    })
}

/// Modes differ per thread; each computes a quotient that shows the mode.
fn rounding(stage: &Stage) -> Result<()> {
    everywhere(stage, |index, wait| {
        let mxcsr = 0x1f80u32 | (u32::try_from(index % 4)? << 13);
        let third = || {
            let mut quotient = 1.0f64;
            let three = 3.0f64;
            // SAFETY: divides two numbers; the mode in force is what is tested.
            unsafe {
                asm!("divsd {}, {}", inout(xmm_reg) quotient, in(xmm_reg) three, options(nomem, nostack));
            }
            quotient.to_bits()
        };
        let usual = 0x1f80u32;
        // SAFETY: sets a valid mode, and the usual one again below.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack, readonly)) };
        let before = third();
        let waited = wait();
        let after = third();
        let mut now = 0u32;
        // SAFETY: stores into a local, then sets the usual mode again.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut now, options(nostack));
            asm!("ldmxcsr [{}]", in(reg) &raw const usual, options(nostack, readonly));
        }
        waited?;
        ensure!(
            before == after,
            "thread {index}: 1/3 was {before:#x}, is {after:#x}"
        );
        let modes = 0xffc0;
        ensure!(
            now & modes == mxcsr & modes,
            "thread {index}: MXCSR was {mxcsr:#x}, is {now:#x}"
        );
        Ok(())
    })
}
