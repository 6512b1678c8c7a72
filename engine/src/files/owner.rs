//! Who gets the signal when a descriptor becomes ready (F_SETOWN, F_SETSIG).
//!
//! It belongs to the open file, is read from outside through a duplicate, and is set back by a task of
//! the tree when all tasks exist: the kernel looks the id up at once and remembers the caller's user ids.

use std::os::fd::{AsFd, RawFd};

use firn_proto::{FdTypes, FdinfoEntry, FownEntry, RegFileEntry};
use firn_sys::file::O_ASYNC;
use firn_sys::{Result, fcntl, nr};

use super::pipe;
use super::store::FileStore;
use crate::program::{Program, Rule};

/// ESRCH, as a record's rule takes it.
const ESRCH: i32 = 3;

/// Reads the owner; all zero means none.
pub(super) fn dump(fd: impl AsFd) -> Result<FownEntry> {
    let fd = fd.as_fd();
    let owner = fcntl::owner(fd)?;
    let signum = fcntl::signal(fd)?;
    if owner.id == 0 {
        return Ok(FownEntry {
            signum,
            ..FownEntry::default()
        });
    }
    let (uid, euid) = fcntl::owner_uids(fd)?;
    Ok(FownEntry {
        uid,
        euid,
        signum,
        pid_type: owner.kind.cast_unsigned(),
        pid: owner.id.cast_unsigned(),
    })
}

/// Adds the records that set the owner of the open file behind `fd`, and O_ASYNC if it is among `flags`.
pub(super) fn plan(fd: RawFd, fown: &FownEntry, flags: u32, program: &mut Program) {
    if fown.signum != 0 {
        program.call(
            nr::FCNTL,
            &[fd.into(), fcntl::F_SETSIG.into(), fown.signum.into()],
            Rule::Ok,
            format!("signal {} of fd {fd}", fown.signum),
        );
    }
    if fown.pid != 0 {
        let mut owner = fown.pid_type.to_le_bytes().to_vec();
        owner.extend_from_slice(&fown.pid.to_le_bytes());
        let owner = program.data(&owner);
        program.call(
            nr::FCNTL,
            &[fd.into(), fcntl::F_SETOWN_EX.into(), owner.into()],
            // The owner may have been dead already at the dump.
            Rule::OkOr(ESRCH),
            format!("owner {} of fd {fd}", fown.pid.cast_signed()),
        );
    }
    if flags & O_ASYNC.cast_unsigned() != 0 {
        // Here and not when it was opened: the signal names the number that this is called with.
        program.call(
            nr::FCNTL,
            &[fd.into(), fcntl::F_SETFL.into(), flags.into()],
            Rule::Ok,
            format!("O_ASYNC of fd {fd}"),
        );
    }
}

impl FileStore {
    /// Signal owner and flags of the open file behind a table entry.
    pub(super) fn owner(&self, fd: &FdinfoEntry) -> Option<(FownEntry, u32)> {
        let fd_type = FdTypes::try_from(fd.r#type).ok()?;
        let entry = self.entry(fd_type, fd.id)?;
        let of_path = |reg: &RegFileEntry| (reg.fown, reg.flags);
        match fd_type {
            FdTypes::Reg => entry.reg.as_ref().map(of_path),
            FdTypes::Pipe => {
                let pipe = entry.pipe.as_ref()?;
                Some((pipe.fown, pipe::flags_of(pipe)))
            }
            FdTypes::Fifo => {
                let path = entry.fifo.as_ref()?.regf_id.unwrap_or(entry.id);
                self.path_entry(path).ok().map(of_path)
            }
            FdTypes::Tty => entry.tty.as_ref().map(|tty| (tty.fown, tty.flags)),
            FdTypes::Memfd => entry.memfd.as_ref().map(|memfd| (memfd.fown, memfd.flags)),
            FdTypes::Unixsk => entry.usk.as_ref().map(|socket| (socket.fown, socket.flags)),
            FdTypes::Eventfd => entry.efd.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Eventpoll => entry.epfd.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Signalfd => entry.sgfd.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Timerfd => entry.tfd.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Inotify => entry.ify.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Fanotify => entry.ffy.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Pidfd => entry.pidfd.as_ref().map(|e| (e.fown, e.flags)),
            FdTypes::Ext => {
                let ext = entry.ext.as_ref()?;
                let flags = ext.firn.as_ref().and_then(|firn| firn.flags);
                Some((ext.fown, flags.unwrap_or(0)))
            }
            FdTypes::Bpfmap => entry.bpf.as_ref().map(|map| (map.fown, map.flags)),
            FdTypes::Inetsk => entry.isk.as_ref().map(|socket| (socket.fown, socket.flags)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_and_signal_are_read_back() {
        let (reader, _writer) = firn_sys::pipe::create().expect("a pipe");
        assert_eq!(dump(&reader).expect("fcntl"), FownEntry::default());
        let pid = firn_sys::Pid::this();
        let owner = fcntl::Owner {
            kind: 1,
            id: pid.raw(),
        };
        fcntl::set_owner(&reader, owner).expect("own pid");
        fcntl::set_signal(&reader, 34).expect("a signal");
        let fown = dump(&reader).expect("fcntl");
        assert_eq!((fown.pid, fown.pid_type), (pid.to_image(), 1));
        assert_eq!(fown.signum, 34);
    }

    #[test]
    fn nothing_is_planned_for_nobody() {
        let mut program = Program::new("task 1");
        plan(3, &FownEntry::default(), 2, &mut program);
        assert!(program.is_empty());
        let fown = FownEntry {
            signum: 29,
            pid_type: 1,
            pid: 7,
            ..FownEntry::default()
        };
        plan(3, &fown, O_ASYNC.cast_unsigned(), &mut program);
        assert_eq!(program.len(), 3);
    }
}
