//! Actions of a process and masks of its threads.

use std::arch::asm;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, KernelAction};
use crate::{Stage, Workload};

pub static ACTIONS: Workload = Workload::new(
    "signals/actions",
    "an action of its own for every signal",
    actions,
);
pub static TRAP: Workload = Workload::new(
    "signals/trap",
    "SIGTRAP ignored, then handled: the dump must not eat it",
    trap,
);
pub static MASKS: Workload = Workload::new(
    "signals/masks",
    "a signal mask of its own for every thread",
    masks,
);

static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: i32) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn count_info(_signal: i32, _info: *const libc::siginfo_t, _context: *mut libc::c_void) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

const SA_RESTORER: u64 = 0x0400_0000;

/// All signals that can have an action, with the verdict's signal left alone.
fn settable() -> impl Iterator<Item = i32> {
    (1..=64).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP, libc::SIGTERM].contains(signal))
}

fn actions(stage: &Stage) -> Result<()> {
    let restorer = sys::kernel_action(libc::SIGTERM)?.restorer;
    for signal in settable() {
        let kind = signal % 4;
        let handler = match kind {
            0 => libc::SIG_IGN,
            1 => libc::SIG_DFL,
            2 => count as *const () as usize,
            _ => count_info as *const () as usize,
        };
        let flags = [
            0,
            libc::SA_RESTART,
            libc::SA_NODEFER,
            libc::SA_ONSTACK,
            libc::SA_RESETHAND,
        ];
        let flag = flags[usize::try_from(signal)? % flags.len()];
        let info = if kind == 3 { libc::SA_SIGINFO } else { 0 };
        let mask = 1u64.rotate_left(u32::try_from(signal)? * 7) | 0x8000_0000;
        let flags = u64::from((flag | info).cast_unsigned()) | SA_RESTORER;
        sys::set_kernel_action(
            signal,
            &KernelAction {
                handler,
                flags,
                restorer,
                mask,
            },
        )?;
    }
    let read = || {
        (1..=64)
            .map(sys::kernel_action)
            .collect::<Result<Vec<_>, _>>()
    };
    let before = read()?;
    stage.ready_and_wait()?;
    for ((signal, was), is) in (1..).zip(before).zip(read()?) {
        ensure!(
            was == is,
            "signal {signal}: the action was {was:x?}, is {is:x?}"
        );
    }
    let handled = settable()
        .find(|signal| signal % 4 == 2)
        .unwrap_or(libc::SIGUSR1);
    // Being stopped and continued may have run the handler of SIGCONT.
    let before = SEEN.load(Ordering::SeqCst);
    sys::kill(sys::pid(), handled)?;
    let ran = SEEN.load(Ordering::SeqCst) - before;
    ensure!(ran == 1, "the handler of signal {handled} ran {ran} times");
    Ok(())
}

/// An engine that ends its work in a task with a breakpoint would reset an ignored SIGTRAP.
fn trap(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::set_action(libc::SIGTRAP, libc::SIG_IGN, 0)?;
        sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGTRAP))?;
        stage.ready_and_wait()?;
        let handler = sys::kernel_action(libc::SIGTRAP)?.handler;
        ensure!(
            handler == libc::SIG_IGN,
            "SIGTRAP was ignored, has handler {handler:#x}"
        );
        let mask = sys::mask(libc::SIG_BLOCK, 0)?;
        ensure!(
            mask & sys::bit(libc::SIGTRAP) != 0,
            "SIGTRAP is not blocked any more"
        );
        Ok(())
    })?;
    sys::handle(libc::SIGTRAP, count, 0)?;
    stage.ready_and_wait()?;
    // SAFETY: a breakpoint raises SIGTRAP, which has a handler that returns behind it.
    unsafe { asm!("int3", options(nomem, nostack)) };
    ensure!(
        SEEN.load(Ordering::SeqCst) == 1,
        "the handler of SIGTRAP has not run once"
    );
    child.finish()
}

fn masks(stage: &Stage) -> Result<()> {
    let (send, receive) = mpsc::channel();
    let wanted = |index: u32| {
        let set = 0x1111_1111_1111_1111u64.rotate_left(index);
        // The kernel never blocks these two, and the verdict must come through somewhere.
        set & !(sys::bit(libc::SIGKILL) | sys::bit(libc::SIGSTOP) | sys::bit(libc::SIGTERM))
    };
    let keep = move |index: u32, wait: &dyn Fn() -> Result<()>| -> Result<()> {
        sys::mask(libc::SIG_SETMASK, wanted(index))?;
        wait()?;
        let (was, is) = (wanted(index), sys::mask(libc::SIG_BLOCK, 0)?);
        ensure!(
            was == is,
            "thread {index}: the mask was {was:#x}, is {is:#x}"
        );
        Ok(())
    };
    let handles: Vec<_> = (1..9)
        .map(|index| {
            let send = send.clone();
            thread::spawn(move || {
                keep(index, &|| {
                    send.send(()).map_err(|_| anyhow!("nobody listens"))?;
                    crate::stop::wait();
                    Ok(())
                })
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    keep(0, &|| stage.ready_and_wait())?;
    handles
        .into_iter()
        .try_for_each(|handle| handle.join().map_err(|_| anyhow!("a thread panicked"))?)
}
