//! The stage a workload plays on: where its files go, who its children are, when it may check.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::sys::{self, Exit};
use crate::{Body, Workload, stop};

/// Set by the runner when the tasks are not killed.
pub(crate) const SAME_TASKS: &str = "FIRN_ZDTM_SAME_TASKS";

/// The stage of one task of a workload.
#[derive(Debug)]
pub struct Stage {
    dir: PathBuf,
    /// A child tells its parent through this pipe that it is ready; it is closed then, so that
    /// nothing of it is left when the tree is dumped.
    gate: RefCell<Option<OwnedFd>>,
    root: bool,
}

/// A child made by [`Stage::child`], ready when this value exists.
#[derive(Debug)]
pub struct Child {
    /// Its process id.
    pub pid: i32,
    failure: PathBuf,
}

impl Stage {
    /// Runs a workload to its end in `dir` and returns the exit code: 0 for a pass.
    pub fn perform(workload: &Workload, dir: &Path) -> u8 {
        let Body::Native(run) = workload.body else {
            return 2;
        };
        let stage = Stage {
            dir: dir.to_owned(),
            gate: RefCell::new(None),
            root: true,
        };
        let verdict = guarded(|| {
            stop::install()?;
            run(&stage)
        });
        let (line, code) = match verdict {
            Ok(()) => ("PASS".to_owned(), 0),
            Err(error) => (format!("FAIL: {error:#}"), 1),
        };
        println!("{line}");
        match write_whole(&stage.dir.join("result"), &line) {
            Ok(()) => code,
            Err(_) => 3,
        }
    }

    /// The instance's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the directory of the workload's own files, which is also its working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join("files").join(name)
    }

    /// Says that the state stands and may be dumped from now on.
    pub fn ready(&self) -> Result<()> {
        match self.gate.take() {
            Some(gate) => fs::File::from(gate)
                .write_all(b"r")
                .context("telling the parent of readiness"),
            None if self.root => {
                write_whole(&self.dir.join("ready"), "").context("making the ready file")
            }
            None => Ok(()),
        }
    }

    /// Sleeps until SIGTERM; threads may all sleep here at once.
    pub fn wait(&self) {
        stop::wait();
    }

    /// Says ready, and sleeps until SIGTERM.
    pub fn ready_and_wait(&self) -> Result<()> {
        self.ready()?;
        self.wait();
        Ok(())
    }

    /// Tells whether SIGTERM has come, for workloads that do something all the time.
    pub fn stopping(&self) -> bool {
        stop::requested()
    }

    /// Tells whether the task may have been killed and restored; if not, it has gone on all the time,
    /// and nothing at all may show.
    pub fn may_have_been_restored(&self) -> bool {
        std::env::var_os(SAME_TASKS).is_none()
    }

    /// Forks a child that runs `body`, and returns when it has called [`Stage::ready`].
    ///
    /// **Errors** when the child ends before it is ready.
    pub fn child(&self, body: impl FnOnce(&Stage) -> Result<()>) -> Result<Child> {
        let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
        let pid = sys::fork().context("forking a child")?;
        if pid == 0 {
            drop(reader);
            // The parent's own gate has been inherited; its reader must see the end of file.
            drop(self.gate.take());
            let stage = Stage {
                dir: self.dir.clone(),
                gate: RefCell::new(Some(writer)),
                root: false,
            };
            sys::exit_now(stage.perform_child(body));
        }
        drop(writer);
        let child = Child {
            pid,
            failure: self.failure_path(pid),
        };
        let mut byte = [0];
        match fs::File::from(reader).read(&mut byte) {
            Ok(1) => Ok(child),
            Ok(_) => {
                child.reap().context("before it was ready")?;
                bail!("child {pid} ended before it was ready")
            }
            Err(error) => Err(error).context("waiting for a child to be ready"),
        }
    }

    /// Takes a task as a child that has become one, as a subreaper gets orphans.
    pub fn adopt(&self, pid: i32) -> Child {
        Child {
            pid,
            failure: self.failure_path(pid),
        }
    }

    fn perform_child(&self, body: impl FnOnce(&Stage) -> Result<()>) -> i32 {
        match guarded(|| body(self)) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("task {}: {error:#}", sys::pid());
                let _ = write_whole(&self.failure_path(sys::pid()), &format!("{error:#}"));
                1
            }
        }
    }

    fn failure_path(&self, pid: i32) -> PathBuf {
        self.dir.join(format!("failure.{pid}"))
    }
}

impl Child {
    /// Sends SIGTERM, waits for the end, and passes on what the child found wrong.
    pub fn finish(self) -> Result<()> {
        sys::kill(self.pid, libc::SIGTERM).with_context(|| format!("ending child {}", self.pid))?;
        self.reap()
    }

    /// Waits for the end, and passes on what the child found wrong.
    pub fn reap(self) -> Result<()> {
        let exit = sys::wait(self.pid).with_context(|| format!("waiting for {}", self.pid))?;
        match fs::read_to_string(&self.failure) {
            Ok(reason) => bail!("child {}: {reason}", self.pid),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("reading a child's reason"),
        }
        ensure!(exit == Exit::Code(0), "child {}: {exit}", self.pid);
        Ok(())
    }
}

/// Runs `body` with a panic turned into an error; the panic's text is in the log.
fn guarded(body: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| bail!("panicked, see the log"))
}

/// Writes a file so that whoever sees it sees all of it.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let partial = path.with_extension(format!("partial.{}", sys::pid()));
    fs::write(&partial, text)?;
    fs::rename(&partial, path)
}
