//! Pairs of pseudo terminals of which the tree has the master.
//!
//! The kernel gives a new pair the lowest free number, so pairs are made until the wanted one comes. A
//! slave without master is opened with one that goes when all files are open, which hangs it up again.
//!
//! A session gets its controlling terminal right after it began, before its leader makes children,
//! because they inherit it; its foreground group is set when all groups are there.
//!
//! What waits in either direction can only be read by taking it out. It is written back at once, with
//! the other side's processing switched off, so that lines keep their ends and nothing is echoed.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use firn_images::{ImageDir, ImageKind, ImageSetWriter};
use firn_proto::{TtyDataEntry, TtyFileEntry, TtyInfoEntry};
use firn_sys::file::{self, O_NOCTTY, O_NONBLOCK, O_RDWR};
use firn_sys::tty::{self, Termios};
use firn_sys::{Errno, Pid, nr};

use super::dump::query;
use super::error::{FileDumpError, FileRestoreError};
use super::open::{self, Opener};
use super::open_file::OpenFile;
use super::store::FileStore;
use super::tty::{Sort, TerminalInfos};
use super::tty_image;
use crate::program::{Program, Rule};

const MASTER: u32 = 1;
/// Pairs that are made on the way to the wanted number.
const MAX_PAIRS: usize = 4096;
/// More than both buffers of a terminal hold.
const MAX_WAITING: usize = 1 << 17;
/// ECHO, ECHOE, ECHOK, ECHONL, ISIG, IEXTEN, ECHOCTL, ECHOKE.
const PROCESSING: u32 = 0o10 | 0o20 | 0o40 | 0o100 | 0o1 | 0o100_000 | 0o1000 | 0o4000;
const OPOST: u32 = 1;
/// ESRCH, as a record's rule takes it.
const ESRCH: i32 = 3;

/// Bytes that wait in pairs, by the number of the side that would read them.
#[derive(Debug, Default)]
pub(super) struct PtyContents {
    sides: HashMap<u32, OwnedFd>,
}

impl PtyContents {
    /// Notes one side of a pair.
    pub(super) fn add(
        &mut self,
        file: &OpenFile,
        fd: BorrowedFd<'_>,
        sort: Sort,
    ) -> Result<(), FileDumpError> {
        if let Sort::Master(_) | Sort::Slave(_) = sort {
            let copy = fd.try_clone_to_owned();
            let copy = copy.map_err(|error| query(file, "the terminal", error.into()))?;
            self.sides.entry(sort.info_id()).or_insert(copy);
        }
        Ok(())
    }

    /// Writes tty-data, if anything waits.
    pub(super) fn write(&self, images: &ImageSetWriter) -> Result<(), FileDumpError> {
        let mut entries = Vec::new();
        for (&id, master) in self.sides.iter().filter(|(id, _)| *id & MASTER != 0) {
            let Some(slave) = self.sides.get(&(id - MASTER)) else {
                continue;
            };
            let failed = |source| FileDumpError::Terminal {
                index: id / 2,
                source,
            };
            let input = take_input(master, slave).map_err(failed)?;
            let output = take_output(master, slave).map_err(failed)?;
            for (tty_id, data) in [(id - MASTER, input), (id, output)] {
                if !data.is_empty() {
                    entries.push(TtyDataEntry { tty_id, data });
                }
            }
        }
        if entries.is_empty() {
            return Ok(());
        }
        entries.sort_by_key(|entry| entry.tty_id);
        Ok(images.write_all(ImageKind::TtyData, 0, &entries)?)
    }
}

/// Reads what waits for the slave and puts it back.
fn take_input(master: &OwnedFd, slave: &OwnedFd) -> Result<Vec<u8>, Errno> {
    if tty::waiting(slave)? == 0 {
        return Ok(Vec::new());
    }
    // An open file of our own, which may be non-blocking.
    let path = format!("/proc/self/fd/{}", slave.as_raw_fd());
    let reader = file::open(
        path.as_ref(),
        (O_RDWR | O_NONBLOCK | O_NOCTTY).cast_unsigned(),
    )?;
    let data = read_all(&reader, usize::MAX)?;
    put_input(master, &data)?;
    Ok(data)
}

/// Reads what waits for the master and puts it back.
fn take_output(master: &OwnedFd, slave: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let waiting = usize::try_from(tty::waiting(master)?).unwrap_or(usize::MAX);
    // Its packets would have to be told from its bytes.
    if waiting == 0 || tty::is_packet_mode(master)? {
        return Ok(Vec::new());
    }
    let data = read_all(master, waiting)?;
    put_output(slave, &data)?;
    Ok(data)
}

fn read_all(fd: &OwnedFd, limit: usize) -> Result<Vec<u8>, Errno> {
    let mut data = Vec::new();
    while data.len() < limit.min(MAX_WAITING) {
        let mut chunk = [0; 4096];
        let len = chunk.len().min(limit - data.len());
        match tty::read(fd, &mut chunk[..len]) {
            Ok(0) | Err(Errno::EAGAIN) => break,
            Ok(got) => data.extend_from_slice(&chunk[..got]),
            Err(errno) => return Err(errno),
        }
    }
    Ok(data)
}

/// Lets the slave have bytes as if they had just been read from the master's side.
fn put_input(master: impl AsFd, data: &[u8]) -> Result<(), Errno> {
    let settings = tty::settings(&master)?;
    let quiet = Termios {
        iflag: 0,
        lflag: settings.lflag & !PROCESSING,
        ..settings
    };
    put(&master, &master, data, &settings, &quiet)
}

/// Lets the master have bytes as if the slave had written them.
fn put_output(slave: impl AsFd, data: &[u8]) -> Result<(), Errno> {
    let settings = tty::settings(&slave)?;
    let quiet = Termios {
        oflag: settings.oflag & !OPOST,
        ..settings
    };
    put(&slave, &slave, data, &settings, &quiet)
}

fn put(
    of: impl AsFd,
    to: impl AsFd,
    data: &[u8],
    settings: &Termios,
    quiet: &Termios,
) -> Result<(), Errno> {
    tty::set_settings(&of, quiet)?;
    let written = tty::write(to, data);
    tty::set_settings(of, settings)?;
    match written? {
        all if all == data.len() => Ok(()),
        _ => Err(Errno::EIO),
    }
}

/// The pairs being restored.
#[derive(Debug, Default)]
pub(super) struct Ptys {
    masters: HashMap<u32, OwnedFd>,
    taken: Vec<u32>,
    /// Pairs whose master somebody outside is to have.
    orphans: Vec<u32>,
    data: BTreeMap<u32, Vec<u8>>,
    /// Sessions with a controlling terminal: id, foreground group, the slave.
    pub(super) sessions: Vec<ControlledSession>,
}

/// A session with its terminal.
#[derive(Debug)]
pub(super) struct ControlledSession {
    sid: u32,
    pgrp: u32,
    slave: OwnedFd,
}

impl Ptys {
    /// Reads what waited in the pairs.
    pub(super) fn load(images: &ImageDir) -> Result<Ptys, FileRestoreError> {
        let data: Vec<TtyDataEntry> = images.read_all(ImageKind::TtyData, 0)?;
        Ok(Ptys {
            data: data.into_iter().map(|d| (d.tty_id, d.data)).collect(),
            ..Ptys::default()
        })
    }

    /// Gives the session that a terminal controlled another one.
    pub(super) fn give_session(
        &mut self,
        info: &TtyInfoEntry,
        terminal: &OwnedFd,
    ) -> Result<(), FileRestoreError> {
        let known = self.sessions.iter().any(|known| known.sid == info.sid);
        if info.sid != 0 && info.termios.is_some() && !known {
            let slave = terminal.try_clone().map_err(|error| {
                FileRestoreError::refused("duplicate", "a terminal")(error.into())
            })?;
            let (sid, pgrp) = (info.sid, info.pgrp);
            self.sessions.push(ControlledSession { sid, pgrp, slave });
        }
        Ok(())
    }

    /// Ends the opening: what waited is put back, which the terminals' settings must not change, and
    /// masters of hung up slaves go.
    pub(super) fn finish(
        &mut self,
        receiver: Option<&MasterReceiver>,
    ) -> Result<(), FileRestoreError> {
        for (id, data) in &self.data {
            let index = id / 2;
            let Some(master) = self.masters.get(&index) else {
                continue;
            };
            let done = if id & MASTER == 0 {
                put_input(master, data)
            } else {
                open_slave(index, O_RDWR.cast_unsigned(), None)
                    .map_err(|_| Errno::EIO)
                    .and_then(|slave| put_output(slave, data))
            };
            let name = format!("terminal {index}");
            done.map_err(FileRestoreError::refused("fill", name))?;
        }
        for index in std::mem::take(&mut self.orphans) {
            if let (Some(receiver), Some(master)) = (receiver, self.masters.remove(&index)) {
                (receiver.0)(index, master);
            }
        }
        Ok(())
    }
}

/// Who gets the masters of pairs of which the tree has the slave only: their number and the master.
#[derive(Clone)]
pub struct MasterReceiver(Arc<dyn Fn(u32, OwnedFd) + Send + Sync>);

impl MasterReceiver {
    /// Calls `receive` with each of them while files are opened.
    pub fn new(receive: impl Fn(u32, OwnedFd) + Send + Sync + 'static) -> MasterReceiver {
        MasterReceiver(Arc::new(receive))
    }
}

impl fmt::Debug for MasterReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterReceiver")
    }
}

impl PartialEq for MasterReceiver {
    fn eq(&self, other: &MasterReceiver) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for MasterReceiver {}

/// Opens one side of a pair; None for a slave whose master is outside.
pub(super) fn open(
    tty: &TtyFileEntry,
    info: &TtyInfoEntry,
    opener: &mut Opener<'_>,
) -> Result<Option<OwnedFd>, FileRestoreError> {
    let Some(index) = info.pty.map(|pty| pty.index) else {
        return Ok(None);
    };
    let reg = opener.path_entry(tty.id, tty.regf_id)?;
    let path = open::path_of(reg, opener.options);
    let is_master = tty.tty_info_id & MASTER != 0;
    let has_master = opener.terminals.contains_key(&(index * 2 + MASTER));
    let is_orphan = !has_master && info.termios.is_some();
    if is_orphan && opener.options.orphan_masters.is_none() {
        return Ok(None);
    }
    if !opener.ptys.masters.contains_key(&index) {
        let ptmx = match is_master {
            true => path.clone(),
            false => PathBuf::from("/dev/ptmx"),
        };
        let master = make(index, &ptmx)?;
        configure(index, &master, opener.terminals)?;
        opener.ptys.masters.insert(index, master);
        opener.ptys.orphans.extend(is_orphan.then_some(index));
        take_session(index, opener)?;
    }
    if !is_master {
        let fd = open_slave(index, tty.flags, Some(path))?;
        if let (Some(uid), Some(gid)) = (info.uid, info.gid) {
            let path = format!("/dev/pts/{index}");
            let _ = file::chown(path.as_ref(), uid, gid);
        }
        return Ok(Some(fd));
    }
    if opener.ptys.taken.contains(&index) {
        return Err(FileRestoreError::corrupt(
            tty.id,
            "two open files are the master of one pair",
        ));
    }
    opener.ptys.taken.push(index);
    let fd = opener.ptys.masters[&index]
        .try_clone()
        .map_err(|error| FileRestoreError::refused("duplicate", "a terminal")(error.into()))?;
    open::set_flags(&fd, tty.flags & !O_NOCTTY.cast_unsigned(), "a terminal")?;
    Ok(Some(fd))
}

/// Makes pairs until one has the number, and unlocks it.
fn make(index: u32, ptmx: &std::path::Path) -> Result<OwnedFd, FileRestoreError> {
    let mut others = Vec::new();
    for _ in 0..MAX_PAIRS {
        let flags = (O_RDWR | O_NOCTTY).cast_unsigned();
        let master = open::open_path(ptmx, flags)?;
        let refused = |action| FileRestoreError::refused(action, format!("terminal {index}"));
        let got = tty::pair_index(&master).map_err(refused("number"))?;
        if got == index {
            tty::set_locked(&master, false).map_err(refused("unlock"))?;
            return Ok(master);
        }
        if got > index {
            break;
        }
        others.push(master);
    }
    Err(FileRestoreError::Terminal {
        what: format!(
            "the tasks had the pseudo terminal /dev/pts/{index}, which somebody else has here; \
             end that program, or restore where it is free"
        ),
    })
}

/// Gives a new pair what both sides know about it.
fn configure(index: u32, master: &OwnedFd, infos: &TerminalInfos) -> Result<(), FileRestoreError> {
    let (slave_id, master_id) = (index * 2, index * 2 + MASTER);
    if let Some(info) = infos.get(&slave_id).or_else(|| infos.get(&master_id)) {
        tty_image::apply(
            master,
            &TtyInfoEntry {
                exclusive: false,
                ..info.clone()
            },
            slave_id,
        )?;
    }
    if let Some(info) = infos.get(&master_id)
        && info.packet_mode
    {
        tty::set_packet_mode(master, true).map_err(FileRestoreError::refused(
            "set",
            format!("terminal {index}"),
        ))?;
    }
    Ok(())
}

fn take_session(index: u32, opener: &mut Opener<'_>) -> Result<(), FileRestoreError> {
    let infos = [index * 2 + MASTER, index * 2];
    let mut infos = infos.iter().filter_map(|id| opener.terminals.get(id));
    let Some(info) = infos.find(|info| info.sid != 0 && info.termios.is_some()) else {
        return Ok(());
    };
    let session = ControlledSession {
        sid: info.sid,
        pgrp: info.pgrp,
        slave: open_slave(index, O_RDWR.cast_unsigned(), None)?,
    };
    opener.ptys.sessions.push(session);
    Ok(())
}

fn open_slave(index: u32, flags: u32, path: Option<PathBuf>) -> Result<OwnedFd, FileRestoreError> {
    let path = path.unwrap_or_else(|| PathBuf::from(format!("/dev/pts/{index}")));
    open::open_path(&path, flags | O_NOCTTY.cast_unsigned())
}

impl FileStore {
    /// Appends the record that gives the session which a task has just started its terminal.
    pub fn plan_controlling_terminal(&self, pid: Pid, program: &mut Program) {
        if let Some(session) = self.session_of(pid) {
            let args = [
                session.slave.as_raw_fd().into(),
                tty::TIOCSCTTY.into(),
                0.into(),
            ];
            let why = "taking the session's terminal";
            program.call(nr::IOCTL, &args, Rule::Ok, why);
        }
    }

    /// Whether a task leads a session with a terminal.
    pub fn leads_terminal(&self, pid: Pid) -> bool {
        self.session_of(pid).is_some()
    }

    /// Appends the record by which a session's leader sets the foreground group of its terminal.
    ///
    /// It runs when all groups are there and the inherited descriptors still are.
    pub fn plan_foreground(&self, pid: Pid, program: &mut Program) {
        if let Some(session) = self.session_of(pid).filter(|session| session.pgrp != 0) {
            let group = program.data(&session.pgrp.to_ne_bytes());
            let args = [
                session.slave.as_raw_fd().into(),
                tty::TIOCSPGRP.into(),
                group.into(),
            ];
            // The group may have been empty at the dump already.
            let rule = Rule::OkOr(ESRCH);
            let why = format!("group {} in the foreground", session.pgrp);
            program.call(nr::IOCTL, &args, rule, why);
        }
    }

    fn session_of(&self, pid: Pid) -> Option<&ControlledSession> {
        let mut sessions = self.terminal_sessions.iter();
        sessions.find(|session| session.sid == pid.to_image())
    }
}
