//! Limits that a program has lowered below what it uses already.

use std::fs::File;
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Stage, Workload};

pub static BELOW_USE: Workload = Workload::new(
    "task/limits-below-use",
    "limits below the memory, descriptors, threads and queued signals that are there",
    below_use,
);

pub static NO_ROOM: Workload = Workload::new(
    "task/no-room",
    "a child that may map nothing more: its parent must not keep what a dump maps, either",
    no_room,
)
.refused(&["has no room", "prlimit"]);

const NR_SIGNALS: usize = 40;
const HIGH: i32 = 200;

/// Resources, each with a soft limit that is less than there is. The hard ones stay.
const LOWERED: [(u32, u64); 6] = [
    (libc::RLIMIT_DATA, 4096),
    (libc::RLIMIT_STACK, 4096),
    (libc::RLIMIT_NPROC, 1),
    (libc::RLIMIT_NOFILE, 20),
    (libc::RLIMIT_MEMLOCK, 4096),
    (libc::RLIMIT_SIGPENDING, 3),
];

fn below_use(stage: &Stage) -> Result<()> {
    let signal = libc::SIGRTMIN() + 2;
    sys::mask(libc::SIG_BLOCK, sys::bit(signal))?;
    for value in 0..NR_SIGNALS {
        sys::queue_to_process(sys::pid(), signal, value)?;
    }
    let locked = Region::anon(4 * PAGE)?;
    locked.fill(9);
    locked.lock(0)?;
    let null = File::open("/dev/null")?;
    let high = sys::dup_to(&null, HIGH, 0)?;
    let own = i64::from(sys::pid());
    let own = sys::descriptor_by(libc::SYS_pidfd_open, [own, 0, 0, 0])?;
    let watched = sys::dup_to(&own, HIGH + 1, 0)?;
    let (send, receive) = mpsc::channel();
    let waiter = thread::spawn(move || {
        let sent = send.send(());
        crate::stop::wait();
        sent
    });
    receive.recv()?;
    // Room on the heap for what this program still needs.
    drop(std::hint::black_box(vec![1u8; 100_000]));
    for (resource, soft) in LOWERED {
        let (_, hard) = sys::limit(resource)?;
        sys::set_limit(resource, soft, hard)?;
    }
    stage.ready_and_wait()?;
    for (resource, soft) in LOWERED {
        let (found, hard) = sys::limit(resource)?;
        ensure!(found == soft, "limit {resource} was {soft}, is {found}");
        sys::set_limit(resource, hard, hard)?;
    }
    locked.check(9)?;
    for value in 0..NR_SIGNALS {
        let (_, _, found) = sys::take_pending(sys::bit(signal))?;
        ensure!(
            found == u64::try_from(value)?,
            "signal {value} came as {found}"
        );
    }
    for file in [&high, &watched] {
        sys::fcntl(file, libc::F_GETFD, 0)?;
    }
    let sent = waiter.join().map_err(|_| anyhow!("the thread panicked"))?;
    Ok(sent?)
}

fn no_room(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        sys::set_limit(libc::RLIMIT_AS, 1 << 20, 1 << 20)?;
        stage.ready_and_wait()
    })?;
    stage.ready_and_wait()?;
    child.finish()
}
