//! The server of one disk, and the process that watches over it.
//!
//! ```text
//! launcher ── starts ──> supervisor ── starts, again and again ──> worker
//!                        holds: /dev/fuse, mount,                  opens the image,
//!                        control socket, state memfd,              answers requests and
//!                        the file system's mount                   the control socket
//! ```
//!
//! The supervisor touches no data and so has little to fail at. When the worker dies, however that
//! came, the kernel keeps all requests as long as the supervisor holds the channel; a new worker asks
//! for those that were read and not answered and goes on. Nothing above notices but the time.
//!
//! When the loop device is released (the last user has unmounted) the worker closes the image and
//! ends, and the supervisor with it.

mod client;
mod config;
pub mod control;
mod conversation;
mod find;
mod launch;
mod long;
mod mounting;
mod open;
mod pending;
mod registry;
mod scratch;
mod setup;
mod state;
mod supervisor;
mod worker;

pub use client::{Client, ControlError};
pub use config::{Denied, MountConfig, NotServed, ServeConfig, Source, THREADS};
pub use launch::{LaunchError, Launcher, unmount};
pub use mounting::where_seen_by;
pub use registry::{RUN_DIR, RUN_DIR_VARIABLE, Record, Registry};

/// Runs as one of the server's processes. `words` are the program's arguments; those before the last
/// `supervise` or `worker` make this program a server, and are kept for its workers. Returns the exit
/// status.
pub fn run(words: &[String]) -> u8 {
    let at = words
        .iter()
        .position(|word| word == "supervise" || word == "worker");
    let outcome = match at.map(|at| (&words[..at], &words[at..])) {
        Some((prefix, [word])) if word == "supervise" => supervisor::run(prefix),
        Some((_, [word, config])) if word == "worker" => {
            worker::run(config).map_err(|error| chain_of(&error))
        }
        _ => Err("not to be called by hand".to_owned()),
    };
    match outcome {
        Ok(()) => 0,
        Err(message) => {
            eprintln!("{message}");
            1
        }
    }
}

/// Whether an error comes of missing rights.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        let refusal = cause.downcast_ref::<std::io::Error>();
        refusal.is_some_and(|it| it.kind() == std::io::ErrorKind::PermissionDenied)
    })
}

/// An error and its causes in one line.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
