//! Files of /proc that describe one task, such as /proc/4711/status, and the others of /proc and /sys.
//!
//! Those of a task of the tree can be opened only when it exists again, so they come late: see
//! [`super::late`]. One whose task is gone tells only that (ESRCH), and has a path that leads nowhere: a
//! helper with the old number is made, its file is opened, and it is killed. Images name it as CRIU's do:
//! a remap of type PROCFS whose number is the task's. What the kernel makes up when it is read has no size
//! and no time that would tell anything.

use std::path::PathBuf;

use firn_sys::Pid;

use super::locate;
use super::open_file::{OpenFile, Place, Trouble};

const PROC: &[u8] = b"/proc/";

/// Whether the content of the path's file is made up by the kernel.
pub(super) fn is_made_up(path: &[u8]) -> bool {
    path.starts_with(PROC) || path.starts_with(b"/sys/")
}

/// The task that a file of /proc describes: the thread, where the path names one.
pub(super) fn task_of(path: &[u8]) -> Option<Pid> {
    let (process, rest) = number(path.strip_prefix(PROC)?)?;
    let thread = rest.strip_prefix(b"/task/").and_then(number);
    Some(thread.map_or(process, |(thread, _)| thread))
}

/// A number and what follows it, which is nothing or starts with a slash.
fn number(text: &[u8]) -> Option<(Pid, &[u8])> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at(digits);
    let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let ends = rest.first().is_none_or(|next| *next == b'/');
    ends.then_some((Pid::from_raw(number), rest))
}

/// The path of the same file of a helper, which is a process without further threads.
pub(super) fn path_of_helper(path: &[u8], helper: Pid) -> Option<PathBuf> {
    let (_, rest) = number(path.strip_prefix(PROC)?)?;
    let new = match rest.strip_prefix(b"/task/").and_then(number) {
        Some((_, rest)) => [format!("/proc/{helper}/task/{helper}").as_bytes(), rest].concat(),
        None => [format!("/proc/{helper}").as_bytes(), rest].concat(),
    };
    Some(locate::to_path(&new))
}

/// The task that is gone, of a file of /proc with this last path; None for any other file that has no
/// path any more.
pub(super) fn departed(old: &[u8]) -> Option<Pid> {
    let task = task_of(old)?;
    // Where something has the path again, somebody else has got the number.
    let is_there = |path: PathBuf| path.symlink_metadata().is_ok();
    let gone = !is_there(PathBuf::from(format!("/proc/{task}"))) || is_there(locate::to_path(old));
    gone.then_some(task)
}

/// What keeps a file from being opened again whose path is that of a task's file.
pub(super) fn trouble(file: &OpenFile, path: &[u8]) -> Option<Trouble> {
    task_of(path)?;
    matches!(file.place, Place::Link(_)).then(|| {
        Trouble::new(
            "it belongs to one task in /proc, which does not exist while directories and mappings are restored",
            "let the task leave it before the dump",
        )
    })
}

/// What is wrong with a file of /proc whose task is not of the tree.
pub(super) fn outside(task: Pid) -> Trouble {
    Trouble::new(
        format!("it describes task {task}, which is outside the tree"),
        "dump the tree that contains both, or let the task close it",
    )
}

/// What is wrong with a file of /proc that went before its task did.
pub(super) fn vanished() -> Trouble {
    Trouble::new(
        "the file of /proc is gone, and its task is not",
        "let the task close it before the dump",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_task_is_in_the_path() {
        let task = |path: &str| task_of(path.as_bytes()).map(Pid::raw);
        assert_eq!(task("/proc/12"), Some(12));
        assert_eq!(task("/proc/12/net/tcp"), Some(12));
        assert_eq!(task("/proc/12/task/15/stat"), Some(15));
        assert_eq!(task("/proc/12/task"), Some(12));
        for other in [
            "/proc/12x/stat",
            "/proc/sys",
            "/proc/",
            "/sys/12",
            "/proc/99999999999",
        ] {
            assert_eq!(task(other), None, "{other}");
        }
    }

    #[test]
    fn a_helper_has_the_same_files() {
        let path = |path: &str| path_of_helper(path.as_bytes(), Pid::from_raw(7));
        assert_eq!(path("/proc/12/stat"), Some("/proc/7/stat".into()));
        assert_eq!(path("/proc/12"), Some("/proc/7".into()));
        let thread = path("/proc/12/task/15/stat");
        assert_eq!(thread, Some("/proc/7/task/7/stat".into()));
        assert_eq!(path("/etc/passwd"), None);
    }

    #[test]
    fn who_is_there_has_not_departed() {
        let own = Pid::this();
        let gone = format!("/proc/{own}/no-such-file");
        assert_eq!(departed(gone.as_bytes()), None);
        assert_eq!(
            departed(b"/proc/4194304/stat"),
            Some(Pid::from_raw(4_194_304))
        );
    }
}
