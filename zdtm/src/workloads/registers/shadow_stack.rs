//! Threads with shadow stacks: the CPU itself checks every return after the restore, and the kernel every
//! return from a handler.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, SHADOW_STACK, SHADOW_WRITES};
use crate::{Need, Stage, Workload};

pub static SHADOW_STACK_KEPT: Workload = Workload::new(
    "registers/shadow-stack",
    "nested calls, a handler and writes under shadow stacks",
    run,
)
.needs(&[Need::ShadowStack])
// Each restored thread keeps a page of shadow stack that the kernel has made for it and it does not use.
.moves(&["maps", "vmflags"]);

const DEPTH: u32 = 100;
/// Frames that fill more than a page of a shadow stack.
const DEEP: u32 = 1000;

/// Calls itself, does `at_bottom` there, and returns all the way.
#[inline(never)]
fn descend(depth: u32, at_bottom: &mut dyn FnMut() -> Result<()>) -> Result<u32> {
    if depth == 0 {
        at_bottom()?;
        return Ok(0);
    }
    Ok(black_box(descend(depth - 1, at_bottom)?) + 1)
}

/// Goes down, waits for the end at the bottom, and comes back the same way, with the same features.
fn go_and_return(depth: u32, mut wait: impl FnMut() -> Result<()>) -> Result<()> {
    let (top, features) = (sys::shadow_stack_pointer(), sys::shadow_stack_features()?);
    ensure!(top != 0, "there is no shadow stack");
    let mut at_bottom = || {
        let before = sys::shadow_stack_pointer();
        wait()?;
        let now = sys::shadow_stack_pointer();
        ensure!(now == before, "the pointer was {before:#x}, is {now:#x}");
        Ok(())
    };
    let returned = descend(depth, &mut at_bottom)?;
    ensure!(returned == depth, "{returned} returns of {depth}");
    let now = sys::shadow_stack_pointer();
    ensure!(now == top, "the pointer was {top:#x} at last, is {now:#x}");
    let now = sys::shadow_stack_features()?;
    ensure!(
        now == features,
        "the features were {features:?}, are {now:?}"
    );
    Ok(())
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

/// Waits in the handler, whose frame is on the shadow stack as well.
extern "C" fn wait_in_handler(_signal: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
    while !crate::stop::requested() {
        sys::pause_for(1);
    }
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

fn in_handler(ready: &Sender<()>) -> Result<()> {
    sys::handle(libc::SIGUSR1, wait_in_handler, 0)?;
    let waiter = ready.clone();
    // Another thread says when this one is in its handler.
    let watch = thread::spawn(move || {
        while HANDLED.load(Ordering::SeqCst) == 0 {
            sys::pause_for(1);
        }
        waiter.send(())
    });
    go_and_return(DEEP, || {
        Ok(sys::kill_thread(sys::pid(), sys::tid(), libc::SIGUSR1)?)
    })?;
    ensure!(
        HANDLED.load(Ordering::SeqCst) == 2,
        "the handler did not end"
    );
    watch.join().map_err(|_| anyhow!("a thread panicked"))??;
    Ok(())
}

fn writing(ready: &Sender<()>) -> Result<()> {
    sys::allow_shadow_writes()?;
    sys::lock_shadow_stack(SHADOW_WRITES)?;
    ensure!(sys::write_below_shadow_stack(7) == 7, "no write before");
    go_and_return(DEPTH, || {
        ready.send(())?;
        crate::stop::wait();
        Ok(())
    })?;
    let written = sys::write_below_shadow_stack(9);
    ensure!(written == 9, "wrote 9, read {written}");
    Ok(())
}

fn tree(stage: &Stage) -> Result<()> {
    let (ready, all) = mpsc::channel();
    let threads: Vec<_> = [in_handler, writing]
        .into_iter()
        .map(|body| {
            let ready = ready.clone();
            thread::spawn(move || body(&ready))
        })
        .collect();
    threads.iter().try_for_each(|_| all.recv())?;
    sys::lock_shadow_stack(SHADOW_STACK)?;
    go_and_return(DEPTH, || stage.ready_and_wait())?;
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    // New threads get shadow stacks, and give them back.
    let more = thread::spawn(|| go_and_return(DEPTH, || Ok(())));
    more.join().map_err(|_| anyhow!("a thread panicked"))?
}

fn run(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::go_on_with_shadow_stack(|| match tree(stage) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("under its shadow stack: {error:#}");
                1
            }
        })
    })?;
    stage.ready_and_wait()?;
    child.finish()
}
