//! Messages that wait in sockets: sk-queues.img.

use std::collections::HashMap;
use std::os::fd::AsFd;

use firn_images::{ImageDir, ImageKind, ImageSetWriter};
use firn_proto::{FirnSkPacketEntry, FirnUcred, ScmEntry, SkPacketEntry};
use firn_sys::socket::{
    self, Credentials, Message, SO_PEEK_OFF, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET,
};
use firn_sys::{Errno, Result};

use super::packet_ring::{Side, Slot};
use crate::files::error::{FileDumpError, FileRestoreError};
use crate::files::kind::KINDS;
use crate::files::shelf::{Held, OpenedFiles};

const SCM_RIGHTS: u32 = 1;
/// Bytes of a stream that are one entry.
const CHUNK: usize = 1 << 16;
/// More messages than any queue holds.
const MAX_MESSAGES: usize = 1 << 20;

/// Messages being dumped, in the order of their queues.
#[derive(Debug, Default)]
pub(in crate::files) struct PacketDump {
    packets: Vec<(SkPacketEntry, Vec<u8>)>,
}

impl PacketDump {
    /// Adds a message that waits at socket `id_for`; `rights` are the numbers of the files in it.
    pub(in crate::files) fn add(&mut self, id_for: u32, message: Message, rights: Vec<u32>) {
        let length = u32::try_from(message.bytes.len()).expect("queues hold less than 4 GiB");
        let creds = message.credentials.map(to_image);
        let sender = (message.sender.len() > 2).then_some(message.sender);
        let firn = FirnSkPacketEntry {
            sender,
            creds,
            ..FirnSkPacketEntry::default()
        };
        let scm = ScmEntry {
            r#type: SCM_RIGHTS,
            rights,
        };
        let entry = SkPacketEntry {
            id_for,
            length,
            scm: if scm.rights.is_empty() {
                Vec::new()
            } else {
                vec![scm]
            },
            firn: (firn != FirnSkPacketEntry::default()).then_some(firn),
        };
        self.packets.push((entry, message.bytes));
    }

    /// Adds a datagram of an inet socket, with the address that it was sent to.
    pub(in crate::files) fn add_datagram(
        &mut self,
        id_for: u32,
        message: Message,
        destination: Option<Vec<u8>>,
    ) {
        self.add(id_for, message, Vec::new());
        if let Some((entry, _)) = self.packets.last_mut() {
            entry.firn.get_or_insert_default().destination = destination;
        }
    }

    /// Adds what a slot in a ring of a packet socket holds.
    pub(super) fn add_slot(&mut self, id_for: u32, slot: Slot) {
        let length = u32::try_from(slot.bytes.len()).expect("blocks hold less than 4 GiB");
        let place = |side| (slot.side == side).then_some(slot.nth);
        let entry = SkPacketEntry {
            id_for,
            length,
            firn: Some(FirnSkPacketEntry {
                rx_slot: place(Side::Receive),
                tx_slot: place(Side::Send),
                ..FirnSkPacketEntry::default()
            }),
            ..SkPacketEntry::default()
        };
        self.packets.push((entry, slot.bytes));
    }

    pub(super) fn write(&self, images: &ImageSetWriter) -> std::result::Result<(), FileDumpError> {
        let mut writer = images.writer(ImageKind::SkQueues, 0);
        for (entry, bytes) in &self.packets {
            writer.entry(entry)?;
            writer.payload(bytes)?;
        }
        Ok(writer.finish()?)
    }
}

/// Credentials as images have them.
pub(super) fn to_image(who: Credentials) -> FirnUcred {
    FirnUcred {
        pid: Some(who.pid.cast_unsigned()),
        uid: Some(who.uid),
        gid: Some(who.gid),
    }
}

/// Credentials of an image; None where they name nobody.
pub(super) fn from_image(who: &FirnUcred) -> Option<Credentials> {
    let pid = who.pid?.cast_signed();
    (pid > 0).then_some(Credentials {
        pid,
        uid: who.uid?,
        gid: who.gid?,
    })
}

/// Reads everything that waits at a socket without taking it. `expected` are the bytes of a connection.
pub(super) fn read_queue(fd: impl AsFd, kind: i32, expected: usize) -> Result<Vec<Message>> {
    let fd = fd.as_fd();
    let old = socket::number(fd, SOL_SOCKET, SO_PEEK_OFF)?;
    let result = walk(fd, kind, expected);
    socket::set_number(fd, SOL_SOCKET, SO_PEEK_OFF, old)?;
    result
}

fn walk(fd: impl AsFd, kind: i32, expected: usize) -> Result<Vec<Message>> {
    let fd = fd.as_fd();
    let is_stream = kind == SOCK_STREAM;
    let (mut messages, mut at, mut room) = (Vec::new(), 0usize, CHUNK);
    // At the end of a connection there is always one more empty message.
    let is_bounded = kind != SOCK_DGRAM;
    while messages.len() < MAX_MESSAGES && !(is_bounded && at >= expected) {
        let offset = i32::try_from(at).map_err(|_| Errno::EINVAL)?;
        socket::set_number(fd, SOL_SOCKET, SO_PEEK_OFF, offset)?;
        let Some(message) = socket::peek(fd, room)? else {
            break;
        };
        if !is_stream && message.len > room {
            room = message.len;
            continue;
        }
        if is_stream && message.bytes.is_empty() {
            break;
        }
        at += message.bytes.len();
        messages.push(message);
    }
    if is_stream && at != expected {
        // An urgent byte hides what is behind it.
        return Err(Errno::EIO);
    }
    Ok(messages)
}

/// A message to be put into a queue again.
#[derive(Debug)]
pub(in crate::files) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) sender: Vec<u8>,
    pub(super) destination: Vec<u8>,
    pub(super) credentials: Option<Credentials>,
    pub(super) rights: Vec<u32>,
    /// It is a slot in a ring.
    pub(super) ring_slot: Option<(Side, u32)>,
}

/// Messages being restored, by the number of the receiver.
#[derive(Debug, Default)]
pub(in crate::files) struct PacketRestore {
    by_receiver: HashMap<u32, Vec<Packet>>,
}

impl PacketRestore {
    /// Reads the image.
    pub(super) fn load(images: &ImageDir) -> std::result::Result<Self, FileRestoreError> {
        let mut packets = PacketRestore::default();
        for_each(images, |entry, bytes| {
            let firn = entry.firn.unwrap_or_default();
            let rights = entry.scm.into_iter().filter(|scm| scm.r#type == SCM_RIGHTS);
            let packet = Packet {
                bytes,
                sender: firn.sender.unwrap_or_default(),
                destination: firn.destination.unwrap_or_default(),
                credentials: firn.creds.as_ref().and_then(from_image),
                rights: rights.flat_map(|scm| scm.rights).collect(),
                ring_slot: (firn.rx_slot.map(|nth| (Side::Receive, nth)))
                    .or(firn.tx_slot.map(|nth| (Side::Send, nth))),
            };
            packets
                .by_receiver
                .entry(entry.id_for)
                .or_default()
                .push(packet);
        })?;
        Ok(packets)
    }

    /// What waits at a socket.
    pub(super) fn take(&mut self, id: u32) -> Vec<Packet> {
        self.by_receiver.remove(&id).unwrap_or_default()
    }
}

/// Numbers of all files that are in messages.
pub(in crate::files) fn files_in_flight(
    images: &ImageDir,
) -> std::result::Result<Vec<u32>, FileRestoreError> {
    let mut ids = Vec::new();
    for_each(images, |entry, _| {
        ids.extend(entry.scm.into_iter().flat_map(|scm| scm.rights));
    })?;
    Ok(ids)
}

fn for_each(
    images: &ImageDir,
    mut take: impl FnMut(SkPacketEntry, Vec<u8>),
) -> std::result::Result<(), FileRestoreError> {
    let Some(mut reader) = images.reader_if_there(ImageKind::SkQueues, 0)? else {
        return Ok(());
    };
    while let Some(entry) = reader.next_entry::<SkPacketEntry>()? {
        let bytes = reader.payload(u64::from(entry.length))?;
        take(entry, bytes);
    }
    Ok(())
}

/// Descriptors of the files in a message.
pub(super) fn rights_of<'a>(
    packet: &Packet,
    opened: &'a OpenedFiles,
) -> std::result::Result<Vec<Held<'a>>, FileRestoreError> {
    let find = |id: &u32| {
        let mut keys = KINDS.iter().map(|kind| (kind.fd_type(), *id));
        let key = keys.find(|key| opened.contains(key));
        let found = key.map(|key| opened.get(&key)).transpose()?;
        let missing = || FileRestoreError::corrupt(*id, "a message has it and no table does");
        found.flatten().ok_or_else(missing)
    };
    packet.rights.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_sys::socket::{Outgoing, SOCK_SEQPACKET};
    use std::os::fd::OwnedFd;

    fn send(fd: &OwnedFd, bytes: &[u8]) {
        let message = Outgoing {
            bytes,
            ..Outgoing::default()
        };
        assert_eq!(socket::send(fd, &message), Ok(bytes.len()));
    }

    #[test]
    fn queues_are_read_whole_and_stay() {
        for (kind, lens) in [
            (SOCK_STREAM, [3, 70_000]),
            (SOCK_DGRAM, [3, 70_000]),
            (SOCK_SEQPACKET, [70_000, 1]),
        ] {
            let (a, b) = socket::pair(kind).expect("a pair");
            for len in lens {
                send(&a, &vec![7; len]);
            }
            for _ in 0..2 {
                let seen = read_queue(&b, kind, 70_003).expect("peek");
                let total: usize = seen.iter().map(|message| message.bytes.len()).sum();
                assert_eq!(total, lens.iter().sum::<usize>());
                assert!(
                    kind == SOCK_STREAM || seen.len() == 2,
                    "{kind}: {}",
                    seen.len()
                );
            }
            let left = socket::peek(&b, 10).expect("peek").expect("still there");
            assert_eq!(left.bytes[0], 7);
        }
    }

    #[test]
    fn empty_datagrams_count() {
        let (a, b) = socket::pair(SOCK_DGRAM).expect("a pair");
        for bytes in [&b"ab"[..], b"", b"", b"c"] {
            send(&a, bytes);
        }
        let seen = read_queue(&b, SOCK_DGRAM, 0).expect("peek");
        let lens: Vec<usize> = seen.iter().map(|message| message.bytes.len()).collect();
        assert_eq!(lens, [2, 0, 0, 1]);
    }
}
