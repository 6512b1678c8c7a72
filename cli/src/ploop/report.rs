//! Answers: text for people, JSON for programs, bars for the patient.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use firn_ploop::FolderError;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::output::Failure;

/// Short work draws no bar.
const PATIENCE: Duration = Duration::from_millis(300);

/// An error of the library, with the original's exit status.
pub fn failure(error: &FolderError) -> Failure {
    let class = match error.exit_code() {
        11 | 39 => "corrupt",
        29 => "cancelled",
        38 | 43 => "usage",
        _ => "refused",
    };
    let mut failure = Failure::new(class, error.to_string()).caused_by(error);
    failure.code = error.exit_code();
    if failure.code == 37 {
        failure.hint = Some(
            "unmount it first; if nobody has it open, 'firn ploop check --repair' takes the mark off"
                .to_owned(),
        );
    }
    failure
}

/// Prints one object, or the text.
pub fn answer(json: bool, object: &Value, text: &str) -> Result<u8, Failure> {
    let line = match json {
        true => format!("{object}\n"),
        false => text.to_owned(),
    };
    match std::io::stdout().write_all(line.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::io("stdout can't be written", &error))
        }
        _ => Ok(0),
    }
}

/// A bar for work that is counted in steps, drawn where somebody looks on.
pub struct Steps {
    bar: Option<ProgressBar>,
    start: Instant,
    what: &'static str,
    watched: bool,
}

impl Steps {
    /// For work of this name.
    pub fn of(what: &'static str, json: bool) -> Steps {
        Steps {
            bar: None,
            start: Instant::now(),
            what,
            watched: std::io::stderr().is_terminal() && !json,
        }
    }

    /// Draws, and lets the work go on.
    pub fn show(&mut self, done: u64, all: u64) -> bool {
        if !self.watched || self.start.elapsed() < PATIENCE {
            return true;
        }
        let what = self.what;
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(all), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{msg:<14} [{bar:32}] {percent} %");
            let style = style.expect("the template is a constant");
            bar.set_style(style.progress_chars("=> "));
            bar.set_message(what);
            bar
        });
        bar.set_length(all);
        bar.set_position(done);
        true
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
