//! Signals that have been sent and are blocked.

use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::sys::{self, Exit};
use crate::{Stage, Workload, proc};

pub static PRIVATE: Workload = Workload::new(
    "signals/pending-private",
    "signals queued for one thread, with values",
    private,
);
pub static SHARED: Workload = Workload::new(
    "signals/pending-shared",
    "signals queued for a process, with values",
    shared,
);
pub static THREADS: Workload = Workload::new(
    "signals/pending-threads",
    "both kinds in every thread of four",
    threads,
);
pub static SENDERS: Workload = Workload::new(
    "signals/pending-senders",
    "signals by kill and tgkill, to a process and to its second thread",
    senders,
);
pub static CHILD: Workload = Workload::new(
    "signals/pending-sigchld",
    "SIGCHLD of a child that ended",
    child,
);
pub static KILLED: Workload = Workload::new(
    "signals/pending-fatal",
    "a blocked signal that ends the task once it is let through",
    fatal,
);

/// What is sent, in this order; standard signals come once, real-time ones all and lowest first.
const SENT: [(i32, usize); 8] = [
    (40, 4),
    (36, 1),
    (libc::SIGUSR1, 7),
    (36, 2),
    (36, 3),
    (libc::SIGUSR2, 0),
    (64, 5),
    (34, 9),
];

/// What must come out, in this order.
const TAKEN: [(i32, u64); 8] = [
    (libc::SIGUSR1, 7),
    (libc::SIGUSR2, 0),
    (34, 9),
    (36, 1),
    (36, 2),
    (36, 3),
    (40, 4),
    (64, 5),
];

fn sent_set() -> u64 {
    SENT.iter()
        .fold(0, |set, (signal, _)| set | sys::bit(*signal))
}

fn check_taken(wanted: &[(i32, u64)]) -> Result<()> {
    let set = sent_set();
    for (index, wanted) in wanted.iter().enumerate() {
        let taken = sys::take_pending(set).with_context(|| format!("pending signal {index}"))?;
        let (signal, code, value) = taken;
        ensure!(
            code == libc::SI_QUEUE,
            "signal {signal} has code {code}, had {}",
            libc::SI_QUEUE
        );
        ensure!(
            (signal, value) == *wanted,
            "pending {index} was {wanted:?}, is {signal}, {value}"
        );
    }
    match sys::take_pending(set) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
        Err(error) => Err(error).context("looking for more"),
        Ok(more) => bail!("there is one more pending signal: {more:?}"),
    }
}

fn private(stage: &Stage) -> Result<()> {
    sys::mask(libc::SIG_BLOCK, sent_set())?;
    let (pid, tid) = (sys::pid(), sys::tid());
    for (signal, value) in SENT {
        sys::queue_to_thread(pid, tid, signal, value)?;
    }
    stage.ready_and_wait()?;
    check_taken(&TAKEN)
}

fn shared(stage: &Stage) -> Result<()> {
    sys::mask(libc::SIG_BLOCK, sent_set())?;
    for (signal, value) in SENT {
        sys::queue_to_process(sys::pid(), signal, value)?;
    }
    stage.ready_and_wait()?;
    check_taken(&TAKEN)
}

/// Every thread has its own queue, and sees the one of the process too.
fn threads(stage: &Stage) -> Result<()> {
    sys::mask(libc::SIG_BLOCK, sent_set())?;
    let (send, receive) = mpsc::channel();
    let handles: Vec<_> = (0..4usize)
        .map(|index| {
            let send = send.clone();
            thread::spawn(move || -> Result<()> {
                let (pid, tid) = (sys::pid(), sys::tid());
                for (signal, value) in SENT {
                    sys::queue_to_thread(pid, tid, signal, value + 1000 * index)?;
                }
                send.send(())?;
                crate::stop::wait();
                // Private ones come first, so that the shared ones below stay for the main thread.
                let offset = 1000 * index as u64;
                for (signal, value) in TAKEN {
                    let taken = sys::take_pending(sys::bit(signal))?;
                    let wanted = (signal, libc::SI_QUEUE, value + offset);
                    ensure!(
                        taken == wanted,
                        "thread {tid}: pending {wanted:?} is {taken:?}"
                    );
                }
                Ok(())
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    for (signal, value) in SENT {
        sys::queue_to_process(sys::pid(), signal, value)?;
    }
    stage.ready_and_wait()?;
    for handle in handles {
        handle.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    check_taken(&TAKEN)
}

/// Who sent it stands in the code: only the kernel may say that it was kill, or tgkill.
fn senders(stage: &Stage) -> Result<()> {
    const SI_TKILL: i32 = -6;
    sys::mask(libc::SIG_BLOCK, sent_set())?;
    let (send, receive) = mpsc::channel();
    let thread = thread::spawn(move || -> Result<()> {
        sys::kill_thread(sys::pid(), sys::tid(), 40)?;
        send.send(())?;
        crate::stop::wait();
        let (signal, code, _) = sys::take_pending(sys::bit(40)).context("taking tgkill's")?;
        ensure!(
            (signal, code) == (40, SI_TKILL),
            "took {signal} with code {code}"
        );
        Ok(())
    });
    receive.recv()?;
    sys::kill(sys::pid(), 36)?;
    sys::kill_thread(sys::pid(), sys::tid(), 64)?;
    stage.ready_and_wait()?;
    for (signal, code) in [(36, libc::SI_USER), (64, SI_TKILL)] {
        let taken = sys::take_pending(sys::bit(signal)).context("taking kill's")?;
        ensure!(
            (taken.0, taken.1) == (signal, code),
            "{signal} is {taken:?}, had code {code}"
        );
    }
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

fn child(stage: &Stage) -> Result<()> {
    sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGCHLD))?;
    let pid = sys::fork()?;
    if pid == 0 {
        sys::exit_now(21);
    }
    sys::wait_leaving_zombie(pid)?;
    stage.ready_and_wait()?;
    let (signal, code, _) = sys::take_pending(sys::bit(libc::SIGCHLD)).context("taking SIGCHLD")?;
    ensure!(
        signal == libc::SIGCHLD && code == libc::CLD_EXITED,
        "took {signal} with code {code}"
    );
    let exit = sys::wait(pid)?;
    ensure!(exit == Exit::Code(21), "the child: {exit}");
    Ok(())
}

fn fatal(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::mask(libc::SIG_BLOCK, sys::bit(libc::SIGHUP))?;
        sys::kill(sys::pid(), libc::SIGHUP)?;
        stage.ready_and_wait()?;
        sys::mask(libc::SIG_UNBLOCK, sys::bit(libc::SIGHUP))?;
        Ok(())
    })?;
    stage.ready_and_wait()?;
    let state = proc::stat(child.pid)?[3].clone();
    ensure!(state != "Z", "the child has died of a blocked signal");
    sys::kill(child.pid, libc::SIGTERM)?;
    let exit = sys::wait(child.pid)?;
    ensure!(
        exit == Exit::Signal(libc::SIGHUP),
        "the child: {exit}, not its pending SIGHUP"
    );
    Ok(())
}
