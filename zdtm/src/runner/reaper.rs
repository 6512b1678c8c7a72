//! Children of a case: every task of the tree may become one.
//!
//! The case is the nearest subreaper (or pid 1 of its namespace), so orphans of a killed tree and the
//! root of a restored one turn up here. They have to be reaped at once, else their pids stay taken.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys::{self, Exit};

/// Collects the ends of all children of this process.
#[derive(Debug, Default)]
pub struct Reaper {
    ended: HashMap<i32, Exit>,
}

impl Reaper {
    /// Becomes the one who gets the orphans.
    pub fn new() -> io::Result<Reaper> {
        sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
        Ok(Reaper::default())
    }

    /// Starts a program; from now on only the reaper waits for it.
    pub fn start(&mut self, command: &mut Command) -> Result<i32> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let pid = i32::try_from(child.id()).context("a pid above 2^31")?;
        self.ended.remove(&pid);
        Ok(pid)
    }

    /// Takes every child that has ended.
    pub fn collect(&mut self) {
        while let Ok((pid, status)) = sys::wait_status(-1, libc::WNOHANG) {
            if pid == 0 {
                break;
            }
            self.ended.insert(pid, Exit::from_status(status));
        }
    }

    /// How a child ended, when it has.
    pub fn end_of(&mut self, pid: i32) -> Option<Exit> {
        self.collect();
        self.ended.get(&pid).copied()
    }

    /// Forgets an end, because the pid is about to be used again.
    pub fn forget(&mut self, pid: i32) {
        self.ended.remove(&pid);
    }

    /// Reaps and asks `done` again and again until it gives something.
    ///
    /// **Errors** when `timeout` passes first, naming `what`.
    pub fn until<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        mut done: impl FnMut(&mut Reaper) -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        let mut pause = 1;
        loop {
            self.collect();
            if let Some(value) = done(self) {
                return Ok(value);
            }
            if start.elapsed() > timeout {
                bail!("{what}: nothing after {} s", timeout.as_secs());
            }
            sys::pause_for(pause);
            pause = (pause + 1).min(10);
        }
    }
}
