//! The `firn` command: parses, calls the engine, tells what came of it.
// They panic where nobody listens; `output` and `print` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod check;
mod config;
mod demo;
mod dump;
mod external;
mod image;
mod log;
mod man;
mod normalize;
mod options;
mod output;
mod ploop;
mod progress;
mod restore;
mod sockets;
mod tracker;
mod unlock;

use std::ffi::OsString;
use std::io::Write;

use crate::args::Task;
use crate::dump::Part;
use crate::output::{Failure, USAGE};

fn main() -> ! {
    let code = run(std::env::args_os().collect());
    // Nobody waits for memory to be given back piece by piece.
    let _ = std::io::stdout().flush();
    firn_sys::task::exit(code)
}

fn run(argv: Vec<OsString>) -> u8 {
    let json = argv
        .iter()
        .take_while(|word| *word != "--")
        .any(|word| word == "--json");
    let (command, result) = obey(argv);
    result.unwrap_or_else(|failure| {
        tell(&failure, command, json);
        failure.code
    })
}

/// Does what the command line says; returns its command, and the status.
fn obey(argv: Vec<OsString>) -> (&'static str, Result<u8, Failure>) {
    // What comes before a fork is copied by it, so it comes first where that can be.
    let part = match dump::is_named_by(&argv).then(dump::split).transpose() {
        Ok(Some(Part::Front(worker, journal))) => {
            return ("dump", dump::status_of(worker, journal.as_ref()));
        }
        Ok(part) => part,
        Err(failure) => return ("dump", Err(failure)),
    };
    match parse(argv) {
        Ok(Parsed::Task(task)) => (name(&task), act(*task, part)),
        Ok(Parsed::Answered(code)) => ("firn", Ok(code)),
        Err(failure) => ("firn", Err(failure)),
    }
}

/// What a command line comes to.
enum Parsed {
    /// Something to do.
    Task(Box<Task>),
    /// Help or version, already printed; the status.
    Answered(u8),
}

fn parse(argv: Vec<OsString>) -> Result<Parsed, Failure> {
    let normalized = normalize::normalize(argv, |name| std::env::var_os(name))?;
    let cli = match args::parse(&normalized.words) {
        Ok(cli) => cli,
        Err(error) => return answer(&error).map(Parsed::Answered),
    };
    for warning in &normalized.warnings {
        output::remark(&format!("warning: {warning}"));
    }
    Ok(Parsed::Task(Box::new(cli.command)))
}

fn name(task: &Task) -> &'static str {
    match task {
        Task::Dump(_) => "dump",
        Task::Restore(_) => "restore",
        Task::Image(_) => "image",
        Task::Check(_) => "check",
        Task::Unlock(_) => "unlock",
        Task::Ploop(_) => "ploop",
        Task::Demo(_) | Task::DemoWorld(_) => "demo",
        Task::HoldTracker => "hold-tracker",
        Task::Completions { .. } => "completions",
        Task::Man { .. } => "man",
    }
}

/// Does a task; this process is the one that works already where there are two.
fn act(task: Task, part: Option<Part>) -> Result<u8, Failure> {
    match task {
        Task::Dump(args) => dump::run(&args, part),
        Task::Restore(args) => restore::run(&args),
        Task::Image(args) => image::run(&args),
        Task::Check(args) => check::run(&args),
        Task::Unlock(args) => unlock::run(&args),
        Task::Ploop(args) => ploop::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::HoldTracker => tracker::hold(),
        Task::DemoWorld(args) => demo::world::run(&args),
        Task::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut args::definitions(), "firn", &mut text);
            print(&text)
        }
        Task::Man { dir } => man::write(&dir).map(|()| 0),
    }
}

/// Prints help and version; turns the parser's other answers into failures.
fn answer(error: &clap::Error) -> Result<u8, Failure> {
    if error.use_stderr() {
        return Err(clap_failure(error));
    }
    print(error.render().ansi_to_string_if_terminal().as_bytes())
}

fn clap_failure(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
    Failure {
        code: USAGE,
        ..Failure::usage(text)
    }
}

/// Writes to stdout; a reader that has left is no error.
fn print(bytes: &[u8]) -> Result<u8, Failure> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::io("stdout can't be written", &error))
        }
        _ => Ok(0),
    }
}

fn tell(failure: &Failure, command: &str, json: bool) {
    // Somebody who closed stderr or stdout does not want to hear it.
    let _ = std::io::stderr().write_all(failure.for_people().as_bytes());
    if json {
        let _ = writeln!(std::io::stdout(), "{}", failure.for_programs(command));
    }
}

/// Colours help where a person reads it.
trait IfTerminal {
    fn ansi_to_string_if_terminal(&self) -> String;
}

impl IfTerminal for clap::builder::StyledStr {
    fn ansi_to_string_if_terminal(&self) -> String {
        use std::io::IsTerminal;
        if std::io::stdout().is_terminal() {
            self.ansi().to_string()
        } else {
            self.to_string()
        }
    }
}
