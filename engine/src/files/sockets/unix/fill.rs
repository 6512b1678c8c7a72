//! Filling the queues of unix sockets.
//!
//! A message in a queue tells who sent it, so it is sent again by a socket with the name of the sender: by
//! that very socket where the tree has it, else by one that has the name for a moment.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_proto::{FdTypes, UnixSkEntry};
use firn_sys::socket::{
    self, Outgoing, SO_PASSCRED, SO_SNDBUFFORCE, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET,
};
use firn_sys::{Errno, stand_in};

use super::super::packets::{Packet, rights_of};
use super::names::{Binder, Reach, shown};
use crate::files::error::FileRestoreError;
use crate::files::shelf::{Held, OpenedFiles, Shelf};

/// Room for whatever a sender had in flight.
const ROOMY: i32 = 1 << 28;

/// What became of a queue.
pub(super) enum Fill {
    Done,
    /// The receiver's peer has sent more than a stranger may: it must be connected first.
    AfterConnect(Vec<Packet>),
}

/// Everything that sending takes.
pub(super) struct Queues<'a> {
    pub(super) entries: &'a HashMap<u32, &'a UnixSkEntry>,
    pub(super) by_ino: &'a HashMap<u32, &'a UnixSkEntry>,
    pub(super) others: &'a Shelf<u32>,
    pub(super) bound: &'a HashSet<u32>,
    pub(super) binder: &'a Binder<'a>,
    pub(super) opened: &'a OpenedFiles,
    /// Counts messages that no longer tell who sent them.
    pub(super) nameless: &'a Cell<u32>,
}

impl Queues<'_> {
    /// Fills the queue of a socket, if that is possible before datagram sockets have their peers.
    pub(super) fn fill(
        &mut self,
        entry: &UnixSkEntry,
        packets: Vec<Packet>,
    ) -> Result<Fill, FileRestoreError> {
        let is_datagram = entry.r#type == SOCK_DGRAM.cast_unsigned();
        let peer = self.by_ino.get(&entry.peer);
        let from_peer = |packet: &Packet| {
            peer.is_some_and(|peer| !peer.name.is_empty() && name_of(&packet.sender) == peer.name)
        };
        if is_datagram && !packets.is_empty() && packets.iter().all(from_peer) {
            return Ok(Fill::AfterConnect(packets));
        }
        self.send_all(entry, &packets)?;
        Ok(Fill::Done)
    }

    /// Sends all messages to a socket.
    pub(super) fn send_all(
        &self,
        entry: &UnixSkEntry,
        packets: &[Packet],
    ) -> Result<(), FileRestoreError> {
        for packet in packets {
            if entry.r#type == SOCK_DGRAM.cast_unsigned() {
                self.send_datagram(entry, packet)?;
            } else {
                let from = self.other_end(entry)?.ok_or_else(|| no_sender(entry))?;
                self.send(from.as_fd(), None, entry, packet)?;
            }
        }
        Ok(())
    }

    /// The socket whose messages arrive at this one.
    fn other_end(&self, entry: &UnixSkEntry) -> Result<Option<Held<'_>>, FileRestoreError> {
        if let Some(other) = self.others.get(&entry.id)? {
            return Ok(Some(other));
        }
        match self.by_ino.get(&entry.peer) {
            Some(peer) => Ok(self.opened.get(&(FdTypes::Unixsk, peer.id))?),
            None => Ok(None),
        }
    }

    fn send_datagram(&self, entry: &UnixSkEntry, packet: &Packet) -> Result<(), FileRestoreError> {
        let name = name_of(&packet.sender);
        let receiver = self.opened.get(&(FdTypes::Unixsk, entry.id))?;
        let receiver = receiver.filter(|_| self.bound.contains(&entry.id));
        let reach = receiver.map(|fd| Reach::of(fd, entry)).transpose()?;
        let destination = reach.as_ref().map(Reach::address);
        if name.is_empty() {
            return match (destination, self.other_end(entry)?) {
                (Some(destination), _) => {
                    let from = self.temporary(entry, None)?;
                    self.send(from.as_fd(), Some(&destination), entry, packet)
                }
                (None, Some(from)) => self.send(from.as_fd(), None, entry, packet),
                (None, None) => Err(no_sender(entry)),
            };
        }
        let mut all = self.entries.values();
        let known = all.find(|other| other.name == name && !is_stream(other));
        let known = known.map(|other| self.opened.get(&(FdTypes::Unixsk, other.id)));
        match known.transpose()?.flatten() {
            Some(from) => self.send(from.as_fd(), destination.as_deref(), entry, packet),
            None => {
                let from = self.temporary(entry, Some(name))?;
                self.send(from.as_fd(), destination.as_deref(), entry, packet)
            }
        }
    }

    /// A socket that sends one message, under a name that nobody of the tree has.
    fn temporary(
        &self,
        entry: &UnixSkEntry,
        name: Option<&[u8]>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let refused = FileRestoreError::refused("create a sender to", shown(entry));
        let fd = socket::create(socket::AF_UNIX, SOCK_DGRAM, 0).map_err(refused)?;
        if let Some(name) = name {
            let named = UnixSkEntry {
                name: name.to_vec(),
                deleted: Some(true),
                ..UnixSkEntry::default()
            };
            self.binder.bind(&fd, &named)?;
        }
        Ok(fd)
    }

    /// Runs `work` while the receiver asks for credentials: only then a message keeps who sent it.
    fn receiving_credentials<T>(&self, entry: &UnixSkEntry, work: impl FnOnce() -> T) -> T {
        let receiver = self.opened.get(&(FdTypes::Unixsk, entry.id));
        let receiver = receiver.ok().flatten();
        let set = |value: i32| {
            let refused = receiver
                .as_ref()
                .and_then(|fd| socket::set_number(fd, SOL_SOCKET, SO_PASSCRED, value).err());
            if let Some(errno) = refused {
                tracing::debug!("SO_PASSCRED of {}: {errno}", shown(entry));
            }
        };
        set(1);
        let result = work();
        set(0);
        result
    }

    fn send(
        &self,
        from: BorrowedFd<'_>,
        destination: Option<&[u8]>,
        entry: &UnixSkEntry,
        packet: &Packet,
    ) -> Result<(), FileRestoreError> {
        let refused = || FileRestoreError::refused("fill the queue of", shown(entry));
        let held = rights_of(packet, self.opened)?;
        let rights: Vec<BorrowedFd<'_>> = held.iter().map(AsFd::as_fd).collect();
        let _ = socket::set_number(from, SOL_SOCKET, SO_SNDBUFFORCE, ROOMY);
        let mut left = packet.bytes.as_slice();
        let mut rights = rights.as_slice();
        loop {
            let message = Outgoing {
                bytes: left,
                destination,
                rights,
                credentials: packet.credentials,
                ..Outgoing::default()
            };
            let sent = match socket::send(from, &message) {
                // Who sent it is not there yet.
                Err(Errno::ESRCH) => {
                    let who = packet.credentials.expect("only credentials name a process");
                    self.receiving_credentials(entry, || self.send_as(who, from, &message))
                }
                sent => sent,
            };
            let sent = sent.map_err(refused())?;
            left = &left[sent.min(left.len())..];
            rights = &[];
            if left.is_empty() {
                return Ok(());
            }
            if entry.r#type != SOCK_STREAM.cast_unsigned() {
                return Err(refused()(Errno::EMSGSIZE));
            }
        }
    }

    /// Sends in the name of a process that does not exist at the moment.
    fn send_as(
        &self,
        who: socket::Credentials,
        from: BorrowedFd<'_>,
        message: &Outgoing<'_>,
    ) -> firn_sys::Result<usize> {
        if message.rights.is_empty()
            && stand_in::send(who, from, message.bytes, message.destination).is_ok()
        {
            return Ok(message.bytes.len());
        }
        self.nameless.set(self.nameless.get() + 1);
        let nameless = Outgoing {
            credentials: None,
            ..*message
        };
        socket::send(from, &nameless)
    }
}

fn is_stream(entry: &UnixSkEntry) -> bool {
    entry.r#type != SOCK_DGRAM.cast_unsigned()
}

fn name_of(address: &[u8]) -> &[u8] {
    address.get(2..).unwrap_or_default()
}

fn no_sender(entry: &UnixSkEntry) -> FileRestoreError {
    FileRestoreError::corrupt(
        entry.id,
        "messages wait in it and nobody can have sent them",
    )
}
