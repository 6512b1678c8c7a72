//! Who a thread is and what it may do.

use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys;
use crate::{Need, Stage, Workload, proc};

pub static IDS: Workload = Workload::new(
    "task/ids",
    "a child with other ids of all four kinds, and groups",
    |s| in_child(s, ids),
)
.needs(&[Need::Root]);
pub static CAPABILITIES: Workload = Workload::new(
    "task/capabilities",
    "all five capability sets and locked secure bits",
    |s| in_child(s, capabilities),
)
.needs(&[Need::Root]);
pub static THREADS: Workload = Workload::new(
    "task/creds-of-threads",
    "threads with ids, capabilities and no_new_privs of their own",
    threads,
)
.needs(&[Need::Root]);
pub static DUMPABLE: Workload = Workload::new(
    "task/not-dumpable",
    "a child that nobody but root may look at",
    |s| in_child(s, || Ok(sys::prctl(libc::PR_SET_DUMPABLE, 0).map(drop)?)),
);
pub static KEYS: Workload = Workload::new(
    "task/keep-caps",
    "an ordinary user who has kept a capability",
    |s| in_child(s, keep_one),
)
.needs(&[Need::Root]);

const SETPCAP: u64 = 1 << 8;
const NET_BIND: u64 = 1 << 10;
const NET_RAW: u64 = 1 << 13;
const CHOWN: u64 = 1;
const KILL: u64 = 1 << 5;

/// Everything that is told about a thread's credentials.
fn told() -> Result<Vec<(String, String)>> {
    let status = proc::lines(format!("{}/task/{}", sys::pid(), sys::tid()), "status")?;
    let names = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
    ];
    let mut told: Vec<(String, String)> = names
        .iter()
        .map(|name| {
            (
                (*name).to_owned(),
                status.get(*name).cloned().unwrap_or_default(),
            )
        })
        .collect();
    for (name, option) in [
        ("securebits", libc::PR_GET_SECUREBITS),
        ("dumpable", libc::PR_GET_DUMPABLE),
    ] {
        told.push((name.to_owned(), sys::prctl(option, 0)?.to_string()));
    }
    Ok(told)
}

fn check(before: &[(String, String)]) -> Result<()> {
    for ((name, before), (_, after)) in before.iter().zip(told()?) {
        ensure!(*before == after, "{name} was `{before}`, is `{after}`");
    }
    Ok(())
}

fn in_child(stage: &Stage, change: fn() -> Result<()>) -> Result<()> {
    let child = stage.child(|stage| {
        let own = told()?;
        change()?;
        let before = told()?;
        ensure!(own != before, "nothing has changed");
        stage.ready_and_wait()?;
        check(&before)
    })?;
    let own = told()?;
    stage.ready_and_wait()?;
    check(&own)?;
    child.finish()
}

fn ids() -> Result<()> {
    sys::set_groups(&[7, 42, 31_337])?;
    sys::set_ids(libc::SYS_setresgid, [2000, 2001, 2002])?;
    sys::call_plain(libc::SYS_setfsgid, [2000, 0, 0, 0, 0, 0])?;
    sys::set_ids(libc::SYS_setresuid, [1000, 1001, 1002])?;
    sys::call_plain(libc::SYS_setfsuid, [1002, 0, 0, 0, 0, 0])?;
    // The change of ids has made it undumpable.
    Ok(sys::prctl(libc::PR_SET_DUMPABLE, 1).map(drop)?)
}

fn capabilities() -> Result<()> {
    let all = SETPCAP | NET_BIND | NET_RAW | CHOWN | KILL;
    // An inheritable one that the bounding set does not have any more.
    sys::set_capabilities(all, all, NET_RAW | NET_BIND).context("limiting the sets")?;
    sys::prctl_with(47, [2, 10, 0]).context("raising an ambient capability")?;
    for cap in [13, 5] {
        sys::prctl_with(24, [cap, 0, 0]).context("dropping from the bounding set")?;
    }
    // No-root, no setuid fix-up, no raising of ambient capabilities; all locked.
    sys::prctl(libc::PR_SET_SECUREBITS, 0xcf).context("setting secure bits")?;
    sys::set_capabilities(CHOWN, NET_BIND | CHOWN, NET_RAW | NET_BIND).context("giving up rights")
}

fn keep_one() -> Result<()> {
    sys::prctl(libc::PR_SET_KEEPCAPS, 1)?;
    sys::set_ids(libc::SYS_setresgid, [3000; 3])?;
    sys::set_ids(libc::SYS_setresuid, [3000; 3])?;
    sys::set_capabilities(NET_BIND, NET_BIND, 0)?;
    Ok(())
}

fn threads(stage: &Stage) -> Result<()> {
    let changes: [fn() -> Result<()>; 4] = [
        ids,
        || Ok(sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(drop)?),
        || Ok(sys::set_capabilities(CHOWN, CHOWN | KILL, KILL)?),
        keep_one,
    ];
    let (send, receive) = mpsc::channel();
    let seen = Arc::new(Barrier::new(changes.len() + 1));
    let mut threads = Vec::new();
    for change in changes {
        let (send, seen) = (send.clone(), Arc::clone(&seen));
        threads.push(thread::spawn(move || -> Result<()> {
            change()?;
            send.send(())?;
            crate::stop::wait();
            // They must be there until they have been looked at.
            seen.wait();
            Ok(())
        }));
        receive.recv()?;
    }
    // From outside the threads: dumpable belongs to all of them and has changed with each.
    let told_of_all = || -> Result<Vec<String>> {
        let tids = proc::threads(sys::pid())?;
        let status = |tid: &i32| proc::text(format!("{}/task/{tid}", sys::pid()), "status");
        let of_one = |text: String| {
            let kept = text.lines().filter(|line| {
                ["Uid", "Gid", "Groups", "Cap", "NoNew"]
                    .iter()
                    .any(|key| line.starts_with(key))
            });
            kept.collect::<Vec<_>>().join("; ")
        };
        Ok(tids
            .iter()
            .map(status)
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .map(of_one)
            .collect())
    };
    let before = told_of_all()?;
    stage.ready_and_wait()?;
    let after = told_of_all();
    seen.wait();
    let after = after?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "was {before}\nis {after}");
    }
    ensure!(before.len() == after.len(), "another number of threads");
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}
