//! The progress bar: phase and bytes on stderr, where a person looks on.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use firn_engine::progress::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::LogArgs;

/// Short operations draw nothing.
const PATIENCE: Duration = Duration::from_millis(150);

/// Whether a person watches: stderr is a terminal and nothing else is asked for.
pub fn is_watched(log: &LogArgs) -> bool {
    std::io::stderr().is_terminal() && !log.json && log.verbosity > 0
}

/// A callback for the engine that draws a bar, or None where nobody watches or log lines would break
/// it.
pub fn bar(log: &LogArgs) -> Option<Box<dyn FnMut(Progress) + Send>> {
    let log_on_stderr = log.log_file.is_none() && log.verbosity > 2;
    if !is_watched(log) || log_on_stderr {
        return None;
    }
    let start = Instant::now();
    let mut bar = Bar { drawn: None };
    Some(Box::new(move |progress| {
        if start.elapsed() > PATIENCE {
            bar.show(&progress);
        }
    }))
}

/// The bar, cleared from the terminal when it goes.
struct Bar {
    drawn: Option<ProgressBar>,
}

impl Bar {
    fn show(&mut self, progress: &Progress) {
        let bar = self.drawn.get_or_insert_with(|| {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
        });
        bar.set_style(style(progress.total_bytes > 0));
        bar.set_message(progress.phase.to_string());
        if progress.total_bytes > 0 {
            bar.set_length(progress.total_bytes);
        }
        bar.set_position(progress.done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.drawn {
            bar.finish_and_clear();
        }
    }
}

/// A bar where it is known how much there is, the bytes alone where it is not.
fn style(total_is_known: bool) -> ProgressStyle {
    let template = match total_is_known {
        true => "{msg:<14} [{bar:32}] {binary_bytes} of {binary_total_bytes}",
        false => "{msg:<14} {binary_bytes}",
    };
    let style = ProgressStyle::with_template(template);
    style
        .expect("the template is a constant")
        .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_templates_hold() {
        super::style(true);
        super::style(false);
    }
}
