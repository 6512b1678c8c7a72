//! Pairs of pseudo terminals of which the tree has the master.
//!
//! The kernel gives a new pair the lowest free number, so pairs are made until the wanted one comes. A
//! slave without master is opened with one that goes when all files are open, which hangs it up again.
//!
//! A session gets its controlling terminal right after it began, before its leader makes children,
//! because they inherit it; its foreground group is set when all groups are there.
//!
//! What waits in a pair is the matter of [`super::pty_data`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use firn_images::{ImageDir, ImageKind};
use firn_proto::{TtyDataEntry, TtyFileEntry, TtyInfoEntry};
use firn_sys::file::{self, O_NOCTTY, O_RDWR};
use firn_sys::{Pid, nr, tty};

use super::error::FileRestoreError;
use super::open::{self, Opener};
use super::pty_data::Waiting;
use super::store::FileStore;
use super::tty::TerminalInfos;
use super::tty_image;
use crate::program::{Program, Rule};

/// What the number of a master's description has more than that of its slave.
pub(super) const MASTER: u32 = 1;
/// Pairs that are made on the way to the wanted number.
const MAX_PAIRS: usize = 4096;
/// ESRCH, as a record's rule takes it.
const ESRCH: i32 = 3;

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
        infos: &TerminalInfos,
        receiver: Option<&MasterReceiver>,
    ) -> Result<(), FileRestoreError> {
        for (&index, master) in &self.masters {
            let mut waited = |id| self.data.remove(&id).unwrap_or_default();
            let (slave_id, master_id) = (index * 2, index * 2 + MASTER);
            let waiting = Waiting {
                input: waited(slave_id),
                output: waited(master_id),
                state: infos
                    .get(&master_id)
                    .and_then(|info| info.firn)
                    .unwrap_or_default(),
            };
            let refused = || FileRestoreError::refused("fill", format!("terminal {index}"));
            waiting.put(master).map_err(refused())?;
            if infos.get(&master_id).is_some_and(|info| info.locked) {
                tty::set_locked(master, true).map_err(refused())?;
            }
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
