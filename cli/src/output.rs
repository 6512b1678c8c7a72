//! What the user and programs are told: errors, hints, reports as JSON.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::time::Duration;

use firn_engine::class::ErrorClass;
use firn_engine::{DumpError, RestoreError};
use serde_json::{Value, json};

use crate::args::LogArgs;

/// Exit status of a failure.
pub const FAILED: u8 = 1;
/// Exit status of a wrong command line or configuration file.
pub const USAGE: u8 = 2;

/// What all errors of the engine tell.
pub trait EngineError: std::error::Error {
    /// Kind of the failure.
    fn class(&self) -> ErrorClass;
    /// What the user can do.
    fn hint(&self) -> Option<String>;
}

macro_rules! engine_errors {
    ($($error:ty),*) => {
        $(impl EngineError for $error {
            fn class(&self) -> ErrorClass {
                <$error>::class(self)
            }

            fn hint(&self) -> Option<String> {
                <$error>::hint(self)
            }
        })*
    };
}

engine_errors!(DumpError, RestoreError);

/// Whether it is the user's rights that are missing.
fn denies(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::PermissionDenied
}

/// Why a command failed, ready to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Class of the error, as `--json` names it.
    pub class: &'static str,
    /// One clause: which object, what went wrong.
    pub message: String,
    /// What caused it, outermost first.
    pub causes: Vec<String>,
    /// What the user can do.
    pub hint: Option<String>,
    /// Somebody with more rights could have done it.
    pub denied: bool,
    /// Everything that is in the way of a dump.
    pub obstacles: Vec<firn_engine::obstacle::Obstacle>,
    /// Exit status of the program.
    pub code: u8,
}

impl Failure {
    /// A failure of the operation itself.
    pub fn new(class: &'static str, message: impl Into<String>) -> Failure {
        Failure {
            class,
            message: message.into(),
            causes: Vec::new(),
            hint: None,
            denied: false,
            obstacles: Vec::new(),
            code: FAILED,
        }
    }

    /// A wrong command line or configuration file.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure {
            code: USAGE,
            ..Failure::new("usage", message)
        }
    }

    /// An error of the engine, with its causes and its hint; its status is CRIU's, whatever its class.
    pub fn of(error: &impl EngineError) -> Failure {
        let class = match error.class() {
            ErrorClass::Unsupported => "unsupported",
            ErrorClass::Refused => "refused",
            ErrorClass::Gone => "gone",
            ErrorClass::Corrupt => "corrupt",
            ErrorClass::Usage => "usage",
            ErrorClass::Cancelled => "cancelled",
            ErrorClass::Bug => "bug",
        };
        let mut failure = Failure::new(class, error.to_string()).caused_by(error);
        failure.hint = error.hint();
        failure
    }

    /// An input or output error of the command itself.
    pub fn io(message: impl Into<String>, error: &std::io::Error) -> Failure {
        let mut failure = Failure::new("refused", message);
        failure.causes.push(error.to_string());
        failure.denied = denies(error);
        failure
    }

    /// Adds what the user can do.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the chain of causes of an error.
    pub fn caused_by(mut self, error: &dyn std::error::Error) -> Failure {
        let mut source = error.source();
        while let Some(cause) = source {
            self.causes.push(cause.to_string());
            self.denied |= cause.downcast_ref::<std::io::Error>().is_some_and(denies);
            source = cause.source();
        }
        self
    }

    /// Also puts it into the log, where that is a file: stderr is told anyway.
    pub fn logged(self, log: &LogArgs) -> Failure {
        if log.log_file.is_some() {
            tracing::error!("{}", self.sentence());
            for obstacle in &self.obstacles {
                tracing::error!("{obstacle}");
            }
        }
        self
    }

    /// The message and its causes in one line.
    pub fn sentence(&self) -> String {
        let mut text = self.message.clone();
        for cause in &self.causes {
            let _ = write!(text, ": {cause}");
        }
        text
    }

    /// Everything, for people: the sentence, one obstacle per line, the hint.
    pub fn for_people(&self) -> String {
        let mut text = format!("error: {}\n", self.sentence());
        for obstacle in &self.obstacles {
            let _ = writeln!(text, "  {obstacle}");
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(text, "hint: {hint}");
        }
        text
    }

    /// Everything, for programs.
    pub fn for_programs(&self, command: &str) -> Value {
        let obstacles: Vec<Value> = self
            .obstacles
            .iter()
            .map(|obstacle| {
                json!({
                    "pid": obstacle.pid.raw(),
                    "object": obstacle.object,
                    "reason": obstacle.reason,
                    "hint": obstacle.hint,
                })
            })
            .collect();
        json!({
            "command": command,
            "ok": false,
            "exit_code": self.code,
            "error": {
                "class": self.class,
                "message": self.message,
                "causes": self.causes,
                "hint": self.hint,
                "obstacles": obstacles,
            },
        })
    }
}

/// Tells what was done on stdout. What was done is done: a report that can't be written does not make it a
/// failure, and a reader that has left does not want to hear it.
pub fn report(text: &str) {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            remark(&format!("warning: the report can't be written: {error}"));
        }
        _ => {}
    }
}

/// Tells people a line on stderr, unless somebody closed it.
pub fn remark(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Bytes with a binary unit: `512 B`, `41 MiB`, `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in units {
        let whole = count >> shift;
        if whole == 0 {
            continue;
        }
        let tenths = ((count >> (shift - 10)) & 1023) * 10 / 1024;
        return if whole < 10 && tenths > 0 {
            format!("{whole}.{tenths} {unit}")
        } else {
            format!("{whole} {unit}")
        };
    }
    format!("{count} B")
}

/// A duration for people: `870 us`, `6.1 ms`, `2.4 s`.
pub fn duration(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => format!("{}.{} ms", micros / 1_000, micros / 100 % 10),
        _ => format!("{}.{} s", micros / 1_000_000, micros / 100_000 % 10),
    }
}

/// A small table of names and values under a title.
pub fn rows(title: &str, rows: &[(&str, String)]) -> String {
    let mut text = format!("{title}\n");
    for (name, value) in rows {
        let _ = writeln!(text, "  {name:<18} {value}");
    }
    text
}

/// `1 task`, `3 tasks`.
pub fn counted(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// Microseconds as a JSON number.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use firn_engine::obstacle::Obstacle;

    use super::*;

    #[test]
    fn sizes_and_times() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(4096), "4 KiB");
        assert_eq!(bytes(41 << 20), "41 MiB");
        assert_eq!(bytes((3 << 30) / 2), "1.5 GiB");
        assert_eq!(bytes(u64::MAX), "17179869183 GiB");
        assert_eq!(duration(Duration::from_micros(870)), "870 us");
        assert_eq!(duration(Duration::from_micros(6_140)), "6.1 ms");
        assert_eq!(duration(Duration::from_millis(2_400)), "2.4 s");
        assert_eq!(counted(1, "task"), "1 task");
        assert_eq!(counted(0, "task"), "0 tasks");
    }

    #[test]
    fn a_failure_is_a_sentence_a_list_and_a_hint() {
        let mut failure = Failure::new("unsupported", "task 7 can't be dumped").hint("wait");
        failure.causes.push("EPERM".to_owned());
        failure.obstacles.push(Obstacle {
            pid: firn_engine::Pid::from_raw(7),
            object: "fd 3 (socket:[1])".to_owned(),
            reason: "sockets come later".to_owned(),
            hint: None,
        });
        let wanted = "error: task 7 can't be dumped: EPERM\n  \
                      task 7: fd 3 (socket:[1]): sockets come later\nhint: wait\n";
        assert_eq!(failure.for_people(), wanted);
        let json = failure.for_programs("dump");
        assert_eq!(json["ok"], false);
        assert_eq!(json["exit_code"], 1);
        assert_eq!(json["error"]["obstacles"][0]["pid"], 7);
    }
}
