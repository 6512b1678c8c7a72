//! What /proc tells about a task without asking it: read for all tasks by a thread of its own, beside the
//! work that only the tracer can do.

use firn_sys::{Pid, procfs};

use super::lsm::{Labels, Module};
use super::status::{Stat, Status, StatusError};
use super::threads::ThreadsDir;
use super::{attributes, autogroup, limits};
use crate::crew;
use crate::tree::{Task, Tree};
use firn_proto::TaskRlimitsEntry;

/// Tasks that are worth a thread of their own to read them.
const TASKS_PER_THREAD: usize = 16;

/// State of a living task as /proc shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Outside {
    /// Of each thread, in the order of the task's threads.
    pub threads: Vec<Status>,
    /// Security labels of the threads, in the same order.
    pub labels: Vec<Labels>,
    /// Resource limits.
    pub limits: TaskRlimitsEntry,
    /// Personality, as images store it.
    pub personality: u32,
    /// Login uid, or all ones.
    pub loginuid: u32,
    /// oom_score_adj.
    pub oom_score_adj: Option<i32>,
    /// Nice value of its session's autogroup, where it tells of that and it is not 0.
    pub autogroup_nice: Option<i32>,
    /// Signal to the parent at exit.
    pub exit_signal: i32,
    /// Arguments.
    pub cmdline: Vec<Vec<u8>>,
    /// Path of the executable.
    pub exe: Option<Vec<u8>>,
}

impl Outside {
    /// Reads one task, with the labels of that security module.
    ///
    /// # Errors
    /// It is gone, or /proc has another form than documented.
    pub fn read(task: &Task, module: Option<Module>) -> Result<Outside, StatusError> {
        let (pid, speaker) = (task.pid, task.speaker());
        let dir = ThreadsDir::open(pid).map_err(|errno| StatusError::Read {
            path: format!("/proc/{pid}/task").into(),
            source: errno.into(),
        })?;
        let status = |tid: &Pid| Status::read_in(&dir, pid, *tid);
        let labels = |tid: &Pid| Labels::read(pid, *tid, module);
        let exe = std::fs::read_link(format!("/proc/{speaker}/exe")).ok();
        Ok(Outside {
            threads: task.threads.iter().map(status).collect::<Result<_, _>>()?,
            labels: task.threads.iter().map(labels).collect(),
            limits: limits::read(speaker)?,
            personality: attributes::personality(speaker).unwrap_or(0),
            loginuid: attributes::loginuid(speaker),
            oom_score_adj: attributes::oom_score_adj(speaker),
            autogroup_nice: None,
            exit_signal: Stat::read(pid)?.exit_signal,
            cmdline: cmdline(speaker),
            exe: exe.map(|path| path.into_os_string().into_encoded_bytes()),
        })
    }

    /// Reads the limits once more: one of them was raised for a moment while it was read.
    ///
    /// # Errors
    /// As [`Outside::read`].
    pub fn read_limits(&mut self, task: &Task) -> Result<(), StatusError> {
        self.limits = limits::read(task.speaker())?;
        Ok(())
    }

    /// Reads all living tasks of a frozen tree, in the order of [`Tree::alive`].
    ///
    /// # Errors
    /// As [`Outside::read`].
    pub fn read_all(tree: &Tree) -> Result<Vec<Outside>, StatusError> {
        let tasks: Vec<&Task> = tree.alive().collect();
        let module = Module::of_host();
        let of_sessions = autogroup::speakers(tree);
        let read = |task: &&Task| {
            let tells = of_sessions.contains(&task.pid);
            Ok(Outside {
                autogroup_nice: tells.then(|| autogroup::nice(task.pid)).flatten(),
                ..Outside::read(task, module)?
            })
        };
        let read = crew::share_out(&tasks, TASKS_PER_THREAD, read);
        read.into_iter().collect()
    }
}

fn cmdline(pid: Pid) -> Vec<Vec<u8>> {
    let text = procfs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = text.strip_suffix(b"\0").unwrap_or(&text);
    let arguments = arguments.split(|byte| *byte == 0);
    arguments.map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Abi;
    use crate::tree::TaskState;

    #[test]
    fn reads_this_process() {
        let me = Pid::this();
        let task = Task {
            pid: me,
            ppid: me,
            pgid: me,
            sid: me,
            state: TaskState::Alive,
            abi: Abi::Native,
            threads: vec![me],
        };
        let outside = Outside::read(&task, Module::of_host()).unwrap();
        assert_eq!(outside.threads.len(), 1);
        assert_eq!(outside.limits.rlimits.len(), 16);
        assert!(!outside.cmdline.is_empty() && outside.exe.is_some());
    }
}
