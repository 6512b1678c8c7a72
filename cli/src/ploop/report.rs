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
        if let Some(bar) = self.bar(Some(all), PERCENT) {
            bar.set_length(all);
            bar.set_position(done);
        }
        true
    }

    /// Draws bytes of which nobody knows how many there will be.
    pub fn show_bytes(&mut self, done: u64) {
        if let Some(bar) = self.bar(None, BYTES) {
            bar.set_position(done);
        }
    }

    fn bar(&mut self, all: Option<u64>, template: &str) -> Option<&ProgressBar> {
        if !self.watched || self.start.elapsed() < PATIENCE {
            return None;
        }
        let what = self.what;
        Some(self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(all, ProgressDrawTarget::stderr());
            bar.set_style(style(template));
            bar.set_message(what);
            bar
        }))
    }
}

const PERCENT: &str = "{msg:<14} [{bar:32}] {percent} %";
const BYTES: &str = "{msg:<14} {binary_bytes}";
const WAITING: &str = "{msg:<14} {spinner} {elapsed}";

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style
        .expect("the template is a constant")
        .progress_chars("=> ")
}

/// Says that something goes on that does not tell how far it is: a tool of the file system's.
pub struct Waiting(ProgressBar);

impl Waiting {
    /// For work of this name, until it is dropped.
    pub fn of(what: &'static str, json: bool) -> Waiting {
        let watched = std::io::stderr().is_terminal() && !json;
        let target = match watched {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(style(WAITING));
        bar.set_message(what);
        if watched {
            bar.enable_steady_tick(PATIENCE);
        }
        Waiting(bar)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_hold() {
        for template in [PERCENT, BYTES, WAITING] {
            style(template);
        }
    }
}
