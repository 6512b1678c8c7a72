//! One table of descriptors: which open file each of them has, and the dump of those not met before.
//!
//! Whatever the kernel tells about one descriptor is asked by several threads at a time; the open files
//! are then told apart and dumped one after another.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use firn_proto::{FdTypes, FdinfoEntry, FownEntry};
use firn_sys::file::{O_ACCMODE, O_CLOEXEC, O_DIRECTORY, O_PATH};
use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::rlimit::RaisedDescriptorLimit;
use firn_sys::{Errno, Pid, fcntl, file, pidfd};

use super::dump::{DumpState, FileTable, query};
use super::error::FileDumpError;
use super::fdinfo::FdInfo;
use super::kind::{self, Dumping};
use super::open_file::{DescriptorDir, FDS_PER_THREAD, OpenFile, Seen, Trouble};
use super::told::{self, QuickLook, Recalled, ToldFd};
use super::{FileDumpOptions, owner, sharing, task_files};
use crate::crew;
use crate::memory::SharedDump;
use crate::obstacle::Obstacle;

/// How many descriptors may be looked at before the first of them is dumped, at the most: so many duplicates
/// are open here, as far as the limit of this process allows.
const MAX_FDS_AHEAD: usize = 200;

/// How many of those that were dumped are kept until the end, at the most.
const MOST_SPENT: usize = 8 << 10;

const PIDFD: &[u8] = b"anon_inode:[pidfd]";

/// What descriptors of one open file have in common and F_SETFL can't change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DescriptionKey {
    mnt_id: u32,
    ino: u64,
    flags: u32,
}

/// All open files that are known, those of one key sorted by kcmp.
#[derive(Default)]
pub(super) struct Descriptions {
    pub(super) by_key: HashMap<DescriptionKey, Vec<Description>>,
}

pub(super) struct Description {
    pub(super) pid: Pid,
    pub(super) fd: i32,
    pub(super) id: u32,
    pub(super) fd_type: FdTypes,
}

/// A descriptor that was looked at beside others.
enum Look {
    /// Its open file was known before.
    Known(i32, FdInfo, (u32, FdTypes)),
    /// Its open file was not known, but may be that of another one looked at beside it.
    New(i32, Box<NewFile>),
}

/// An open file that may have to be dumped.
pub(super) struct NewFile {
    file: OpenFile,
    duplicate: Option<OwnedFd>,
    obstacles: Vec<Obstacle>,
    fown: FownEntry,
}

impl FileTable {
    /// Collects the descriptors of a task's table.
    pub(super) fn add_table(
        &mut self,
        pid: Pid,
        shared: &mut SharedDump,
    ) -> Result<(), FileDumpError> {
        let dir = DescriptorDir::open(pid)?;
        let pidfd =
            pidfd::open_by_thread(pid).map_err(|source| dir.failed("the descriptors", source))?;
        let (told, close_on_exec) = self.recalled.remove(&pid).unwrap_or_default();
        let fds = wanted(&dir, &told, &close_on_exec)?;
        let mut table = Vec::with_capacity(fds.len());
        let ahead = match fds.len() {
            0..=FDS_PER_THREAD => MAX_FDS_AHEAD,
            _ => self.limit.as_ref().map_or(MAX_FDS_AHEAD, room),
        };
        let quick = self.quick.take();
        let is_first = self.descriptions.by_key.is_empty();
        let descriptions = RwLock::new(std::mem::take(&mut self.descriptions));
        let options = self.collected.options.clone();
        let look = |(fd, recalled): &(i32, Option<Recalled<'_>>)| {
            let known = quick.as_ref().zip(recalled.as_ref());
            let looked = known.map(|(quick, recalled)| {
                let known = (&descriptions, is_first);
                look_again(&dir, &pidfd, (*fd, recalled), quick, known, &options)
            });
            match looked.transpose()?.flatten() {
                Some(look) => Ok(look),
                None => look_at(&dir, &pidfd, *fd, &descriptions, &options),
            }
        };
        let take = |look: Result<Look, FileDumpError>| {
            table.extend(self.add_descriptor(&dir, look?, &descriptions, shared)?);
            Ok::<_, FileDumpError>(())
        };
        let done = crew::stream(&fds, FDS_PER_THREAD, ahead, look, take);
        self.descriptions = descriptions.into_inner().unwrap_or_else(|e| e.into_inner());
        self.quick = quick;
        done?;
        self.tables.push((self.files_id(pid), table));
        Ok(())
    }

    /// Adds a file that is in a message and of which we have a duplicate. Returns its number; None for one
    /// that can't be dumped, which is noted.
    pub(super) fn add_in_flight(
        &mut self,
        fd: OwnedFd,
        shared: &mut SharedDump,
    ) -> Result<Option<u32>, FileDumpError> {
        let (me, number) = (Pid::this(), fd.as_raw_fd());
        let dir = DescriptorDir::open(me)?;
        let seen = dir.see(number)?;
        if seen.link == PIDFD || task_files::task_of(&seen.link).is_some() {
            let file = dir.look(seen, Some(fd.as_fd()))?;
            self.obstacles.push(file.obstacle(Trouble::new(
                "it describes a task, which does not exist yet when the socket gets its message back",
                "let the receiver take the message before the dump",
            )));
            return Ok(None);
        }
        let (known, fd) = match self.descriptions.find(me, number, &seen.info)? {
            Ok(known) => (Some(known), Some(fd)),
            Err(place) => {
                let file = dir.look(seen, Some(fd.as_fd()))?;
                let new = NewFile::read(file, Some(fd), &self.collected.options)?;
                let known = self.describe(&new, shared)?;
                if let Some(known) = known {
                    let key = DescriptionKey::of(&new.file.info);
                    self.descriptions.insert(key, place, (me, number), known);
                }
                (known, new.duplicate)
            }
        };
        // It stays open: it may be the one that others are compared with.
        self.in_flight.extend(fd);
        Ok(known.map(|(id, _)| id))
    }

    /// Makes a descriptor's entry; None for one that can't be dumped, which is noted.
    fn add_descriptor(
        &mut self,
        dir: &DescriptorDir,
        look: Look,
        descriptions: &RwLock<Descriptions>,
        shared: &mut SharedDump,
    ) -> Result<Option<FdinfoEntry>, FileDumpError> {
        let (fd, flags, known) = match look {
            Look::Known(fd, info, known) => {
                let flags = info.flags;
                // Locks of fcntl belong to the task and not to the open file.
                if info.has_locks() {
                    let link = dir.link(fd)?;
                    let file = dir.look(Seen { fd, link, info }, None)?;
                    let options = &self.collected.options;
                    self.obstacles.extend(kind::lock_obstacles(&file, options));
                    self.note_locks(&file, fd, known.0, None)?;
                }
                (fd, flags, Some(known))
            }
            Look::New(fd, new) => {
                let info = &new.file.info;
                let pid = new.file.pid;
                let found = read(descriptions).find(pid, fd, info)?;
                let known = match found {
                    Ok(known) => {
                        let options = &self.collected.options;
                        self.obstacles
                            .extend(kind::lock_obstacles(&new.file, options));
                        Some(known)
                    }
                    Err(place) => {
                        let known = self.describe(&new, shared)?;
                        if let Some(known) = known {
                            let key = DescriptionKey::of(info);
                            let mut descriptions = write(descriptions);
                            descriptions.insert(key, place, (pid, fd), known);
                        }
                        known
                    }
                };
                if let (Some((id, _)), true) = (known, info.has_locks()) {
                    self.note_locks(&new.file, fd, id, new.duplicate.as_ref())?;
                }
                let flags = info.flags;
                self.put_aside(new);
                (fd, flags, known)
            }
        };
        let cloexec = flags & O_CLOEXEC.cast_unsigned() != 0;
        Ok(known.map(|(id, fd_type)| FdinfoEntry {
            id,
            flags: if cloexec { fcntl::FD_CLOEXEC } else { 0 },
            r#type: fd_type.into(),
            fd: fd.cast_unsigned(),
            xattr_security_selinux: None,
        }))
    }

    /// Keeps what another thread has allocated: to free it here, beside that thread, would make each wait for the
    /// other at every turn.
    fn put_aside(&mut self, mut new: Box<NewFile>) {
        new.duplicate = None;
        if self.spent.len() < MOST_SPENT {
            self.spent.push(new);
        }
    }

    /// Notes the locks under a descriptor. Leases are met with the open file itself, by its duplicate.
    fn note_locks(
        &mut self,
        file: &OpenFile,
        fd: i32,
        id: u32,
        duplicate: Option<&OwnedFd>,
    ) -> Result<(), FileDumpError> {
        let table = self.files_id(file.pid);
        let lease = || duplicate.map_or(Err(Errno::EBADF), fcntl::lease);
        let process = self.collected.process_of.get(&file.pid);
        let process = *process.unwrap_or(&file.pid);
        self.collected
            .locks
            .add(file, process, fd, table, id, lease)
    }

    /// Dumps an open file; None for one that can't be dumped, which is noted.
    fn describe(
        &mut self,
        new: &NewFile,
        shared: &mut SharedDump,
    ) -> Result<Option<(u32, FdTypes)>, FileDumpError> {
        let file = &new.file;
        let kind = match kind::of_file(file, &self.collected.options) {
            Some(kind) if new.obstacles.is_empty() => kind,
            _ => {
                self.obstacles.extend(new.obstacles.iter().cloned());
                return Ok(None);
            }
        };
        let dumping = Dumping {
            file,
            duplicate: new.duplicate.as_ref().map(AsFd::as_fd),
            id: self.collected.new_id(),
            fown: new.fown,
        };
        let mut state = DumpState {
            shared,
            collected: &mut self.collected,
        };
        let entry = kind.dump(&dumping, &mut state)?;
        self.collected.entries.push(entry);
        Ok(Some((dumping.id, kind.fd_type())))
    }
}

/// How many duplicates there is room for: half of what the limit leaves, since others need some, too.
fn room(limit: &RaisedDescriptorLimit) -> usize {
    let Some(limit) = limit.limit().and_then(|limit| usize::try_from(limit).ok()) else {
        return MAX_FDS_AHEAD;
    };
    let open = file::open("/proc/self/fd".as_ref(), 0).and_then(file::list_numbers);
    let open = open.map_or(0, |numbers| numbers.len());
    (limit.saturating_sub(open) / 2).clamp(1, MAX_FDS_AHEAD)
}

/// All open descriptors; those of the survey, with what it has seen, where they are all that there are.
fn wanted<'a>(
    dir: &DescriptorDir,
    told: &'a [ToldFd],
    close_on_exec: &[bool],
) -> Result<Vec<(i32, Option<Recalled<'a>>)>, FileDumpError> {
    // All of them were open when the task was asked for their flags.
    if !told.is_empty() && told.len() == close_on_exec.len() && dir.count() == Some(told.len()) {
        let recalled = told.iter().zip(close_on_exec);
        let recalled = recalled.map(|(told, &close_on_exec)| {
            let link = &told.link;
            let recalled = Recalled {
                link,
                close_on_exec,
            };
            (told.fd, Some(recalled))
        });
        return Ok(recalled.collect());
    }
    let fds = dir.numbers()?.into_iter();
    Ok(fds.map(|fd| (fd, None)).collect())
}

/// Looks at a descriptor that is known from the survey; None where that is not enough.
fn look_again(
    dir: &DescriptorDir,
    pidfd: &OwnedFd,
    (fd, recalled): (i32, &Recalled<'_>),
    quick: &QuickLook,
    (descriptions, is_first): (&RwLock<Descriptions>, bool),
    options: &FileDumpOptions,
) -> Result<Option<Look>, FileDumpError> {
    let Ok(duplicate) = pidfd::getfd(pidfd, fd) else {
        return Ok(None);
    };
    let Some((stat, info)) = quick.info((dir, fd), &duplicate, recalled) else {
        return Ok(None);
    };
    let pid = dir.pid();
    // In the first table hardly any is: whoever takes what was looked at finds the others.
    if !is_first && let Ok(known) = read(descriptions).find(pid, fd, &info)? {
        return Ok(Some(Look::Known(fd, info, known)));
    }
    let Some(file) = told::open_file((pid, fd), recalled, stat, info) else {
        return Ok(None);
    };
    let new = NewFile::read(file, Some(duplicate), options)?;
    Ok(Some(Look::New(fd, Box::new(new))))
}

fn look_at(
    dir: &DescriptorDir,
    pidfd: &OwnedFd,
    fd: i32,
    descriptions: &RwLock<Descriptions>,
    options: &FileDumpOptions,
) -> Result<Look, FileDumpError> {
    let info = dir.info(fd)?;
    let found = read(descriptions).find(dir.pid(), fd, &info)?;
    if let Ok(known) = found {
        return Ok(Look::Known(fd, info, known));
    }
    let failed = |source| dir.failed(&format!("a duplicate of fd {fd}"), source);
    let duplicate = match info.is_path_only() {
        true => None,
        false => Some(pidfd::getfd(pidfd, fd).map_err(failed)?),
    };
    let file = dir.look_behind(fd, info, duplicate.as_ref().map(AsFd::as_fd))?;
    let new = NewFile::read(file, duplicate, options)?;
    Ok(Look::New(fd, Box::new(new)))
}

impl Descriptions {
    /// Finds the open file behind a descriptor: its number and type, or the place where it belongs among
    /// those with the same key.
    fn find(
        &self,
        pid: Pid,
        fd: i32,
        info: &FdInfo,
    ) -> Result<Result<(u32, FdTypes), usize>, FileDumpError> {
        let Some(known) = self.by_key.get(&DescriptionKey::of(info)) else {
            return Ok(Err(0));
        };
        let found = sharing::search(known, |other| {
            let resource = Resource::File {
                fd1: other.fd,
                fd2: fd,
            };
            let other = other.pid;
            kcmp(other, pid, resource).map_err(|source| FileDumpError::Compare {
                pid,
                other,
                source,
            })
        })?;
        Ok(found.map(|at| (known[at].id, known[at].fd_type)))
    }

    /// Adds an open file at the place where [`Descriptions::find`] missed it.
    fn insert(
        &mut self,
        key: DescriptionKey,
        place: usize,
        (pid, fd): (Pid, i32),
        (id, fd_type): (u32, FdTypes),
    ) {
        let description = Description {
            pid,
            fd,
            id,
            fd_type,
        };
        let known = self.by_key.entry(key).or_default();
        known.insert(place, description);
    }
}

fn read(descriptions: &RwLock<Descriptions>) -> RwLockReadGuard<'_, Descriptions> {
    descriptions.read().unwrap_or_else(|e| e.into_inner())
}

fn write(descriptions: &RwLock<Descriptions>) -> RwLockWriteGuard<'_, Descriptions> {
    descriptions.write().unwrap_or_else(|e| e.into_inner())
}

impl NewFile {
    fn read(
        file: OpenFile,
        duplicate: Option<OwnedFd>,
        options: &FileDumpOptions,
    ) -> Result<NewFile, FileDumpError> {
        let obstacles = kind::obstacles(&file, options);
        let fown = match &duplicate {
            Some(fd) if obstacles.is_empty() => {
                owner::dump(fd).map_err(|source| query(&file, "the signal owner", source))?
            }
            _ => FownEntry::default(),
        };
        Ok(NewFile {
            file,
            duplicate,
            obstacles,
            fown,
        })
    }
}

impl DescriptionKey {
    /// Whether files with this key may have the inode number.
    pub(super) fn may_be(&self, inode: u64) -> bool {
        self.ino == 0 || self.ino == inode
    }

    fn of(info: &FdInfo) -> DescriptionKey {
        let fixed = (O_ACCMODE | O_PATH | O_DIRECTORY).cast_unsigned();
        DescriptionKey {
            mnt_id: info.mnt_id,
            ino: info.ino,
            flags: info.flags & fixed,
        }
    }
}
