//! One table of descriptors: which open file each of them has, and the dump of those not met before.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use firn_proto::{FdTypes, FdinfoEntry, FownEntry};
use firn_sys::file::{O_ACCMODE, O_CLOEXEC, O_DIRECTORY, O_PATH};
use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::{Pid, fcntl, pidfd};

use super::dump::{DumpState, FileTable, query};
use super::error::FileDumpError;
use super::fdinfo::FdInfo;
use super::kind::{self, Dumping};
use super::open_file::{DescriptorDir, OpenFile, Seen};
use super::{owner, sharing};
use crate::memory::SharedDump;

/// What descriptors of one open file have in common and F_SETFL can't change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DescriptionKey {
    mnt_id: u32,
    ino: u64,
    flags: u32,
}

/// Where an open file belongs among those known.
#[derive(Debug, Clone, Copy)]
struct Place {
    key: DescriptionKey,
    at: usize,
}

pub(super) struct Description {
    pid: Pid,
    fd: i32,
    id: u32,
    fd_type: FdTypes,
}

impl FileTable {
    /// Collects the descriptors of a task's table.
    pub(super) fn add_table(
        &mut self,
        pid: Pid,
        shared: &mut SharedDump,
    ) -> Result<(), FileDumpError> {
        let mut dir = DescriptorDir::open(pid)?;
        let mut task = Duplicator { pid, pidfd: None };
        let mut table = Vec::new();
        for fd in dir.numbers()? {
            let seen = dir.see(fd)?;
            let cloexec = seen.info.flags & O_CLOEXEC.cast_unsigned() != 0;
            let known = match self.find(pid, &seen)? {
                Ok(known) => {
                    // Locks of fcntl belong to the task and not to the open file.
                    if seen.info.locks().next().is_some() {
                        let file = dir.look(seen, None)?;
                        self.obstacles.extend(kind::lock_obstacles(&file));
                    }
                    Some(known)
                }
                Err(place) => {
                    let duplicate = task.duplicate(&dir, &seen)?;
                    let file = dir.look(seen, duplicate.as_ref().map(AsFd::as_fd))?;
                    let duplicate = duplicate.as_ref().map(AsFd::as_fd);
                    self.describe(&file, duplicate, fd, place, shared)?
                }
            };
            table.extend(known.map(|(id, fd_type)| FdinfoEntry {
                id,
                flags: if cloexec { fcntl::FD_CLOEXEC } else { 0 },
                r#type: fd_type.into(),
                fd: fd.cast_unsigned(),
                xattr_security_selinux: None,
            }));
        }
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
        let mut dir = DescriptorDir::open(me)?;
        let seen = dir.see(number)?;
        let known = match self.find(me, &seen)? {
            Ok(known) => Some(known),
            Err(place) => {
                let file = dir.look(seen, Some(fd.as_fd()))?;
                self.describe(&file, Some(fd.as_fd()), number, place, shared)?
            }
        };
        // It stays open: it may be the one that others are compared with.
        self.in_flight.push(fd);
        Ok(known.map(|(id, _)| id))
    }

    /// Finds the open file behind a descriptor among those known: its number and type, or the place
    /// where it belongs.
    fn find(
        &mut self,
        pid: Pid,
        seen: &Seen,
    ) -> Result<Result<(u32, FdTypes), Place>, FileDumpError> {
        let key = DescriptionKey::of(&seen.info);
        let known = self.descriptions.entry(key).or_default();
        let found = sharing::search(known, |other| {
            let resource = Resource::File {
                fd1: other.fd,
                fd2: seen.fd,
            };
            let other = other.pid;
            kcmp(other, pid, resource).map_err(|source| FileDumpError::Compare {
                pid,
                other,
                source,
            })
        })?;
        Ok(match found {
            Ok(at) => Ok((known[at].id, known[at].fd_type)),
            Err(at) => Err(Place { key, at }),
        })
    }

    /// Dumps an open file; None for one that can't be dumped, which is noted.
    fn describe(
        &mut self,
        file: &OpenFile,
        duplicate: Option<BorrowedFd<'_>>,
        fd: i32,
        place: Place,
        shared: &mut SharedDump,
    ) -> Result<Option<(u32, FdTypes)>, FileDumpError> {
        let obstacles = kind::obstacles(file, &self.collected.options);
        let kind = match kind::of_file(file) {
            Some(kind) if obstacles.is_empty() => kind,
            _ => {
                self.obstacles.extend(obstacles);
                return Ok(None);
            }
        };
        let fown = duplicate.map_or(Ok(FownEntry::default()), |fd| {
            owner::dump(fd).map_err(|source| query(file, "the signal owner", source))
        })?;
        let dumping = Dumping {
            file,
            duplicate,
            id: self.collected.new_id(),
            fown,
        };
        let mut state = DumpState {
            shared,
            collected: &mut self.collected,
        };
        let entry = kind.dump(&dumping, &mut state)?;
        self.collected.entries.push(entry);
        let description = Description {
            pid: file.pid,
            fd,
            id: dumping.id,
            fd_type: kind.fd_type(),
        };
        let known = self.descriptions.entry(place.key).or_default();
        known.insert(place.at, description);
        Ok(Some((dumping.id, kind.fd_type())))
    }
}

impl DescriptionKey {
    fn of(info: &FdInfo) -> DescriptionKey {
        let fixed = (O_ACCMODE | O_PATH | O_DIRECTORY).cast_unsigned();
        DescriptionKey {
            mnt_id: info.mnt_id,
            ino: info.ino,
            flags: info.flags & fixed,
        }
    }
}

/// Duplicates descriptors of one task; its pidfd is opened at the first need.
struct Duplicator {
    pid: Pid,
    pidfd: Option<OwnedFd>,
}

impl Duplicator {
    fn duplicate(
        &mut self,
        dir: &DescriptorDir,
        seen: &Seen,
    ) -> Result<Option<OwnedFd>, FileDumpError> {
        if seen.info.is_path_only() {
            return Ok(None);
        }
        let failed = |source| dir.failed(&format!("a duplicate of fd {}", seen.fd), source);
        let pidfd = match &self.pidfd {
            Some(pidfd) => pidfd,
            None => self.pidfd.insert(pidfd::open(self.pid).map_err(failed)?),
        };
        Ok(Some(pidfd::getfd(pidfd, seen.fd).map_err(failed)?))
    }
}
