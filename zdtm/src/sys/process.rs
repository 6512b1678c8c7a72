//! Processes: making them, waiting for them, their groups and sessions.

use std::ffi::{CStr, CString};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::check;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

impl Exit {
    /// Reads a wait status.
    pub fn from_status(status: i32) -> Exit {
        if libc::WIFSIGNALED(status) {
            Exit::Signal(libc::WTERMSIG(status))
        } else {
            Exit::Code(libc::WEXITSTATUS(status))
        }
    }
}

/// This process's id, asked from the kernel.
pub fn pid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::getpid() }
}

/// The parent's id.
pub fn parent() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::getppid() }
}

/// This thread's id, asked from the kernel.
pub fn tid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// Forks; 0 in the child.
pub fn fork() -> io::Result<i32> {
    // SAFETY: the workloads fork from one thread, or the child only makes system calls.
    check(unsafe { libc::fork() })
}

/// Makes a process by raw `clone` that shares what `flags` says, but not the stack; 0 in the child.
///
/// # Safety
/// As `clone` without a new stack: `CLONE_VM` must not be among the flags.
pub unsafe fn clone_process(flags: i32) -> io::Result<i32> {
    let flags = i64::from(flags | libc::SIGCHLD);
    let pid = super::call_plain(libc::SYS_clone, [flags, 0, 0, 0, 0, 0])?;
    i32::try_from(pid).map_err(io::Error::other)
}

/// Ends the process without any cleaning up.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Waits for one child to end; interruptions are waited through.
pub fn wait(pid: i32) -> io::Result<Exit> {
    loop {
        match wait_status(pid, 0) {
            Ok((_, status)) => return Ok(Exit::from_status(status)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Calls `waitpid` and returns the pid (0: nothing yet) and the raw status.
pub fn wait_status(pid: i32, options: i32) -> io::Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    let pid = check(unsafe { libc::waitpid(pid, &raw mut status, options) })?;
    Ok((pid, status))
}

/// Waits until a child has ended, and leaves it a zombie.
pub fn wait_leaving_zombie(pid: i32) -> io::Result<()> {
    let id = u32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: an all-zero siginfo is a valid one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOWAIT;
    // SAFETY: the siginfo lives through the call.
    check(unsafe { libc::waitid(libc::P_PID, id, &raw mut info, options) }).map(drop)
}

/// Makes a session.
pub fn setsid() -> io::Result<i32> {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() })
}

/// Puts a process into a group.
pub fn setpgid(pid: i32, group: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::setpgid(pid, group) }).map(drop)
}

/// The process group and the session of this process.
pub fn group_and_session() -> (i32, i32) {
    // SAFETY: numbers only.
    unsafe { (libc::getpgid(0), libc::getsid(0)) }
}

/// Calls `prctl` with numbers.
pub fn prctl(option: i32, argument: u64) -> io::Result<i32> {
    // SAFETY: only used for options that take numbers.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

/// Lets other threads and processes run.
pub fn pause_for(millis: u64) {
    std::thread::sleep(std::time::Duration::from_millis(millis));
}

/// Leaves namespaces for new ones.
pub fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::unshare(flags) }).map(drop)
}

/// Mounts, or changes a mount when there is no source and type.
pub fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: u64,
) -> io::Result<()> {
    mount_with(source, target, kind, flags, None)
}

/// Mounts with options of the file system.
pub fn mount_with(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: u64,
    options: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    let (source, kind, options) = (pointer(source), pointer(kind), pointer(options));
    // SAFETY: the texts are C strings that live through the call.
    check(unsafe { libc::mount(source, target.as_ptr(), kind, flags, options.cast()) }).map(drop)
}

/// Takes a mount away; whoever uses it keeps it until then.
pub fn unmount(target: &CStr) -> io::Result<()> {
    // SAFETY: the text is a C string that lives through the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

/// Mounts an overlay at `merged` below a directory that has a `lower` already; the other layers are made.
pub fn mount_overlay(base: &Path) -> io::Result<PathBuf> {
    for dir in ["upper", "work", "merged"] {
        std::fs::create_dir(base.join(dir))?;
    }
    let dir = |name| base.join(name).display().to_string();
    let (lower, upper, work) = (dir("lower"), dir("upper"), dir("work"));
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let options = CString::new(options).map_err(io::Error::other)?;
    let merged = base.join("merged");
    let (target, kind) = (super::c_path(&merged)?, Some(c"overlay"));
    mount_with(kind, &target, kind, 0, Some(&options))?;
    Ok(merged)
}

/// Sets the umask and returns the old one.
pub fn umask(mask: u32) -> u32 {
    // SAFETY: numbers only.
    unsafe { libc::umask(mask) }
}
