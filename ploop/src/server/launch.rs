//! Starting a server and taking a disk down.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::config::{Launched, NotServed, ServeConfig};
use super::registry::Record;
use super::{Client, ControlError, mounting};
use crate::device::users::{users_of, users_of_mount};

/// So many times the patience for users an image is given to be closed.
const CLOSING: u32 = 20;

/// How the server's program is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its first arguments, which make it call [`run`](super::run).
    pub prefix: Vec<String>,
}

/// Why a disk was not served or not taken down.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The program could not be started.
    #[error("{program} can't be started")]
    Start {
        /// The program.
        program: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The server said why.
    #[error(transparent)]
    Failed(NotServed),
    /// The server ended without a word.
    #[error("the server ended at its start")]
    Silent,
    /// A file system could not be unmounted.
    #[error("{target} can't be unmounted{}", used_by(.users))]
    Unmount {
        /// Where it is mounted.
        target: String,
        /// Who was found to use it.
        users: Vec<String>,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The server goes on, because somebody still uses its device.
    #[error("{device} is still in use: {}", named(.users))]
    StillUsed {
        /// The device.
        device: String,
        /// Who was found to use it.
        users: Vec<String>,
    },
    /// The image is not closed yet.
    #[error("{disk} is unmounted, but still writes what it holds down to its image")]
    StillClosing {
        /// The disk.
        disk: String,
    },
}

fn used_by(users: &[String]) -> String {
    match users.is_empty() {
        true => String::new(),
        false => format!(", since it is used by {}", users.join(" and ")),
    }
}

fn named(users: &[String]) -> String {
    match users.is_empty() {
        true => "another mount of it, or a program that has it open".to_owned(),
        false => users.join("; "),
    }
}

impl LaunchError {
    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            LaunchError::Start { .. } | LaunchError::Silent => 12,
            LaunchError::Failed(why) => why.code,
            LaunchError::Unmount { .. } => 22,
            LaunchError::StillUsed { .. } | LaunchError::StillClosing { .. } => 17,
        }
    }
}

impl Launcher {
    /// The `firn` command: this program where it is that, else the one that is found in PATH.
    pub fn firn() -> Launcher {
        let this = std::env::current_exe().ok();
        let is_firn = |path: &PathBuf| path.file_name().is_some_and(|name| name == "firn");
        Launcher {
            program: this
                .filter(is_firn)
                .unwrap_or_else(|| PathBuf::from("firn")),
            prefix: vec!["ploop".to_owned(), "serve".to_owned()],
        }
    }

    /// Starts a server; returns when its device is there and its file system mounted.
    ///
    /// # Errors
    /// The server can't be started or says why it can't serve the disk.
    pub fn launch(&self, config: &ServeConfig) -> Result<Record, LaunchError> {
        let answer = self.ask(config).map_err(|source| LaunchError::Start {
            program: self.program.display().to_string(),
            source,
        })?;
        match serde_json::from_str(&answer) {
            Ok(Launched::Ready(record)) => Ok(record),
            Ok(Launched::Failed(why)) => Err(LaunchError::Failed(why)),
            Err(_) => Err(LaunchError::Silent),
        }
    }

    fn ask(&self, config: &ServeConfig) -> io::Result<String> {
        let mut words: Vec<OsString> = self.prefix.iter().map(OsString::from).collect();
        words.push("supervise".into());
        let mut child = Command::new(&self.program)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let text = serde_json::to_vec(config).map_err(io::Error::other)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&text)?;
        }
        let mut answer = String::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_string(&mut answer)?;
        }
        child.wait()?;
        Ok(answer)
    }
}

/// Takes a disk down: unmounts what was mounted from it, and returns when its image is closed. A device
/// that has users then is waited for as long as `patience` lasts.
///
/// # Errors
/// Somebody uses it.
pub fn unmount(record: &Record, patience: Duration) -> Result<(), LaunchError> {
    let Some(supervisor) = Pid::from_raw(record.supervisor) else {
        return Ok(());
    };
    // Before the unmount: the number may belong to somebody else a moment later.
    let Ok(process) = rustix::process::pidfd_open(supervisor, PidfdFlags::empty()) else {
        return Ok(());
    };
    match (&record.mountpoint, &record.device) {
        (Some(target), Some(device)) => unmount_at(record.supervisor, device, target)?,
        _ => {
            // It may have ended by itself in the meantime.
            let _ = rustix::process::pidfd_send_signal(&process, Signal::TERM);
        }
    }
    for _ in 0..CLOSING {
        if has_ended(&process, patience) {
            return Ok(());
        }
        if !is_closing(record) {
            let device = record.device.clone().unwrap_or_default();
            return Err(LaunchError::StillUsed {
                users: users_of(&device),
                device: device.display().to_string(),
            });
        }
    }
    Err(LaunchError::StillClosing {
        disk: record.source.path().display().to_string(),
    })
}

/// Waits for a process's end.
fn has_ended(process: &OwnedFd, patience: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < patience {
        let left = patience.saturating_sub(begun.elapsed());
        let timeout = rustix::time::Timespec::try_from(left).ok();
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            _ => return true,
        }
    }
    false
}

/// Whether the device has lost its last user, and only the image has to be closed: on a slow host, with
/// much that is not written yet, that takes its time. A server that is not there any more is at its end.
fn is_closing(record: &Record) -> bool {
    let stat = Client::connect(&record.control).and_then(|mut client| client.stat());
    match stat {
        Ok(stat) => stat.is_closing,
        Err(error) => matches!(error, ControlError::Unreachable { .. }),
    }
}

/// Unmounts, unless somebody has already.
fn unmount_at(supervisor: i32, device: &Path, target: &Path) -> Result<(), LaunchError> {
    let unmounted = mounting::where_seen_by(supervisor, || {
        match mounting::is_mounted_at(device, target) {
            true => mounting::unmount(target),
            false => Ok(()),
        }
    });
    unmounted.flatten().map_err(|source| LaunchError::Unmount {
        target: target.display().to_string(),
        users: match source.kind() {
            io::ErrorKind::ResourceBusy => users_of_mount(target),
            _ => Vec::new(),
        },
        source,
    })
}
