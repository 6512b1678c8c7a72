//! State that is not supported yet: a dump must refuse it clearly and leave the tree untouched.
//!
//! Each line is a kind of state and the words that the refusal must have in it. A kind that becomes
//! supported moves from this table to an area of its own.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

static USERFAULTFD: Workload = Workload::new("refusals/userfaultfd", "a userfaultfd", |stage| {
    hold_call(stage, libc::SYS_userfaultfd, [0; 4])
})
.needs(&[Need::Root])
.refused(&["userfaultfd"]);
static PERF_EVENT: Workload =
    Workload::new("refusals/perf-event", "a performance counter", |stage| {
        hold(stage, sys::perf_event)
    })
    .refused(&["performance counter"]);
static SECRET: Workload = Workload::new(
    "refusals/memfd-secret",
    "memory that not even root may read",
    |stage| hold(stage, || sys::secret_memory(sys::PAGE)),
)
.refused(&["secret"]);
static MESSAGE_QUEUE: Workload = Workload::new(
    "refusals/message-queue",
    "a POSIX message queue without a name",
    |stage| hold(stage, sys::nameless_queue),
)
.refused(&["POSIX message queue"]);
static TRACED_FROM_OUTSIDE: Workload = Workload::new(
    "refusals/traced-from-outside",
    "a task that a debugger outside of its tree traces",
    traced_from_outside,
)
.refused(&["is traced by process"]);
static UTS_NAMESPACE: Workload = Workload::new(
    "refusals/uts-namespace",
    "a child in a UTS namespace of its own",
    |stage| in_child(stage, || Ok(sys::unshare(libc::CLONE_NEWUTS)?)),
)
.needs(&[Need::Root])
.refused(&["namespace"]);
static MOUNT_NAMESPACE: Workload = Workload::new(
    "refusals/mount-namespace",
    "a child in a mount namespace of its own",
    |stage| in_child(stage, || Ok(sys::unshare(libc::CLONE_NEWNS)?)),
)
.needs(&[Need::Root])
.refused(&["namespace"]);
static NET_NAMESPACE: Workload = Workload::new(
    "refusals/net-namespace",
    "a child in a network namespace of its own",
    |stage| in_child(stage, || Ok(sys::unshare(libc::CLONE_NEWNET)?)),
)
.needs(&[Need::Root])
.refused(&["namespace"]);
static IPC_NAMESPACE: Workload = Workload::new(
    "refusals/ipc-namespace",
    "a child in an IPC namespace of its own",
    |stage| in_child(stage, || Ok(sys::unshare(libc::CLONE_NEWIPC)?)),
)
.needs(&[Need::Root])
.refused(&["namespace"]);
static CGROUP_NAMESPACE: Workload = Workload::new(
    "refusals/cgroup-namespace",
    "a child in a cgroup namespace of its own",
    |stage| in_child(stage, || Ok(sys::unshare(libc::CLONE_NEWCGROUP)?)),
)
.needs(&[Need::Root])
.refused(&["namespace"]);
static SEVERAL: Workload = Workload::new(
    "refusals/several",
    "three tasks with different things: the refusal must list them all",
    several,
)
.refused(&["kmsg", "loop-control", "userfaultfd"])
.needs(&[Need::Root]);
static VFORK: Workload = Workload::new(
    "refusals/vfork",
    "a parent that waits in vfork for its child",
    vfork,
)
.dump_options(&["--timeout", "1"])
.refused(&["waits in vfork"]);
static TRACED: Workload =
    Workload::new("refusals/traced", "a task that another task traces", traced).refused(&["trac"]);

pub static ALL: &[&Workload] = &[
    &USERFAULTFD,
    &PERF_EVENT,
    &SECRET,
    &MESSAGE_QUEUE,
    &TRACED_FROM_OUTSIDE,
    &UTS_NAMESPACE,
    &MOUNT_NAMESPACE,
    &NET_NAMESPACE,
    &IPC_NAMESPACE,
    &CGROUP_NAMESPACE,
    &SEVERAL,
    &VFORK,
    &TRACED,
];

/// Holds a descriptor that a call with plain numbers makes.
fn hold_call(stage: &Stage, nr: i64, arguments: [i64; 4]) -> Result<()> {
    hold(stage, || sys::descriptor_by(nr, arguments))
}

/// Holds something open over the attempts.
fn hold<T>(stage: &Stage, open: impl FnOnce() -> std::io::Result<T>) -> Result<()> {
    let held = open().context("making it")?;
    stage.ready_and_wait()?;
    drop(held);
    Ok(())
}

fn in_child(stage: &Stage, change: impl Fn() -> Result<()>) -> Result<()> {
    let child = stage.child(|stage| {
        change()?;
        stage.ready_and_wait()
    })?;
    stage.ready_and_wait()?;
    child.finish()
}

fn several(stage: &Stage) -> Result<()> {
    let open: [fn() -> std::io::Result<OwnedFd>; 2] = [
        || sys::open("/dev/kmsg", libc::O_RDONLY),
        || sys::open("/dev/loop-control", libc::O_RDONLY),
    ];
    let children = open
        .into_iter()
        .map(|open| stage.child(|stage| hold(stage, open)))
        .collect::<Result<Vec<_>>>()?;
    hold(stage, || sys::descriptor_by(libc::SYS_userfaultfd, [0; 4]))?;
    children.into_iter().try_for_each(|child| child.finish())
}

/// The middle task sleeps uninterruptibly until its child lets it go.
fn vfork(stage: &Stage) -> Result<()> {
    let gate: PathBuf = stage.path("gate");
    sys::mkfifo(&gate)?;
    let path = sys::c_path(&gate)?;
    let middle = sys::fork()?;
    if middle == 0 {
        sys::exit_now(sys::vfork_reading(&path));
    }
    while !sys::is_in_vfork(middle)? {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    // That somebody opens the other end is all the child waits for.
    drop(sys::open(&gate, libc::O_WRONLY)?);
    let exit = sys::wait(middle)?;
    ensure!(exit == sys::Exit::Code(0), "the task in vfork: {exit}");
    Ok(())
}

/// The debugger's parent is gone, so it belongs to the runner, and ends with the task.
fn traced_from_outside(stage: &Stage) -> Result<()> {
    let task = sys::pid();
    let (reader, writer) = sys::pipe(0)?;
    let middle = sys::fork()?;
    if middle == 0 {
        if sys::fork()? == 0 {
            let said = sys::setsid()
                .and_then(|_| sys::seize(task))
                .and_then(|()| sys::write(&writer, b"s"));
            drop((reader, writer));
            if said.is_ok() {
                let _ = sys::let_signals_through(task);
            }
        }
        sys::exit_now(0);
    }
    drop(writer);
    sys::wait(middle)?;
    sys::read_exact(&reader, 1).context("waiting for the debugger")?;
    drop(reader);
    stage.ready_and_wait()
}

fn traced(stage: &Stage) -> Result<()> {
    let tracee = stage.child(|stage| stage.ready_and_wait())?;
    let target = tracee.pid;
    let tracer = stage.child(move |stage| {
        sys::seize(target)?;
        stage.ready_and_wait()
    })?;
    stage.ready_and_wait()?;
    tracer.finish()?;
    tracee.finish()
}
