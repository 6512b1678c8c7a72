//! Packet sockets: frames of interfaces, below all protocols.
//!
//! packet_diag tells interface, protocol, memberships, rings and the fanout group, options the rest. At
//! restore the socket hears nothing until everything else about it is set: it is made without a protocol,
//! gets its options, rings and filter, and is bound last. A fanout group takes only sockets that hear.
//!
//! Rings are mapped again where they were, with the frames that nobody has read and the kernel at the place
//! where it was: see [`super::packet_ring`]. Frames that wait in the socket itself are lost, which a warning
//! tells, as are those on the wire while nobody is there. Not kept: a fanout group that chooses by a BPF program,
//! which no call shows.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_proto::{
    FdTypes, FileEntry, FirnPacketSockEntry, PacketMclist, PacketRing, PacketSockEntry,
};
use firn_sys::sock_diag::{self, PacketSocket};
use firn_sys::socket::packet::{self, Membership};
use firn_sys::socket::{self, AF_PACKET, SIOCINQ, SOCK_PACKET, SOL_PACKET};
use firn_sys::{Errno, Result};

use super::extra::SocketKind;
use super::packet_ring::{self, Side};
use super::packets::Packet;
use super::{DumpedSockets, NET_NS_ID, foreign_namespace, inode_of, is_of_protocol, options};
use crate::files::dump::{Collected, DumpState, query};
use crate::files::error::{FileDumpError, FileRestoreError};
use crate::files::kind::{Dumping, FileKind};
use crate::files::open::{self, Opener};
use crate::files::open_file::{OpenFile, Trouble};
use crate::kernel::Kernel;

/// Bits of [`PacketSocket::flags`].
const AUXDATA: u32 = 2;
const ORIGDEV: u32 = 4;
const VNET_HDR: u32 = 8;
const LOSS: u32 = 16;

/// Packet sockets.
pub(in crate::files) struct PacketSocketKind;

impl FileKind for PacketSocketKind {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Packetsk
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        is_of_protocol(file, &["PACKET"])
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> std::result::Result<FileEntry, FileDumpError> {
        Ok(FileEntry {
            r#type: FdTypes::Packetsk.into(),
            id: dumping.id,
            psk: Some(Box::new(dump(dumping, state.collected)?)),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> std::result::Result<OwnedFd, FileRestoreError> {
        let part = entry.psk.as_deref();
        let entry = FileRestoreError::expect_member(entry, part, "a packet socket")?;
        let waiting = opener.sockets.packets.take(entry.id);
        open_again(entry, &waiting, &mut opener.sockets.losses)
    }
}

/// The packet sockets of a dump.
#[derive(Debug, Default)]
pub(in crate::files) struct DumpedPacket {
    /// All of the namespace, as soon as there is one to be dumped.
    known: Option<HashMap<u32, PacketSocket>>,
    /// Number of a socket in files.img and bytes of its rings, by inode number.
    rings: HashMap<u64, (u32, u64)>,
}

impl DumpedPacket {
    fn diag(&mut self, ino: u32) -> Result<Option<&PacketSocket>> {
        let known = match self.known.take() {
            Some(known) => known,
            None => sock_diag::packet_sockets()?,
        };
        Ok(self.known.insert(known).get(&ino))
    }

    /// The socket whose rings a mapping of `len_bytes` shows.
    pub(in crate::files) fn mapped(
        &self,
        ino: u64,
        len_bytes: u64,
    ) -> std::result::Result<u32, &'static str> {
        match self.rings.get(&ino) {
            None => Err("the socket is no packet socket of the tree: its mappings are not saved"),
            Some((id, len)) if *len == len_bytes => Ok(*id),
            Some(_) => Err("it shows only a part of the rings of its packet socket"),
        }
    }
}

fn dump(
    dumping: &Dumping<'_>,
    collected: &mut Collected,
) -> std::result::Result<PacketSockEntry, FileDumpError> {
    let file = dumping.file;
    let failed = |source| query(file, "the packet socket", source);
    let fd = dumping.duplicate.ok_or_else(|| failed(Errno::EBADF))?;
    let refuse = |trouble| FileDumpError::Obstacles(vec![file.obstacle(trouble)]);
    let sockets = &mut collected.sockets;
    let diag = sockets.packet.diag(inode_of(file)).map_err(failed)?;
    let diag = diag.cloned().ok_or_else(|| refuse(foreign_namespace()))?;
    if diag.fanout.is_some_and(packet::chooses_by_program) {
        return Err(refuse(by_program()));
    }
    let mut entry = describe(dumping, fd, &diag, sockets)?;
    let rings = [&entry.rx_ring, &entry.tx_ring];
    let bytes = rings.into_iter().flatten().map(ring_bytes).sum();
    let known = (dumping.id, bytes);
    sockets.packet.rings.insert(file.stat.ino, known);
    let mut lost = Vec::new();
    if bytes > 0 {
        let head = |side| head_in(collected.rings.kernel.get()?, fd, side);
        let rings = packet_ring::dump(fd, &entry, head).map_err(failed)?;
        if rings.send_head_is_lost {
            lost.push(
                "nothing tells which frame of its ring is sent next: the restored ring begins with the first",
            );
        }
        let heads = FirnPacketSockEntry {
            rx_head: rings.receive_head.filter(|head| *head != 0),
            tx_head: rings.send_head.filter(|head| *head != 0),
        };
        entry.firn = (heads != FirnPacketSockEntry::default()).then_some(heads);
        let packets = &mut collected.sockets.packets;
        let slots = rings.slots.into_iter();
        slots.for_each(|slot| packets.add_slot(dumping.id, slot));
    }
    if socket::ioctl_number(fd, SIOCINQ).map_err(failed)? > 0 {
        lost.push("frames that it has captured and nobody has read will not be there again");
    }
    let told = lost
        .into_iter()
        .map(|lost| format!("task {}: {}: {lost}", file.pid, file.place));
    collected.warnings.extend(told);
    Ok(entry)
}

/// Where the kernel is in a ring of frames, as its own structures tell.
fn head_in(kernel: &Kernel, fd: BorrowedFd<'_>, side: Side) -> Option<u32> {
    let socket = kernel.file(fd)?.follow_as("private_data", "socket")?;
    let socket = socket.follow_as("sk", "packet_sock")?;
    socket.word(match side {
        Side::Receive => "rx_ring.head",
        Side::Send => "tx_ring.head",
    })
}

fn by_program() -> Trouble {
    Trouble::new(
        "its fanout group chooses by a BPF program, which no call shows",
        "dump when the task has left the group",
    )
}

fn describe(
    dumping: &Dumping<'_>,
    fd: BorrowedFd<'_>,
    diag: &PacketSocket,
    sockets: &mut DumpedSockets,
) -> std::result::Result<PacketSockEntry, FileDumpError> {
    let file = dumping.file;
    let kind = SocketKind {
        family: AF_PACKET,
        kind: diag.kind.cast_signed(),
        protocol: 0,
    };
    let opts = options::dump(fd, kind, false, &mut sockets.defaults)
        .map_err(|error| query(file, error.what, error.source))?;
    let has = |flag| diag.flags & flag != 0;
    let memberships = diag.memberships.iter();
    Ok(PacketSockEntry {
        id: dumping.id,
        r#type: diag.kind,
        protocol: u32::from(diag.protocol.to_be()),
        flags: file.image_flags(),
        ifindex: diag.index,
        fown: dumping.fown,
        opts,
        version: diag.version,
        reserve: diag.reserve,
        aux_data: has(AUXDATA),
        orig_dev: has(ORIGDEV),
        vnet_hdr: has(VNET_HDR),
        loss: has(LOSS),
        timestamp: diag.timestamp,
        copy_thresh: diag.copy_thresh,
        mclist: memberships.flat_map(membership_entries).collect(),
        fanout: diag.fanout,
        rx_ring: diag.rx_ring.map(ring_entry),
        tx_ring: diag.tx_ring.map(ring_entry),
        ns_id: Some(NET_NS_ID),
        firn: None,
    })
}

/// An entry for each time that the group was joined.
fn membership_entries(membership: &sock_diag::PacketMembership) -> Vec<PacketMclist> {
    let entry = PacketMclist {
        index: membership.index,
        r#type: membership.kind.into(),
        addr: membership.address.clone(),
    };
    let times = usize::try_from(membership.count).unwrap_or(1);
    vec![entry; times.min(packet::MAX_TIMES)]
}

fn ring_entry(ring: sock_diag::PacketRing) -> PacketRing {
    PacketRing {
        block_size: ring.block_size,
        block_nr: ring.block_nr,
        frame_size: ring.frame_size,
        frame_nr: ring.frame_nr,
        retire_tmo: ring.retire_tmo,
        sizeof_priv: ring.sizeof_priv,
        features: ring.features,
    }
}

fn ring_bytes(ring: &PacketRing) -> u64 {
    u64::from(ring.block_size) * u64::from(ring.block_nr)
}

fn open_again(
    entry: &PacketSockEntry,
    waiting: &[Packet],
    losses: &mut Vec<String>,
) -> std::result::Result<OwnedFd, FileRestoreError> {
    let name = shown(entry);
    let refused = |action| FileRestoreError::refused(action, name.clone());
    let is_old = entry.r#type == SOCK_PACKET.cast_unsigned();
    // The old type has no way to get a protocol later.
    let protocol = if is_old {
        entry.protocol.cast_signed()
    } else {
        0
    };
    let fd = socket::create(AF_PACKET, entry.r#type.cast_signed(), protocol)
        .map_err(refused("create"))?;
    options::restore_early(&fd, &entry.opts, &name)?;
    if !is_old {
        set_options(&fd, entry).map_err(refused("set an option of"))?;
        set_rings(&fd, entry).map_err(refused("make the rings of"))?;
        let remake = || remake_rings(&fd, entry);
        if let Err(errno) = packet_ring::restore(&fd, entry, waiting, remake) {
            remake().map_err(refused("make the rings of"))?;
            losses.push(format!(
                "{name}: its rings are empty and begin with their first frames: {errno}"
            ));
        }
        // From now on nothing comes until it is bound.
        socket::bind(&fd, &packet::address(0, 0)).map_err(refused("bind"))?;
        set_copy_threshold(&fd, entry).map_err(refused("set an option of"))?;
    }
    options::restore_late(&fd, &entry.opts, &name)?;
    for member in &entry.mclist {
        let member = Membership {
            index: member.index,
            kind: u16::try_from(member.r#type).unwrap_or(u16::MAX),
            address: &member.addr,
        };
        packet::join(&fd, &member).map_err(refused("join a group with"))?;
    }
    bind(&fd, entry, is_old).map_err(refused("bind"))?;
    if let Some(group) = entry.fanout.filter(|group| *group != NO_FANOUT) {
        socket::set_number(&fd, SOL_PACKET, packet::FANOUT, group.cast_signed())
            .map_err(refused("join the fanout group of"))?;
    }
    open::set_flags(&fd, entry.flags, &name)?;
    Ok(fd)
}

/// A socket without a group, in images of others.
const NO_FANOUT: u32 = u32::MAX;

fn set_options(fd: impl AsFd, entry: &PacketSockEntry) -> Result<()> {
    let fd = fd.as_fd();
    let set = |name, value: u32| socket::set_number(fd, SOL_PACKET, name, value.cast_signed());
    set(packet::VERSION, entry.version)?;
    set(packet::RESERVE, entry.reserve)?;
    set(packet::TIMESTAMP, entry.timestamp)?;
    set(packet::AUXDATA, entry.aux_data.into())?;
    set(packet::ORIGDEV, entry.orig_dev.into())?;
    set(packet::LOSS, entry.loss.into())?;
    let wanted = (Some(SOL_PACKET), Some(packet::VNET_HDR_SZ));
    let mut others = entry.opts.firn.iter();
    match others.any(|option| (option.level, option.name) == wanted) {
        // It says more and has been set.
        true => Ok(()),
        // Cooked sockets refuse even to have it switched off.
        false if !entry.vnet_hdr => Ok(()),
        false => set(packet::VNET_HDR, 1),
    }
}

/// Comes late: no frame that only moves the kernel on is to be copied.
fn set_copy_threshold(fd: impl AsFd, entry: &PacketSockEntry) -> Result<()> {
    let value = entry.copy_thresh.cast_signed();
    socket::set_number(fd, SOL_PACKET, packet::COPY_THRESH, value)
}

/// Makes rings anew that nobody has mapped.
fn remake_rings(fd: impl AsFd, entry: &PacketSockEntry) -> Result<()> {
    let rings = [
        (packet::RX_RING, &entry.rx_ring),
        (packet::TX_RING, &entry.tx_ring),
    ];
    for (name, _) in rings.iter().filter(|(_, ring)| ring.is_some()) {
        socket::set_option(fd.as_fd(), SOL_PACKET, *name, &[0; 28])?;
    }
    set_rings(fd, entry)
}

fn set_rings(fd: impl AsFd, entry: &PacketSockEntry) -> Result<()> {
    let fd = fd.as_fd();
    let rings = [
        (packet::RX_RING, &entry.rx_ring),
        (packet::TX_RING, &entry.tx_ring),
    ];
    for (name, ring) in rings {
        let Some(ring) = ring else { continue };
        let words = [
            ring.block_size,
            ring.block_nr,
            ring.frame_size,
            ring.frame_nr,
            ring.retire_tmo,
            ring.sizeof_priv,
            ring.features,
        ];
        let request: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        socket::set_option(fd, SOL_PACKET, name, &request)?;
    }
    Ok(())
}

fn bind(fd: impl AsFd, entry: &PacketSockEntry, is_old: bool) -> Result<()> {
    if is_old {
        if entry.ifindex == 0 {
            return Ok(());
        }
        let name = socket::interface_name(entry.ifindex)?;
        return socket::bind(fd, &packet::old_address(&name));
    }
    if entry.protocol == 0 && entry.ifindex == 0 {
        return Ok(());
    }
    let protocol = u16::try_from(entry.protocol).map_err(|_| Errno::EINVAL)?;
    socket::bind(fd, &packet::address(entry.ifindex, protocol))
}

/// A socket in words.
pub(super) fn shown(entry: &PacketSockEntry) -> String {
    let interface = match entry.ifindex {
        0 => "all interfaces".to_owned(),
        index => socket::interface_name(index).unwrap_or_else(|_| format!("interface {index}")),
    };
    format!("packet socket {} of {interface}", entry.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_was_joined_twice_is_joined_twice() {
        let membership = sock_diag::PacketMembership {
            index: 1,
            count: 2,
            kind: 0,
            address: vec![1, 0, 0x5e, 0, 0, 1],
        };
        let entries = membership_entries(&membership);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].addr, membership.address);
    }

    #[test]
    fn only_whole_rings_of_known_sockets_are_mapped() {
        let mut dumped = DumpedPacket::default();
        dumped.rings.insert(77, (5, 8192));
        assert_eq!(dumped.mapped(77, 8192), Ok(5));
        assert!(dumped.mapped(77, 4096).is_err());
        assert!(dumped.mapped(78, 8192).is_err());
    }
}
