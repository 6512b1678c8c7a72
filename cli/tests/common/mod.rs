//! Calling the command, and processes for it to work on.
#![allow(dead_code, reason = "each test program uses a part of this")]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The command, without configuration files of this machine.
pub fn firn(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_firn"));
    command.args(args).stdin(Stdio::null());
    command
        .env("HOME", "/nonexistent")
        .env_remove("CRIU_CONFIG_FILE");
    command
}

/// Runs it and collects what it says.
pub fn run(args: &[&str]) -> Said {
    Said::of(firn(args).output().unwrap())
}

/// What a finished command said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn of(output: Output) -> Said {
        Said {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The one JSON object on stdout.
    pub fn json(&self) -> Value {
        assert_eq!(self.out.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.out).unwrap()
    }

    /// Asserts success.
    pub fn good(self) -> Said {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }
}

/// Whether dump and restore can work for this user; says why not.
pub fn can_run() -> bool {
    let works = run(&["check"]).code == Some(0);
    if !works {
        eprintln!("skipped: 'firn check' says that dump and restore do not work here");
    }
    works
}

/// A bash script in a session of its own, without terminal; killed and reaped when dropped.
pub struct Victim(pub Child);

impl Victim {
    pub fn start(script: &str, dir: &Path) -> Victim {
        // A pipe of whoever runs the tests would be an end outside the tree.
        firn_sys::session::close_on_exec_from(3).unwrap();
        let child = Command::new("setsid")
            .args(["bash", "-c", script])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Victim(child)
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A restored process that is not our child; killed when dropped.
pub struct Restored(pub String);

impl Restored {
    pub fn is_running(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
        !matches!(state.flatten(), None | Some('Z' | 'X'))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = Command::new("kill").args(["-KILL", &self.0]).status();
        }
    }
}

/// Waits until `reached` holds.
pub fn until(what: &str, reached: impl Fn() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "waited in vain for {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The contents of a file, empty when it is not there.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
