//! `firn restore`.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use firn_engine::cancel::CancelFlag;
use firn_engine::{Restore, RestoreReport};
use firn_sys::signal::TerminationFlag;
use serde_json::{Value, json};

use crate::args::RestoreArgs;
use crate::dump::{scripts, validation};
use crate::output::{self, Failure, bytes, counted, duration, micros};
use crate::progress;

/// Restores; detached, status 0 says that the tree runs, else the status is that of its root task.
pub fn run(args: &RestoreArgs) -> Result<u8, Failure> {
    check_together(args)?;
    let work_dir = args.common.work_dir();
    crate::log::start(&crate::log::Settings {
        file: args.common.log.log_file.as_deref(),
        work_dir: &work_dir,
        verbosity: args.common.log.verbosity,
        with_pid: args.log_pid,
    })?;
    restore(args, &work_dir).map_err(|failure| failure.logged(&args.common.log))
}

fn check_together(args: &RestoreArgs) -> Result<(), Failure> {
    if args.exec_cmd && args.restore_detached {
        return Err(Failure::usage(
            "--exec-cmd and --restore-detached exclude each other",
        ));
    }
    if args.restore_sibling && !args.restore_detached {
        return Err(Failure::usage("--restore-sibling needs --restore-detached"));
    }
    if let Some(key) = args.inherit.missing() {
        let what = format!("--external {key} needs --inherit-fd 'fd[N]:{key}'");
        return Err(Failure::usage(what));
    }
    if !args.command.is_empty() && !args.exec_cmd {
        return Err(Failure::usage("a command needs --exec-cmd"));
    }
    Ok(())
}

fn restore(args: &RestoreArgs, work_dir: &Path) -> Result<u8, Failure> {
    let written = args.inherit.write_debug();
    written.map_err(|error| Failure::io("the text of --inherit-fd can't be written", &error))?;
    let cancel = CancelFlag::new();
    let operation = operation(args, work_dir, &cancel);
    if args.plan {
        let plan = operation.plan().map_err(|error| Failure::of(&error))?;
        return crate::print(plan.as_bytes());
    }
    let pidfile = args
        .pidfile
        .as_ref()
        .map(|path| PidFile::make(&work_dir.join(path)))
        .transpose()?;
    let signals = TerminationFlag::install(cancel.as_atomic())
        .map_err(|errno| Failure::io("signals can't be handled", &errno.into()))?;
    let mut report = operation.run().map_err(|error| Failure::of(&error))?;
    // From here on the tree runs, and a signal ends this program alone.
    drop(signals);
    if let Some(pidfile) = pidfile {
        pidfile.write(report.pid.raw())?;
    }
    tell(args, &report);
    if args.exec_cmd {
        return Err(exec(args, &report));
    }
    if args.restore_detached {
        return Ok(0);
    }
    let status = report.wait().map_err(|errno| {
        Failure::io(
            format!("root task {} can't be waited for", report.pid),
            &errno.into(),
        )
    })?;
    Ok(status_byte(status))
}

fn operation(args: &RestoreArgs, work_dir: &Path, cancel: &CancelFlag) -> Restore {
    let mut restore = Restore::new(&args.common.images_dir)
        .work_dir(work_dir)
        .sibling(args.restore_sibling)
        .leave_stopped(args.leave_stopped)
        .strict(args.strict)
        .shell_job(args.shell_job)
        .skip_file_rwx_check(args.skip_file_rwx_check)
        .file_validation(validation(args.file_validation))
        .sockets(args.sockets.options())
        .labels(args.lsm_profile.clone().unwrap_or_default())
        .scripts(scripts(&args.action_script))
        .cancel(cancel.clone());
    for (pattern, policy) in &args.file_policy {
        restore = restore.file_policy(pattern, *policy);
    }
    for (fd, key) in args.inherit.objects() {
        restore = restore.inherit_fd(fd, key);
    }
    if let Some(root) = &args.root {
        restore = restore.root(root);
    }
    match progress::bar(&args.common.log) {
        Some(bar) => restore.progress(bar),
        None => restore,
    }
}

/// The exit status of the root task, or 128 and the signal that killed it.
fn status_byte(status: std::process::ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status
        .code()
        .or_else(|| Some(128 + status.signal()?))
        .unwrap_or(1);
    u8::try_from(code).unwrap_or(output::FAILED)
}

/// The pid file, made before the restore so that nothing can go wrong with it afterwards; it goes again
/// if there is no pid to put into it.
struct PidFile {
    path: PathBuf,
    file: std::fs::File,
    is_new: bool,
    is_written: bool,
}

impl PidFile {
    fn make(path: &Path) -> Result<PidFile, Failure> {
        let is_new = !path.exists();
        // What an old file says holds until there is a new pid.
        let opened = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(path);
        let file = opened.map_err(|error| {
            Failure::io(format!("pid file {} can't be made", path.display()), &error)
        })?;
        Ok(PidFile {
            path: path.to_owned(),
            file,
            is_new,
            is_written: false,
        })
    }

    fn write(mut self, pid: i32) -> Result<(), Failure> {
        let text = pid.to_string();
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.write_all(text.as_bytes()));
        self.is_written = true;
        written.map_err(|error| {
            let what = format!(
                "the tree runs as {pid}, but pid file {} can't be written",
                self.path.display()
            );
            Failure::io(what, &error)
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_new && !self.is_written {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Becomes the command, which is then the parent of the tree; returns only if that fails.
fn exec(args: &RestoreArgs, report: &RestoreReport) -> Failure {
    let (program, rest) = args.command.split_first().expect("clap requires a command");
    let mut command = Command::new(program);
    command.args(rest);
    command.env("CRTOOLS_SCRIPT_ACTION", "post-resume");
    command.env("CRTOOLS_INIT_PID", report.pid.to_string());
    command.env("CRTOOLS_IMAGE_DIR", &args.common.images_dir);
    let error = command.exec();
    let what = format!(
        "the tree runs as {}, but command {program:?} can't be run",
        report.pid
    );
    Failure::io(what, &error)
}

fn tell(args: &RestoreArgs, report: &RestoreReport) {
    let log = &args.common.log;
    for warning in &report.warnings {
        output::remark(&format!("warning: {warning}"));
    }
    if log.json {
        output::report(&format!("{}\n", as_json(report)));
        return;
    }
    if args.display_stats {
        output::report(&statistics(report));
    }
    if progress::is_watched(log) {
        output::remark(&format!(
            "restored {} as {}, {}, in {}",
            counted(report.tasks, "task"),
            report.pid,
            bytes(report.bytes),
            duration(report.total)
        ));
    }
}

fn as_json(report: &RestoreReport) -> Value {
    json!({
        "command": "restore",
        "ok": true,
        "pid": report.pid.raw(),
        "tasks": report.tasks,
        "threads": report.threads,
        "pages": report.pages,
        "bytes": report.bytes,
        "fork_us": micros(report.fork_time),
        "total_us": micros(report.total),
        "warnings": report.warnings,
    })
}

fn statistics(report: &RestoreReport) -> String {
    let rows = [
        ("Tasks", report.tasks.to_string()),
        ("Threads", report.threads.to_string()),
        (
            "Pages restored",
            format!("{} ({})", report.pages, bytes(report.bytes)),
        ),
        ("Forking time", duration(report.fork_time)),
        ("Total time", duration(report.total)),
    ];
    output::rows("Restore", &rows)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn statuses() {
        assert_eq!(status_byte(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(status_byte(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn a_pid_file_without_a_pid_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        drop(PidFile::make(&path).unwrap());
        assert!(!path.exists());
        PidFile::make(&path).unwrap().write(4711).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "4711");
        drop(PidFile::make(&path).unwrap());
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "4711",
            "an old file stays"
        );
    }
}
