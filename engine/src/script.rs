//! Action scripts: programs of the user that run at fixed points of a dump or a restore.
//!
//! They are CRIU's: each is a shell command line, several run in the reverse order of their
//! registration, all of them run even if one fails, and the exit statuses are OR-ed. The environment
//! tells them where they are:
//!
//! | variable | value |
//! |---|---|
//! | `CRTOOLS_SCRIPT_ACTION` | name of the point, such as `post-dump` |
//! | `CRTOOLS_IMAGE_DIR` | `/proc/PID/fd/N` of the image directory, valid while the script runs |
//! | `CRTOOLS_INIT_PID` | pid of the root task, where it is known |

use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use firn_sys::Pid;

/// A point at which scripts run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScriptAction {
    /// Before the tree is touched; failure ends the dump.
    PreDump,
    /// The images are complete and the tasks still frozen; failure leaves the tasks running and its
    /// status becomes that of the dump.
    PostDump,
    /// Before anything is created; failure ends the restore.
    PreRestore,
    /// The tree is complete but does not run yet; failure removes it.
    PostRestore,
    /// Just before the tasks run; failure is only logged.
    PreResume,
    /// The tasks run; failure is only logged.
    PostResume,
}

impl ScriptAction {
    /// The name that scripts see.
    pub fn name(self) -> &'static str {
        match self {
            ScriptAction::PreDump => "pre-dump",
            ScriptAction::PostDump => "post-dump",
            ScriptAction::PreRestore => "pre-restore",
            ScriptAction::PostRestore => "post-restore",
            ScriptAction::PreResume => "pre-resume",
            ScriptAction::PostResume => "post-resume",
        }
    }

    /// Whether a failure ends the operation.
    pub fn is_decisive(self) -> bool {
        !matches!(self, ScriptAction::PreResume | ScriptAction::PostResume)
    }
}

impl fmt::Display for ScriptAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the scripts are told.
#[derive(Debug, Clone, Copy)]
pub struct ScriptContext<'a> {
    /// The image directory.
    pub images_dir: BorrowedFd<'a>,
    /// The root task, once it is known.
    pub init_pid: Option<Pid>,
}

/// Failed scripts of one action.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// At least one ended with a status other than 0.
    #[error("{action} script {script:?} {}", describe(*.status))]
    Failed {
        /// When it ran.
        action: ScriptAction,
        /// The first script that failed.
        script: OsString,
        /// How that one ended.
        status: ExitStatus,
        /// Exit statuses of all scripts of the action, OR-ed; 128 + number for a signal.
        code: i32,
    },
    /// The shell could not be started.
    #[error("{action} script {script:?} can't be run by /bin/sh")]
    Spawn {
        /// When it should have run.
        action: ScriptAction,
        /// The script.
        script: OsString,
        /// Why.
        source: std::io::Error,
    },
}

impl ScriptError {
    /// The exit status of an operation that ends with this failure: that of the scripts where it was
    /// a post-dump script, which is how a script says that the tasks are to run on.
    pub fn exit_code(&self) -> i32 {
        match self {
            ScriptError::Failed {
                action: ScriptAction::PostDump,
                code,
                ..
            } => *code,
            _ => 1,
        }
    }
}

/// The scripts of one operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scripts {
    lines: Vec<OsString>,
}

impl Scripts {
    /// No scripts.
    pub fn new() -> Scripts {
        Scripts::default()
    }

    /// Registers a shell command line; it runs before those registered earlier.
    pub fn register(&mut self, line: impl Into<OsString>) {
        self.lines.push(line.into());
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Runs all scripts, one after the other, and waits for them.
    ///
    /// # Errors
    /// The first script that failed or could not be started; the others have run all the same.
    pub fn run(
        &self,
        action: ScriptAction,
        context: &ScriptContext<'_>,
    ) -> Result<(), ScriptError> {
        let mut failure: Option<ScriptError> = None;
        let mut all = 0;
        for line in self.lines.iter().rev() {
            tracing::debug!("running {action} script {line:?}");
            let status = match command(line, action, context).status() {
                Ok(status) => status,
                Err(source) => {
                    let script = line.clone();
                    failure.get_or_insert(ScriptError::Spawn {
                        action,
                        script,
                        source,
                    });
                    continue;
                }
            };
            all |= exit_code(status);
            if !status.success() {
                let script = line.clone();
                failure.get_or_insert(ScriptError::Failed {
                    action,
                    script,
                    status,
                    code: 0,
                });
            }
        }
        match failure {
            None => Ok(()),
            Some(ScriptError::Failed {
                action,
                script,
                status,
                ..
            }) => Err(ScriptError::Failed {
                action,
                script,
                status,
                code: all,
            }),
            Some(error) => Err(error),
        }
    }
}

fn command(line: &OsString, action: ScriptAction, context: &ScriptContext<'_>) -> Command {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(line);
    command.env("CRTOOLS_SCRIPT_ACTION", action.name());
    let images = format!(
        "/proc/{}/fd/{}",
        Pid::this(),
        context.images_dir.as_raw_fd()
    );
    command.env("CRTOOLS_IMAGE_DIR", images);
    match context.init_pid {
        Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
        // A value inherited from an outer engine would name a stranger.
        None => command.env_remove("CRTOOLS_INIT_PID"),
    };
    command
}

fn exit_code(status: ExitStatus) -> i32 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "did not end".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::path::Path;

    use super::*;

    struct Scene {
        dir: tempfile::TempDir,
        handle: File,
    }

    impl Scene {
        fn new() -> Scene {
            let dir = tempfile::tempdir().unwrap();
            let handle = File::open(dir.path()).unwrap();
            Scene { dir, handle }
        }

        fn path(&self) -> &Path {
            self.dir.path()
        }

        fn run(
            &self,
            lines: &[&str],
            action: ScriptAction,
            pid: Option<i32>,
        ) -> Result<String, ScriptError> {
            let mut scripts = Scripts::new();
            for line in lines {
                scripts.register(line.replace("LOG", &format!("{}/log", self.path().display())));
            }
            let context = ScriptContext {
                images_dir: self.handle.as_fd(),
                init_pid: pid.map(Pid::from_raw),
            };
            scripts.run(action, &context)?;
            Ok(self.log())
        }

        fn log(&self) -> String {
            std::fs::read_to_string(self.path().join("log")).unwrap_or_default()
        }
    }

    #[test]
    fn a_script_sees_action_directory_and_pid() {
        let scene = Scene::new();
        std::fs::write(scene.path().join("marker"), "here").unwrap();
        let line = r#"echo "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID $(cat $CRTOOLS_IMAGE_DIR/marker)" >> LOG"#;
        let log = scene
            .run(&[line], ScriptAction::PostRestore, Some(4711))
            .unwrap();
        assert_eq!(log, "post-restore 4711 here\n");
    }

    #[test]
    fn without_a_root_task_the_variable_is_unset() {
        let log = Scene::new()
            .run(
                &["echo \"${CRTOOLS_INIT_PID-none}\" >> LOG"],
                ScriptAction::PreRestore,
                None,
            )
            .unwrap();
        assert_eq!(log, "none\n");
    }

    #[test]
    fn the_last_registered_runs_first() {
        let log = Scene::new()
            .run(
                &["echo one >> LOG", "echo two >> LOG"],
                ScriptAction::PreDump,
                None,
            )
            .unwrap();
        assert_eq!(log, "two\none\n");
    }

    #[test]
    fn all_run_and_their_statuses_are_ored() {
        let scene = Scene::new();
        let lines = ["echo ran >> LOG; exit 4", "exit 3"];
        let error = scene.run(&lines, ScriptAction::PostDump, None).unwrap_err();
        assert_eq!(scene.log(), "ran\n");
        assert_eq!(error.exit_code(), 7);
        assert_eq!(
            error.to_string(),
            "post-dump script \"exit 3\" ended with status 3"
        );
    }

    #[test]
    fn death_by_signal_is_a_failure() {
        let error = Scene::new()
            .run(&["kill -9 $$"], ScriptAction::PostDump, None)
            .unwrap_err();
        assert_eq!(error.exit_code(), 137);
        assert!(
            error.to_string().ends_with("was killed by signal 9"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_program_is_the_shells_127() {
        let error = Scene::new()
            .run(&["/nowhere/script"], ScriptAction::PostDump, None)
            .unwrap_err();
        assert_eq!(error.exit_code(), 127);
    }

    #[test]
    fn other_scripts_end_an_operation_with_1() {
        let error = Scene::new()
            .run(&["exit 9"], ScriptAction::PreDump, None)
            .unwrap_err();
        assert_eq!(error.exit_code(), 1);
    }

    #[test]
    fn only_the_resume_scripts_may_fail() {
        assert!(ScriptAction::PostDump.is_decisive());
        assert!(!ScriptAction::PreResume.is_decisive() && !ScriptAction::PostResume.is_decisive());
    }
}
