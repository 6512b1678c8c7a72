//! A namespace per test, with the test itself as its first process.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, WaitStatus};
use tempfile::TempDir;

use crate::command::firn_path;
use crate::standstill;
use crate::survive::{rounds, tries};

/// Set, to the test's name, in the process that runs the body.
const INSIDE: &str = "FIRN_TEST_INSIDE";
/// Longest that one test may take, in seconds: so much, and so much per round of a long-running program and
/// per try at a tree in motion.
const LIMIT: usize = 240;
const LIMIT_PER_ROUND: usize = 60;
const LIMIT_PER_TRY: usize = 15;

/// Closes what the caller of the tests left open: it belongs to no test, and lies outside the
/// namespace's mounts. Then runs the rest of the arguments.
const CLOSE_INHERITED: &str = r#"
    for fd in /proc/$$/fd/*; do
        fd=${fd##*/}
        [ "$fd" -le 2 ] || [ "$fd" -eq 255 ] || exec {fd}>&-
    done
    exec "$@""#;

/// Runs `body` as the first process of new pid and mount namespaces.
///
/// `name` is the name of the calling test function: the test binary runs itself again with it as the
/// filter. Without root, or when one of `programs` is not installed, the test is skipped.
pub fn isolated(name: &str, programs: &[&str], body: impl FnOnce(&Sandbox)) {
    run_isolated(name, &[], programs, body);
}

/// As [`isolated`], with a network of its own, where only the loopback interface is there and up, and with
/// System V objects of its own: for servers with fixed ports and keys.
pub fn isolated_server(name: &str, programs: &[&str], body: impl FnOnce(&Sandbox)) {
    let programs: Vec<_> = programs.iter().chain(&["ip"]).copied().collect();
    run_isolated(name, &["--net", "--ipc"], &programs, |sandbox| {
        let mut up = Command::new("ip");
        sandbox
            .run(up.args(["link", "set", "lo", "up"]))
            .expect_success("ip");
        body(sandbox);
    });
}

fn run_isolated(name: &str, spaces: &[&str], programs: &[&str], body: impl FnOnce(&Sandbox)) {
    if std::env::var_os(INSIDE).is_some_and(|inside| inside == name) {
        let sandbox = Sandbox::new();
        body(&sandbox);
        sandbox.assert_nothing_left();
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip(name, "needs root");
    }
    if let Some(missing) = programs.iter().find(|program| !is_installed(program)) {
        return skip(name, &format!("{missing} is not installed"));
    }
    let output = Command::new("bash")
        .args([
            "-c",
            CLOSE_INHERITED,
            "bash",
            "timeout",
            "--kill-after=5",
            &(LIMIT + LIMIT_PER_ROUND * rounds() + LIMIT_PER_TRY * tries()).to_string(),
        ])
        .args(["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"])
        .args(spaces)
        .arg(std::env::current_exe().expect("a running test has a path"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, name)
        .env("RUST_BACKTRACE", "0")
        .env("FIRN_BIN", firn_path())
        .output()
        .expect("bash is there to run timeout and unshare");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{name} in its namespace: {}\n{text}{errors}",
        output.status
    );
    assert!(
        text.contains("1 passed"),
        "no test is called {name}:\n{text}{errors}"
    );
}

/// Notes that a test cannot run, or fails it where skipping is not allowed.
pub fn skip(name: &str, reason: &str) {
    assert!(
        std::env::var_os("FIRN_TESTS_REQUIRE").is_none(),
        "{name} cannot run: {reason}"
    );
    // Straight to the descriptor: the test harness hides what passing tests print.
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {reason}");
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// The namespace's scratch directory and the exit statuses of what ran in it.
pub struct Sandbox {
    dir: TempDir,
    statuses: RefCell<HashMap<i32, WaitStatus>>,
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("FIRN_TESTS_KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("left for inspection: {}", self.dir().display());
        }
    }
}

impl Sandbox {
    fn new() -> Self {
        let dir = TempDir::with_prefix("firn-test-").expect("the temporary directory is writable");
        Self {
            dir,
            statuses: RefCell::default(),
        }
    }

    /// The scratch directory; removed when the test ends.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes and names a directory in the scratch directory.
    pub fn make_dir(&self, name: &str) -> PathBuf {
        let dir = self.dir().join(name);
        std::fs::create_dir(&dir).unwrap_or_else(|error| panic!("cannot make {name}: {error}"));
        dir
    }

    /// Reaps everything that has ended. Not while an engine command is running, or its status
    /// would be lost to it.
    pub(crate) fn reap(&self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.statuses
                .borrow_mut()
                .insert(pid.as_raw_nonzero().get(), status);
        }
    }

    /// Forgets how a pid ended, since it is in use again.
    pub fn forget(&self, pid: i32) {
        self.statuses.borrow_mut().remove(&pid);
    }

    /// How a pid ended, if it has.
    pub(crate) fn ended(&self, pid: i32) -> Option<WaitStatus> {
        self.reap();
        self.statuses.borrow().get(&pid).copied()
    }

    /// Every pid in the namespace but our own.
    pub fn pids(&self) -> Vec<i32> {
        self.reap();
        let entries = std::fs::read_dir("/proc").expect("/proc is mounted");
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names
            .filter_map(|name| name.parse().ok())
            .filter(|pid| *pid != 1)
            .collect()
    }

    /// Waits until `done`, or panics with `what` after `seconds`.
    #[track_caller]
    pub fn wait_until(&self, seconds: u64, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(
                start.elapsed() < Duration::from_secs(seconds),
                "after {seconds} s: {what}{}",
                standstill::describe(&self.pids())
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until all of these are gone and reaped.
    #[track_caller]
    pub(crate) fn wait_until_ended(&self, pids: &[i32]) {
        self.wait_until(60, "killed tasks are still there", || {
            let left = self.pids();
            !pids.iter().any(|pid| left.contains(pid))
        });
    }

    /// Checks that no process is left in the namespace.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.wait_until(60, "tasks are left", || {
            let left = self.pids();
            left.is_empty()
                || left
                    .iter()
                    .all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        });
    }
}
