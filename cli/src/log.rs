//! The log: lines of tracing events with CRIU's time prefix, into a file of the work directory or to
//! stderr.
//!
//! Errors and warnings carry `Error (file:line):` and `Warn  (file:line):`, which is what container
//! runtimes look for in a log.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::output::Failure;

/// How to log.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// File, `-` for stdout, None for stderr; relative to the work directory.
    pub file: Option<&'a Path>,
    /// Work directory.
    pub work_dir: &'a Path,
    /// 0 silent, 1 errors, 2 warnings, 3 information, 4 and more everything.
    pub verbosity: u8,
    /// Puts the pid of the task that a line is about, else the own one, into the prefix.
    pub with_pid: bool,
}

/// Starts logging for this process.
///
/// # Errors
/// The log file can't be made.
pub fn start(settings: &Settings<'_>) -> Result<(), Failure> {
    let sink: Box<dyn Write + Send> = match settings.file {
        None => Box::new(std::io::stderr()),
        Some(path) if path.as_os_str() == "-" => Box::new(std::io::stdout()),
        Some(path) => Box::new(open(&settings.work_dir.join(path))?),
    };
    let log = Log {
        start: Instant::now(),
        level: level(settings.verbosity),
        with_pid: settings.with_pid,
        sink: Mutex::new(sink),
        spans: AtomicU64::new(1),
    };
    // The first one wins; a second start would be a mistake of ours and loses nothing.
    let _ = tracing::subscriber::set_global_default(log);
    Ok(())
}

fn open(path: &Path) -> Result<File, Failure> {
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    opened.map_err(|error| {
        Failure::io(
            format!("log file {} can't be opened", path.display()),
            &error,
        )
        .hint("-o names a file in the work directory (-W, else -D), which must exist")
    })
}

fn level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

struct Log {
    start: Instant,
    level: LevelFilter,
    with_pid: bool,
    sink: Mutex<Box<dyn Write + Send>>,
    spans: AtomicU64,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = self.line(event.metadata(), &text);
        // One write per line; a log that can't be written must not end the operation.
        if let Ok(mut sink) = self.sink.lock() {
            let _ = sink.write_all(line.as_bytes());
        }
    }

    // Spans only group; the lines name their objects themselves.
    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed))
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}

impl Log {
    fn line(&self, metadata: &Metadata<'_>, text: &Text) -> String {
        let since = self.start.elapsed();
        let mut line = format!("({:02}.{:06})", since.as_secs(), since.subsec_micros());
        if self.with_pid {
            let own = || std::process::id().to_string();
            let _ = write!(line, " pid {}", text.pid.clone().unwrap_or_else(own));
        }
        let place = || {
            format!(
                "({}:{})",
                metadata.file().unwrap_or("?"),
                metadata.line().unwrap_or(0)
            )
        };
        match *metadata.level() {
            Level::ERROR => line.push_str(&format!(" Error {}:", place())),
            Level::WARN => line.push_str(&format!(" Warn  {}:", place())),
            _ => {}
        }
        for part in [&text.message, &text.fields] {
            if !part.is_empty() {
                let _ = write!(line, " {part}");
            }
        }
        line.push('\n');
        line
    }
}

/// The message of an event and its other fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
    pid: Option<String>,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            // A message of several lines would break the prefix.
            "message" => self.message = format!("{value:?}").replace('\n', "\\n"),
            name => {
                if matches!(name, "pid" | "tid" | "task") {
                    self.pid = Some(format!("{value:?}"));
                }
                let gap = if self.fields.is_empty() { "" } else { " " };
                let _ = write!(self.fields, "{gap}{name}={value:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn lines(verbosity: u8, with_pid: bool) -> Vec<String> {
        let shared = Shared::default();
        let log = Log {
            start: Instant::now(),
            level: level(verbosity),
            with_pid,
            sink: Mutex::new(Box::new(shared.clone())),
            spans: AtomicU64::new(1),
        };
        tracing::subscriber::with_default(log, || {
            tracing::error!("broken");
            tracing::warn!(fd = 3, "odd");
            tracing::info!(pid = 42, "task seized");
            tracing::debug!("two\nlines");
        });
        let text = String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn verbosity_selects_levels() {
        let counts: Vec<usize> = (0..=4).map(|level| lines(level, false).len()).collect();
        assert_eq!(counts, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn errors_and_warnings_carry_their_place() {
        let lines = lines(4, false);
        assert!(lines[0].starts_with("(00.0") && lines[0].contains(" Error (cli/src/log.rs:"));
        assert!(lines[0].ends_with("): broken"), "{}", lines[0]);
        assert!(
            lines[1].contains(" Warn  (") && lines[1].ends_with(": odd fd=3"),
            "{}",
            lines[1]
        );
        assert!(lines[3].ends_with(r") two\nlines"), "{}", lines[3]);
    }

    #[test]
    fn the_pid_column_names_the_task() {
        let lines = lines(3, true);
        assert!(lines[2].contains(") pid 42 task seized"), "{}", lines[2]);
        assert!(lines[0].contains(&format!(") pid {} Error", std::process::id())));
    }
}
