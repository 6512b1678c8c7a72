//! A look at running tasks: which of their files stand in the way of a dump.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use firn_sys::Pid;
use firn_sys::file::{self, S_IFIFO, S_IFREG, Stat};
use firn_sys::kcmp::{Resource, kcmp};

use super::fdinfo::FdInfo;
use super::kind;
use super::locate::{self, Location};
use super::lock_watch::LockWatch;
use super::open_file::{
    DescriptorDir, FDS_PER_THREAD, OpenFile, Place, ProcLink, ProcReadError, Trouble,
    look_at_running,
};
use super::told::{Told, ToldFd};
use super::{FileDumpOptions, autofs, io_uring, outside, tty};
use crate::crew;
use crate::freeze;
use crate::obstacle::Obstacle;
use crate::task::status::Status;

/// Tasks that are worth a thread of their own to look at their files.
const TASKS_PER_THREAD: usize = 4;

/// A task with more files than this is not asked for the locks of each. (A reader of /proc/locks waits for a grace
/// period of RCU, 3 to 16 ms, however few locks there are; that of a file costs some 5 µs.)
const FILES_ASKED_FOR_LOCKS: usize = 256;

/// How much a survey looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Everything but files that another one is mounted over, which are asked for one at a time; the frozen look
    /// comes upon them early. Locks of the files of a task that has many are looked for among all locks of the
    /// machine.
    Quick,
    /// Everything: there is something in the way already, and the list of it is to be complete.
    Full,
}

/// What a survey of files has shown.
#[derive(Debug, Default)]
pub struct FileSurvey {
    /// What can't be dumped.
    pub obstacles: Vec<Obstacle>,
    /// There are io_uring rings.
    pub has_rings: bool,
    /// The descriptors that were seen.
    pub(crate) told: Told,
}

/// Finds every file of the tasks that can't be dumped, without stopping them.
///
/// `pids` are all processes of the tree: pipes that other processes hold too are found by looking at all
/// of /proc. What vanishes meanwhile is no obstacle. `locks` reads the list of all locks, for a quick survey.
pub fn survey(
    pids: &[Pid],
    options: &FileDumpOptions,
    depth: Depth,
    locks: Option<&LockWatch>,
) -> FileSurvey {
    let surveyor = Surveyor::new(options, depth, locks);
    let looks = crew::share_out(pids, TASKS_PER_THREAD, |pid| surveyor.look_at_task(*pid));
    let mut found = Vec::new();
    let mut pipes = HashMap::with_capacity(looks.iter().map(|look| look.pipes.len()).sum());
    let mut terminals = Vec::new();
    let mut unasked = Vec::new();
    let mut has_rings = false;
    let mut told = Told::default();
    for look in looks {
        has_rings |= look.has_rings;
        if let Some((pid, fds)) = look.told {
            told.keep(pid, fds);
        }
        found.extend(look.found);
        unasked.extend(look.unasked);
        terminals.extend(look.terminals);
        for file in look.pipes {
            pipes.entry(file.link.clone()).or_insert(file);
        }
    }
    pipes.retain(|_, file| !options.has_external(file));
    found.extend(autofs::obstacles(&pipes, pids));
    found.extend(lasting_holders(&pipes, pids));
    // The list of all locks has had the most time to come.
    found.extend(surveyor.locked(&unasked));
    found.extend(tty::unpaired(&terminals, options));
    FileSurvey {
        obstacles: found,
        has_rings,
        told,
    }
}

/// What a look at files has shown.
#[derive(Debug, Default)]
struct Look {
    found: Vec<Obstacle>,
    /// Ends of pipes, which somebody outside may hold, too.
    pipes: Vec<OpenFile>,
    /// Terminals, whose other side somebody outside may have.
    terminals: Vec<OpenFile>,
    has_rings: bool,
    /// Regular files that were not asked for locks.
    unasked: Vec<Unasked>,
    /// All descriptors, by the task that was asked.
    told: Option<(Pid, Vec<ToldFd>)>,
}

/// A regular file that was not asked for locks.
#[derive(Debug)]
struct Unasked {
    pid: Pid,
    fd: i32,
    inode: u64,
}

/// Looks at tasks.
struct Surveyor<'a> {
    options: &'a FileDumpOptions,
    depth: Depth,
    /// Files of a task that are asked for their locks one at a time.
    files_asked: usize,
    /// Tells all locks of the machine, once it has read them.
    locks: Option<&'a LockWatch>,
}

impl<'a> Surveyor<'a> {
    fn new(
        options: &'a FileDumpOptions,
        depth: Depth,
        locks: Option<&'a LockWatch>,
    ) -> Surveyor<'a> {
        Surveyor {
            options,
            depth,
            files_asked: FILES_ASKED_FOR_LOCKS,
            locks,
        }
    }

    fn look_at_task(&self, pid: Pid) -> Look {
        let exe = OpenFile::of_link(pid, ProcLink::Exe, 0);
        if exe.is_err() {
            // A zombie has no files, but where only the main thread is dead, its other threads have them.
            let speaker = freeze::speaker(pid);
            if speaker != pid {
                return self.look_at_task(speaker);
            }
        }
        let mut look = self.look_at_descriptors(pid);
        let others = [ProcLink::Cwd, ProcLink::Root].map(|link| OpenFile::of_link(pid, link, 0));
        for file in others.into_iter().chain([exe]).flatten() {
            look.found.extend(link_obstacles(&file, self.options));
        }
        let threads = file::open(format!("/proc/{pid}/task").as_ref(), 0);
        let tids = threads.and_then(file::list_numbers);
        let tids: Vec<Pid> = (tids.unwrap_or_default().into_iter())
            .map(Pid::from_raw)
            .collect();
        look.found.extend(threads_with_own_table(pid, &tids));
        look
    }

    fn look_at_descriptors(&self, pid: Pid) -> Look {
        let Ok(dir) = DescriptorDir::open(pid) else {
            return Look::default();
        };
        let listed = || dir.numbers().map_or(0, |numbers| numbers.len());
        let asks = self.asks_for_locks(dir.count().unwrap_or_else(listed));
        let look = |fd: &i32| {
            let file = self.look_at_descriptor(&dir, *fd, asks).ok()?;
            Some((*fd, kind::obstacles(&file, self.options), file))
        };
        let look = |fds: &[i32]| crew::share_out(fds, FDS_PER_THREAD, look);
        let (looks, others) = look_at_running(dir.links(), look);
        let mut look = Look::default();
        let mut told = Vec::with_capacity(looks.len());
        for (fd, obstacles, mut file) in looks.into_iter().chain(others).flatten() {
            look.found.extend(obstacles);
            look.has_rings |= io_uring::is_ring(&file.link);
            let is_pipe = file.stat.file_type() == S_IFIFO && !file.is_path_only();
            let is_terminal = !is_pipe && tty::sort_of(&file).is_some();
            let link = match is_pipe || is_terminal {
                true => file.link.clone(),
                false => std::mem::take(&mut file.link),
            };
            told.push(ToldFd { fd, link });
            if is_pipe {
                look.pipes.push(file);
            } else if is_terminal {
                look.terminals.push(file);
            } else if !asks && file.stat.file_type() == S_IFREG {
                let inode = file.stat.ino;
                look.unasked.push(Unasked { pid, fd, inode });
            }
        }
        look.told = Some((pid, told));
        look
    }

    /// Looks at a descriptor. Of most files the link tells all that a quick survey asks.
    fn look_at_descriptor(
        &self,
        dir: &DescriptorDir,
        fd: i32,
        asks_for_locks: bool,
    ) -> Result<OpenFile, ProcReadError> {
        let link = dir.link(fd)?;
        if self.depth == Depth::Quick && !self.options.names_mounts() {
            let (pid, place) = (dir.pid(), Place::Fd(fd));
            if let Some((stat, location)) = told_by_link(&link) {
                let info = match asks_for_locks && stat.file_type() == S_IFREG {
                    true => dir.info(fd)?,
                    false => FdInfo::default(),
                };
                return Ok(OpenFile {
                    pid,
                    place,
                    link,
                    stat,
                    info,
                    location,
                });
            }
        }
        dir.look(dir.see_behind(fd, link)?, None)
    }

    /// Whether regular files of a task with that many descriptors are asked for their locks at once.
    fn asks_for_locks(&self, nr_fds: usize) -> bool {
        self.depth == Depth::Full || !self.options.file_locks && nr_fds <= self.files_asked
    }

    /// Locks of files that were not asked, unless they are saved anyway. Files whose inodes are not among those that
    /// have locks have none; until these are known, files are asked one by one, which is as quick as to wait.
    fn locked(&self, unasked: &[Unasked]) -> Vec<Obstacle> {
        if self.options.file_locks {
            return Vec::new();
        }
        let pids: HashSet<Pid> = unasked.iter().map(|file| file.pid).collect();
        let dirs = pids.into_iter().map(|pid| (pid, DescriptorDir::open(pid)));
        let dirs: HashMap<Pid, _> = dirs.collect();
        let known = OnceLock::new();
        let is_free = |file: &Unasked| {
            if known.get().is_none()
                && let Some(inodes) = self.locks.and_then(LockWatch::locked_inodes)
            {
                known.get_or_init(|| inodes);
            }
            (known.get()).is_some_and(|inodes: &HashSet<u64>| !inodes.contains(&file.inode))
        };
        let look = |file: &Unasked| -> Option<Vec<Obstacle>> {
            if is_free(file) {
                return None;
            }
            let dir = dirs.get(&file.pid)?.as_ref().ok()?;
            let info = dir.info(file.fd).ok().filter(FdInfo::has_locks)?;
            let file = dir.look_behind(file.fd, info, None).ok()?;
            Some(kind::lock_obstacles(&file, self.options).collect())
        };
        let found = crew::share_out(unasked, FDS_PER_THREAD, look);
        found.into_iter().flatten().flatten().collect()
    }
}

/// Holders outside of the tree that are still there at a second look: a child that has lost its parent
/// and is about to end looks like one, too.
fn lasting_holders(pipes: &HashMap<Vec<u8>, OpenFile>, pids: &[Pid]) -> Vec<Obstacle> {
    const BETWEEN_LOOKS: Duration = Duration::from_millis(10);
    let mut found = outside::obstacles(pipes, pids);
    if !found.is_empty() {
        std::thread::sleep(BETWEEN_LOOKS);
        let again = outside::obstacles(pipes, pids);
        found.retain(|obstacle| again.contains(obstacle));
    }
    found
}

/// What is behind a link, where its text tells: a pipe, or the regular file that has this name. (Another file may
/// be mounted over it; the look at the stopped tasks compares them.)
fn told_by_link(link: &[u8]) -> Option<(Stat, OnceLock<Location>)> {
    if let Some(inode) = link.strip_prefix(b"pipe:[") {
        let inode = str::from_utf8(inode.strip_suffix(b"]")?).ok()?;
        let stat = Stat {
            mode: S_IFIFO,
            ino: inode.parse().ok()?,
            ..Stat::default()
        };
        return Some((stat, OnceLock::new()));
    }
    if !link.starts_with(b"/") || link.ends_with(locate::DELETED) {
        return None;
    }
    let stat = file::lstat_path(Path::new(OsStr::from_bytes(link))).ok()?;
    let location = OnceLock::from(Location::Named(link.to_vec()));
    (stat.file_type() == S_IFREG).then_some((stat, location))
}

/// What keeps a file from being dumped that a task holds without a descriptor.
pub(super) fn link_obstacles(file: &OpenFile, options: &FileDumpOptions) -> Vec<Obstacle> {
    kind::obstacles(file, options)
}

/// Threads that do not share the descriptor table of their process.
///
/// `pid` is one of them.
pub(super) fn threads_with_own_table(pid: Pid, threads: &[Pid]) -> Vec<Obstacle> {
    // A thread that is dead or about to be has none.
    let lives = |tid: Pid| {
        let status = Status::read(pid, tid);
        status.is_ok_and(|status| !matches!(status.state, b'Z' | b'X'))
    };
    let differs = |tid: &&Pid| {
        **tid != pid
            && kcmp(pid, **tid, Resource::Files).is_ok_and(|order| order.is_ne())
            && lives(**tid)
    };
    threads
        .iter()
        .filter(differs)
        .map(|tid| Obstacle {
            pid,
            object: format!("thread {tid}"),
            reason: "it has a descriptor table of its own".to_owned(),
            hint: Some("dump before the thread has called unshare(CLONE_FILES)".to_owned()),
        })
        .collect()
}

/// Says that somebody outside the tree holds the pipe too, whose link is given.
pub(super) fn held_outside(holder: &str, link: &[u8]) -> Trouble {
    let both = "dump the tree that contains both, or let the other side close it";
    let link = String::from_utf8_lossy(link);
    // Fifos have no such key.
    let hint = match link.strip_prefix("pipe:") {
        Some(_) => format!(
            "{both}, or add --external '{link}' here and --inherit-fd 'fd[N]:{link}' to the restore"
        ),
        None => both.to_owned(),
    };
    let reason = format!("{holder} outside the tree holds an end of it too");
    Trouble::new(reason, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a quick survey of this process says of a file, where up to `files_asked` files are asked at once.
    fn survey_of(
        path: &Path,
        files_asked: usize,
        locks: Option<&LockWatch>,
        options: &FileDumpOptions,
    ) -> Vec<String> {
        let mut surveyor = Surveyor::new(options, Depth::Quick, locks);
        surveyor.files_asked = files_asked;
        let look = surveyor.look_at_task(Pid::this());
        let mut found = look.found;
        found.extend(surveyor.locked(&look.unasked));
        let name = path.to_string_lossy();
        let of_file = found.iter().filter(|found| found.object.contains(&*name));
        of_file.map(|found| found.reason.clone()).collect()
    }

    #[test]
    fn locks_are_seen_while_the_tasks_run() {
        let locked = tempfile::NamedTempFile::new().expect("a file");
        let free = tempfile::NamedTempFile::new().expect("a file");
        locked.as_file().lock().expect("nobody else has it");
        let options = FileDumpOptions::default();
        // None in another pid namespace than the first one, where the list is not complete.
        let watch = LockWatch::begin();
        if let Some(watch) = &watch {
            watch.wait(Duration::from_secs(60));
        }
        for (files_asked, locks) in [(usize::MAX, None), (0, None), (0, watch.as_ref())] {
            let found = survey_of(locked.path(), files_asked, locks, &options);
            assert!(
                matches!(&found[..], [one] if one.contains("FLOCK ADVISORY WRITE")),
                "{found:?}"
            );
            assert!(survey_of(free.path(), files_asked, locks, &options).is_empty());
        }
        let saved = FileDumpOptions {
            file_locks: true,
            ..options
        };
        for files_asked in [usize::MAX, 0] {
            assert!(survey_of(locked.path(), files_asked, None, &saved).is_empty());
        }
    }
}
