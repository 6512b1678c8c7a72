//! What the kernel tells about sockets that it does not tell through their descriptors.
//!
//! Source: man 7 sock_diag; linux include/uapi/linux/unix_diag.h, packet_diag.h, netlink_diag.h.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use crate::netlink::{ACK, Attributes, DUMP, Netlink, REQUEST, Request, SOCK_DIAG, word};
use crate::socket::{AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, IPPROTO_TCP, TCP_LISTEN};
use crate::{Errno, Result};

const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// A unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnixSocket {
    /// Inode number.
    pub ino: u32,
    /// SOCK_STREAM and so on.
    pub kind: u32,
    /// TCP_ESTABLISHED and so on.
    pub state: u32,
    /// Name as in sun_path, with the NUL at the end of a path.
    pub name: Vec<u8>,
    /// Inode number and device (kernel encoding) of the file that it is bound to.
    pub file: Option<(u32, u32)>,
    /// Inode number of the peer; 0 where it has no descriptor any more or yet.
    pub peer: Option<u32>,
    /// Of a listening socket: who waits to be accepted.
    pub waiting: Vec<u32>,
    /// Bytes to be read; of a listening socket, connections.
    pub receive_queue: u32,
    /// Memory of what was sent and not read yet; of a listening socket, the backlog.
    pub send_queue: u32,
    /// Directions that are shut down: 1 reading, 2 writing.
    pub shutdown: u32,
}

/// Lists all unix sockets of this network namespace by inode number.
///
/// # Errors
/// ENOENT without CONFIG_UNIX_DIAG.
pub fn unix_sockets() -> Result<HashMap<u32, UnixSocket>> {
    let mut fixed = vec![AF_UNIX.to_ne_bytes()[0], 0, 0, 0];
    fixed.extend(u32::MAX.to_ne_bytes());
    fixed.extend(0u32.to_ne_bytes());
    // Name, file, peer, waiting connections, queue lengths.
    fixed.extend(0x1fu32.to_ne_bytes());
    fixed.extend([0; 8]);
    let mut found = HashMap::new();
    let request = Request::new(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &fixed);
    Netlink::open(SOCK_DIAG)?.dump(request, |payload| {
        if let Some(socket) = parse_unix(payload) {
            found.insert(socket.ino, socket);
        }
    })?;
    Ok(found)
}

fn parse_unix(payload: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        kind: u32::from(*payload.get(1)?),
        state: u32::from(*payload.get(2)?),
        ino: word(payload, 4)?,
        ..UnixSocket::default()
    };
    for (kind, value) in Attributes(payload.get(16..)?) {
        match kind {
            0 => socket.name = value.to_vec(),
            1 => socket.file = Some((word(value, 0)?, word(value, 4)?)),
            2 => socket.peer = word(value, 0),
            3 => {
                let words = value.chunks_exact(4).filter_map(|bytes| word(bytes, 0));
                socket.waiting = words.collect();
            }
            4 => {
                socket.receive_queue = word(value, 0)?;
                socket.send_queue = word(value, 4)?;
            }
            6 => socket.shutdown = u32::from(*value.first()?),
            _ => {}
        }
    }
    Some(socket)
}

/// A netlink socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetlinkSocket {
    /// Inode number.
    pub ino: u32,
    /// NETLINK_ROUTE and so on.
    pub protocol: u32,
    /// 1 for one that takes messages of its peer only.
    pub state: u32,
    /// Its own port; 0 for none.
    pub port: u32,
    /// Port of the peer; 0 for the kernel.
    pub peer_port: u32,
    /// Multicast group that it sends to; 0 for none.
    pub peer_group: u32,
    /// Whether the kernel still has parts of a long answer for it.
    pub is_answered: bool,
}

/// Lists all netlink sockets of this network namespace with a port or a group, by inode number.
///
/// # Errors
/// ENOENT without CONFIG_NETLINK_DIAG.
pub fn netlink_sockets() -> Result<HashMap<u32, NetlinkSocket>> {
    const ALL_PROTOCOLS: u8 = 255;
    const SHOW_FLAGS: u32 = 8;
    let mut fixed = vec![AF_NETLINK.to_ne_bytes()[0], ALL_PROTOCOLS, 0, 0];
    fixed.extend(0u32.to_ne_bytes());
    fixed.extend(SHOW_FLAGS.to_ne_bytes());
    fixed.extend([0; 8]);
    let mut found = HashMap::new();
    let request = Request::new(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &fixed);
    Netlink::open(SOCK_DIAG)?.dump(request, |payload| {
        if let Some(socket) = parse_netlink(payload) {
            found.insert(socket.ino, socket);
        }
    })?;
    Ok(found)
}

fn parse_netlink(payload: &[u8]) -> Option<NetlinkSocket> {
    const FLAGS: u16 = 4;
    const CALLBACK_RUNS: u32 = 1;
    let mut attributes = Attributes(payload.get(28..)?);
    let flags = attributes.find(|(kind, _)| *kind == FLAGS);
    let flags = flags.and_then(|(_, value)| word(value, 0)).unwrap_or(0);
    Some(NetlinkSocket {
        protocol: u32::from(*payload.get(2)?),
        state: u32::from(*payload.get(3)?),
        port: word(payload, 4)?,
        peer_port: word(payload, 8)?,
        peer_group: word(payload, 12)?,
        ino: word(payload, 16)?,
        is_answered: flags & CALLBACK_RUNS != 0,
    })
}

/// A ring of a packet socket, as it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketRing {
    /// Bytes of a block.
    pub block_size: u32,
    /// Number of blocks.
    pub block_nr: u32,
    /// Bytes of a frame.
    pub frame_size: u32,
    /// Number of frames.
    pub frame_nr: u32,
    /// Milliseconds after which a block is handed over.
    pub retire_tmo: u32,
    /// Bytes of private area in each block.
    pub sizeof_priv: u32,
    /// Feature bits.
    pub features: u32,
}

/// Membership of a packet socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketMembership {
    /// Interface.
    pub index: u32,
    /// How often it was joined.
    pub count: u32,
    /// PACKET_MR_MULTICAST and so on.
    pub kind: u16,
    /// Hardware address.
    pub address: Vec<u8>,
}

/// A packet socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PacketSocket {
    /// Inode number.
    pub ino: u32,
    /// SOCK_RAW and so on.
    pub kind: u32,
    /// Protocol of the frames; 0 for none.
    pub protocol: u16,
    /// Interface; 0 for all.
    pub index: u32,
    /// PACKET_VERSION.
    pub version: u32,
    /// PACKET_RESERVE.
    pub reserve: u32,
    /// PACKET_COPY_THRESH.
    pub copy_thresh: u32,
    /// PACKET_TIMESTAMP.
    pub timestamp: u32,
    /// Bits: 1 running, 2 auxiliary data, 4 original device, 8 vnet headers, 16 losses.
    pub flags: u32,
    /// Memberships.
    pub memberships: Vec<PacketMembership>,
    /// The ring for receiving.
    pub rx_ring: Option<PacketRing>,
    /// The ring for sending.
    pub tx_ring: Option<PacketRing>,
    /// Fanout group, with its way to choose in the third byte and its flags in the fourth.
    pub fanout: Option<u32>,
}

/// Lists all packet sockets of this network namespace by inode number.
///
/// # Errors
/// ENOENT without CONFIG_PACKET_DIAG.
pub fn packet_sockets() -> Result<HashMap<u32, PacketSocket>> {
    let mut fixed = vec![AF_PACKET.to_ne_bytes()[0], 0, 0, 0];
    fixed.extend(0u32.to_ne_bytes());
    // Info, memberships, rings, fanout.
    fixed.extend(0x0fu32.to_ne_bytes());
    fixed.extend([0; 8]);
    let mut found = HashMap::new();
    let request = Request::new(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &fixed);
    Netlink::open(SOCK_DIAG)?.dump(request, |payload| {
        if let Some(socket) = parse_packet(payload) {
            found.insert(socket.ino, socket);
        }
    })?;
    Ok(found)
}

fn parse_packet(payload: &[u8]) -> Option<PacketSocket> {
    let mut socket = PacketSocket {
        kind: u32::from(*payload.get(1)?),
        protocol: u16::from_ne_bytes([*payload.get(2)?, *payload.get(3)?]),
        ino: word(payload, 4)?,
        ..PacketSocket::default()
    };
    for (kind, value) in Attributes(payload.get(16..)?) {
        match kind {
            0 => {
                socket.index = word(value, 0)?;
                socket.version = word(value, 4)?;
                socket.reserve = word(value, 8)?;
                socket.copy_thresh = word(value, 12)?;
                socket.timestamp = word(value, 16)?;
                socket.flags = word(value, 20)?;
            }
            1 => socket.memberships = value.chunks_exact(44).filter_map(membership).collect(),
            2 => socket.rx_ring = ring(value),
            3 => socket.tx_ring = ring(value),
            4 => socket.fanout = word(value, 0),
            _ => {}
        }
    }
    Some(socket)
}

/// `struct packet_diag_mclist`: index, count, type, address length, address.
fn membership(bytes: &[u8]) -> Option<PacketMembership> {
    let len = usize::from(u16::from_ne_bytes([bytes[10], bytes[11]]));
    Some(PacketMembership {
        index: word(bytes, 0)?,
        count: word(bytes, 4)?,
        kind: u16::from_ne_bytes([bytes[8], bytes[9]]),
        address: bytes.get(12..12 + len)?.to_vec(),
    })
}

fn ring(bytes: &[u8]) -> Option<PacketRing> {
    Some(PacketRing {
        block_size: word(bytes, 0)?,
        block_nr: word(bytes, 4)?,
        frame_size: word(bytes, 8)?,
        frame_nr: word(bytes, 12)?,
        retire_tmo: word(bytes, 16)?,
        sizeof_priv: word(bytes, 20)?,
        features: word(bytes, 24)?,
    })
}

/// Ends the TCP connection with these two ends if it is an orphan: no process has its socket any more, and the
/// kernel goes on repeating its end. A reset is sent. False where there is none, or where a process has it.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN; EOPNOTSUPP without CONFIG_INET_DIAG_DESTROY. Before Linux 6.11 orphans stay.
///
/// Source: linux net/ipv4/inet_diag.c, net/ipv4/tcp.c, tcp_abort (Linux 4.5).
pub fn destroy_orphan(local: SocketAddr, remote: SocketAddr) -> Result<bool> {
    const SOCK_DESTROY: u16 = 21;
    const ANY_COOKIE: [u8; 8] = [0xff; 8];
    let mut netlink = Netlink::open(SOCK_DIAG)?;
    let mut orphan = None;
    let fixed = connection_request(local, remote, ANY_COOKIE);
    let request = Request::new(SOCK_DIAG_BY_FAMILY, REQUEST | ACK, &fixed);
    let found = netlink.dump(request, |payload| {
        orphan = orphan_cookie(payload);
    });
    match (found, orphan) {
        (Ok(()), Some(cookie)) => {
            let fixed = connection_request(local, remote, cookie);
            let request = Request::new(SOCK_DESTROY, REQUEST | ACK, &fixed);
            netlink.request(request).map(|()| true)
        }
        (Ok(()) | Err(Errno::ENOENT), _) => Ok(false),
        (Err(errno), _) => Err(errno),
    }
}

/// `struct inet_diag_req_v2` for one TCP connection.
fn connection_request(local: SocketAddr, remote: SocketAddr, cookie: [u8; 8]) -> Vec<u8> {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut fixed = vec![family.to_ne_bytes()[0], IPPROTO_TCP.to_ne_bytes()[0], 0, 0];
    fixed.extend(u32::MAX.to_ne_bytes());
    fixed.extend(local.port().to_be_bytes());
    fixed.extend(remote.port().to_be_bytes());
    for address in [local.ip(), remote.ip()] {
        let mut bytes = match address {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        bytes.resize(16, 0);
        fixed.extend(bytes);
    }
    fixed.extend(0u32.to_ne_bytes());
    fixed.extend(cookie);
    fixed
}

/// The cookie of a connection whose socket no process has, out of its `struct inet_diag_msg`.
fn orphan_cookie(payload: &[u8]) -> Option<[u8; 8]> {
    const COOKIE: usize = 44;
    const INODE: usize = 68;
    let is_listening = i32::from(*payload.get(1)?) == TCP_LISTEN.cast_signed();
    let is_orphan = word(payload, INODE)? == 0 && !is_listening;
    let cookie = payload.get(COOKIE..COOKIE + 8)?;
    is_orphan.then(|| cookie.try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket;
    use std::os::fd::AsFd;

    fn ino(fd: impl AsFd) -> u32 {
        u32::try_from(crate::file::stat(fd).expect("stat").ino)
            .expect("inodes of sockets are small")
    }

    #[test]
    fn a_pair_knows_its_ends() {
        let (a, b) = socket::pair(socket::SOCK_STREAM).expect("a pair");
        socket::send(
            &a,
            &socket::Outgoing {
                bytes: b"abc",
                ..Default::default()
            },
        )
        .expect("send");
        let all = unix_sockets().expect("unix_diag");
        let (a, b) = (&all[&ino(&a)], &all[&ino(&b)]);
        assert_eq!((a.peer, b.peer), (Some(b.ino), Some(a.ino)));
        assert_eq!((a.kind, a.state, b.receive_queue), (1, 1, 3));
    }

    #[test]
    fn a_netlink_socket_knows_its_port() {
        const KOBJECT_UEVENT: i32 = 15;
        let fd = socket::create(AF_NETLINK, socket::SOCK_DGRAM, KOBJECT_UEVENT).expect("a socket");
        assert!(
            !netlink_sockets()
                .expect("netlink_diag")
                .contains_key(&ino(&fd))
        );
        socket::bind(&fd, &[16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).expect("a free port");
        let own = socket::local_address(&fd).expect("an address");
        let found = netlink_sockets().expect("netlink_diag")[&ino(&fd)];
        assert_eq!(Some(found.port), word(&own, 4));
        assert_eq!(found.protocol, 15);
        assert!(found.state != 1 && found.port != 0 && !found.is_answered);
    }
}
