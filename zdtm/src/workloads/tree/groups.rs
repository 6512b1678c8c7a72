//! Process groups and sessions.

use anyhow::{Result, ensure};

use crate::{Child, Stage, Workload, sys};

pub static GROUPS: Workload = Workload::new(
    "tree/groups",
    "process groups with a leader and members",
    groups,
);
pub static SESSIONS: Workload = Workload::new(
    "tree/sessions",
    "sessions inside a session, with members in their groups",
    sessions,
);
pub static ORPHAN_GROUP: Workload = Workload::new(
    "tree/orphan-group",
    "a process group whose leader is gone",
    orphan_group,
);
pub static ORPHAN_SESSION: Workload = Workload::new(
    "tree/orphan-session",
    "a session whose leader is gone",
    orphan_session,
);

/// Waits, and checks that group and session are what they were.
fn keep_ids(stage: &Stage) -> Result<()> {
    let ids = sys::group_and_session();
    stage.ready_and_wait()?;
    let now = sys::group_and_session();
    ensure!(ids == now, "(group, session) were {ids:?}, are {now:?}");
    Ok(())
}

/// Starts a child that does `before` and then keeps its ids.
fn member(stage: &Stage, before: impl Fn() -> Result<()>) -> Result<Child> {
    stage.child(|stage| {
        before()?;
        keep_ids(stage)
    })
}

fn groups(stage: &Stage) -> Result<()> {
    let leader = member(stage, || Ok(sys::setpgid(0, 0)?))?;
    let group = leader.pid;
    let first = member(stage, || Ok(sys::setpgid(0, group)?))?;
    let second = member(stage, || Ok(sys::setpgid(0, group)?))?;
    // A leader that is younger than the group's other member.
    let early = member(stage, || Ok(()))?;
    let late = member(stage, || Ok(sys::setpgid(0, 0)?))?;
    sys::setpgid(early.pid, late.pid)?;
    // The child compares with what it had when it became ready: tell it by asking from here.
    let wanted = (late.pid, sys::group_and_session().1);
    stage.ready_and_wait()?;
    let found = group_and_session_of(early.pid)?;
    ensure!(
        found == wanted,
        "early member: (group, session) were {wanted:?}, are {found:?}"
    );
    sys::kill(early.pid, libc::SIGKILL)?;
    sys::wait(early.pid)?;
    [first, second, late, leader]
        .into_iter()
        .try_for_each(Child::finish)
}

fn group_and_session_of(pid: i32) -> Result<(i32, i32)> {
    let stat = crate::proc::stat(pid)?;
    Ok((stat[5].parse()?, stat[6].parse()?))
}

fn sessions(stage: &Stage) -> Result<()> {
    let leader = stage.child(|stage| {
        sys::setsid()?;
        let member_here = member(stage, || Ok(()))?;
        let own_group = member(stage, || Ok(sys::setpgid(0, 0)?))?;
        let deeper = stage.child(|stage| {
            sys::setsid()?;
            let innermost = member(stage, || Ok(()))?;
            keep_ids(stage)?;
            innermost.finish()
        })?;
        keep_ids(stage)?;
        [member_here, own_group, deeper]
            .into_iter()
            .try_for_each(Child::finish)
    })?;
    let sibling = member(stage, || Ok(()))?;
    keep_ids(stage)?;
    [leader, sibling].into_iter().try_for_each(Child::finish)
}

fn orphan_group(stage: &Stage) -> Result<()> {
    let leader = stage.child(|stage| {
        sys::setpgid(0, 0)?;
        stage.ready_and_wait()
    })?;
    let group = leader.pid;
    let left = member(stage, || Ok(sys::setpgid(0, group)?))?;
    leader.finish()?;
    stage.ready_and_wait()?;
    left.finish()
}

fn orphan_session(stage: &Stage) -> Result<()> {
    // It has the memory of its parent, which is there before the two are made again.
    let sibling = member(stage, || Ok(()))?;
    let (session, left) = left_in_session(stage, |stage| member(stage, || Ok(())))?;
    stage.ready_and_wait()?;
    let found = group_and_session_of(left.pid)?;
    ensure!(
        found == (session, session),
        "(group, session) are {found:?}, were {session} both"
    );
    [left, sibling].into_iter().try_for_each(Child::finish)
}

/// The leader of a session starts a child and ends; the child stays in the session and comes to this process as
/// subreaper. Returns the session too.
pub fn left_in_session(
    stage: &Stage,
    start: impl FnOnce(&Stage) -> Result<Child>,
) -> Result<(i32, Child)> {
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let leader = stage.child(|stage| {
        sys::setsid()?;
        let left = start(stage)?;
        sys::write(&writer, &left.pid.to_le_bytes())?;
        stage.ready()
    })?;
    let session = leader.pid;
    leader.reap()?;
    let bytes = sys::read_exact(&reader, 4)?;
    let pid = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok((session, stage.adopt(pid)))
}
