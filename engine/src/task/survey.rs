//! Per-task state that can't be dumped yet, found before anything is stopped.

use std::fmt::Display;
use std::fs;

use firn_sys::Pid;
use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::procfs;

use super::posix_timers;
use super::status::Status;
use super::threads::ThreadsDir;
use crate::crew;
use crate::freeze;
use crate::obstacle::Obstacle;
use crate::tree::{Task, Tree};

/// Tasks and threads that are worth a thread of their own to look at them.
const TASKS_PER_THREAD: usize = 32;
/// Threads of one process that are.
pub const MANY_THREADS: usize = 128;
/// Namespaces that a task must share with the dumper.
const NAMESPACES: [&str; 8] = ["pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time"];

/// The thread through which a running process can be looked at; None when it is dead or gone, which is no
/// obstacle.
pub fn speaker(pid: Pid) -> Option<Pid> {
    let status = Status::read(pid, pid).ok()?;
    if !matches!(status.state, b'Z' | b'X') {
        return Some(pid);
    }
    Some(freeze::speaker(pid)).filter(|speaker| *speaker != pid)
}

/// Those that a thread may leave alone; whoever leaves the mount namespace has a working directory of its own.
const OF_THREADS: &[&str] = &["net", "ipc", "uts", "cgroup"];

/// Looks at a running process and its threads for state that a dump would lose.
pub fn survey(pid: Pid, threads: &[Pid], own: &OwnNamespaces) -> Vec<Obstacle> {
    let mut found = Vec::new();
    survey_namespaces(pid, pid, own, &mut found);
    let others = threads.split_first().map_or(&[][..], |(_, others)| others);
    if !others.is_empty()
        && let Ok(dir) = ThreadsDir::open(pid)
    {
        let of_thread = |tid: &Pid| {
            let mut found = Vec::new();
            let link = |name: &str| dir.link(*tid, &format!("ns/{name}")).ok();
            survey_some(pid, *tid, own, OF_THREADS, link, &mut found);
            found
        };
        found.extend(crew::share_out(others, MANY_THREADS, of_thread).concat());
    }
    survey_timers(pid, threads, &mut found);
    found
}

fn obstacle(pid: Pid, object: impl Into<String>, reason: impl Into<String>) -> Obstacle {
    Obstacle {
        pid,
        object: object.into(),
        reason: reason.into(),
        hint: None,
    }
}

/// A timer on the CPU clock of the thread that made it, without a word on which that was.
fn survey_timers(pid: Pid, threads: &[Pid], found: &mut Vec<Obstacle>) {
    let Ok(timers) = posix_timers::read(pid) else {
        return;
    };
    for timer in timers {
        let is_unclear = posix_timers::counts_its_maker(&timer) && timer.notify_thread_id.is_none();
        if is_unclear && threads.len() > 1 {
            let reason =
                "it runs on the CPU clock of one of several threads, and nothing tells which";
            found.push(Obstacle {
                hint: Some("let it notify its thread (SIGEV_THREAD_ID), or delete it".to_owned()),
                ..obstacle(pid, format!("POSIX timer {}", timer.it_id), reason)
            });
        }
    }
}

/// The dumper's own namespaces, looked up once for all tasks.
#[derive(Debug)]
pub struct OwnNamespaces([Option<Vec<u8>>; NAMESPACES.len()]);

impl OwnNamespaces {
    /// Looks them up.
    pub fn read() -> OwnNamespaces {
        OwnNamespaces(NAMESPACES.map(|name| namespace("self", name)))
    }
}

/// What the link of a namespace in /proc says; None for those that this kernel does not have.
fn namespace(task: impl Display, name: &str) -> Option<Vec<u8>> {
    let link = fs::read_link(format!("/proc/{task}/ns/{name}")).ok()?;
    Some(link.into_os_string().into_encoded_bytes())
}

/// Compares all namespaces of a process, by the thread that speaks for it.
fn survey_namespaces(pid: Pid, speaker: Pid, own: &OwnNamespaces, found: &mut Vec<Obstacle>) {
    let link = |name: &str| namespace(speaker, name);
    survey_some(pid, speaker, own, &NAMESPACES, link, found);
}

/// Compares some namespaces of thread `tid` of process `pid`, by what their links say.
fn survey_some(
    pid: Pid,
    tid: Pid,
    own: &OwnNamespaces,
    wanted: &[&str],
    link: impl Fn(&str) -> Option<Vec<u8>>,
    found: &mut Vec<Obstacle>,
) {
    let all = NAMESPACES.iter().zip(&own.0);
    for (name, own) in all.filter(|(name, _)| wanted.contains(name)) {
        if let (Some(theirs), Some(own)) = (link(name), own)
            && theirs != *own
        {
            let whose = match tid == pid {
                true => String::new(),
                false => format!(" of thread {tid}"),
            };
            found.push(Obstacle {
                pid,
                object: format!(
                    "{name} namespace {}{whose}",
                    String::from_utf8_lossy(&theirs)
                ),
                reason: "namespaces of its own are not supported yet".to_owned(),
                hint: Some(format!(
                    "run firn inside that namespace: nsenter -t {tid} --{} firn ...",
                    nsenter_option(name)
                )),
            });
        }
    }
}

fn nsenter_option(name: &str) -> &str {
    match name {
        "mnt" => "mount",
        other => other,
    }
}

/// Filters that can't be suspended would kill or hinder what asks the tasks about themselves.
pub fn survey_seccomp(tree: &Tree) -> Vec<Obstacle> {
    let mut found = Vec::new();
    for task in tree.alive() {
        let is_filtered =
            |tid: &&Pid| Status::read(task.pid, **tid).is_ok_and(|status| status.seccomp != 0);
        if let Some(tid) = task.threads.iter().find(is_filtered) {
            found.push(Obstacle {
                pid: task.pid,
                object: format!("seccomp of thread {tid}"),
                reason: "it can't be suspended from here".to_owned(),
                hint: Some("run firn with CAP_SYS_ADMIN and without seccomp filters".to_owned()),
            });
        }
    }
    found
}

/// Looks at a frozen tree for what only a stopped tree shows reliably: tables shared across processes,
/// threads that share less than usual, 32-bit code, namespaces that were left since the survey.
pub fn survey_frozen(tree: &Tree, own: &OwnNamespaces) -> Vec<Obstacle> {
    let tasks: Vec<&Task> = tree.alive().collect();
    let of_task = |task: &&Task| {
        let mut found = Vec::new();
        survey_threads(task, &mut found);
        let parent = tree.task(task.ppid).filter(|parent| parent.is_alive());
        if let Some(parent) = parent {
            survey_sharing(task, parent, &mut found);
        }
        survey_namespaces(task.pid, task.speaker(), own, &mut found);
        found
    };
    crew::share_out(&tasks, TASKS_PER_THREAD, of_task).concat()
}

fn survey_threads(task: &Task, found: &mut Vec<Obstacle>) {
    let pid = task.pid;
    for tid in task.threads.iter().skip(1) {
        if kcmp(task.speaker(), *tid, Resource::Fs).is_ok_and(|order| order.is_ne()) {
            let object = format!("thread {tid} has a working directory of its own");
            let reason = "threads that have unshared it are not supported";
            found.push(obstacle(pid, object, reason));
        }
    }
}

fn survey_sharing(task: &Task, parent: &Task, found: &mut Vec<Obstacle>) {
    let kinds = [
        (
            Resource::Vm,
            "memory",
            "a vfork in progress, or clone with CLONE_VM",
        ),
        (
            Resource::Fs,
            "working directory and umask",
            "clone with CLONE_FS",
        ),
        (
            Resource::Sighand,
            "signal handlers",
            "clone with CLONE_SIGHAND",
        ),
    ];
    for (resource, what, how) in kinds {
        if kcmp(task.speaker(), parent.speaker(), resource).is_ok_and(|order| order.is_eq()) {
            let object = format!("{what} shared with process {}", parent.pid);
            found.push(obstacle(
                task.pid,
                object,
                format!("{how} is not supported"),
            ));
        }
    }
}

/// A sentence for each task that is in another cgroup than the dumper: the restore won't put it back.
pub fn cgroup_warnings(pids: &[Pid]) -> Vec<String> {
    let own = procfs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let is_elsewhere = |pid: &Pid| {
        procfs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|theirs| theirs != own)
    };
    let judged = crew::share_out(pids, TASKS_PER_THREAD, is_elsewhere);
    let elsewhere: Vec<String> = (pids.iter().zip(judged))
        .filter(|(_, is_elsewhere)| *is_elsewhere)
        .map(|(pid, _)| pid.to_string())
        .collect();
    match elsewhere.as_slice() {
        [] => Vec::new(),
        some => vec![format!(
            "cgroups are not dumped yet: a restore puts task{} {} into the restorer's cgroups",
            if some.len() == 1 { "" } else { "s" },
            some.join(", ")
        )],
    }
}
