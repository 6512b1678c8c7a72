//! Running the engine under test, and its peer.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use crate::sandbox::Sandbox;

/// The binary under test: `FIRN_BIN`, or the workspace's own, built first so that it is not stale.
pub fn firn_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| std::env::var_os("FIRN_BIN").map_or_else(build_firn, PathBuf::from))
}

fn build_firn() -> PathBuf {
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build
        .args(["build", "--quiet", "-p", "firn"])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    assert!(
        build.status().expect("cargo runs").success(),
        "cannot build firn"
    );
    let exe = std::env::current_exe().expect("a running test has a path");
    let profile = exe
        .ancestors()
        .nth(2)
        .expect("tests lie in TARGET/PROFILE/deps");
    profile.join("firn")
}

/// The peer's binary, if one was named.
pub fn criu() -> Option<PathBuf> {
    std::env::var_os("FIRN_CRIU").map(PathBuf::from)
}

/// What a command left behind.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// The end of its log, for the messages of failed tests.
    pub log: String,
}

impl Finished {
    /// Panics with the command's own words unless it succeeded.
    #[track_caller]
    pub fn expect_success(self, what: &str) -> Self {
        let Self {
            status,
            stdout,
            stderr,
            log,
        } = &self;
        assert!(status.success(), "{what}: {status}\n{stdout}{stderr}{log}");
        self
    }

    /// Checks for a refusal as people should see it: an exit code that is not zero, and one line that
    /// names each of `names`, with at most a hint below it. Returns the line.
    #[track_caller]
    pub fn expect_refusal(&self, names: &[&str]) -> String {
        let Self { status, stderr, .. } = self;
        assert!(
            status.code().is_some_and(|code| code != 0),
            "not refused: {self:?}"
        );
        assert!(!stderr.contains("panicked"), "it panicked: {stderr}");
        let is_said = |line: &&str| !line.trim().is_empty() && !line.starts_with("hint: ");
        let lines: Vec<_> = stderr.lines().filter(is_said).collect();
        let [line] = lines[..] else {
            panic!("not one line, but {}: {stderr}", lines.len())
        };
        assert!(line.len() < 400, "too long to read: {line}");
        for name in names {
            assert!(line.contains(name), "does not say {name:?}: {line}");
        }
        line.to_owned()
    }
}

impl Sandbox {
    /// Runs `firn` with these arguments.
    pub fn firn<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        self.run(Command::new(firn_path()).args(arguments))
    }

    /// Runs a command to its end. Its output goes through files: a restored task that kept the
    /// engine's end of a pipe open would otherwise be waited for.
    pub fn run(&self, command: &mut Command) -> Finished {
        let out = self.dir().join("command.out");
        let err = self.dir().join("command.err");
        let status = command
            .stdin(Stdio::null())
            .stdout(File::create(&out).expect("the scratch directory is writable"))
            .stderr(File::create(&err).expect("the scratch directory is writable"))
            .status()
            .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        let text = |path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into();
        Finished {
            status,
            stdout: text(&out),
            stderr: text(&err),
            log: String::new(),
        }
    }

    /// As [`Sandbox::run`], for a command that writes a log.
    pub fn run_logged(&self, command: &mut Command, log: &Path) -> Finished {
        let finished = self.run(command);
        let text = std::fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(6)..].join("\n");
        Finished {
            log: tail,
            ..finished
        }
    }
}
