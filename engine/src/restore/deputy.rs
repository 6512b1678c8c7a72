//! What becomes of a restore that is killed while it lets the tasks go.
//!
//! ```text
//! killed            the tasks                           the deputy
//! before            die with the restore                takes automounts away that were made
//! letting go        some would live without the rest    kills all of them, and does the same
//! all let go        live                                lifts the network lock, has what is queued sent, removes
//!                                                       names that the dump made
//! ```
//!
//! So the point of no return is the note that all have been let go, which nothing can cut in two. What a task may do
//! that is killed after it, in the moment until the deputy kills it, no peer hears: the lock is up.

use std::time::{Duration, Instant};

use firn_sys::deputy::Deputy;
use firn_sys::{Pid, task as sys_task};

use super::run::is_zombie;
use super::takeover::TakenOver;
use crate::files::FileStore;
use crate::task::status::Stat;

/// Noted before the first task is let go.
pub(super) const LETTING_GO: u8 = 1;
/// Noted when the last one has been.
pub(super) const ALL_LIVE: u8 = 2;

/// How long killed tasks may take to go.
const PATIENCE: Duration = Duration::from_secs(20);
const SIGKILL: i32 = 9;

/// Makes a deputy where a part of what is still to do would be missed.
pub(super) fn appoint(taken: &TakenOver<'_>, files: &mut FileStore) -> Option<Deputy> {
    if !files.leaves_work() && taken.nr_threads() < 2 {
        return None;
    }
    let _relieved = files.mounts_deputy();
    let appointed = Deputy::appoint(|note| match note {
        Some(ALL_LIVE) => {
            files.free_network();
            files.remove_link_remaps();
            tracing::warn!("the restore was killed when its tasks lived already; they go on");
        }
        note => {
            if note.is_some() {
                kill(taken);
            }
            files.unmake_mounts();
            tracing::error!(
                "the restore was killed before all of its tasks could live without it: none of them is left, and \
                 the images can be restored again"
            );
        }
    });
    let told = appointed.inspect_err(|errno| {
        tracing::info!("nobody would finish this restore if it were killed now: {errno}");
    });
    told.ok()
}

/// Kills all tasks and waits until they are gone. They were born before this process: who is younger has only one
/// of their pids.
fn kill(taken: &TakenOver<'_>) {
    let Ok(own) = Stat::read(Pid::this()) else {
        return;
    };
    let is_older =
        |pid: &Pid| Stat::read(*pid).is_ok_and(|stat| stat.start_ticks <= own.start_ticks);
    let tasks: Vec<Pid> = taken.living().map(|(_, task, _)| task.pid).collect();
    for pid in tasks.iter().filter(|pid| is_older(pid)) {
        let _ = sys_task::kill(*pid, SIGKILL);
    }
    let deadline = Instant::now() + PATIENCE;
    while tasks.iter().any(|pid| is_older(pid) && !is_zombie(*pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}
