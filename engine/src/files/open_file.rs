//! One open file as /proc shows it: a descriptor of a task, or a link such as its executable.

use std::borrow::Cow;
use std::ffi::CString;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;

use firn_sys::file::{self, S_IFIFO, S_IFSOCK, Stat};
use firn_sys::{Errno, Pid, pipe};

use super::dump::query;
use super::error::FileDumpError;
use super::fdinfo::FdInfo;
use super::locate::Location;
use crate::obstacle::Obstacle;

/// Descriptors that are worth a thread of their own to look at them.
pub(super) const FDS_PER_THREAD: usize = 32;

/// A file that a task holds without a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProcLink {
    /// The executable.
    Exe,
    /// The working directory.
    Cwd,
    /// The root directory.
    Root,
    /// The file of a mapping.
    MapFiles {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
}

/// Where a task holds an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// Descriptor with this number.
    Fd(i32),
    /// No descriptor.
    Link(ProcLink),
}

/// An open file of a task.
#[derive(Debug, Clone)]
pub(super) struct OpenFile {
    pub(super) pid: Pid,
    pub(super) place: Place,
    /// Text of the link in /proc, with ` (deleted)` where the kernel says so.
    pub(super) link: Vec<u8>,
    pub(super) stat: Stat,
    pub(super) info: FdInfo,
    /// Where it can be found, once somebody has asked.
    pub(super) location: OnceLock<Location>,
}

/// Why something about an open file could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what} of task {pid}")]
pub struct ProcReadError {
    pub(super) pid: Pid,
    pub(super) what: String,
    #[source]
    pub(super) source: Errno,
}

impl OpenFile {
    /// Looks at a file that the task holds without a descriptor; `flags` are those to open it with.
    pub(super) fn of_link(pid: Pid, link: ProcLink, flags: u32) -> Result<OpenFile, ProcReadError> {
        let place = Place::Link(link);
        let path = proc_path(pid, place);
        let failed = |source| ProcReadError {
            pid,
            what: place.to_string(),
            source,
        };
        let text = std::fs::read_link(&path).map_err(|error| failed(error.into()))?;
        Ok(OpenFile {
            pid,
            place,
            link: std::os::unix::ffi::OsStringExt::into_vec(text.into_os_string()),
            stat: file::stat_path(&path).map_err(failed)?,
            info: FdInfo {
                flags,
                ..FdInfo::default()
            },
            location: OnceLock::new(),
        })
    }

    /// A path that leads to the very file, also when it has no name any more.
    pub(super) fn proc_path(&self) -> PathBuf {
        proc_path(self.pid, self.place)
    }

    /// Text of the link for messages.
    pub(super) fn link_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.link)
    }

    /// True if it was opened with O_PATH, so that almost no call works on it.
    pub(super) fn is_path_only(&self) -> bool {
        self.info.is_path_only()
    }

    /// True for a file that has no inode of its own and this name.
    pub(super) fn is_anonymous(&self, name: &str) -> bool {
        self.link.strip_prefix(b"anon_inode:") == Some(name.as_bytes())
    }

    /// Reads a line of fdinfo.
    pub(super) fn field<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, FileDumpError> {
        let value = self.info.value(key).and_then(parse);
        value.ok_or_else(|| self.unexpected(key))
    }

    /// Says that a line of fdinfo is missing or not as expected.
    pub(super) fn unexpected(&self, key: &'static str) -> FileDumpError {
        query(self, key, Errno::EINVAL)
    }

    /// Open flags as images keep them: without O_CLOEXEC, which belongs to the descriptor.
    pub(super) fn image_flags(&self) -> u32 {
        self.info.flags & !file::O_CLOEXEC.cast_unsigned()
    }

    /// Says that this file stands in the way of a dump.
    pub(super) fn obstacle(&self, trouble: Trouble) -> Obstacle {
        let link = self.link_text();
        let object = match trouble.kind {
            Some(kind) => format!("{} ({link}, {kind})", self.place),
            None => format!("{} ({link})", self.place),
        };
        Obstacle {
            pid: self.pid,
            object,
            reason: trouble.reason,
            hint: trouble.hint,
        }
    }
}

/// What is wrong with an open file; becomes an [`Obstacle`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    /// What the file is, where its link does not say.
    pub(super) kind: Option<String>,
    /// Why it can't be dumped.
    pub(super) reason: String,
    /// What the user can do.
    pub(super) hint: Option<String>,
}

impl Trouble {
    /// A trouble with a reason and a hint.
    pub(super) fn new(reason: impl Into<String>, hint: impl Into<String>) -> Trouble {
        Trouble {
            kind: None,
            reason: reason.into(),
            hint: Some(hint.into()),
        }
    }
}

fn proc_path(pid: Pid, place: Place) -> PathBuf {
    PathBuf::from(match place {
        Place::Fd(fd) => format!("/proc/{pid}/fd/{fd}"),
        Place::Link(ProcLink::Exe) => format!("/proc/{pid}/exe"),
        Place::Link(ProcLink::Cwd) => format!("/proc/{pid}/cwd"),
        Place::Link(ProcLink::Root) => format!("/proc/{pid}/root"),
        Place::Link(ProcLink::MapFiles { start, end }) => {
            format!("/proc/{pid}/map_files/{start:x}-{end:x}")
        }
    })
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Fd(fd) => write!(f, "fd {fd}"),
            Place::Link(ProcLink::Exe) => f.write_str("executable"),
            Place::Link(ProcLink::Cwd) => f.write_str("working directory"),
            Place::Link(ProcLink::Root) => f.write_str("root directory"),
            Place::Link(ProcLink::MapFiles { start, end }) => {
                write!(f, "mapping {start:#x}-{end:#x}")
            }
        }
    }
}

/// What is read of every descriptor, also of one whose open file is known already.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) fd: i32,
    pub(super) link: Vec<u8>,
    pub(super) info: FdInfo,
}

/// The descriptors of one task, read relative to its /proc directories.
pub(super) struct DescriptorDir {
    pid: Pid,
    links: OwnedFd,
    infos: OwnedFd,
}

impl DescriptorDir {
    /// Opens the task's directories in /proc.
    pub(super) fn open(pid: Pid) -> Result<DescriptorDir, ProcReadError> {
        Ok(DescriptorDir {
            pid,
            links: open_directory(pid, "fd")?,
            infos: open_directory(pid, "fdinfo")?,
        })
    }

    /// The task.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Numbers of all open descriptors, ascending.
    pub(super) fn numbers(&self) -> Result<Vec<i32>, ProcReadError> {
        file::list_numbers(&self.links).map_err(|source| self.failed("the descriptors", source))
    }

    /// How many descriptors are open; None before Linux 6.2, which does not say.
    pub(super) fn count(&self) -> Option<usize> {
        count_in(&self.links)
    }

    /// The directory of links.
    pub(super) fn links(&self) -> &OwnedFd {
        &self.links
    }

    /// Where the link of a descriptor leads.
    pub(super) fn link(&self, fd: i32) -> Result<Vec<u8>, ProcReadError> {
        file::read_link_at(&self.links, &name_of(fd))
            .map_err(|source| self.failed(&format!("fd {fd}"), source))
    }

    /// Reads link and fdinfo of a descriptor, the least that tells it from others.
    pub(super) fn see(&self, fd: i32) -> Result<Seen, ProcReadError> {
        self.see_behind(fd, self.link(fd)?)
    }

    /// The same where the link is known.
    pub(super) fn see_behind(&self, fd: i32, link: Vec<u8>) -> Result<Seen, ProcReadError> {
        let info = self.info(fd)?;
        Ok(Seen { fd, link, info })
    }

    /// Reads fdinfo of a descriptor, which tells which open file it may be.
    pub(super) fn info(&self, fd: i32) -> Result<FdInfo, ProcReadError> {
        let mut text = Vec::new();
        let read = file::read_at(&self.infos, &name_of(fd), &mut text);
        read.map_err(|source| self.failed(&format!("fd {fd}"), source))?;
        FdInfo::parse(&text).map_err(|_| self.failed(&format!("fd {fd}"), Errno::EINVAL))
    }

    /// Looks at an open file through a duplicate, where there is one. Its link is read only where it says more
    /// than the duplicate does.
    pub(super) fn look_behind(
        &self,
        fd: i32,
        info: FdInfo,
        duplicate: Option<BorrowedFd<'_>>,
    ) -> Result<OpenFile, ProcReadError> {
        let stat = duplicate.and_then(|duplicate| file::stat(duplicate).ok());
        let nameless = stat.and_then(|stat| Some((stat, nameless_link(&stat)?)));
        let Some((stat, link)) = nameless else {
            let link = self.link(fd)?;
            return match stat {
                Some(stat) => Ok(self.open_file(Seen { fd, link, info }, stat)),
                None => self.look(Seen { fd, link, info }, duplicate),
            };
        };
        Ok(self.open_file(Seen { fd, link, info }, stat))
    }

    /// Completes what was seen of a descriptor, through a duplicate where there is one.
    pub(super) fn look(
        &self,
        seen: Seen,
        duplicate: Option<BorrowedFd<'_>>,
    ) -> Result<OpenFile, ProcReadError> {
        let stat = match duplicate {
            Some(duplicate) => file::stat(duplicate),
            None => file::stat_at(&self.links, &name_of(seen.fd)),
        };
        let stat = stat.map_err(|source| self.failed(&format!("fd {}", seen.fd), source))?;
        Ok(self.open_file(seen, stat))
    }

    fn open_file(&self, seen: Seen, stat: Stat) -> OpenFile {
        OpenFile {
            pid: self.pid,
            place: Place::Fd(seen.fd),
            link: seen.link,
            stat,
            info: seen.info,
            location: OnceLock::new(),
        }
    }

    /// An error about one of the descriptors.
    pub(super) fn failed(&self, what: &str, source: Errno) -> ProcReadError {
        ProcReadError {
            pid: self.pid,
            what: what.to_owned(),
            source,
        }
    }
}

/// The link of a pipe or socket that somebody has open: its text tells nothing but the inode. (A socket in a
/// directory can't be opened but by O_PATH, of which there are no duplicates.)
pub(super) fn nameless_link(stat: &Stat) -> Option<Vec<u8>> {
    let kind = match stat.file_type() {
        S_IFSOCK => "socket",
        _ if is_nameless_pipe(stat) => "pipe",
        _ => return None,
    };
    Some(format!("{kind}:[{}]", stat.ino).into_bytes())
}

/// True for a pipe, which is no fifo.
pub(super) fn is_nameless_pipe(stat: &Stat) -> bool {
    static PIPES: OnceLock<Option<u64>> = OnceLock::new();
    let pipes = || *PIPES.get_or_init(|| pipe::filesystem().ok());
    stat.file_type() == S_IFIFO && pipes() == Some(stat.dev)
}

/// Where the descriptors of a task lead that is no other concern of ours; empty for one that is gone.
pub(super) fn links_of(pid: Pid) -> Vec<(i32, Vec<u8>)> {
    let Ok(dir) = open_directory(pid, "fd") else {
        return Vec::new();
    };
    let link = |fd: &i32| Some((*fd, file::read_link_at(&dir, &name_of(*fd)).ok()?));
    let (looks, others) = look_at_running(&dir, |fds| fds.iter().map(link).collect());
    looks.into_iter().chain(others).flatten().collect()
}

/// Looks at all descriptors of a task that may run, whose directory this is. `look` has None for those that are not open.
///
/// Most tables have few gaps, so that numbers from 0 on are quicker tried than listed: for a list the kernel makes an
/// entry of each first.
pub(super) fn look_at_running<R>(
    dir: &OwnedFd,
    look: impl Fn(&[i32]) -> Vec<Option<R>>,
) -> (Vec<Option<R>>, Vec<Option<R>>) {
    let tried = count_in(dir).and_then(|count| i32::try_from(count).ok());
    let tried = tried.unwrap_or(0);
    let looks = look(&(0..tried).collect::<Vec<i32>>());
    if tried > 0 && looks.iter().all(Option::is_some) {
        return (looks, Vec::new());
    }
    let mut others = file::list_numbers(dir).unwrap_or_default();
    others.retain(|fd| *fd >= tried);
    (looks, look(&others))
}

/// How many descriptors are open by the size of their directory; None before Linux 6.2, which does not say.
fn count_in(dir: &OwnedFd) -> Option<usize> {
    let size = file::stat(dir).ok()?.size;
    usize::try_from(size).ok().filter(|size| *size > 0)
}

fn open_directory(pid: Pid, name: &str) -> Result<OwnedFd, ProcReadError> {
    let path = PathBuf::from(format!("/proc/{pid}/{name}"));
    let flags = file::O_DIRECTORY.cast_unsigned();
    file::open(&path, flags).map_err(|source| ProcReadError {
        pid,
        what: format!("the directory {name}"),
        source,
    })
}

fn name_of(fd: i32) -> CString {
    CString::new(fd.to_string()).expect("digits hold no NUL")
}
