//! Threads: their ids, stacks and thread-local data.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};

use crate::{Child, Stage, Workload, sys};

pub static FEW: Workload = Workload::new("tree/threads", "eight threads", |s| with_threads(s, 8));
pub static THOUSAND: Workload = Workload::new("tree/thousand-threads", "a thousand threads", |s| {
    with_threads(s, 1000)
});
pub static TREE: Workload = Workload::new(
    "tree/threads-in-children",
    "four children with five threads each",
    tree,
);
pub static CHURN: Workload = Workload::new(
    "tree/thread-churn",
    "threads that come and go all the time",
    churn,
)
.moves(&[
    "tree", "maps", "vmflags", "signals", "comm", "umask", "tracer", "syscall",
]);

thread_local! {
    static SECRET: Cell<u64> = const { Cell::new(0) };
}

static SET_UP: AtomicU64 = AtomicU64::new(0);

/// Starts `count` threads that keep an id, a thread-local and a value on the stack, and returns when
/// all stand; each looks at them again after SIGTERM.
fn start(count: u64) -> Result<Vec<JoinHandle<Result<()>>>> {
    SET_UP.store(0, Ordering::SeqCst);
    let handles = (0..count)
        .map(|index| {
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || keep(index))
        })
        .collect::<Result<Vec<_>, _>>()
        .context("starting a thread")?;
    while SET_UP.load(Ordering::SeqCst) < count {
        sys::pause_for(1);
    }
    Ok(handles)
}

fn keep(index: u64) -> Result<()> {
    let secret = index.wrapping_mul(0x9e37_79b9) + 1;
    let on_stack = std::hint::black_box([secret; 16]);
    let tid = sys::tid();
    SECRET.set(secret);
    SET_UP.fetch_add(1, Ordering::SeqCst);
    crate::stop::wait();
    ensure!(
        sys::tid() == tid,
        "thread {index}: tid was {tid}, is {}",
        sys::tid()
    );
    let found = SECRET.get();
    ensure!(
        found == secret,
        "thread {tid}: the thread-local was {secret}, is {found}"
    );
    ensure!(
        on_stack == [secret; 16],
        "thread {tid}: the stack has changed"
    );
    Ok(())
}

fn join(handles: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    handles.into_iter().try_for_each(|handle| {
        handle
            .join()
            .map_err(|_| anyhow!("a thread panicked, see the log"))?
    })
}

fn with_threads(stage: &Stage, count: u64) -> Result<()> {
    let handles = start(count)?;
    stage.ready_and_wait()?;
    join(handles)
}

fn tree(stage: &Stage) -> Result<()> {
    let children = (0..4)
        .map(|_| stage.child(|s| with_threads(s, 5)))
        .collect::<Result<Vec<Child>>>()?;
    with_threads(stage, 5)?;
    children.into_iter().try_for_each(Child::finish)
}

fn churn(stage: &Stage) -> Result<()> {
    stage.ready()?;
    let mut sum = 0;
    let mut rounds = 0;
    while !stage.stopping() {
        let handles: Vec<_> = (0..3u64).map(|n| thread::spawn(move || n)).collect();
        for handle in handles {
            sum += handle.join().map_err(|_| anyhow!("a thread panicked"))?;
        }
        rounds += 1;
    }
    ensure!(sum == rounds * 3, "{rounds} rounds gave {sum}");
    Ok(())
}
