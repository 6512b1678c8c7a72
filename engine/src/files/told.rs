//! Descriptors that the survey has seen, asked again for little once the tasks stand still.
//!
//! fdinfo tells all there is to know of a descriptor, but takes longer than every other question together, and the
//! link takes its share. Of pipes, and of regular files on filesystems known to be plain, the same is learned from
//!
//! ```text
//! the survey    where the link leads; what has that path now must be the very file, with one name, on the same mount
//! a duplicate   flags, position, mount, inode
//! the task      close-on-exec, by the program that asks it everything else
//! /proc/locks   whether anybody has locked the file, of all files at once
//! ```
//!
//! Where the list of locks is not there in time, fdinfo is read after all, and saves nothing but the link.
//!
//! Where one of them does not fit, the descriptor is looked at as if nobody had seen it before.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{OnceLock, RwLock};

use firn_sys::file::{self, O_CLOEXEC, O_PATH, S_IFIFO, S_IFREG, Stat};
use firn_sys::{Pid, fcntl, nr};

use super::dump::FileTable;
use super::fdinfo::FdInfo;
use super::locate::Location;
use super::lock_watch::LockWatch;
use super::open_file::{DescriptorDir, OpenFile, Place, is_nameless_pipe, nameless_link};
use crate::program::{Arena, Program, ProgramId, Rule, Slot};

/// Descriptors of a tree from which on their questions are worth a thread that watches locks.
const MANY: usize = 128;
/// Descriptors of one table that a program asks for at most.
const MOST: usize = 32 << 10;
/// Descriptors of all tables that are kept; the others are listed once more.
const MOST_OF_ALL: usize = 64 << 10;
/// Command of fcntl: the flags of a descriptor.
const F_GETFD: i32 = 1;

/// The descriptors of the tables of a tree that runs, by the task that was asked.
#[derive(Debug, Default)]
pub struct Told(HashMap<Pid, Vec<ToldFd>>);

/// A descriptor, and where its link led.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToldFd {
    pub(super) fd: i32,
    pub(super) link: Vec<u8>,
}

impl Told {
    /// Whether no task is to be asked for its descriptors.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn of(&self, speaker: Pid) -> &[ToldFd] {
        self.0.get(&speaker).map_or(&[], Vec::as_slice)
    }

    /// Keeps what was seen of a task's descriptors.
    pub(super) fn keep(&mut self, task: Pid, fds: Vec<ToldFd>) {
        let kept: usize = self.0.values().map(Vec::len).sum();
        if (MANY..=MOST).contains(&fds.len()) && kept + fds.len() <= MOST_OF_ALL {
            self.0.insert(task, fds);
        }
    }

    fn take(&mut self, speaker: Pid) -> Vec<ToldFd> {
        self.0.remove(&speaker).unwrap_or_default()
    }
}

/// Watches the locks of all files, where so many descriptors of the tasks make it worth while.
pub fn watch_locks(pids: &[Pid]) -> Option<LockWatch> {
    // The size of the directory is the number of descriptors as of Linux 6.2, and 0 before.
    let count =
        |pid: &Pid| file::stat_path(format!("/proc/{pid}/fd").as_ref()).map_or(0, |s| s.size);
    let most = pids.iter().map(count).max()?;
    (usize::try_from(most).ok()? >= MANY).then(LockWatch::begin)?
}

/// Questions for the flags of descriptors, which nobody but the task itself knows without fdinfo.
#[derive(Debug, Default)]
pub struct FlagQuestions(Vec<Slot>);

/// Adds the questions for the flags of the descriptors that the survey has seen.
pub fn ask_flags(program: &mut Program, told: &Told, speaker: Pid) -> FlagQuestions {
    let ask = |told: &ToldFd| {
        let args = [told.fd.into(), F_GETFD.into()];
        // It may have been closed since.
        program.call_to_slot(nr::FCNTL, &args, Rule::Any, "reading a descriptor's flags")
    };
    FlagQuestions(told.of(speaker).iter().map(ask).collect())
}

impl FlagQuestions {
    /// Which descriptors are closed by execve, in the order of the survey; None where not all are open any more, or
    /// none was asked for.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> Option<Vec<bool>> {
        let answer = |slot: &Slot| u32::try_from(arena.slot(id, *slot)).ok();
        let closed = |flags: u32| flags & fcntl::FD_CLOEXEC != 0;
        let answers: Option<Vec<bool>> =
            self.0.iter().map(|slot| answer(slot).map(closed)).collect();
        answers.filter(|answers| !answers.is_empty())
    }
}

/// A descriptor that is known from before the tasks stopped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recalled<'a> {
    pub(super) link: &'a [u8],
    pub(super) close_on_exec: bool,
}

impl FileTable {
    /// Asks for locks by a watch that has begun before the tasks were stopped.
    pub(crate) fn with_lock_watch(mut self, watch: Option<LockWatch>) -> FileTable {
        self.lock_watch = watch;
        self
    }

    /// Takes what the survey was told about a task's descriptors, and which of them are closed by execve, as the
    /// task has said since it stands still.
    pub(crate) fn recall(&mut self, speaker: Pid, told: &mut Told, close_on_exec: Vec<bool>) {
        let told = told.take(speaker);
        self.recalled.insert(speaker, (told, close_on_exec));
    }
}

/// What takes the place of fdinfo while the tasks stand still.
#[derive(Debug)]
pub(super) struct QuickLook {
    /// Inodes with locks; None where they are not known, and fdinfo has to tell.
    locked: Option<HashSet<u64>>,
    /// Devices whose filesystem is plain, and those that are not.
    plain: RwLock<HashMap<u64, bool>>,
}

impl QuickLook {
    /// Asks for the locks of this moment.
    pub(super) fn begin(watch: Option<&LockWatch>) -> QuickLook {
        QuickLook {
            locked: watch.and_then(LockWatch::locked_inodes),
            plain: RwLock::default(),
        }
    }

    /// What fdinfo tells of a plain file or pipe without locks, and the file; None for all others.
    pub(super) fn info(
        &self,
        (dir, fd): (&DescriptorDir, i32),
        duplicate: &OwnedFd,
        recalled: &Recalled<'_>,
    ) -> Option<(Stat, FdInfo)> {
        match &self.locked {
            Some(locked) => self.info_without_fdinfo(locked, duplicate, recalled),
            None => {
                let info = dir.info(fd).ok()?;
                // Of such files the other lines are locks.
                let is_bare = info.lines.is_empty() && !info.is_path_only();
                let stat = file::stat(duplicate).ok().filter(|_| is_bare)?;
                let is_file = stat.file_type() == S_IFREG && recalled.link.starts_with(b"/");
                (is_file || is_nameless_pipe(&stat)).then_some((stat, info))
            }
        }
    }

    fn info_without_fdinfo(
        &self,
        locked: &HashSet<u64>,
        duplicate: &OwnedFd,
        recalled: &Recalled<'_>,
    ) -> Option<(Stat, FdInfo)> {
        let (stat, mnt_id) = file::stat_with_mount(duplicate).ok()?;
        let flags = fcntl::flags(duplicate).ok()? & !O_CLOEXEC.cast_unsigned();
        if locked.contains(&stat.ino) || flags & O_PATH.cast_unsigned() != 0 {
            return None;
        }
        let pos = match stat.file_type() {
            S_IFIFO if is_nameless_pipe(&stat) => 0,
            S_IFREG if recalled.link.starts_with(b"/") && self.is_plain(duplicate, stat.dev) => {
                file::position(duplicate).ok()?
            }
            _ => return None,
        };
        let cloexec = if recalled.close_on_exec { O_CLOEXEC } else { 0 };
        let info = FdInfo {
            pos,
            flags: flags | cloexec.cast_unsigned(),
            mnt_id: mnt_id?,
            ino: stat.ino,
            lines: Vec::new(),
        };
        Some((stat, info))
    }

    /// Whether the number that stat tells is that of the inode itself, so that the list of locks names it, and the
    /// position is told without side effects. Stacked and remote filesystems have numbers of their own.
    fn is_plain(&self, duplicate: &OwnedFd, dev: u64) -> bool {
        let known = self
            .plain
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .get(&dev)
            .copied();
        known.unwrap_or_else(|| {
            let found = file::filesystem_type_of(duplicate.as_fd());
            let is_plain = found.is_ok_and(|found| {
                matches!(found, file::EXT4 | file::XFS | file::BTRFS | file::TMPFS)
            });
            let mut plain = self.plain.write().unwrap_or_else(|e| e.into_inner());
            plain.insert(dev, is_plain);
            is_plain
        })
    }
}

/// The open file behind a descriptor, if the link that the survey has seen is still its link.
pub(super) fn open_file(
    (pid, fd): (Pid, i32),
    recalled: &Recalled<'_>,
    stat: Stat,
    info: FdInfo,
) -> Option<OpenFile> {
    let (link, location) = match nameless_link(&stat) {
        Some(link) => (link, OnceLock::new()),
        None => {
            // A file with several names may have been opened again by another one.
            let path = (stat.nlink == 1).then(|| CString::new(recalled.link).ok())??;
            let (there, mount) = file::lstat_with_mount(&path).ok()?;
            if !there.same_file(&stat) || mount != Some(info.mnt_id) {
                return None;
            }
            let link = recalled.link.to_vec();
            (link.clone(), OnceLock::from(Location::Named(link)))
        }
    };
    Some(OpenFile {
        pid,
        place: Place::Fd(fd),
        link,
        stat,
        info,
        location,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    use super::super::open_file::DescriptorDir;

    fn quick(locked: Option<HashSet<u64>>) -> QuickLook {
        QuickLook {
            locked,
            plain: RwLock::default(),
        }
    }

    fn recalled(link: &[u8]) -> Recalled<'_> {
        Recalled {
            link,
            close_on_exec: true,
        }
    }

    #[test]
    fn a_quick_look_says_what_fdinfo_says() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").expect("room");
        let mut file = std::fs::File::open(&path).expect("just made");
        file.read_exact(&mut [0; 7]).expect("ten bytes");
        let file = OwnedFd::from(file);
        let (reader, writer) = firn_sys::pipe::create().expect("a pipe");
        let own = DescriptorDir::open(Pid::this()).expect("own descriptors");
        for fd in [&file, &reader, &writer] {
            let number = fd.as_raw_fd();
            let seen = own.see(number).expect("open");
            let recalled = recalled(&seen.link);
            let whole = own.look(seen.clone(), Some(fd.as_fd())).expect("open");
            for locked in [Some(HashSet::new()), None] {
                let looked = quick(locked).info((&own, number), fd, &recalled);
                let (stat, info) = looked.expect("plain");
                assert_eq!(info, seen.info);
                let place = (Pid::this(), number);
                let quick = open_file(place, &recalled, stat, info).expect("the link leads there");
                assert_eq!((&quick.link, quick.stat), (&whole.link, whole.stat));
            }
        }
    }

    #[test]
    fn what_has_changed_is_not_recalled() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
        let path = dir.path().join("file");
        let mut file = std::fs::File::create(&path).expect("room");
        file.write_all(b"text").expect("room");
        let file = OwnedFd::from(file);
        let link = path.as_os_str().as_encoded_bytes();
        let recalled = recalled(link);
        let own = DescriptorDir::open(Pid::this()).expect("own descriptors");
        let look = |quick: &QuickLook| {
            let place = (&own, file.as_raw_fd());
            let (stat, info) = quick.info(place, &file, &recalled)?;
            open_file((Pid::this(), file.as_raw_fd()), &recalled, stat, info)
        };
        let free = quick(Some(HashSet::new()));
        let unknown = quick(None);
        let ino = look(&free).expect("nothing has changed").stat.ino;
        let locked = quick(Some(HashSet::from([ino])));
        assert!(look(&locked).is_none(), "it is locked");
        assert!(look(&unknown).is_some());
        let same = std::fs::File::from(file.try_clone().expect("room"));
        same.lock().expect("nobody else has it");
        assert!(look(&unknown).is_none(), "it is locked");
        same.unlock().expect("it was locked");
        let second = dir.path().join("second");
        std::fs::hard_link(&path, &second).expect("a link");
        assert!(look(&free).is_none(), "it has two names");
        std::fs::remove_file(&second).expect("just made");
        assert!(look(&free).is_some());
        std::fs::rename(&path, &second).expect("rename");
        assert!(look(&free).is_none(), "the name is gone");
        std::fs::write(&path, b"another").expect("room");
        assert!(look(&free).is_none(), "the name is another file's");
    }
}
