//! `firn dump`.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use firn_engine::cancel::CancelFlag;
use firn_engine::inject::{Journal, Repair, repair};
use firn_engine::script::Scripts;
use firn_engine::{Dump, DumpError, DumpReport, FileValidation, Leave, Pid};
use firn_sys::Errno;
use firn_sys::signal::TerminationFlag;
use firn_sys::worker::{self, Side, Worker};
use serde_json::{Value, json};

use crate::args::{DumpArgs, Validation};
use crate::output::{self, Failure, bytes, counted, duration, micros};
use crate::progress;
use crate::tracker::Holders;

/// Longer than anybody waits, and short enough to be added to a time.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Whether a command line names the dump where it usually does, before all options.
pub fn is_named_by(argv: &[OsString]) -> bool {
    argv.get(1).is_some_and(|word| word == "dump")
}

/// Which of the two processes of a dump this is, and what the worker notes in memory of both.
pub enum Part {
    /// The process that was called.
    Front(Worker, Option<Journal>),
    /// The one that does the work.
    Worker(Option<Journal>),
}

/// Begins a process of its own for the work.
///
/// For some hundred microseconds the tasks hold registers of ours. A SIGKILL for the process that was called leaves the
/// worker time to put everything back; after one for the worker, the process that was called does that, out of the
/// journal.
pub fn split() -> Result<Part, Failure> {
    let journal = Journal::new().ok();
    match worker::split() {
        Ok(Side::Front(worker)) => Ok(Part::Front(worker, journal)),
        Ok(Side::Worker) => Ok(Part::Worker(journal)),
        Err(errno) => Err(Failure::io("the dump can't be started", &errno.into())),
    }
}

/// Dumps; status 0 says that the images are complete. `part` tells which of the two processes this is where they have
/// been split before.
pub fn run(args: &DumpArgs, part: Option<Part>) -> Result<u8, Failure> {
    match part.map_or_else(split, Ok)? {
        Part::Front(worker, journal) => status_of(worker, journal.as_ref()),
        Part::Worker(journal) => work(args, journal),
    }
}

/// The status of the worker, which has told everything else itself.
pub fn status_of(worker: Worker, journal: Option<&Journal>) -> Result<u8, Failure> {
    let failed = |errno: Errno| Failure::io("the dump can't be waited for", &errno.into());
    let status = worker.wait().map_err(failed)?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(u8::try_from(code).unwrap_or(output::FAILED)),
        (None, signal) => {
            let signal = signal.unwrap_or(0);
            let mut message = format!("the process that dumps was killed by signal {signal}");
            if let Some(journal) = journal {
                message.push_str(&told_of(&repair(journal)));
            }
            Err(Failure::new("gone", message))
        }
    }
}

/// What was put back, in words.
fn told_of(repair: &Repair) -> String {
    let mut said = String::new();
    if repair.signal.is_some() {
        said.push_str(
            "; the images are complete, and what it had begun with the tasks was finished",
        );
    }
    if repair.thawed {
        said.push_str("; the cgroup of the tasks was thawed");
    }
    if repair.connections > 0 {
        let connections = counted(repair.connections, "TCP connection");
        said.push_str(&format!("; {connections} went on"));
    }
    if repair.put_back > 0 {
        let threads = counted(repair.put_back, "thread");
        said.push_str(&format!("; {threads} got back what it had changed"));
    }
    for (tid, error) in &repair.failures {
        said.push_str(&format!("; thread {tid} is not as it was: {error}"));
    }
    said
}

fn work(args: &DumpArgs, journal: Option<Journal>) -> Result<u8, Failure> {
    let work_dir = args.common.work_dir();
    crate::log::start(&crate::log::Settings {
        file: args.common.log.log_file.as_deref(),
        work_dir: &work_dir,
        verbosity: args.common.log.verbosity,
        with_pid: false,
    })?;
    let cancel = CancelFlag::new();
    let _signals = TerminationFlag::install(cancel.as_atomic())
        .map_err(|errno| Failure::io("signals can't be handled", &errno.into()))?;
    match operation(args, &cancel).journal(journal).run() {
        Ok(report) => {
            tell(args, &report);
            Ok(0)
        }
        Err(error) => Err(failure(&error).logged(&args.common.log)),
    }
}

fn operation(args: &DumpArgs, cancel: &CancelFlag) -> Dump {
    let mut sockets = args.sockets.options();
    sockets.ext_unix_inodes.extend(args.external.unix_peers());
    let mut dump = Dump::new(Pid::from_raw(args.tree))
        .images_dir(&args.common.images_dir)
        .work_dir(args.common.work_dir())
        .leave(leave(args))
        .shell_job(args.shell_job)
        .link_remap(args.link_remap)
        .file_locks(args.file_locks)
        .track_mem(args.track_mem)
        .trackers(Arc::new(Holders))
        .timeout(timeout(args.timeout))
        .file_validation(validation(args.file_validation))
        .sockets(sockets)
        .scripts(scripts(&args.action_script))
        .cancel(cancel.clone());
    for key in args.external.files() {
        dump = dump.external(key);
    }
    if let Some(limit) = args.ghost_limit {
        dump = dump.ghost_limit(limit);
    }
    if let Some(dir) = &args.prev_images_dir {
        dump = dump.prev_images_dir(dir);
    }
    if let Some(path) = &args.freeze_cgroup {
        dump = dump.freeze_cgroup(path);
    }
    match progress::bar(&args.common.log) {
        Some(bar) => dump.progress(bar),
        None => dump,
    }
}

fn timeout(seconds: u32) -> Duration {
    match seconds {
        0 => FOREVER,
        n => Duration::from_secs(u64::from(n)),
    }
}

fn leave(args: &DumpArgs) -> Leave {
    match (args.leave_running, args.leave_stopped) {
        (true, _) => Leave::Running,
        (_, true) => Leave::Stopped,
        _ => Leave::Killed,
    }
}

/// The engine's word for a way to recognize files.
pub fn validation(validation: Validation) -> FileValidation {
    match validation {
        Validation::Filesize => FileValidation::FileSize,
        Validation::Buildid => FileValidation::BuildId,
        Validation::Mtime => FileValidation::Mtime,
    }
}

/// Scripts of the command line, in order of registration.
pub fn scripts(lines: &[OsString]) -> Scripts {
    let mut scripts = Scripts::new();
    for line in lines {
        scripts.register(line);
    }
    scripts
}

pub fn failure(error: &DumpError) -> Failure {
    let mut failure = Failure::of(error);
    failure.obstacles = error.obstacles().to_vec();
    if let Some(status) = error.script_status() {
        failure.code = u8::try_from(status).unwrap_or(output::FAILED);
    }
    failure
}

fn tell(args: &DumpArgs, report: &DumpReport) {
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
            "dumped {}, {}, frozen for {}",
            counted(report.tasks, "task"),
            bytes(report.bytes),
            duration(report.frozen)
        ));
    }
}

fn as_json(report: &DumpReport) -> Value {
    json!({
        "command": "dump",
        "ok": true,
        "tasks": report.tasks,
        "threads": report.threads,
        "pages": report.pages,
        "pages_in_parent": report.pages_in_parent,
        "bytes": report.bytes,
        "freezing_us": micros(report.freezing),
        "frozen_us": micros(report.frozen),
        "memory_us": micros(report.memory_time),
        "write_us": micros(report.write_time),
        "total_us": micros(report.total),
        "warnings": report.warnings,
    })
}

fn statistics(report: &DumpReport) -> String {
    let rows = [
        ("Tasks", report.tasks.to_string()),
        ("Threads", report.threads.to_string()),
        (
            "Pages written",
            format!("{} ({})", report.pages, bytes(report.bytes)),
        ),
        ("Pages in the parent", report.pages_in_parent.to_string()),
        ("Freezing time", duration(report.freezing)),
        ("Frozen time", duration(report.stood_still())),
        ("Memory dump time", duration(report.memory_time)),
        ("Memory write time", duration(report.write_time)),
        ("Total time", duration(report.total)),
    ];
    output::rows("Dump", &rows)
}
