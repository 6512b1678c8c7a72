//! Connections of unix sockets: through the listener whose name the accepting end has, as a pair where there
//! is none, anew to a peer outside, or waiting to be accepted.

use std::os::fd::{AsFd, OwnedFd};

use firn_proto::UnixSkEntry;
use firn_sys::socket::{self, Outgoing, TCP_LISTEN};

use super::super::options;
use super::makers::{connect, listen, make_pair};
use super::names::{Reach, address_of, shown};
use super::restore::{MANY, Outcome, RestoredUnix, is_stream, kind_of, peer_of};
use crate::files::OutsidePeer;
use crate::files::error::FileRestoreError;
use crate::files::external::take_over;
use crate::files::shelf::Held;

impl<'a> RestoredUnix<'a> {
    pub(super) fn make_connection(&mut self, entry: &'a UnixSkEntry) -> Outcome<()> {
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
                self.made.insert(entry.id, one)?;
                self.made.insert(peer.id, other)?;
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
            self.made.insert(entry.id, fd)?;
            return Ok(());
        }
        let (own, other) = if self.is_acceptor(entry, None) {
            self.through_listener(entry, None)?
        } else {
            self.as_pair(entry, None)?
        };
        if entry
            .firn
            .as_ref()
            .is_some_and(|firn| firn.reset == Some(true))
        {
            // Whoever closes an end with something unread in it resets the other.
            let unread = Outgoing {
                bytes: b"x",
                ..Outgoing::default()
            };
            let refused = FileRestoreError::refused("prepare the reset of", shown(entry));
            socket::send(&own, &unread).map_err(refused)?;
        }
        self.made.insert(entry.id, own)?;
        self.others.insert(entry.id, other)?;
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
        let peer = peer.map(|peer| peer.id);
        let known = |other: &&UnixSkEntry| other.id == entry.id || Some(other.id) == peer;
        self.listener_of(entry).is_some() || !self.named(&entry.name).iter().all(known)
    }

    fn listener_of(&self, entry: &UnixSkEntry) -> Option<&'a UnixSkEntry> {
        let mut same = self.named(&entry.name).iter().copied();
        same.find(|other| {
            let is_there = other.name_dir == entry.name_dir;
            is_there && other.state == TCP_LISTEN && other.r#type == entry.r#type
        })
    }

    /// All that have a name; none for no name.
    fn named(&self, name: &[u8]) -> &[&'a UnixSkEntry] {
        self.by_name.get(name).map_or(&[], Vec::as_slice)
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
        let (listener, reach) = match self.listener_of(accepted) {
            Some(listener) => {
                let fd = self.made.get(&listener.id)?;
                let fd = fd.expect("listeners are made first");
                if self.listens_as.get(&listener.id) != Some(&noted) && noted.is_some() {
                    listen(&fd, noted, MANY, listener)?;
                    self.listens_as.insert(listener.id, noted);
                }
                let reach = Reach::of(&fd, listener)?;
                (fd, reach)
            }
            None => {
                self.make_stand_in(accepted)?;
                let fd = &self.stand_ins[&accepted.name];
                listen(fd, noted, MANY, accepted)?;
                (Held::Here(fd.as_fd()), Reach::of(fd, accepted)?)
            }
        };
        let what = || shown(accepted);
        connect(&from, peer_of(accepted), &reach.address())
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
            self.binder.bind(&fd, accepted)?;
            self.stand_ins.insert(accepted.name.clone(), fd);
        }
        Ok(())
    }

    pub(super) fn as_pair(
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
        let at = self.made.get(&listener.id)?;
        let Some(at) = at.filter(|_| self.bound.contains(&listener.id)) else {
            return Err(FileRestoreError::corrupt(
                entry.id,
                "its listener has no name",
            ));
        };
        let reach = Reach::of(at, listener)?;
        let refused = FileRestoreError::refused("connect", shown(entry));
        socket::connect(&fd, &reach.address()).map_err(refused)?;
        self.made.insert(entry.id, fd)?;
        Ok(())
    }
}
