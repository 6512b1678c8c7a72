//! One instance of one workload, from start to verdict.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::compare::{Between, differences};
use super::engine::{Call, Engine, tail};
use super::outside::OutsideObject;
use super::reaper::Reaper;
use super::snapshot::Snapshot;
use super::{After, CriuDoes, Play};
use crate::stage::SAME_TASKS;
use crate::sys::{self, Exit};
use crate::workload::find_program;
use crate::{Body, Expect, Workload, proc};

/// A workload that has been started.
struct Case<'a> {
    workload: &'a Workload,
    play: &'a Play,
    dir: PathBuf,
    reaper: Reaper,
    engine: Option<Engine>,
    outside: Option<OutsideObject>,
    root: i32,
}

extern "C" fn on_hang_up(_signal: i32) {}

/// Plays one instance in `dir`, which must exist and be empty.
///
/// **Errors** when the workload fails, the engine fails, or the tree looks different afterwards.
pub fn play(workload: &Workload, play: &Play, dir: &Path) -> Result<()> {
    let mut reaper = Reaper::new().context("becoming a subreaper")?;
    let engine = play.find_engine()?.map(|program| Engine {
        program,
        dumps_instead: play.criu_for(CriuDoes::Dump),
        restores_instead: play.criu_for(CriuDoes::Restore),
        output_dir: dir.to_owned(),
        timeout: play.timeout(workload),
        shell_job: workload.shell_job,
        dump_options: workload.dump_options,
        restore_options: workload.restore_options,
        descriptor_limit: workload.descriptor_limit,
    });
    // Its window closes at the end, which tells the session's leader, us.
    sys::handle(libc::SIGHUP, on_hang_up, 0).context("catching SIGHUP")?;
    let terminal = workload
        .shell_job
        .then(sys::lead_session_on_new_terminal)
        .transpose();
    let _terminal = terminal.context("making a terminal")?;
    let outside = workload.outside.map(|kind| OutsideObject::make(kind, dir));
    let outside = outside.transpose().context("making what is outside")?;
    let root = start(workload, play, dir, outside.as_ref(), &mut reaper)?;
    let mut case = Case {
        workload,
        play,
        dir: dir.to_owned(),
        reaper,
        engine,
        outside,
        root,
    };
    let verdict = case.run();
    let cleaned = case.clean_up();
    verdict?;
    cleaned
}

/// Starts the workload as a session of its own with nothing of ours but a log file, or as a job
/// with our terminal.
fn start(
    workload: &Workload,
    play: &Play,
    dir: &Path,
    outside: Option<&OutsideObject>,
    reaper: &mut Reaper,
) -> Result<i32> {
    let files = dir.join("files");
    fs::create_dir(&files).context("making the workload's directory")?;
    let mut command = match workload.body {
        Body::Native(_) => {
            let mut command =
                Command::new(std::env::current_exe().context("finding our own program")?);
            command.args(["workload", workload.name, "--dir"]).arg(dir);
            command
        }
        Body::Script {
            interpreter,
            source,
        } => {
            let script = dir.join("script");
            fs::write(&script, source).context("writing the script")?;
            let program = find_program(interpreter).context("finding the interpreter")?;
            let mut command = Command::new(program);
            command.arg(script).arg(dir);
            command
        }
    };
    if play.no_checkpoint || play.after() != After::Kill {
        command.env(SAME_TASKS, "1");
    }
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join("log"))?;
    let twin = log.try_clone()?;
    let input = match outside {
        Some(outside) => outside.inside()?.into(),
        None if workload.shell_job => Stdio::inherit(),
        None => Stdio::null(),
    };
    command
        .current_dir(&files)
        .stdin(input)
        .stdout(log)
        .stderr(twin);
    if let Some(uid) = play.uid {
        for path in [dir, &files, &dir.join("log")] {
            chown(path, Some(uid), Some(uid)).context("giving the workload its files")?;
        }
        command.uid(uid).gid(uid);
    }
    let shell_job = workload.shell_job;
    let before_exec = move || {
        // Descriptors of whoever started the runner belong to other mounts, and to nobody here.
        sys::close_on_exec_from(3)?;
        if shell_job {
            sys::setpgid(0, 0)
        } else {
            sys::setsid().map(drop)
        }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(before_exec) };
    reaper.start(&mut command)
}

impl Case<'_> {
    fn run(&mut self) -> Result<()> {
        self.wait_ready()?;
        if self.engine.is_some() {
            for round in 1..=self.play.rounds {
                self.checkpoint(round)
                    .with_context(|| format!("round {round}"))?;
            }
        }
        self.collect_verdict()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let (ready, root) = (self.dir.join("ready"), self.root);
        let ended = self
            .reaper
            .until("start", self.play.timeout(self.workload), |reaper| {
                if ready.exists() {
                    return Some(None);
                }
                reaper.end_of(root).map(Some)
            })?;
        match ended {
            None => {
                self.let_settle();
                Ok(())
            }
            Some(exit) => bail!(
                "start: the workload ended with {exit}: {}",
                self.own_words()
            ),
        }
    }

    /// Waits until all tasks sleep, so that they are seen in the state they stay in and not on their way
    /// from saying ready to there. Trees that never do are let be.
    fn let_settle(&mut self) {
        let root = self.root;
        let asleep = |_: &mut Reaper| {
            let tree = proc::tree(root).ok()?;
            let rests = |pid: &i32| proc::stat(pid).is_ok_and(|stat| stat[3] != "R");
            tree.iter().all(rests).then_some(())
        };
        let _ = self
            .reaper
            .until("settle", Duration::from_millis(300), asleep);
    }

    fn checkpoint(&mut self, round: u32) -> Result<()> {
        let images = self.dir.join(format!("images.{round}"));
        fs::create_dir(&images).context("making the images directory")?;
        let before = Snapshot::take(self.root).context("looking at the tree")?;
        let after = match self.workload.expect {
            Expect::Refused(words) => return self.expect_refusal(&images, &before, words),
            Expect::Restored => self.play.after(),
        };
        self.dump(&images, after)?.expect_success("dump")?;
        match after {
            After::Kill => {
                self.expect_gone(&before)?;
                self.restore(&images)?;
                self.compare(&before, Between::Restored)
            }
            After::LeaveRunning => self.compare(&before, Between::SameTasks),
            After::LeaveStopped => {
                self.continue_stopped(&before)?;
                self.compare(&before, Between::SameTasks)
            }
        }
    }

    fn dump(&mut self, images: &Path, after: After) -> Result<Call> {
        let engine = self.engine.as_ref().context("no engine")?;
        let outside = self.outside.as_ref();
        engine.dump(&mut self.reaper, self.root, images, after, outside)
    }

    fn restore(&mut self, images: &Path) -> Result<()> {
        self.reaper.forget(self.root);
        let tag = images.file_name().unwrap_or_default().to_string_lossy();
        let pidfile = self.dir.join(format!("{tag}.pid"));
        let engine = self.engine.as_ref().context("no engine")?;
        engine
            .restore(&mut self.reaper, images, &pidfile, self.outside.as_mut())?
            .expect_success("restore")?;
        let pid = fs::read_to_string(&pidfile).context("restore: reading the pidfile")?;
        ensure!(
            pid.trim() == self.root.to_string(),
            "restore: the pidfile says {}, the root was {}",
            pid.trim(),
            self.root
        );
        if let Some(exit) = self.reaper.end_of(self.root) {
            bail!(
                "after restore: the root ended with {exit}: {}",
                self.own_words()
            );
        }
        Ok(())
    }

    /// Checks that a killed tree has left nothing, so that its pids are free.
    fn expect_gone(&mut self, before: &Snapshot) -> Result<()> {
        let tids: Vec<i32> = before
            .tasks
            .iter()
            .flat_map(|(_, tids)| tids.clone())
            .collect();
        let gone = self.reaper.until("kill", Duration::from_secs(15), |_| {
            tids.iter()
                .all(|&tid| proc::stat(tid).is_err())
                .then_some(())
        });
        let left: Vec<&i32> = tids
            .iter()
            .filter(|&&tid| proc::stat(tid).is_ok())
            .collect();
        gone.with_context(|| format!("dump: tasks {left:?} are still there after the kill"))
    }

    /// Checks that a tree left stopped is stopped, and continues what was not stopped before.
    fn continue_stopped(&mut self, before: &Snapshot) -> Result<()> {
        // A task that has been sent SIGSTOP gets to it when it is next scheduled.
        let root = self.root;
        let stands = |_: &mut Reaper| moving_task(root).is_none().then_some(());
        let stood = self
            .reaper
            .until("dump -s", Duration::from_secs(15), stands);
        if let (Err(_), Some((tid, state))) = (stood, moving_task(root)) {
            bail!("dump -s: task {tid} is in state {state}");
        }
        let tree = proc::tree(root).context("dump -s: looking at the tree")?;
        for &pid in tree
            .iter()
            .filter(|&&pid| before.state_of(pid) != Some("T"))
        {
            // One that was ending has been reaped by a parent that runs again.
            match sys::kill(pid, libc::SIGCONT) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(error).context("continuing the tree");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Compares the tree with what it was; tasks that have just been let go get a moment to be back
    /// in the call they were in.
    fn compare(&mut self, before: &Snapshot, between: Between) -> Result<()> {
        if self.play.no_compare {
            return Ok(());
        }
        let started = Instant::now();
        loop {
            if let Some(exit) = self.reaper.end_of(self.root) {
                bail!("the root ended with {exit}: {}", self.own_words());
            }
            // A task that ends while it is looked at is a difference that a second look will tell.
            let after = Snapshot::take(self.root);
            let found = after
                .as_ref()
                .map(|after| differences(before, after, between, self.workload.moves));
            match found {
                Ok(found) if found.is_empty() => return Ok(()),
                _ if started.elapsed() < Duration::from_secs(5) => sys::pause_for(20),
                Ok(found) => {
                    let shown: Vec<String> = found
                        .iter()
                        .take(12)
                        .map(|d| format!("\n    {d}"))
                        .collect();
                    let count = found.len();
                    bail!(
                        "the tree looks different ({count} lines):{}",
                        shown.concat()
                    );
                }
                Err(error) => bail!("looking at the tree: {error}"),
            }
        }
    }

    /// Checks that a dump is refused clearly and that nothing has happened.
    fn expect_refusal(&mut self, images: &Path, before: &Snapshot, words: &[&str]) -> Result<()> {
        let foreign = images.join("a file of the user");
        fs::write(&foreign, "kept").context("putting a file into the images directory")?;
        let call = self.dump(images, After::Kill)?;
        ensure!(
            call.exit != Exit::Code(0),
            "dump: succeeded, a refusal was expected"
        );
        ensure!(
            matches!(call.exit, Exit::Code(_)),
            "dump: {}, not a clear refusal",
            call.exit
        );
        let said = call.said().to_lowercase();
        for word in words {
            ensure!(
                said.contains(&word.to_lowercase()),
                "dump: the refusal does not say `{word}`\n{}",
                call.last_words()
            );
        }
        self.compare(before, Between::SameTasks)
            .context("after the refusal")?;
        let entries = fs::read_dir(images)?.filter_map(|entry| entry.ok());
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let left: Vec<String> = names
            .filter(|name| !["dump.log", "a file of the user"].contains(&name.as_str()))
            .collect();
        ensure!(
            left.is_empty(),
            "dump: the refusal left {left:?} in the images directory"
        );
        ensure!(
            foreign.exists(),
            "dump: the refusal removed a file that is not its own"
        );
        Ok(())
    }

    fn collect_verdict(&mut self) -> Result<()> {
        self.outside.as_ref().map_or(Ok(()), OutsideObject::speak)?;
        sys::kill(self.root, libc::SIGTERM).context("asking for the verdict")?;
        let root = self.root;
        let exit = self
            .reaper
            .until("verdict", self.play.timeout(self.workload), |reaper| {
                reaper.end_of(root)
            })
            .with_context(|| format!("the log ends with: {}", self.own_words()))?;
        match fs::read_to_string(self.dir.join("result")) {
            Ok(line) if line.trim() == "PASS" && exit == Exit::Code(0) => Ok(()),
            Ok(line) if line.trim() == "PASS" => bail!("passed, but ended with {exit}"),
            Ok(line) => Err(anyhow!(line.trim().trim_start_matches("FAIL: ").to_owned())),
            Err(_) => bail!("no verdict, ended with {exit}: {}", self.own_words()),
        }
    }

    fn own_words(&self) -> String {
        tail(&self.dir.join("log"), 5).join(" / ")
    }

    /// Ends whatever is left of the tree and of the engine: everything below this process.
    fn clean_up(&mut self) -> Result<()> {
        let own = sys::pid();
        self.reaper
            .until("clean-up", Duration::from_secs(60), |_| {
                let left: Vec<i32> = proc::tree(own)
                    .ok()?
                    .into_iter()
                    .filter(|&pid| pid != own)
                    .collect();
                for &pid in &left {
                    let _ = sys::kill(pid, libc::SIGKILL);
                }
                left.is_empty().then_some(())
            })
            .map_err(|_| anyhow!("tasks are left that do not die"))
    }
}

/// Finds a thread of a tree that is neither stopped nor dead.
fn moving_task(root: i32) -> Option<(i32, String)> {
    let threads = proc::tree(root)
        .ok()?
        .into_iter()
        .filter_map(|pid| proc::threads(pid).ok());
    threads
        .flatten()
        .filter_map(|tid| Some((tid, proc::stat(tid).ok()?.get(3)?.clone())))
        .find(|(_, state)| !matches!(state.as_str(), "T" | "Z"))
}
