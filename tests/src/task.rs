//! A program that is dumped and restored.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, WaitStatus};

use crate::command::{Finished, firn_path};
use crate::sandbox::Sandbox;

/// The root of a process tree in a session of its own, with files for its standard descriptors.
/// It is followed by pid, as it is nobody's [`std::process::Child`] once it was restored.
pub struct Task<'a> {
    sandbox: &'a Sandbox,
    pid: i32,
}

impl<'a> Task<'a> {
    /// Starts a program in `dir`; its output goes to `DIR/stdout` and `DIR/stderr`.
    #[expect(
        clippy::zombie_processes,
        reason = "the sandbox reaps by pid, restored or not"
    )]
    pub fn spawn<S: AsRef<OsStr>>(
        sandbox: &'a Sandbox,
        dir: &Path,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        let open = |name| File::create(dir.join(name)).expect("the scratch directory is writable");
        let child = Command::new("setsid")
            .arg(program)
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(open("stdout"))
            .stderr(open("stderr"))
            .spawn()
            .expect("setsid is part of util-linux, as unshare is");
        let pid = i32::try_from(child.id()).expect("pids are positive and small");
        Self { sandbox, pid }
    }

    /// Its pid, the same before and after.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The port that a server among our programs prints once it listens; `dir` is where it was started.
    #[track_caller]
    pub fn announced_port(&self, dir: &Path) -> String {
        let mut port = None;
        self.sandbox
            .wait_until(20, "the server does not listen", || {
                let said = std::fs::read_to_string(dir.join("stdout")).unwrap_or_default();
                let line = said.strip_suffix('\n');
                port = line.and_then(|line| Some(line.strip_prefix("port ")?.to_owned()));
                port.is_some()
            });
        port.expect("the loop above ended with a port")
    }

    /// The command that dumps it into `images`.
    pub fn dump_command(&self, images: &Path) -> Command {
        let mut command = Command::new(firn_path());
        command.args([
            "dump",
            "-t",
            &self.pid.to_string(),
            "-v4",
            "-o",
            "dump.log",
            "-D",
        ]);
        command.arg(images);
        command
    }

    /// Runs a dump whose worker is killed at its nth call of this kind, and tells what it said; None if it did not come
    /// to it. Needs strace.
    pub fn dump_killed_at(
        &self,
        images: &Path,
        call: &str,
        nth: u32,
        options: &[&str],
    ) -> Option<String> {
        let dump = self.dump_command(images);
        let mut command = Command::new("strace");
        command
            .args(["-f", "-qq", "-o", "/dev/null", "-e"])
            .arg(format!("trace={call}"))
            .arg("-e")
            .arg(format!("inject={call}:signal=KILL:when={nth}"))
            .arg(dump.get_program())
            .args(dump.get_args())
            .args(options);
        let output = command.output().expect("strace starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (!output.status.success()).then_some(said)
    }

    /// Dumps it with further options, and waits until all its tasks are gone if it was killed.
    pub fn dump(&self, images: &Path, options: &[&str]) -> Finished {
        let tree = self.tree();
        let finished = self.sandbox.run_logged(
            self.dump_command(images).args(options),
            &images.join("dump.log"),
        );
        if finished.status.success() && !options.contains(&"-R") {
            self.wait_until_gone();
            self.sandbox.wait_until_ended(&tree);
        }
        finished
    }

    /// Pids of the task, of what descends from it, and of what is in its session.
    pub fn tree(&self) -> Vec<i32> {
        let mut tree = self.session();
        if !tree.contains(&self.pid) && stat_field(self.pid, 0).is_some() {
            tree.push(self.pid);
        }
        let pids = self.sandbox.pids().into_iter();
        let parents: Vec<_> = pids
            .filter_map(|pid| Some((pid, stat_field(pid, 1)?.parse::<i32>().ok()?)))
            .collect();
        let mut seen = 0;
        while let Some(parent) = tree.get(seen).copied() {
            seen += 1;
            for (child, _) in parents.iter().filter(|(_, of)| *of == parent) {
                if !tree.contains(child) {
                    tree.push(*child);
                }
            }
        }
        tree
    }

    /// Waits until the task and everything below it is gone and reaped. Only this tree may be
    /// running in the sandbox's namespace with the session of this task.
    #[track_caller]
    pub fn wait_until_gone(&self) {
        self.sandbox
            .wait_until(60, "the dumped tasks are still there", || {
                self.session().is_empty()
            });
    }

    /// Pids of the task's session.
    pub fn session(&self) -> Vec<i32> {
        let session = self.pid.to_string();
        let in_session = |pid: &i32| stat_field(*pid, 3).is_some_and(|field| field == session);
        self.sandbox.pids().into_iter().filter(in_session).collect()
    }

    /// Restores it, detached, and checks that it has its pid again.
    #[track_caller]
    pub fn restore(&self, images: &Path) {
        self.try_restore(images).expect_success("restore");
        let pid = std::fs::read_to_string(images.join("pid")).expect("restore wrote its pidfile");
        assert_eq!(
            pid.trim(),
            self.pid.to_string(),
            "restored with another pid"
        );
        assert!(!self.has_ended(), "the task has ended after its restore");
    }

    /// Runs the restore, whatever comes of it.
    pub fn try_restore(&self, images: &Path) -> Finished {
        self.try_restore_with(images, &[])
    }

    /// As [`Task::try_restore`], with further options.
    pub fn try_restore_with(&self, images: &Path, options: &[&str]) -> Finished {
        let pidfile = images.join("pid");
        let _ = std::fs::remove_file(&pidfile);
        self.sandbox.forget(self.pid);
        let mut command = Command::new(firn_path());
        command
            .args(["restore", "-d", "-v4", "-o", "restore.log", "-D"])
            .arg(images);
        command.arg("--pidfile").arg(pidfile).args(options);
        self.sandbox
            .run_logged(&mut command, &images.join("restore.log"))
    }

    /// Whether it exists and is no zombie.
    pub fn is_alive(&self) -> bool {
        self.sandbox.reap();
        stat_field(self.pid, 0).is_some_and(|state| state != "Z" && state != "X")
    }

    /// Whether it has ended. The main thread alone may be a zombie for a moment, when another thread of it
    /// executes a program.
    pub fn has_ended(&self) -> bool {
        self.sandbox.ended(self.pid).is_some()
    }

    /// Whether it is stopped by a signal or held by a tracer.
    pub fn is_stopped(&self) -> bool {
        stat_field(self.pid, 0).is_some_and(|state| state == "T" || state == "t")
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&self, seconds: u64) -> WaitStatus {
        let mut status = None;
        self.sandbox
            .wait_until(seconds, "the program has not ended", || {
                status = self.sandbox.ended(self.pid);
                status.is_some()
            });
        status.expect("the loop above ended with a status")
    }

    /// Sends a signal to the task itself.
    pub fn signal(&self, signal: Signal) {
        send(self.pid, signal);
    }

    /// Kills its whole tree and waits until it is gone.
    pub fn kill(&self) {
        let tree = self.tree();
        tree.iter().for_each(|pid| send(*pid, Signal::KILL));
        self.wait_until_gone();
        self.sandbox.wait_until_ended(&tree);
    }

    /// Processor time of all its tasks since they were started or restored, in clock ticks.
    pub fn cpu_ticks(&self) -> u64 {
        let ticks = |pid: i32, index| -> u64 {
            stat_field(pid, index)
                .and_then(|field| field.parse().ok())
                .unwrap_or(0)
        };
        self.session()
            .into_iter()
            .map(|pid| ticks(pid, 11) + ticks(pid, 12))
            .sum()
    }
}

fn send(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// A field of /proc/PID/stat, counted from the state (0) on.
fn stat_field(pid: i32, index: usize) -> Option<String> {
    let stat = std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat"))).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(index).map(str::to_owned)
}
