//! Seccomp: strict mode, filters and their order, shared by threads or not.

use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, Exit, fail_with, filter, install_filter};
use crate::{Stage, Workload};

static FILTER: Workload = Workload::new(
    "seccomp/order",
    "filters of which the newest decides, in child and grandchild",
    order,
);
static THREADS: Workload = Workload::new(
    "seccomp/threads",
    "a filter for all, another one for each of three threads",
    threads,
);
static SHARED: Workload = Workload::new(
    "seccomp/shared",
    "filters that threads share, so that one more can be given to all",
    shared,
);
static DEADLY: Workload = Workload::new(
    "seccomp/deadly",
    "a filter that kills for every call that dump and restore make",
    deadly,
);
static STRICT: Workload = Workload::new("seccomp/strict", "a child in strict mode", strict);
static NOTIFY: Workload = Workload::new(
    "refusals/seccomp-notify",
    "a filter that asks a supervisor outside",
    |stage| {
        let child = stage.child(|stage| {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
            install_filter(filter(&[HARMLESS], sys::NOTIFY), 0)?;
            stage.ready_and_wait()
        })?;
        stage.ready_and_wait()?;
        child.finish()
    },
)
.refused(&["seccomp", "supervisor"]);

pub static ALL: &[&Workload] = &[&FILTER, &THREADS, &SHARED, &DEADLY, &STRICT, &NOTIFY];

/// Calls that nothing here makes otherwise.
const HARMLESS: i64 = libc::SYS_getpgrp;
const OTHER: i64 = libc::SYS_sched_yield;

fn deny(call: i64, errno: u16) -> Result<()> {
    let left_out = install_filter(filter(&[call], fail_with(errno)), 0)?;
    ensure!(left_out == 0, "installing a filter came to {left_out}");
    Ok(())
}

fn expect(call: i64, errno: i32) -> Result<()> {
    let found = sys::errno_of(call);
    ensure!(
        found == errno,
        "thread {}: call {call} gives errno {found}, was {errno}",
        sys::tid()
    );
    Ok(())
}

fn order(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
        deny(HARMLESS, 71)?;
        deny(HARMLESS, 72)?;
        let grandchild = stage.child(|stage| {
            deny(HARMLESS, 73)?;
            deny(OTHER, 74)?;
            stage.ready_and_wait()?;
            expect(HARMLESS, 73)?;
            expect(OTHER, 74)
        })?;
        stage.ready_and_wait()?;
        expect(HARMLESS, 72)?;
        expect(OTHER, 0)?;
        grandchild.finish()
    })?;
    stage.ready_and_wait()?;
    expect(HARMLESS, 0)?;
    child.finish()
}

/// Starts threads that run `set_up`, wait, and run `check`.
fn start_threads(
    count: u16,
    set_up: fn(u16) -> Result<()>,
    check: fn(u16) -> Result<()>,
) -> Result<Vec<thread::JoinHandle<Result<()>>>> {
    let (send, receive) = mpsc::channel();
    let threads: Vec<_> = (1..=count)
        .map(|nth| {
            let send = send.clone();
            thread::spawn(move || {
                set_up(nth)?;
                send.send(())?;
                crate::stop::wait();
                check(nth)
            })
        })
        .collect();
    drop(send);
    threads.iter().try_for_each(|_| receive.recv())?;
    Ok(threads)
}

fn join(threads: Vec<thread::JoinHandle<Result<()>>>) -> Result<()> {
    let mut all = threads.into_iter();
    all.try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
}

fn threads(stage: &Stage) -> Result<()> {
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    deny(OTHER, 80)?;
    let threads = start_threads(
        3,
        |nth| deny(HARMLESS, 90 + nth),
        |nth| {
            expect(OTHER, 80)?;
            expect(HARMLESS, 90 + i32::from(nth))
        },
    )?;
    stage.ready_and_wait()?;
    expect(OTHER, 80)?;
    expect(HARMLESS, 0)?;
    join(threads)
}

fn shared(stage: &Stage) -> Result<()> {
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    deny(OTHER, 80)?;
    deny(OTHER, 81)?;
    let threads = start_threads(3, |_| expect(OTHER, 81), |_| expect(OTHER, 81))?;
    stage.ready_and_wait()?;
    expect(OTHER, 81)?;
    let late = install_filter(filter(&[HARMLESS], fail_with(85)), sys::TSYNC)?;
    ensure!(
        late == 0,
        "thread {late} does not share the filters any more"
    );
    join(threads)
}

const FORBIDDEN: [i64; 24] = [
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_prctl,
    libc::SYS_arch_prctl,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_rseq,
    libc::SYS_getitimer,
    libc::SYS_setitimer,
    libc::SYS_membarrier,
    libc::SYS_dup3,
    libc::SYS_close_range,
    libc::SYS_fchdir,
    libc::SYS_umask,
    libc::SYS_prlimit64,
    libc::SYS_pause,
];

/// That the filter is there is seen by what it does to the child in the end.
fn deadly(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
        install_filter(filter(&FORBIDDEN, sys::KILL), 0)?;
        stage.ready_and_wait()?;
        sys::errno_of(libc::SYS_umask);
        Ok(())
    })?;
    stage.ready_and_wait()?;
    sys::kill(child.pid, libc::SIGTERM)?;
    let exit = sys::wait(child.pid)?;
    ensure!(
        exit == Exit::Signal(libc::SIGSYS),
        "the child: {exit}, not killed by its filter"
    );
    Ok(())
}

fn strict(stage: &Stage) -> Result<()> {
    let (input, to_child) = sys::pipe(0)?;
    let (from_child, output) = sys::pipe(0)?;
    let pid = sys::fork()?;
    if pid == 0 {
        use std::os::fd::AsRawFd;
        drop((to_child, from_child));
        let lived = sys::live_strictly(input.as_raw_fd(), output.as_raw_fd());
        sys::exit_now(i32::from(lived.is_err()));
    }
    drop((input, output));
    let ask = |call: u8| -> Result<Vec<u8>> {
        sys::write(&to_child, &[call])?;
        Ok(sys::read_exact(&from_child, 1)?)
    };
    ensure!(ask(0)? == [0], "the child does not answer");
    stage.ready_and_wait()?;
    ensure!(ask(0)? == [0], "the child does not answer any more");
    // getpid is a call too many.
    let getpid = u8::try_from(libc::SYS_getpid)?;
    ensure!(
        ask(getpid).is_err(),
        "the child is not in strict mode any more"
    );
    let exit = sys::wait(pid)?;
    ensure!(exit == Exit::Signal(libc::SIGKILL), "the child: {exit}");
    Ok(())
}
