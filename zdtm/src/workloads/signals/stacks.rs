//! Alternative signal stacks, and checkpoints inside a handler.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, Region};
use crate::{Stage, Workload};

pub static ALTSTACK: Workload = Workload::new(
    "signals/altstack",
    "a handler runs on the alternative stack",
    altstack,
);
pub static NONE: Workload = Workload::new(
    "signals/no-altstack",
    "tasks without an alternative stack, and handlers that would use one",
    none,
);
pub static THREADS: Workload = Workload::new(
    "signals/altstack-threads",
    "a stack of its own for every thread",
    threads,
);
pub static ON_STACK: Workload = Workload::new(
    "signals/in-handler",
    "frozen inside a handler on the alternative stack",
    in_handler,
);
pub static NESTED: Workload = Workload::new(
    "signals/nested-handlers",
    "frozen two handlers deep",
    nested,
);

const STACK: usize = 64 << 10;
const SS_AUTODISARM: i32 = i32::MIN;

static RAN_AT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_stack(_signal: i32) {
    let here = black_box(0u8);
    RAN_AT.store((&raw const here).addr(), Ordering::SeqCst);
}

fn check_runs_on(stack: Region) -> Result<()> {
    RAN_AT.store(0, Ordering::SeqCst);
    sys::kill_thread(sys::pid(), sys::tid(), libc::SIGUSR1)?;
    let at = RAN_AT.load(Ordering::SeqCst);
    ensure!(
        (stack.addr..stack.end()).contains(&at),
        "the handler ran at {at:#x}, not on {stack:x?}"
    );
    Ok(())
}

fn altstack(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGUSR1, note_stack, libc::SA_ONSTACK)?;
    let stack = Region::anon(STACK)?;
    sys::set_altstack(stack, 0)?;
    stage.ready_and_wait()?;
    let now = sys::altstack()?;
    ensure!(now == (stack, 0), "the stack was {stack:x?}, is {now:x?}");
    check_runs_on(stack)
}

/// A task that had none must not come by one: a handler would run wherever that lies.
fn none(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGUSR1, note_stack, libc::SA_ONSTACK)?;
    let nothing = Region { addr: 0, len: 0 };
    // The runtime has set one up for the main thread.
    sys::set_altstack(nothing, libc::SS_DISABLE)?;
    let check = || -> Result<()> {
        let (stack, flags) = sys::altstack()?;
        ensure!(
            flags == libc::SS_DISABLE,
            "there was no stack, is {stack:x?} ({flags:#x})"
        );
        let local = black_box(0u8);
        let here = (&raw const local).addr();
        check_runs_on(Region {
            addr: here - (1 << 16),
            len: 1 << 16,
        })
    };
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        check()
    })?;
    stage.ready_and_wait()?;
    check()?;
    child.finish()
}

fn threads(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGUSR1, note_stack, libc::SA_ONSTACK)?;
    let (send, receive) = mpsc::channel();
    let handles: Vec<_> = (0..4)
        .map(|index| {
            let send = send.clone();
            thread::spawn(move || -> Result<()> {
                let stack = Region::anon(STACK)?;
                let flags = if index % 2 == 0 { 0 } else { SS_AUTODISARM };
                sys::set_altstack(stack, flags)?;
                send.send(())?;
                crate::stop::wait();
                let now = sys::altstack()?;
                ensure!(
                    now == (stack, flags),
                    "thread {index}: {now:x?} instead of {stack:x?}"
                );
                static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
                let _turn = ONE_AT_A_TIME.lock();
                check_runs_on(stack)
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    stage.ready_and_wait()?;
    handles
        .into_iter()
        .try_for_each(|handle| handle.join().map_err(|_| anyhow!("a thread panicked"))?)
}

static DEPTH: AtomicU32 = AtomicU32::new(0);
static RETURNED: AtomicU32 = AtomicU32::new(0);

/// Goes one signal deeper, and waits at the deepest.
extern "C" fn deeper(signal: i32) {
    let local = black_box(signal * 3);
    DEPTH.fetch_add(1, Ordering::SeqCst);
    if signal == libc::SIGUSR1 || signal == 40 {
        let _ = sys::kill_thread(sys::pid(), sys::tid(), signal + 1);
    }
    while !crate::stop::requested() {
        sys::pause_for(1);
    }
    if black_box(local) == signal * 3 {
        RETURNED.fetch_add(1, Ordering::SeqCst);
    }
}

fn in_handler(stage: &Stage) -> Result<()> {
    const SIGNAL: i32 = 44;
    let stack = Region::anon(STACK)?;
    let worker = thread::spawn(move || -> Result<()> {
        sys::set_altstack(stack, 0)?;
        sys::handle(SIGNAL, deeper, libc::SA_ONSTACK)?;
        let before = sys::mask(libc::SIG_BLOCK, sys::bit(45))?;
        sys::kill_thread(sys::pid(), sys::tid(), SIGNAL)?;
        let after = sys::mask(libc::SIG_SETMASK, before)?;
        ensure!(
            after == before | sys::bit(45),
            "the mask after the handler is {after:#x}"
        );
        Ok(())
    });
    while DEPTH.load(Ordering::SeqCst) < 1 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    worker
        .join()
        .map_err(|_| anyhow!("the thread panicked"))??;
    ensure!(
        RETURNED.load(Ordering::SeqCst) == 1,
        "the handler has not returned"
    );
    Ok(())
}

fn nested(stage: &Stage) -> Result<()> {
    let worker = thread::spawn(|| -> Result<()> {
        for signal in [40, 41] {
            sys::handle(signal, deeper, libc::SA_NODEFER)?;
        }
        sys::handle(42, deeper, 0)?;
        sys::kill_thread(sys::pid(), sys::tid(), 40)?;
        Ok(())
    });
    while DEPTH.load(Ordering::SeqCst) < 2 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    worker
        .join()
        .map_err(|_| anyhow!("the thread panicked"))??;
    let returned = RETURNED.load(Ordering::SeqCst);
    ensure!(
        returned == 2,
        "{returned} of 2 handlers have returned rightly"
    );
    Ok(())
}
