//! Dead children that nobody has waited for.

use anyhow::{Context, Result, ensure};

use crate::sys::{self, Exit};
use crate::{Stage, Workload};

pub static CODES: Workload = Workload::new("tree/zombie-codes", "zombies with exit codes", |s| {
    keep_zombies(s, &CODE_ENDS)
});
pub static SIGNALS: Workload =
    Workload::new("tree/zombie-signals", "zombies killed by signals", |s| {
        keep_zombies(s, &SIGNAL_ENDS)
    });
pub static LEADER: Workload = Workload::new(
    "tree/zombie-leader",
    "a zombie that leads a living group",
    leader,
);

pub static SESSION: Workload = Workload::new(
    "tree/zombie-session",
    "a zombie that leads a session, and a member of it that has come to its grandparent",
    session,
);

const CODE_ENDS: [Exit; 4] = [
    Exit::Code(0),
    Exit::Code(1),
    Exit::Code(42),
    Exit::Code(255),
];
const SIGNAL_ENDS: [Exit; 4] = [
    Exit::Signal(libc::SIGKILL),
    Exit::Signal(libc::SIGSEGV),
    Exit::Signal(libc::SIGUSR1),
    Exit::Signal(libc::SIGALRM),
];

fn zombie(end: Exit) -> Result<i32> {
    let pid = sys::fork()?;
    if pid == 0 {
        match end {
            Exit::Code(code) => sys::exit_now(code),
            Exit::Signal(signal) => {
                // The runtime has a handler of its own for SIGSEGV.
                let _ = sys::set_action(signal, libc::SIG_DFL, 0);
                let _ = sys::kill(sys::pid(), signal);
                sys::exit_now(99)
            }
        }
    }
    sys::wait_leaving_zombie(pid)?;
    Ok(pid)
}

fn keep_zombies(stage: &Stage, ends: &[Exit]) -> Result<()> {
    let zombies = ends
        .iter()
        .map(|&end| Ok((zombie(end)?, end)))
        .collect::<Result<Vec<(i32, Exit)>>>()?;
    stage.ready_and_wait()?;
    for (pid, wanted) in zombies {
        let found = sys::wait(pid).with_context(|| format!("waiting for zombie {pid}"))?;
        ensure!(found == wanted, "zombie {pid}: {found}, was {wanted}");
    }
    Ok(())
}

/// The dead leader's pid is still the group of a living child, and it is reaped only afterwards.
fn leader(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let leader = sys::fork()?;
    if leader == 0 {
        let _ = sys::setpgid(0, 0);
        drop(writer);
        let _ = sys::read(&reader, &mut [0]);
        sys::exit_now(3);
    }
    drop(reader);
    let member = stage.child(|stage| {
        // The leader makes its group itself; until then this fails.
        while sys::setpgid(0, leader).is_err() {
            sys::pause_for(1);
        }
        stage.ready_and_wait()?;
        let (group, _) = sys::group_and_session();
        ensure!(group == leader, "the group is {group}, was {leader}");
        Ok(())
    });
    drop(writer);
    let member = member?;
    sys::kill(leader, libc::SIGKILL).context("ending the leader")?;
    sys::wait_leaving_zombie(leader)?;
    stage.ready_and_wait()?;
    member.finish()?;
    sys::wait(leader).context("waiting for the dead leader")?;
    Ok(())
}

/// The session lives on in a child that its dead leader has left to the subreaper.
fn session(stage: &Stage) -> Result<()> {
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let leader = stage.child(|stage| {
        let session = sys::setsid()?;
        let member = stage.child(|stage| {
            sys::setpgid(0, 0)?;
            stage.ready_and_wait()?;
            let found = sys::group_and_session();
            let wanted = (sys::pid(), session);
            ensure!(
                found == wanted,
                "(group, session) were {wanted:?}, are {found:?}"
            );
            Ok(())
        })?;
        sys::write(&writer, &member.pid.to_le_bytes())?;
        stage.ready()
    })?;
    sys::wait_leaving_zombie(leader.pid)?;
    let bytes = sys::read_exact(&reader, 4)?;
    let member = stage.adopt(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    drop((reader, writer));
    stage.ready_and_wait()?;
    member.finish()?;
    leader.reap()?;
    // Nobody else must have become a child.
    let other = sys::wait(-1).map_err(|error| error.raw_os_error());
    ensure!(
        other
            .as_ref()
            .is_err_and(|errno| *errno == Some(libc::ECHILD)),
        "there was another child: {other:?}"
    );
    Ok(())
}
