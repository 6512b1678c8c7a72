//! Namespaces for one case: pids, ids and ports that nobody else can take, and an end that takes
//! everything along.

use std::env;
use std::ffi::CStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result};

use crate::sys;

/// Runs this program again with `arguments` as pid 1 of a new pid namespace, with its own `/proc`,
/// pseudo terminals, mounts, network and System V objects.
///
/// The child dies with this process, and all that it started with it.
pub fn run_as_init(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<ExitStatus> {
    let kinds = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;
    sys::unshare(kinds).context("making namespaces")?;
    sys::raise_loopback().context("bringing the loopback interface up")?;
    sys::mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)
        .context("keeping mounts to ourselves")?;
    let mut command = Command::new(env::current_exe().context("finding our own program")?);
    command.args(arguments);
    die_with_parent(&mut command);
    command.status().context("starting the case")
}

/// Mounts the `/proc` of the pid namespace this process is the first of.
pub fn mount_proc() -> io::Result<()> {
    const PROC: &CStr = c"proc";
    sys::mount(Some(PROC), c"/proc", Some(PROC), 0)
}

/// Mounts pseudo terminals whose numbers no other case can take.
pub fn mount_terminals() -> io::Result<()> {
    const DEVPTS: &CStr = c"devpts";
    // A device node finds the instance beside it: `/dev/ptmx` needs no mount of its own.
    sys::mount(Some(DEVPTS), c"/dev/pts", Some(DEVPTS), 0)
}

/// Lets a program that is about to be started get SIGKILL when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) {
    let own_pid = sys::pid();
    let before_exec = move || {
        sys::prctl(libc::PR_SET_PDEATHSIG, 9)?;
        // The parent may be gone already. A first process of a namespace sees parent 0.
        match sys::parent() {
            0 => Ok(()),
            parent if parent == own_pid => Ok(()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    };
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(before_exec) };
}
