//! How the demo speaks: with colours on a terminal, plainly into a pipe.

use std::fmt::Display;
use std::io::{IsTerminal, Write};

use super::stage::{Actor, State};

/// The speaker.
pub struct Voice {
    colours: bool,
}

impl Voice {
    /// Looks at stdout and NO_COLOR.
    pub fn new() -> Voice {
        let wanted = std::env::var_os("NO_COLOR").is_none();
        Voice {
            colours: wanted && std::io::stdout().is_terminal(),
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// What this is all about.
    pub fn title(&self, text: &str) {
        line(self.paint("1", text));
    }

    /// A new scene.
    pub fn step(&self, text: &str) {
        line(format_args!("\n{}", self.paint("1", text)));
    }

    /// A command that does the same from a shell.
    pub fn command(&self, command: &str) {
        line(format_args!(
            "\n{} {}",
            self.paint("2", "$"),
            self.paint("1;36", command)
        ));
    }

    /// A remark.
    pub fn say(&self, text: &str) {
        line(format_args!("  {text}"));
    }

    /// An empty line.
    pub fn blank(&self) {
        line("");
    }

    /// The processes, as a tree.
    pub fn cast(&self, cast: &[Actor]) {
        for actor in cast {
            let indent = "  ".repeat(actor.depth);
            let threads = match actor.threads {
                1 => String::new(),
                n => format!("  ({n} threads)"),
            };
            line(format_args!(
                "  {:>8}  {indent}{}{threads}",
                actor.pid, actor.command
            ));
        }
    }

    /// How far the world has come.
    pub fn progress(&self, text: &str, state: &State) {
        let State {
            ticks,
            counted,
            heard,
        } = state;
        line(format_args!("  {text}:"));
        line(format_args!(
            "            tick {ticks}, listener heard {heard}, threads counted {counted}"
        ));
    }

    /// A claim, and whether it holds.
    pub fn check(&self, holds: bool, what: &str) {
        let mark = if holds {
            self.paint("32", "ok")
        } else {
            self.paint("31", "NO")
        };
        line(format_args!("  {mark}  {what}"));
    }
}

/// One line to stdout; the demo goes on, and cleans up, even when nobody listens any more.
fn line(text: impl Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
