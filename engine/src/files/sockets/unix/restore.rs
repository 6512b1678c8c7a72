//! Making unix sockets and their connections.
//!
//! ```text
//! bind        everything that is found by its name; listeners listen
//! connect     streams, each with its peer: through the listener whose name the accepting end has,
//!             or as a pair where there is none
//! wait        connections that nobody has accepted
//! fill        queues, when all files are open; datagrams before their receiver is connected
//! finish      peers of datagram sockets, shutdowns, options
//! ```
//!
//! The kernel notes who listened, connected or made a pair, as credentials of the peer; so these calls are
//! made by stand-ins with the pids and users of the dump.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_proto::{FdTypes, UnixSkEntry};
use firn_sys::socket::{
    self, Credentials, SO_PEEK_OFF, SOCK_DGRAM, SOL_SOCKET, TCP_ESTABLISHED, TCP_LISTEN,
};
use firn_sys::{Result as SysResult, stand_in};

use super::super::options;
use super::super::packets::{PacketRestore, from_image};
use super::USK_EXTERN;
use super::fill::{Fill, Queues};
use super::names::{Binder, Reach, address_of, shown};
use crate::files::error::FileRestoreError;
use crate::files::external::take_over;
use crate::files::open;
use crate::files::{FileRestoreOptions, OutsidePeer};

/// Backlog while connections are made; the real one follows.
const MANY: u32 = 4096;

/// The unix sockets of a restore.
#[derive(Debug)]
pub(in crate::files) struct RestoredUnix<'a> {
    entries: HashMap<u32, &'a UnixSkEntry>,
    /// Entry by inode number.
    by_ino: HashMap<u32, &'a UnixSkEntry>,
    options: &'a FileRestoreOptions,
    binder: Binder<'a>,
    made: HashMap<u32, OwnedFd>,
    /// Other ends that the tree does not have: they fill a queue and go.
    others: HashMap<u32, OwnedFd>,
    reach: HashMap<u32, Reach>,
    /// Listeners made for names whose own is gone, by name.
    stand_ins: HashMap<Vec<u8>, (OwnedFd, Reach)>,
    listens_as: HashMap<u32, Option<Credentials>>,
}

type Outcome<T> = Result<T, FileRestoreError>;

fn is_stream(entry: &UnixSkEntry) -> bool {
    entry.r#type != SOCK_DGRAM.cast_unsigned()
}

fn kind_of(entry: &UnixSkEntry) -> i32 {
    entry.r#type.cast_signed()
}

/// Whom SO_PEERCRED of the socket names.
fn peer_of(entry: &UnixSkEntry) -> Option<Credentials> {
    from_image(entry.firn.as_ref()?.peer_creds.as_ref()?)
}

/// A datagram socket that is connected to one that is gone.
fn has_lost_peer(entry: &UnixSkEntry) -> bool {
    let firn = entry.firn.as_ref();
    firn.is_some_and(|firn| firn.lost_peer == Some(true))
}

impl<'a> RestoredUnix<'a> {
    /// Makes all sockets and all connections.
    pub(in crate::files) fn make(
        mut entries: Vec<&'a UnixSkEntry>,
        options: &'a FileRestoreOptions,
    ) -> Outcome<Self> {
        // Names whose files are gone come first: they stand in nobody's way afterwards.
        entries.sort_by_key(|entry| (entry.deleted != Some(true), entry.id));
        let mut set = RestoredUnix {
            entries: entries.iter().map(|entry| (entry.id, *entry)).collect(),
            by_ino: entries.iter().map(|entry| (entry.ino, *entry)).collect(),
            options,
            binder: Binder::new(options),
            made: HashMap::new(),
            others: HashMap::new(),
            reach: HashMap::new(),
            stand_ins: HashMap::new(),
            listens_as: HashMap::new(),
        };
        let own = entries
            .iter()
            .filter(|entry| entry.uflags & USK_EXTERN == 0);
        let own: Vec<&UnixSkEntry> = own.copied().collect();
        for entry in own.iter().filter(|entry| entry.state == TCP_LISTEN) {
            set.make_listener(entry)?;
        }
        for entry in own.iter().filter(|entry| is_stream(entry)) {
            if entry.state == TCP_ESTABLISHED && !set.made.contains_key(&entry.id) {
                set.make_connection(entry)?;
            }
        }
        // A peer without a name is reached by making both at once, and in no other way.
        let (first, then): (Vec<&UnixSkEntry>, Vec<&UnixSkEntry>) =
            own.into_iter().partition(|entry| {
                set.by_ino
                    .get(&entry.peer)
                    .is_some_and(|p| p.name.is_empty())
            });
        for entry in first.into_iter().chain(then) {
            if !set.made.contains_key(&entry.id) {
                set.make_single(entry)?;
            }
        }
        Ok(set)
    }

    fn create(&self, entry: &UnixSkEntry) -> Outcome<OwnedFd> {
        let refused = FileRestoreError::refused("create", shown(entry));
        let fd = socket::create(socket::AF_UNIX, kind_of(entry), 0).map_err(refused)?;
        options::restore_early(&fd, &entry.opts, &shown(entry))?;
        Ok(fd)
    }

    /// Gives a socket its name, if it has one.
    fn bind(&mut self, fd: impl AsFd, entry: &UnixSkEntry) -> Outcome<()> {
        if !entry.name.is_empty() {
            let reach = self.binder.bind(fd, entry)?;
            self.reach.insert(entry.id, reach);
        }
        Ok(())
    }

    fn make_listener(&mut self, entry: &UnixSkEntry) -> Outcome<()> {
        let fd = self.create(entry)?;
        self.bind(&fd, entry)?;
        listen(&fd, peer_of(entry), MANY, entry)?;
        self.listens_as.insert(entry.id, peer_of(entry));
        self.made.insert(entry.id, fd);
        Ok(())
    }

    /// A socket that is no stream with a connection: closed, or for datagrams.
    fn make_single(&mut self, entry: &UnixSkEntry) -> Outcome<()> {
        let peer = self.by_ino.get(&entry.peer).copied();
        let pair = peer.filter(|peer| {
            let mutual = peer.peer == entry.ino && peer.id != entry.id;
            let unmade = !self.made.contains_key(&peer.id) && peer.uflags & USK_EXTERN == 0;
            !is_stream(entry) && !is_stream(peer) && unmade && (mutual || peer.name.is_empty())
        });
        let alone = entry.peer == 0 && !is_stream(entry);
        if alone && (has_lost_peer(entry) || entry.name.is_empty()) {
            // Its peer is gone, or it may hold messages of one that is.
            let (own, other) = self.as_pair(entry, None)?;
            self.made.insert(entry.id, own);
            self.others.insert(entry.id, other);
            return Ok(());
        }
        let Some(peer) = pair else {
            let fd = self.create(entry)?;
            self.bind(&fd, entry)?;
            self.made.insert(entry.id, fd);
            return Ok(());
        };
        let (one, other) = make_pair(peer_of(entry), entry)?;
        for (fd, entry) in [(one, entry), (other, peer)] {
            options::restore_early(&fd, &entry.opts, &shown(entry))?;
            self.bind(&fd, entry)?;
            self.made.insert(entry.id, fd);
        }
        Ok(())
    }

    fn make_connection(&mut self, entry: &'a UnixSkEntry) -> Outcome<()> {
        match self.by_ino.get(&entry.peer).copied() {
            Some(listener) if listener.state == TCP_LISTEN => self.wait_at(entry, listener),
            Some(peer) if is_stream(peer) && peer.id != entry.id => {
                let (one, other) = if self.is_acceptor(entry, Some(peer)) {
                    let (accepted, client) = self.through_listener(entry, Some(peer))?;
                    (accepted, client)
                } else if self.is_acceptor(peer, Some(entry)) {
                    let (accepted, client) = self.through_listener(peer, Some(entry))?;
                    (client, accepted)
                } else {
                    self.as_pair(entry, Some(peer))?
                };
                self.made.insert(entry.id, one);
                self.made.insert(peer.id, other);
                Ok(())
            }
            _ => self.without_peer(entry),
        }
    }

    /// One end of a connection whose other end is gone, or outside.
    fn without_peer(&mut self, entry: &'a UnixSkEntry) -> Outcome<()> {
        let outside = entry
            .firn
            .as_ref()
            .and_then(|firn| firn.outside_peer.as_deref());
        if let Some(name) = outside
            && let Some(fd) = self.reconnect(entry, name)?
        {
            self.made.insert(entry.id, fd);
            return Ok(());
        }
        let (own, other) = if self.is_acceptor(entry, None) {
            self.through_listener(entry, None)?
        } else {
            self.as_pair(entry, None)?
        };
        self.made.insert(entry.id, own);
        self.others.insert(entry.id, other);
        Ok(())
    }

    /// A new connection to a peer outside, where the user wants one.
    fn reconnect(&mut self, entry: &UnixSkEntry, name: &[u8]) -> Outcome<Option<OwnedFd>> {
        match self.options.sockets.outside_peer(name, is_stream(entry)) {
            OutsidePeer::EndOfFile => Ok(None),
            OutsidePeer::Inherit(fd) => {
                tracing::debug!("{} is descriptor {fd}", shown(entry));
                take_over(fd).map(Some)
            }
            OutsidePeer::Reconnect => {
                let fd = self.create(entry)?;
                self.bind(&fd, entry)?;
                let refused = FileRestoreError::refused("connect again", shown(entry));
                socket::connect(&fd, &address_of(name)).map_err(refused)?;
                Ok(Some(fd))
            }
        }
    }

    /// Whether a connection's end was made by accept(): it has the name of a listener, or one that
    /// several ends have.
    fn is_acceptor(&self, entry: &UnixSkEntry, peer: Option<&UnixSkEntry>) -> bool {
        if entry.name.is_empty() {
            return false;
        }
        let same = |other: &&&UnixSkEntry| other.name == entry.name && other.id != entry.id;
        let mut others = self.entries.values().filter(same);
        let peer = peer.map(|peer| peer.id);
        self.listener_of(entry).is_some() || others.any(|other| Some(other.id) != peer)
    }

    fn listener_of(&self, entry: &UnixSkEntry) -> Option<&'a UnixSkEntry> {
        let mut all = self.entries.values().copied();
        all.find(|other| {
            let same = other.name == entry.name && other.name_dir == entry.name_dir;
            same && other.state == TCP_LISTEN && other.r#type == entry.r#type
        })
    }

    /// Connects through the listener with the name of the accepting end: the accepted end, the client.
    fn through_listener(
        &mut self,
        accepted: &'a UnixSkEntry,
        client: Option<&'a UnixSkEntry>,
    ) -> Outcome<(OwnedFd, OwnedFd)> {
        let from = match client {
            Some(client) => {
                let fd = self.create(client)?;
                self.bind(&fd, client)?;
                fd
            }
            None => self.create_bare(accepted)?,
        };
        let noted = client.and_then(peer_of);
        let (listener, address) = match self.listener_of(accepted) {
            Some(listener) => {
                if self.listens_as.get(&listener.id) != Some(&noted) && noted.is_some() {
                    listen(&self.made[&listener.id], noted, MANY, listener)?;
                    self.listens_as.insert(listener.id, noted);
                }
                (
                    self.made[&listener.id].as_fd(),
                    self.reach[&listener.id].address(),
                )
            }
            None => {
                self.make_stand_in(accepted)?;
                let (fd, reach) = &self.stand_ins[&accepted.name];
                listen(fd, noted, MANY, accepted)?;
                (fd.as_fd(), reach.address())
            }
        };
        let what = || shown(accepted);
        connect(&from, peer_of(accepted), &address)
            .map_err(FileRestoreError::refused("connect to", what()))?;
        let end = socket::accept(listener)
            .map_err(FileRestoreError::refused("accept a connection of", what()))?;
        options::restore_early(&end, &accepted.opts, &what())?;
        Ok((end, from))
    }

    fn create_bare(&self, entry: &UnixSkEntry) -> Outcome<OwnedFd> {
        let refused = FileRestoreError::refused("create a peer of", shown(entry));
        socket::create(socket::AF_UNIX, kind_of(entry), 0).map_err(refused)
    }

    /// A listener for accepted sockets whose own is gone.
    fn make_stand_in(&mut self, accepted: &UnixSkEntry) -> Outcome<()> {
        if !self.stand_ins.contains_key(&accepted.name) {
            let fd = self.create_bare(accepted)?;
            let reach = self.binder.bind(&fd, accepted)?;
            self.stand_ins.insert(accepted.name.clone(), (fd, reach));
        }
        Ok(())
    }

    fn as_pair(
        &mut self,
        entry: &UnixSkEntry,
        peer: Option<&UnixSkEntry>,
    ) -> Outcome<(OwnedFd, OwnedFd)> {
        let (one, other) = make_pair(peer_of(entry), entry)?;
        options::restore_early(&one, &entry.opts, &shown(entry))?;
        self.bind(&one, entry)?;
        if let Some(peer) = peer {
            options::restore_early(&other, &peer.opts, &shown(peer))?;
            self.bind(&other, peer)?;
        }
        Ok((one, other))
    }

    /// A connection that waits to be accepted.
    fn wait_at(&mut self, entry: &'a UnixSkEntry, listener: &UnixSkEntry) -> Outcome<()> {
        let fd = self.create(entry)?;
        self.bind(&fd, entry)?;
        let Some(reach) = self.reach.get(&listener.id) else {
            return Err(FileRestoreError::corrupt(
                entry.id,
                "its listener has no name",
            ));
        };
        let refused = FileRestoreError::refused("connect", shown(entry));
        socket::connect(&fd, &reach.address()).map_err(refused)?;
        self.made.insert(entry.id, fd);
        Ok(())
    }

    /// Hands a socket out.
    pub(in crate::files) fn take(&mut self, id: u32) -> Option<OwnedFd> {
        self.made.remove(&id)
    }

    /// Fills queues and sets what remains, when all files are open.
    pub(in crate::files) fn finish(
        mut self,
        packets: &mut PacketRestore,
        opened: &HashMap<(FdTypes, u32), OwnedFd>,
    ) -> Outcome<()> {
        let mut ids: Vec<u32> = self.entries.keys().copied().collect();
        ids.sort_unstable();
        let mut queues = Queues {
            entries: &self.entries,
            by_ino: &self.by_ino,
            others: &self.others,
            reach: &self.reach,
            binder: &self.binder,
            opened,
        };
        let mut after = Vec::new();
        for &id in &ids {
            let entry = self.entries[&id];
            let waiting = packets.take(id);
            match queues.fill(entry, waiting)? {
                Fill::Done => {}
                Fill::AfterConnect(waiting) => after.push((entry, waiting)),
            }
        }
        let mut connected = Vec::new();
        for &id in &ids {
            self.connect_datagrams(self.entries[&id], opened, &mut connected)?;
        }
        let queues = Queues {
            entries: &self.entries,
            by_ino: &self.by_ino,
            others: &self.others,
            reach: &self.reach,
            binder: &self.binder,
            opened,
        };
        for (entry, waiting) in after {
            queues.send_all(entry, &waiting)?;
        }
        drop(std::mem::take(&mut self.others));
        for &id in &ids {
            if let Some(fd) = opened.get(&(FdTypes::Unixsk, id)) {
                self.finish_one(self.entries[&id], fd.as_fd())?;
            }
        }
        Ok(())
    }

    /// Connects a datagram socket to its peer, after all those that are connected to it: a socket with
    /// a peer takes no other.
    fn connect_datagrams(
        &self,
        entry: &UnixSkEntry,
        opened: &HashMap<(FdTypes, u32), OwnedFd>,
        connected: &mut Vec<u32>,
    ) -> Outcome<()> {
        if is_stream(entry) || entry.peer == 0 || connected.contains(&entry.id) {
            return Ok(());
        }
        connected.push(entry.id);
        for other in self.entries.values() {
            if other.peer == entry.ino && entry.peer != other.ino {
                self.connect_datagrams(other, opened, connected)?;
            }
        }
        let fd = opened.get(&(FdTypes::Unixsk, entry.id));
        let (Some(fd), Some(peer)) = (fd, self.by_ino.get(&entry.peer)) else {
            return Ok(());
        };
        let address = if peer.uflags & USK_EXTERN != 0 {
            match self.options.sockets.outside_peer(&peer.name, false) {
                OutsidePeer::Reconnect => address_of(&peer.name),
                OutsidePeer::EndOfFile | OutsidePeer::Inherit(_) => return Ok(()),
            }
        } else {
            match self.reach.get(&peer.id) {
                Some(reach) => reach.address(),
                // A pair has been connected from the beginning.
                None => return Ok(()),
            }
        };
        let refused = FileRestoreError::refused("connect", shown(entry));
        socket::connect(fd, &address).map_err(refused)
    }

    fn finish_one(&self, entry: &UnixSkEntry, fd: BorrowedFd<'_>) -> Outcome<()> {
        let name = shown(entry);
        // One of a pair that was made for its messages, or that was connected to nobody.
        let unconnected = entry.peer == 0 && !has_lost_peer(entry);
        if !is_stream(entry) && unconnected && socket::peer_address(fd).is_ok() {
            let refused = FileRestoreError::refused("disconnect", name.clone());
            socket::disconnect(fd).map_err(refused)?;
        }
        if entry.state == TCP_LISTEN {
            listen(fd, peer_of(entry), entry.backlog, entry)?;
        }
        let how = match entry.shutdown() {
            firn_proto::SkShutdown::None => None,
            firn_proto::SkShutdown::Read => Some(socket::SHUT_RD),
            firn_proto::SkShutdown::Write => Some(socket::SHUT_WR),
            firn_proto::SkShutdown::Both => Some(socket::SHUT_RDWR),
        };
        if let Some(how) = how {
            // Sockets without a connection are marked although the call fails.
            let _ = socket::shutdown(fd, how);
        }
        options::restore_late(fd, &entry.opts, &name)?;
        if let Some(offset) = entry.firn.as_ref().and_then(|firn| firn.peek_off) {
            socket::set_number(fd, SOL_SOCKET, SO_PEEK_OFF, offset).map_err(
                FileRestoreError::refused("set the peek offset of", name.clone()),
            )?;
        }
        open::set_flags(fd, entry.flags, &name)
    }
}

/// Makes a pair in the name of who is noted with it.
fn make_pair(who: Option<Credentials>, entry: &UnixSkEntry) -> Outcome<(OwnedFd, OwnedFd)> {
    let pair = in_the_name_of(
        who,
        |who| stand_in::pair(who, kind_of(entry)),
        || socket::pair(kind_of(entry)),
    );
    pair.map_err(FileRestoreError::refused("make", shown(entry)))
}

fn listen(
    fd: impl AsFd,
    who: Option<Credentials>,
    backlog: u32,
    entry: &UnixSkEntry,
) -> Outcome<()> {
    let fd = fd.as_fd();
    let listening = in_the_name_of(
        who,
        |who| stand_in::listen(who, fd, backlog),
        || socket::listen(fd, backlog),
    );
    listening.map_err(FileRestoreError::refused("listen with", shown(entry)))
}

fn connect(fd: impl AsFd, who: Option<Credentials>, address: &[u8]) -> SysResult<()> {
    let fd = fd.as_fd();
    in_the_name_of(
        who,
        |who| stand_in::connect(who, fd, address),
        || socket::connect(fd, address),
    )
}

/// Does something as somebody else, or as this process where that can't be: the pid may be taken by a
/// process outside, which then is not to be impersonated, and the user may not be allowed to.
fn in_the_name_of<T>(
    who: Option<Credentials>,
    as_other: impl FnOnce(Credentials) -> SysResult<T>,
    as_self: impl FnOnce() -> SysResult<T>,
) -> SysResult<T> {
    let Some(who) = who else {
        return as_self();
    };
    as_other(who).or_else(|errno| {
        tracing::info!(
            pid = who.pid,
            "no stand-in for the maker of a socket: {errno}"
        );
        as_self()
    })
}
