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
//! `connect.rs` makes the connections, `finish.rs` what comes when all files are open, `fill.rs` the queues.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use firn_proto::UnixSkEntry;
use firn_sys::socket::{self, Credentials, SOCK_DGRAM, TCP_ESTABLISHED, TCP_LISTEN};

use super::super::options;
use super::super::packets::from_image;
use super::USK_EXTERN;
use super::makers::{listen, make_pair};
use super::names::{Binder, shown};
use crate::files::FileRestoreOptions;
use crate::files::error::FileRestoreError;
use crate::files::shelf::{Room, Shelf};

/// Backlog while connections are made; the real one follows.
pub(super) const MANY: u32 = 4096;

/// The unix sockets of a restore.
#[derive(Debug)]
pub(in crate::files) struct RestoredUnix<'a> {
    pub(super) entries: HashMap<u32, &'a UnixSkEntry>,
    /// Entry by inode number.
    pub(super) by_ino: HashMap<u32, &'a UnixSkEntry>,
    /// Entries that have the same name, by it; those that listen first.
    pub(super) by_name: HashMap<&'a [u8], Vec<&'a UnixSkEntry>>,
    pub(super) options: &'a FileRestoreOptions,
    pub(super) binder: Binder<'a>,
    pub(super) made: Shelf<u32>,
    /// Other ends that the tree does not have: they fill a queue and go.
    pub(super) others: Shelf<u32>,
    /// Sockets that have been given their names.
    pub(super) bound: HashSet<u32>,
    /// Listeners made for names whose own is gone, by name.
    pub(super) stand_ins: HashMap<Vec<u8>, OwnedFd>,
    pub(super) listens_as: HashMap<u32, Option<Credentials>>,
}

pub(super) type Outcome<T> = Result<T, FileRestoreError>;

pub(super) fn is_stream(entry: &UnixSkEntry) -> bool {
    entry.r#type != SOCK_DGRAM.cast_unsigned()
}

pub(super) fn kind_of(entry: &UnixSkEntry) -> i32 {
    entry.r#type.cast_signed()
}

/// Whom SO_PEERCRED of the socket names.
pub(super) fn peer_of(entry: &UnixSkEntry) -> Option<Credentials> {
    from_image(entry.firn.as_ref()?.peer_creds.as_ref()?)
}

/// A datagram socket that is connected to one that is gone.
pub(super) fn has_lost_peer(entry: &UnixSkEntry) -> bool {
    let firn = entry.firn.as_ref();
    firn.is_some_and(|firn| firn.lost_peer == Some(true))
}

impl<'a> RestoredUnix<'a> {
    /// Makes all sockets and all connections.
    pub(in crate::files) fn make(
        mut entries: Vec<&'a UnixSkEntry>,
        options: &'a FileRestoreOptions,
        room: &Room,
    ) -> Outcome<Self> {
        // Names whose files are gone come first: they stand in nobody's way afterwards.
        entries.sort_by_key(|entry| (entry.deleted != Some(true), entry.id));
        let mut by_name: HashMap<&[u8], Vec<&UnixSkEntry>> = HashMap::new();
        for entry in entries.iter().filter(|entry| !entry.name.is_empty()) {
            by_name.entry(&entry.name).or_default().push(entry);
        }
        for same in by_name.values_mut() {
            same.sort_by_key(|entry| entry.state != TCP_LISTEN);
        }
        let mut set = RestoredUnix {
            by_name,
            entries: entries.iter().map(|entry| (entry.id, *entry)).collect(),
            by_ino: entries.iter().map(|entry| (entry.ino, *entry)).collect(),
            options,
            binder: Binder::new(options),
            made: Shelf::new(room.part(4)),
            others: Shelf::new(room.part(4)),
            bound: HashSet::new(),
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
            if entry.state == TCP_ESTABLISHED && !set.made.contains(&entry.id) {
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
            if !set.made.contains(&entry.id) {
                set.make_single(entry)?;
            }
        }
        Ok(set)
    }

    pub(super) fn create(&self, entry: &UnixSkEntry) -> Outcome<OwnedFd> {
        let refused = FileRestoreError::refused("create", shown(entry));
        let fd = socket::create(socket::AF_UNIX, kind_of(entry), 0).map_err(refused)?;
        options::restore_early(&fd, &entry.opts, &shown(entry))?;
        Ok(fd)
    }

    /// Gives a socket its name, if it has one.
    pub(super) fn bind(&mut self, fd: impl AsFd, entry: &UnixSkEntry) -> Outcome<()> {
        if !entry.name.is_empty() {
            self.binder.bind(fd, entry)?;
            self.bound.insert(entry.id);
        }
        Ok(())
    }

    fn make_listener(&mut self, entry: &UnixSkEntry) -> Outcome<()> {
        let fd = self.create(entry)?;
        self.bind(&fd, entry)?;
        listen(&fd, peer_of(entry), MANY, entry)?;
        self.listens_as.insert(entry.id, peer_of(entry));
        self.made.insert(entry.id, fd)?;
        Ok(())
    }

    /// A socket that is no stream with a connection: closed, or for datagrams.
    fn make_single(&mut self, entry: &UnixSkEntry) -> Outcome<()> {
        let peer = self.by_ino.get(&entry.peer).copied();
        let pair = peer.filter(|peer| {
            let mutual = peer.peer == entry.ino && peer.id != entry.id;
            let unmade = !self.made.contains(&peer.id) && peer.uflags & USK_EXTERN == 0;
            !is_stream(entry) && !is_stream(peer) && unmade && (mutual || peer.name.is_empty())
        });
        let alone = entry.peer == 0 && !is_stream(entry);
        if alone && (has_lost_peer(entry) || entry.name.is_empty()) {
            // Its peer is gone, or it may hold messages of one that is.
            let (own, other) = self.as_pair(entry, None)?;
            self.made.insert(entry.id, own)?;
            self.others.insert(entry.id, other)?;
            return Ok(());
        }
        let Some(peer) = pair else {
            let fd = self.create(entry)?;
            self.bind(&fd, entry)?;
            self.made.insert(entry.id, fd)?;
            return Ok(());
        };
        let (one, other) = make_pair(peer_of(entry), entry)?;
        for (fd, entry) in [(one, entry), (other, peer)] {
            options::restore_early(&fd, &entry.opts, &shown(entry))?;
            self.bind(&fd, entry)?;
            self.made.insert(entry.id, fd)?;
        }
        Ok(())
    }

    /// Hands a socket out.
    pub(in crate::files) fn take(&mut self, id: u32) -> Outcome<Option<OwnedFd>> {
        Ok(self.made.remove(&id)?)
    }
}
