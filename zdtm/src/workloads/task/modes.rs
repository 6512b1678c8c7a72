//! Modes that prctl keeps for a thread, a process or an address space.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys::{self, Exit, PAGE, Region};
use crate::{Need, Stage, Workload};

pub static SWITCHES: Workload = Workload::new(
    "task/prctl",
    "subreaper, death signal, huge pages off, memory errors, speculation, membarrier",
    switches,
);
pub static NO_WRITE_EXEC: Workload = Workload::new(
    "task/no-write-exec",
    "a child whose memory is never writable and executable",
    no_write_exec,
);
pub static NO_TSC: Workload = Workload::new(
    "task/no-tsc",
    "a child that may not read the time stamp counter",
    no_tsc,
);
pub static NO_CPUID: Workload = Workload::new(
    "task/no-cpuid",
    "a child that may not ask the CPU what it is",
    no_cpuid,
)
.needs(&[Need::CpuidFaulting]);
pub static DISPATCH_RANGE: Workload = Workload::new(
    "task/syscall-dispatch-range",
    "a thread with dispatched system calls, all of whose code may make them",
    dispatch_range,
);
pub static DISPATCH: Workload = Workload::new(
    "task/syscall-dispatch",
    "a thread whose system calls go to its own handler",
    dispatch,
);

/// MEMBARRIER_CMD_REGISTER_*: global, private, of cores, of restartable sequences.
const REGISTRATIONS: [i64; 4] = [1 << 2, 1 << 4, 1 << 6, 1 << 8];
const STORE_BYPASS: i64 = 0;
const INDIRECT_BRANCH: i64 = 1;
const PR_GET_SPECULATION: i64 = 52;
const PR_SET_SPECULATION: i64 = 53;
const PR_SET_MDWE: i64 = 65;
const PR_GET_MDWE: i64 = 66;

fn get(option: i64, which: i64) -> Option<u64> {
    sys::prctl_with(option, [which, 0, 0]).ok()
}

/// What prctl and membarrier tell; None where this machine has no such thing.
fn told() -> Vec<(&'static str, Option<u64>)> {
    let pointed_to = |option: i32| {
        let word = Region::anon(PAGE).ok()?;
        let at = i64::try_from(word.addr).ok()?;
        sys::prctl_with(i64::from(option), [at, 0, 0]).ok()?;
        let value = word.word(0).load(Ordering::SeqCst);
        word.unmap().ok()?;
        Some(u64::from(value))
    };
    let registered = sys::call_plain(libc::SYS_membarrier, [1 << 9, 0, 0, 0, 0, 0]);
    vec![
        ("subreaper", pointed_to(libc::PR_GET_CHILD_SUBREAPER)),
        ("death signal", pointed_to(libc::PR_GET_PDEATHSIG)),
        (
            "huge pages off",
            get(i64::from(libc::PR_GET_THP_DISABLE), 0),
        ),
        (
            "memory error policy",
            get(i64::from(libc::PR_MCE_KILL_GET), 0),
        ),
        ("store bypass", get(PR_GET_SPECULATION, STORE_BYPASS)),
        (
            "indirect branches",
            get(PR_GET_SPECULATION, INDIRECT_BRANCH),
        ),
        ("membarrier", registered.ok()),
    ]
}

/// Disables speculation of a kind where the thread decides about it.
fn no_speculation(kind: i64) -> Result<()> {
    const DECIDES: u64 = 1;
    const DISABLE: i64 = 4;
    if get(PR_GET_SPECULATION, kind).is_some_and(|state| state & DECIDES != 0) {
        sys::prctl_with(PR_SET_SPECULATION, [kind, DISABLE, 0])?;
    }
    Ok(())
}

fn switches(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
        sys::prctl(libc::PR_SET_PDEATHSIG, 34)?;
        sys::prctl(libc::PR_SET_THP_DISABLE, 1)?;
        sys::prctl_with(33, [1, 1, 0]).context("PR_MCE_KILL")?;
        no_speculation(STORE_BYPASS)?;
        no_speculation(INDIRECT_BRANCH)?;
        for command in REGISTRATIONS {
            sys::call_plain(libc::SYS_membarrier, [command, 0, 0, 0, 0, 0])?;
        }
        let before = told();
        stage.ready_and_wait()?;
        for (before, after) in before.iter().zip(told()) {
            ensure!(*before == after, "was {before:?}, is {after:?}");
        }
        // Expedited barriers of each kind, which nobody may ask for who has not registered.
        for command in [1 << 3, 1 << 5, 1 << 7] {
            sys::call_plain(libc::SYS_membarrier, [command, 0, 0, 0, 0, 0])
                .with_context(|| format!("the expedited barrier {command:#x}"))?;
        }
        Ok(())
    })?;
    let own = told();
    stage.ready_and_wait()?;
    ensure!(own == told(), "was {own:?}, is {:?}", told());
    child.finish()
}

fn no_write_exec(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::prctl_with(PR_SET_MDWE, [1, 0, 0])?;
        stage.ready_and_wait()?;
        ensure!(
            get(PR_GET_MDWE, 0) == Some(1),
            "the mode is {:?}",
            get(PR_GET_MDWE, 0)
        );
        let page = Region::anon(PAGE)?;
        ensure!(
            page.protect(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
                .is_err(),
            "memory may be writable and executable again"
        );
        Ok(page.unmap()?)
    })?;
    stage.ready_and_wait()?;
    ensure!(
        get(PR_GET_MDWE, 0) == Some(0),
        "the parent has the mode, too"
    );
    child.finish()
}

fn no_tsc(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::prctl(libc::PR_SET_TSC, 2)?;
        stage.ready_and_wait()?;
        if sys::tsc_mode()? == 2 {
            std::hint::black_box(sys::read_tsc());
        }
        Ok(())
    })?;
    stage.ready_and_wait()?;
    ensure!(sys::tsc_mode()? == 1, "the parent may not read the counter");
    sys::kill(child.pid, libc::SIGTERM)?;
    let exit = sys::wait(child.pid)?;
    ensure!(
        exit == Exit::Signal(libc::SIGSEGV),
        "the child: {exit}, it may read the counter"
    );
    Ok(())
}

const ARCH_GET_CPUID: i64 = 0x1011;
const ARCH_SET_CPUID: i64 = 0x1012;

fn may_ask_cpu() -> Result<bool> {
    Ok(sys::call_plain(libc::SYS_arch_prctl, [ARCH_GET_CPUID, 0, 0, 0, 0, 0])? == 1)
}

fn no_cpuid(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::call_plain(libc::SYS_arch_prctl, [ARCH_SET_CPUID, 0, 0, 0, 0, 0])?;
        stage.ready_and_wait()?;
        if !may_ask_cpu()? {
            std::hint::black_box(std::arch::x86_64::__cpuid(0));
        }
        Ok(())
    })?;
    stage.ready_and_wait()?;
    ensure!(may_ask_cpu()?, "the parent may not ask, either");
    sys::kill(child.pid, libc::SIGTERM)?;
    let exit = sys::wait(child.pid)?;
    ensure!(
        exit == Exit::Signal(libc::SIGSEGV),
        "the child: {exit}, it may ask"
    );
    Ok(())
}

static BLOCKING: AtomicU32 = AtomicU32::new(0);
static STRAYED: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_stray_call(_signal: i32) {
    BLOCKING.store(0, Ordering::SeqCst);
    STRAYED.fetch_add(1, Ordering::SeqCst);
}

/// With all of user space let through, the selector blocks nothing; without the range it would everything.
fn dispatch_range(stage: &Stage) -> Result<()> {
    const USER_SPACE: i64 = (1 << 47) - (1 << 16);
    sys::handle(libc::SIGSYS, on_stray_call, 0)?;
    let (send, receive) = mpsc::channel();
    let thread = thread::spawn(move || -> Result<()> {
        sys::dispatch_calls_outside(1 << 16, USER_SPACE - (1 << 16), BLOCKING.as_ptr().addr())?;
        BLOCKING.store(1, Ordering::SeqCst);
        send.send(())?;
        crate::stop::wait();
        let _ = sys::call_plain(libc::SYS_getppid, [0; 6]);
        let still = BLOCKING.swap(0, Ordering::SeqCst);
        let strayed = STRAYED.load(Ordering::SeqCst);
        ensure!(
            still == 1 && strayed == 0,
            "{strayed} calls were dispatched that the range lets through"
        );
        Ok(())
    });
    receive.recv()?;
    stage.ready_and_wait()?;
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

static DISPATCHED: AtomicU32 = AtomicU32::new(0);
/// Its first byte is the selector; not a stack's or heap's, so that the handler finds it.
static SELECTOR: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_call(_signal: i32) {
    SELECTOR.store(0, Ordering::SeqCst);
    DISPATCHED.fetch_add(1, Ordering::SeqCst);
}

fn dispatch(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGSYS, on_call, 0)?;
    let (send, receive) = mpsc::channel();
    let thread = thread::spawn(move || -> Result<()> {
        // No other signal's handler may run here, since it would make calls.
        sys::mask(libc::SIG_BLOCK, !sys::bit(libc::SIGSYS))?;
        sys::dispatch_calls(SELECTOR.as_ptr().addr())?;
        send.send(())?;
        SELECTOR.store(1, Ordering::SeqCst);
        while !crate::stop::requested() {
            std::hint::spin_loop();
        }
        let early = DISPATCHED.load(Ordering::SeqCst);
        let _ = sys::call_plain(libc::SYS_getppid, [0; 6]);
        let count = DISPATCHED.load(Ordering::SeqCst);
        SELECTOR.store(0, Ordering::SeqCst);
        ensure!(
            early == 0,
            "{early} calls of dump and restore came to the handler"
        );
        ensure!(
            count == 1,
            "the thread's own call came to the handler {count} times"
        );
        Ok(())
    });
    receive.recv()?;
    while SELECTOR.load(Ordering::SeqCst) == 0 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}
