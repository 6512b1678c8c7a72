//! Where the demo's world lives: its directory and its processes, all gone when the stage goes.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use firn_engine::Pid;
use firn_engine::cancel::CancelFlag;
use firn_sys::{task, wait};

use super::world::{COUNTERS, SCRIPT};
use crate::output::Failure;

/// How long anything in the world may take.
const PATIENCE: Duration = Duration::from_secs(10);
const SIGKILL: i32 = 9;

/// The directory, and the processes that were seen in it.
pub struct Stage {
    dir: PathBuf,
    pids: Vec<Pid>,
    cancel: CancelFlag,
}

/// One process of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// Its pid.
    pub pid: Pid,
    /// Levels below the root.
    pub depth: usize,
    /// Command line.
    pub command: String,
    /// Number of threads.
    pub threads: usize,
}

/// How far the world has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Last number in the diary.
    pub ticks: u64,
    /// Sum of what the threads had counted by then.
    pub counted: u64,
    /// Last number that came out of the pipe.
    pub heard: u64,
}

/// Memory, where there is a file system of it: images are brought to disk before the tasks are killed, and
/// the demo is about the freeze, not about the disk.
fn base() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let is_asked = std::env::var_os("TMPDIR").is_some();
    match !is_asked && memory.is_dir() {
        true => memory,
        false => std::env::temp_dir(),
    }
}

impl Stage {
    /// Makes the directory.
    pub fn build(cancel: CancelFlag) -> Result<Stage, Failure> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = base().join(format!("firn-demo-{}", std::process::id()));
        let failed = |error| Failure::io(format!("{} can't be made", dir.display()), &error);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(failed)?;
        let stage = Stage {
            dir: dir.clone(),
            pids: Vec::new(),
            cancel,
        };
        std::fs::create_dir(stage.images()).map_err(failed)?;
        std::fs::write(dir.join("world.sh"), SCRIPT).map_err(failed)?;
        Ok(stage)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the images go.
    pub fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// Starts the world; the root task is a child of this process.
    pub fn start(&mut self) -> Result<Pid, Failure> {
        let failed = |error| Failure::io("the demo's world can't be started", &error);
        // Orphans of the world come to us, so that their pids are free once we have reaped them.
        firn_sys::session::adopt_orphans().map_err(|errno| failed(errno.into()))?;
        let errors = std::fs::File::create(self.dir.join("errors")).map_err(failed)?;
        let child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["demo-world", "start"])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(failed)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("pids fit i32"));
        self.pids.push(pid);
        Ok(pid)
    }

    /// The processes of the tree below `root`, which the stage remembers.
    pub fn actors(&mut self, root: Pid) -> Vec<Actor> {
        let mut actors = Vec::new();
        collect(root, 0, &mut actors);
        for actor in &actors {
            if !self.pids.contains(&actor.pid) {
                self.pids.push(actor.pid);
            }
        }
        actors
    }

    /// Waits until the world has ticked and heard up to `ticks`.
    pub fn until(&self, ticks: u64) -> Result<State, Failure> {
        let start = Instant::now();
        loop {
            let state = self.state();
            if state.ticks >= ticks && state.heard >= ticks {
                return Ok(state);
            }
            self.check_cancelled()?;
            if start.elapsed() > PATIENCE {
                return Err(self.stuck(&state, ticks));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn stuck(&self, state: &State, ticks: u64) -> Failure {
        let said = std::fs::read_to_string(self.dir.join("errors")).unwrap_or_default();
        let text = format!(
            "the demo's world stands still at tick {} (heard {}) instead of {ticks}",
            state.ticks, state.heard
        );
        let failure = Failure::new("bug", text);
        match said.lines().last() {
            Some(line) => failure.hint(format!("it said: {line}")),
            None => failure,
        }
    }

    /// Fails when the user has interrupted.
    pub fn check_cancelled(&self) -> Result<(), Failure> {
        if self.cancel.is_cancelled() {
            return Err(Failure::new(
                "refused",
                "interrupted; everything was cleaned up",
            ));
        }
        Ok(())
    }

    /// How far the world has come.
    pub fn state(&self) -> State {
        let diary = self.numbers("diary");
        let last = diary.last().cloned().unwrap_or_default();
        let heard = self.numbers("heard");
        State {
            ticks: last.first().copied().unwrap_or(0),
            counted: last.iter().skip(1).sum(),
            heard: heard
                .last()
                .and_then(|line| line.first().copied())
                .unwrap_or(0),
        }
    }

    /// Whether diary and listener hold every number from 1 on, once and in order.
    pub fn is_gapless(&self) -> bool {
        let diary = self.numbers("diary");
        let complete = diary.iter().all(|line| line.len() == COUNTERS + 1);
        complete && gapless(&diary) && gapless(&self.numbers("heard"))
    }

    /// The complete lines of a file, as numbers.
    fn numbers(&self, name: &str) -> Vec<Vec<u64>> {
        let text = std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        let complete = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
        let words = |line: &str| {
            line.split(' ')
                .filter_map(|word| word.parse().ok())
                .collect()
        };
        complete.lines().map(words).collect()
    }

    /// Reaps what has been killed and tells whether every process is gone.
    pub fn all_gone(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if self.pids.iter().all(|pid| is_gone(*pid)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let start = Instant::now();
        // Children of a killed parent become ours and are killed in the next round.
        while start.elapsed() < PATIENCE && !self.pids.iter().all(|pid| is_gone(*pid)) {
            for pid in &self.pids {
                // Only a child of ours that still runs: a pid may have gone to somebody else.
                if matches!(wait::try_wait(*pid), Ok(None)) {
                    let _ = task::kill(*pid, SIGKILL);
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Whether no process of ours has this pid any more, after reaping it if it has ended.
fn is_gone(pid: Pid) -> bool {
    if matches!(wait::try_wait(pid), Ok(Some(wait::Status::Ended(_)))) {
        return true;
    }
    !Path::new(&format!("/proc/{pid}")).exists()
}

fn gapless(lines: &[Vec<u64>]) -> bool {
    !lines.is_empty()
        && lines
            .iter()
            .zip(1..)
            .all(|(line, wanted)| line.first() == Some(&wanted))
}

fn collect(pid: Pid, depth: usize, actors: &mut Vec<Actor>) {
    let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else {
        return;
    };
    let words: Vec<String> = line
        .split(|&byte| byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return;
    };
    let tids: Vec<_> = threads.flatten().map(|entry| entry.path()).collect();
    actors.push(Actor {
        pid,
        depth,
        command: shorten(&words),
        threads: tids.len(),
    });
    for tid in tids {
        let children = std::fs::read_to_string(tid.join("children")).unwrap_or_default();
        for child in children
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
        {
            collect(Pid::from_raw(child), depth + 1, actors);
        }
    }
}

/// The command line with the program's directory left out.
fn shorten(words: &[String]) -> String {
    let mut words = words.to_vec();
    if let Some(first) = words.first_mut() {
        *first = first.rsplit('/').next().unwrap_or_default().to_owned();
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_repetitions_are_seen() {
        let lines = |numbers: &[u64]| numbers.iter().map(|n| vec![*n]).collect::<Vec<_>>();
        assert!(gapless(&lines(&[1, 2, 3])));
        assert!(!gapless(&lines(&[])) && !gapless(&lines(&[1, 3])) && !gapless(&lines(&[1, 1])));
        assert!(!gapless(&[vec![]]));
    }

    #[test]
    fn programs_are_shown_without_their_directory() {
        let words = ["/usr/bin/firn".to_owned(), "demo-world".to_owned()];
        assert_eq!(shorten(&words), "firn demo-world");
        assert_eq!(shorten(&[]), "");
    }
}
