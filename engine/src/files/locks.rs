//! Locks and leases of files.
//!
//! fdinfo shows what is held: POSIX locks under every descriptor that the holding table has of the file,
//! all others under the open file that holds them. Waiters are not shown and not needed: a task that
//! waits for a lock waits again when it goes on.
//!
//! POSIX locks belong to a table, so a task that has it sets them; it sets the others as well, which lets
//! /proc/locks name a living process. A lease is set by this process before the tasks exist, because one
//! that is being broken sends a signal to whoever owns the file then.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd};

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{FdinfoEntry, FileLockEntry};
use firn_sys::file::{self, O_ACCMODE, O_NONBLOCK, O_RDONLY, O_WRONLY};
use firn_sys::{Errno, Pid, fcntl, nr};

use super::dump::query;
use super::error::{FileDumpError, FileRestoreError};
use super::open_file::OpenFile;
use super::store::FileStore;
use crate::program::{Program, Rule};

const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;
/// Marks a lease that somebody waits for; the type is then what is to be left of it.
const BREAKING: u32 = 4;
const READ: u32 = 0;
const WRITE: u32 = 1;
const NONE: u32 = 2;
const LOCK_SH: u32 = 1;
const LOCK_EX: u32 = 2;
const LOCK_NB: u32 = 4;

/// A line of fdinfo about a lock.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Line {
    kind: u32,
    lock_type: u32,
    /// Device and inode as the kernel writes them.
    file: String,
    start: i64,
    /// 0 is up to the end of the file, however long.
    len: i64,
}

/// The locks met so far.
#[derive(Debug, Default)]
pub(super) struct Locks {
    entries: Vec<FileLockEntry>,
    seen: HashSet<(Holder, Line)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Holder {
    Table(u32),
    Description(u32),
}

impl Line {
    /// Parses `lock: 1: POSIX ADVISORY WRITE 4711 fe:00:12 0 EOF`.
    pub(super) fn parse(line: &str) -> Option<Line> {
        let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
        let mut next = || words.next();
        let kind = match next()? {
            "POSIX" => POSIX,
            "FLOCK" => FLOCK,
            "OFDLCK" => OFD,
            "LEASE" => LEASE,
            _ => return None,
        };
        let breaking = match next()? {
            "ADVISORY" | "ACTIVE" => 0,
            "BREAKING" => BREAKING,
            _ => return None,
        };
        let lock_type = match next()? {
            "READ" => READ,
            "WRITE" => WRITE,
            "UNLCK" => NONE,
            _ => return None,
        };
        let file = next().and_then(|_pid| next())?.to_owned();
        let start: i64 = next()?.parse().ok()?;
        let len = match next()? {
            "EOF" => 0,
            end => end
                .parse::<i64>()
                .ok()?
                .checked_sub(start)?
                .checked_add(1)?,
        };
        Some(Line {
            kind,
            lock_type: lock_type | breaking,
            file,
            start,
            len,
        })
    }
}

/// The inodes in lines such as `7: POSIX  ADVISORY  WRITE 4711 fe:00:12 0 EOF`; those who wait for a lock (`->`)
/// don't hold one.
pub(super) fn inodes_of(text: &str) -> HashSet<u64> {
    let inode_of = |line: &str| {
        let file = line.split_whitespace().nth(5)?;
        file.rsplit_once(':')?.1.parse().ok()
    };
    text.lines().filter_map(inode_of).collect()
}

impl Locks {
    /// Notes the locks under a descriptor of a table of `process` whose open file has number `id`.
    pub(super) fn add(
        &mut self,
        file: &OpenFile,
        process: Pid,
        fd: i32,
        table: u32,
        id: u32,
        duplicate: impl FnOnce() -> Result<u32, Errno>,
    ) -> Result<(), FileDumpError> {
        let mut duplicate = Some(duplicate);
        for line in file.info.lines.iter().filter(|l| l.starts_with("lock:")) {
            let mut lock = Line::parse(line).ok_or_else(|| file.unexpected("lock"))?;
            let holder = match lock.kind {
                POSIX => Holder::Table(table),
                _ => Holder::Description(id),
            };
            if !self.seen.insert((holder, lock.clone())) {
                continue;
            }
            if lock.lock_type & BREAKING != 0
                && let Some(ask) = duplicate.take()
            {
                let target = ask().map_err(|source| query(file, "the lease", source))?;
                lock.lock_type = BREAKING | target;
            }
            self.entries.push(FileLockEntry {
                flag: lock.kind,
                r#type: lock.lock_type,
                pid: process.raw(),
                fd,
                start: lock.start,
                len: lock.len,
            });
        }
        Ok(())
    }

    /// Writes filelocks.img, if there are any.
    pub(super) fn write(&self, images: &ImageSetWriter) -> Result<(), FileDumpError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        Ok(images.write_all(ImageKind::FileLocks, 0, &self.entries)?)
    }
}

impl FileStore {
    /// Sets leases, and breaks those that were being broken.
    pub(super) fn set_leases(&self) -> Result<(), FileRestoreError> {
        for lock in self.locks.iter().filter(|lock| lock.flag == LEASE) {
            let table = self.table_of(Pid::from_raw(lock.pid));
            let fd = table.and_then(|table| entry_of(self.table(table), lock.fd));
            let opened = fd.map(|fd| self.opened_by(fd)).transpose()?;
            let Some(fd) = opened.flatten() else {
                let what = format!("task {} has no fd {} for its lease", lock.pid, lock.fd);
                return Err(FileRestoreError::corrupt(0, what));
            };
            set_lease(fd, lock).map_err(FileRestoreError::refused(
                "set the lease of",
                format!("fd {} of task {}", lock.fd, lock.pid),
            ))?;
        }
        Ok(())
    }

    /// Appends the records that set the locks held by a task or through its table.
    ///
    /// They run when the table is complete.
    pub fn plan_locks(&self, pid: Pid, program: &mut Program) {
        let own = self.locks.iter().filter(|lock| lock.pid == pid.raw());
        for lock in own {
            let why = format!("lock of fd {}", lock.fd);
            if lock.flag == FLOCK {
                let operation = match lock.r#type {
                    READ => LOCK_SH,
                    _ => LOCK_EX,
                };
                let args = [lock.fd.into(), (operation | LOCK_NB).into()];
                program.call(nr::FLOCK, &args, Rule::Ok, why);
            } else if matches!(lock.flag, POSIX | OFD) {
                let command = match lock.flag {
                    POSIX => fcntl::F_SETLK,
                    _ => fcntl::F_OFD_SETLK,
                };
                let range = program.data(&flock_bytes(lock));
                let args = [lock.fd.into(), command.into(), range.into()];
                program.call(nr::FCNTL, &args, Rule::Ok, why);
            }
        }
    }
}

fn entry_of(table: &[FdinfoEntry], fd: i32) -> Option<&FdinfoEntry> {
    table.iter().find(|entry| entry.fd == fd.cast_unsigned())
}

/// struct flock: type, whence, 4 bytes of padding, start, length, pid, 4 bytes of padding.
fn flock_bytes(lock: &FileLockEntry) -> [u8; 32] {
    let mut bytes = [0; 32];
    let lock_type = u16::try_from(lock.r#type & 3).expect("two bits");
    bytes[..2].copy_from_slice(&lock_type.to_ne_bytes());
    bytes[8..16].copy_from_slice(&lock.start.to_ne_bytes());
    bytes[16..24].copy_from_slice(&lock.len.to_ne_bytes());
    bytes
}

fn set_lease(fd: impl AsFd, lock: &FileLockEntry) -> Result<(), Errno> {
    let target = lock.r#type & 3;
    if lock.r#type & BREAKING == 0 {
        fcntl::set_lease(&fd, target.cast_signed())?;
        return fcntl::set_owner(&fd, fcntl::Owner::default());
    }
    // What it was before is not told, but only one kind goes with the way the file is open.
    let reads = fcntl::flags(&fd)? & O_ACCMODE.cast_unsigned() == O_RDONLY.cast_unsigned();
    let before = if reads { READ } else { WRITE };
    fcntl::set_lease(&fd, before.cast_signed())?;
    fcntl::set_owner(&fd, fcntl::Owner::default())?;
    let wanted = if target == NONE { O_WRONLY } else { O_RDONLY };
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    match file::open(path.as_ref(), (wanted | O_NONBLOCK).cast_unsigned()) {
        Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno),
        Ok(_) => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_of_lines_are_read() {
        let read = |text| Line::parse(text).map(|l| (l.kind, l.lock_type, l.start, l.len));
        let line = "lock:\t1: POSIX  ADVISORY  WRITE 4711 fe:00:12 5 14";
        assert_eq!(read(line), Some((POSIX, WRITE, 5, 10)));
        let line = "lock:\t3: OFDLCK ADVISORY  READ -1 00:1b:198992 100 EOF";
        assert_eq!(read(line), Some((OFD, READ, 100, 0)));
        let line = "lock:\t1: LEASE  BREAKING  UNLCK 29919 00:1b:198993 0 EOF";
        assert_eq!(read(line), Some((LEASE, NONE | BREAKING, 0, 0)));
        assert_eq!(
            read("lock:\t1: DELEG  ACTIVE    READ 1 00:1b:1 0 EOF"),
            None
        );
    }

    #[test]
    fn inodes_of_holders_are_read() {
        let text = "1: POSIX  ADVISORY  WRITE 4711 fe:00:12 0 EOF\n\
            1: -> POSIX  ADVISORY  WRITE 4712 fe:00:12 0 EOF\n\
            2: FLOCK  ADVISORY  READ -1 00:1b:198992 0 EOF\n3: odd\n";
        assert_eq!(inodes_of(text), HashSet::from([12, 198_992]));
    }

    #[test]
    fn a_range_has_the_kernels_layout() {
        let bytes = flock_bytes(&FileLockEntry {
            r#type: WRITE,
            start: 5,
            len: 10,
            ..FileLockEntry::default()
        });
        assert_eq!((bytes[0], bytes[8], bytes[16]), (1, 5, 10));
    }
}
