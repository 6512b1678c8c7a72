//! Trees of processes: pids, parents, depth and fan-out.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{Child, Stage, Workload, sys};

pub static SINGLE: Workload = Workload::new("tree/single", "one process and its ids", single);
pub static CHAIN: Workload =
    Workload::new("tree/chain", "sixteen generations, one child each", chain);
pub static FAN_OUT: Workload = Workload::new("tree/fan-out", "fifty children of one", fan_out);
pub static BUSHY: Workload = Workload::new(
    "tree/bushy",
    "three generations of four children each",
    bushy,
);
pub static REPARENTED: Workload = Workload::new(
    "tree/reparented",
    "orphans handed to a subreaper, from another group and session",
    reparented,
);
pub static FORKING: Workload = Workload::new(
    "tree/forking",
    "children that come and go all the time, frozen at any moment",
    forking,
)
.moves(MOVES);

pub static VFORKING: Workload = Workload::new(
    "tree/vforking",
    "tasks that wait in vfork nearly all the time",
    vforking,
)
.moves(MOVES);

/// What shows of a tree in motion may be anything.
const MOVES: &[&str] = &[
    "tree", "ids", "state", "exit", "comm", "maps", "vmflags", "mm", "fd", "cwd", "root", "exe",
    "signals", "umask", "tracer", "syscall",
];

fn single(stage: &Stage) -> Result<()> {
    let ids = (sys::pid(), sys::tid(), sys::group_and_session());
    stage.ready_and_wait()?;
    let now = (sys::pid(), sys::tid(), sys::group_and_session());
    ensure!(
        ids == now,
        "pid, tid, (group, session) were {ids:?}, are {now:?}"
    );
    Ok(())
}

/// Checks a task that is not the root: pid and parent must both be what they were.
fn child_with_ids(stage: &Stage) -> Result<()> {
    let ids = (sys::pid(), sys::parent());
    stage.ready_and_wait()?;
    let now = (sys::pid(), sys::parent());
    ensure!(ids == now, "pid and parent were {ids:?}, are {now:?}");
    Ok(())
}

fn chain(stage: &Stage) -> Result<()> {
    link(stage, 15)
}

fn link(stage: &Stage, deeper: u32) -> Result<()> {
    if deeper == 0 {
        return child_with_ids(stage);
    }
    let child = stage.child(|stage| link(stage, deeper - 1))?;
    let pid = sys::pid();
    stage.ready_and_wait()?;
    ensure!(sys::pid() == pid, "pid was {pid}, is {}", sys::pid());
    child.finish()
}

fn fan_out(stage: &Stage) -> Result<()> {
    let children = (0..50)
        .map(|_| stage.child(child_with_ids))
        .collect::<Result<Vec<Child>>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)
}

fn bushy(stage: &Stage) -> Result<()> {
    branch(stage, 3)
}

fn branch(stage: &Stage, generations: u32) -> Result<()> {
    if generations == 0 {
        return child_with_ids(stage);
    }
    let children = (0..4)
        .map(|_| stage.child(|stage| branch(stage, generations - 1)))
        .collect::<Result<Vec<Child>>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)
}

/// Three grandchildren whose parents are gone: a plain one, one that leads a session, and one in
/// the session of its dead parent's living sibling.
fn reparented(stage: &Stage) -> Result<()> {
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    let plain = orphan(stage, || Ok(()))?;
    let leader = orphan(stage, || sys::setsid().map(drop).map_err(Into::into))?;
    let own_group = orphan(stage, || sys::setpgid(0, 0).map_err(Into::into))?;
    stage.ready()?;
    stage.wait();
    for orphan in [plain, leader, own_group] {
        orphan.finish()?;
    }
    Ok(())
}

/// Makes a grandchild whose parent ends, so that it becomes a child of this process.
fn orphan(stage: &Stage, before: impl Fn() -> Result<()>) -> Result<Child> {
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let subreaper = sys::pid();
    let middle = stage.child(|stage| {
        let grandchild = stage.child(|stage| {
            before()?;
            let ids = (sys::pid(), sys::group_and_session());
            stage.ready_and_wait()?;
            let now = (sys::pid(), sys::group_and_session());
            ensure!(
                ids == now,
                "pid and (group, session) were {ids:?}, are {now:?}"
            );
            ensure!(
                sys::parent() == subreaper,
                "parent is {}, not {subreaper}",
                sys::parent()
            );
            Ok(())
        })?;
        sys::write(&writer, &grandchild.pid.to_le_bytes())?;
        stage.ready()
    })?;
    middle.reap()?;
    let bytes = sys::read_exact(&reader, 4)?;
    let pid = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(stage.adopt(pid))
}

/// Forks and reaps without pause in four children, so that a freeze meets new and dying tasks.
fn forking(stage: &Stage) -> Result<()> {
    let children = (0..4)
        .map(|_| stage.child(fork_without_pause))
        .collect::<Result<Vec<Child>>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)
}

fn fork_without_pause(stage: &Stage) -> Result<()> {
    stage.ready()?;
    while !stage.stopping() {
        let pid = sys::fork()?;
        if pid == 0 {
            sys::pause_for(2);
            sys::exit_now(7);
        }
        let exit = sys::wait(pid)?;
        ensure!(
            exit == sys::Exit::Code(7),
            "child {pid}: {exit}, not exit code 7"
        );
    }
    Ok(())
}

/// A parent in vfork can't be stopped before its child has ended.
fn vforking(stage: &Stage) -> Result<()> {
    let children = (0..3)
        .map(|_| {
            stage.child(|stage| {
                stage.ready()?;
                while !stage.stopping() {
                    let (pid, time) = (sys::fork()?, Duration::from_millis(40));
                    if pid == 0 {
                        sys::exit_now(sys::vfork_sleeping(time));
                    }
                    let exit = sys::wait(pid)?;
                    ensure!(exit == sys::Exit::Code(0), "a task in vfork: {exit}");
                }
                Ok(())
            })
        })
        .collect::<Result<Vec<Child>>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)
}
