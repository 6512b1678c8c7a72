//! Socket options that CRIU's images have no field for.
//!
//! Every option of this table is compared with that of a fresh socket of the same kind; what differs goes
//! into the image by level, name and value, and is set again. So an option that a kernel adds needs a row
//! and nothing else. Values that change by themselves (TCP_QUICKACK, SO_INCOMING_CPU) are left out.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::AsFd;

use firn_proto::FirnSockoptEntry;
use firn_sys::socket::packet::VNET_HDR_SZ;
use firn_sys::socket::{
    self, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, IPPROTO_TCP, IPPROTO_UDP,
    IPPROTO_UDPLITE, SOCK_RAW, SOCK_STREAM, SOL_IP, SOL_IPV6, SOL_NETLINK, SOL_PACKET, SOL_SOCKET,
    SOL_TCP, SOL_UDP, SOL_UDPLITE,
};
use firn_sys::{Errno, Result};

/// Family, type and protocol of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::files) struct SocketKind {
    pub(in crate::files) family: i32,
    pub(in crate::files) kind: i32,
    pub(in crate::files) protocol: i32,
}

/// Messages carry a pidfd of the sender.
pub(super) const SO_PASSPIDFD: i32 = 76;

/// When an option can be read and set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    /// The kernel changes it on a connection.
    Unconnected,
}

struct Row {
    level: i32,
    name: i32,
    /// Bytes that it takes at most.
    room: usize,
    when: When,
    /// As the kernel's headers call it.
    label: &'static str,
}

const fn row(level: i32, name: i32, label: &'static str) -> Row {
    Row {
        level,
        name,
        room: 4,
        when: When::Always,
        label,
    }
}

const fn wide(level: i32, name: i32, room: usize, label: &'static str) -> Row {
    Row {
        room,
        ..row(level, name, label)
    }
}

const fn unconnected(level: i32, name: i32, label: &'static str) -> Row {
    Row {
        when: When::Unconnected,
        ..row(level, name, label)
    }
}

static SOCKET: &[Row] = &[
    row(SOL_SOCKET, 1, "SO_DEBUG"),
    row(SOL_SOCKET, 29, "SO_TIMESTAMP_OLD"),
    row(SOL_SOCKET, 35, "SO_TIMESTAMPNS_OLD"),
    wide(SOL_SOCKET, 37, 8, "SO_TIMESTAMPING_OLD"),
    row(SOL_SOCKET, 40, "SO_RXQ_OVFL"),
    row(SOL_SOCKET, 41, "SO_WIFI_STATUS"),
    row(SOL_SOCKET, 43, "SO_NOFCS"),
    row(SOL_SOCKET, 45, "SO_SELECT_ERR_QUEUE"),
    row(SOL_SOCKET, 46, "SO_BUSY_POLL"),
    wide(SOL_SOCKET, 47, 8, "SO_MAX_PACING_RATE"),
    row(SOL_SOCKET, 60, "SO_ZEROCOPY"),
    wide(SOL_SOCKET, 61, 8, "SO_TXTIME"),
    row(SOL_SOCKET, 63, "SO_TIMESTAMP_NEW"),
    row(SOL_SOCKET, 64, "SO_TIMESTAMPNS_NEW"),
    wide(SOL_SOCKET, 65, 8, "SO_TIMESTAMPING_NEW"),
    row(SOL_SOCKET, 69, "SO_PREFER_BUSY_POLL"),
    row(SOL_SOCKET, 70, "SO_BUSY_POLL_BUDGET"),
    row(SOL_SOCKET, 74, "SO_TXREHASH"),
    row(SOL_SOCKET, 75, "SO_RCVMARK"),
    row(SOL_SOCKET, SO_PASSPIDFD, "SO_PASSPIDFD"),
    row(SOL_SOCKET, 82, "SO_RCVPRIORITY"),
    row(SOL_SOCKET, 83, "SO_PASSRIGHTS"),
];

static IPV4: &[Row] = &[
    wide(SOL_IP, 4, 40, "IP_OPTIONS"),
    row(SOL_IP, 6, "IP_RECVOPTS"),
    row(SOL_IP, 7, "IP_RETOPTS"),
    row(SOL_IP, 10, "IP_MTU_DISCOVER"),
    row(SOL_IP, 11, "IP_RECVERR"),
    row(SOL_IP, 12, "IP_RECVTTL"),
    row(SOL_IP, 13, "IP_RECVTOS"),
    row(SOL_IP, 18, "IP_PASSSEC"),
    row(SOL_IP, 19, "IP_TRANSPARENT"),
    row(SOL_IP, 20, "IP_RECVORIGDSTADDR"),
    row(SOL_IP, 21, "IP_MINTTL"),
    row(SOL_IP, 23, "IP_CHECKSUM"),
    row(SOL_IP, 24, "IP_BIND_ADDRESS_NO_PORT"),
    row(SOL_IP, 25, "IP_RECVFRAGSIZE"),
    row(SOL_IP, 26, "IP_RECVERR_RFC4884"),
    row(SOL_IP, 49, "IP_MULTICAST_ALL"),
    row(SOL_IP, 50, "IP_UNICAST_IF"),
    row(SOL_IP, 51, "IP_LOCAL_PORT_RANGE"),
];

static IPV6: &[Row] = &[
    row(SOL_IPV6, 16, "IPV6_UNICAST_HOPS"),
    row(SOL_IPV6, 23, "IPV6_MTU_DISCOVER"),
    row(SOL_IPV6, 25, "IPV6_RECVERR"),
    row(SOL_IPV6, 29, "IPV6_MULTICAST_ALL"),
    row(SOL_IPV6, 31, "IPV6_RECVERR_RFC4884"),
    row(SOL_IPV6, 33, "IPV6_FLOWINFO_SEND"),
    row(SOL_IPV6, 51, "IPV6_RECVHOPLIMIT"),
    row(SOL_IPV6, 53, "IPV6_RECVHOPOPTS"),
    row(SOL_IPV6, 56, "IPV6_RECVRTHDR"),
    row(SOL_IPV6, 58, "IPV6_RECVDSTOPTS"),
    row(SOL_IPV6, 60, "IPV6_RECVPATHMTU"),
    row(SOL_IPV6, 62, "IPV6_DONTFRAG"),
    row(SOL_IPV6, 66, "IPV6_RECVTCLASS"),
    row(SOL_IPV6, 67, "IPV6_TCLASS"),
    row(SOL_IPV6, 70, "IPV6_AUTOFLOWLABEL"),
    row(SOL_IPV6, 72, "IPV6_ADDR_PREFERENCES"),
    row(SOL_IPV6, 73, "IPV6_MINHOPCOUNT"),
    row(SOL_IPV6, 74, "IPV6_RECVORIGDSTADDR"),
    row(SOL_IPV6, 75, "IPV6_TRANSPARENT"),
    row(SOL_IPV6, 76, "IPV6_UNICAST_IF"),
    row(SOL_IPV6, 77, "IPV6_RECVFRAGSIZE"),
];

/// Streams have values of their own there (those of the last packet of the handshake) and take none.
static MULTICAST_V4: &[Row] = &[
    row(SOL_IP, 32, "IP_MULTICAST_IF"),
    row(SOL_IP, 33, "IP_MULTICAST_TTL"),
    row(SOL_IP, 34, "IP_MULTICAST_LOOP"),
];

/// As [`MULTICAST_V4`].
static MULTICAST_V6: &[Row] = &[
    row(SOL_IPV6, 17, "IPV6_MULTICAST_IF"),
    row(SOL_IPV6, 18, "IPV6_MULTICAST_HOPS"),
    row(SOL_IPV6, 19, "IPV6_MULTICAST_LOOP"),
];

static TCP: &[Row] = &[
    unconnected(SOL_TCP, 2, "TCP_MAXSEG"),
    row(SOL_TCP, 7, "TCP_SYNCNT"),
    row(SOL_TCP, 8, "TCP_LINGER2"),
    row(SOL_TCP, 9, "TCP_DEFER_ACCEPT"),
    unconnected(SOL_TCP, 10, "TCP_WINDOW_CLAMP"),
    wide(SOL_TCP, 13, 16, "TCP_CONGESTION"),
    row(SOL_TCP, 16, "TCP_THIN_LINEAR_TIMEOUTS"),
    row(SOL_TCP, 17, "TCP_THIN_DUPACK"),
    row(SOL_TCP, 18, "TCP_USER_TIMEOUT"),
    unconnected(SOL_TCP, 23, "TCP_FASTOPEN"),
    row(SOL_TCP, 25, "TCP_NOTSENT_LOWAT"),
    row(SOL_TCP, 27, "TCP_SAVE_SYN"),
    unconnected(SOL_TCP, 30, "TCP_FASTOPEN_CONNECT"),
    row(SOL_TCP, 34, "TCP_FASTOPEN_NO_COOKIE"),
    row(SOL_TCP, 36, "TCP_INQ"),
    row(SOL_TCP, 37, "TCP_TX_DELAY"),
];

static UDP: &[Row] = &[
    row(SOL_UDP, 100, "UDP_ENCAP"),
    row(SOL_UDP, 101, "UDP_NO_CHECK6_TX"),
    row(SOL_UDP, 102, "UDP_NO_CHECK6_RX"),
    row(SOL_UDP, 103, "UDP_SEGMENT"),
    row(SOL_UDP, 104, "UDP_GRO"),
];

static UDPLITE: &[Row] = &[
    row(SOL_UDPLITE, 10, "UDPLITE_SEND_CSCOV"),
    row(SOL_UDPLITE, 11, "UDPLITE_RECV_CSCOV"),
];

static RAW_IPV6: &[Row] = &[row(SOL_IPV6, 7, "IPV6_CHECKSUM")];

static NETLINK: &[Row] = &[
    row(SOL_NETLINK, 3, "NETLINK_PKTINFO"),
    row(SOL_NETLINK, 4, "NETLINK_BROADCAST_ERROR"),
    row(SOL_NETLINK, 5, "NETLINK_NO_ENOBUFS"),
    row(SOL_NETLINK, 8, "NETLINK_LISTEN_ALL_NSID"),
    row(SOL_NETLINK, 10, "NETLINK_CAP_ACK"),
    row(SOL_NETLINK, 11, "NETLINK_EXT_ACK"),
    row(SOL_NETLINK, 12, "NETLINK_GET_STRICT_CHK"),
];

static PACKET: &[Row] = &[
    row(SOL_PACKET, 19, "PACKET_TX_HAS_OFF"),
    row(SOL_PACKET, 20, "PACKET_QDISC_BYPASS"),
    row(SOL_PACKET, 23, "PACKET_IGNORE_OUTGOING"),
    row(SOL_PACKET, VNET_HDR_SZ, "PACKET_VNET_HDR_SZ"),
];

/// The tables of a kind.
fn tables(of: SocketKind) -> Vec<&'static [Row]> {
    let mut tables = vec![SOCKET];
    match of.family {
        AF_INET => tables.push(IPV4),
        AF_INET6 => tables.extend([IPV6, IPV4]),
        AF_NETLINK => tables.push(NETLINK),
        AF_PACKET => tables.push(PACKET),
        _ => {}
    }
    if !matches!(of.family, AF_INET | AF_INET6) {
        return tables;
    }
    if of.kind != SOCK_STREAM {
        tables.push(MULTICAST_V4);
        if of.family == AF_INET6 {
            tables.push(MULTICAST_V6);
        }
    }
    match of.protocol {
        _ if of.kind == SOCK_RAW && of.family == AF_INET6 => tables.push(RAW_IPV6),
        _ if of.kind == SOCK_RAW => {}
        IPPROTO_TCP => tables.push(TCP),
        IPPROTO_UDP => tables.push(UDP),
        IPPROTO_UDPLITE => tables.push(UDPLITE),
        _ => {}
    }
    tables
}

/// The name of an option, for messages.
pub(super) fn label(level: i32, name: i32) -> String {
    let all = [
        SOCKET,
        IPV4,
        IPV6,
        MULTICAST_V4,
        MULTICAST_V6,
        TCP,
        UDP,
        UDPLITE,
        RAW_IPV6,
        NETLINK,
        PACKET,
    ];
    let found = all.into_iter().flatten();
    let mut found = found.filter(|row| (row.level, row.name) == (level, name));
    match found.next() {
        Some(row) => row.label.to_owned(),
        None => format!("option {name} of level {level}"),
    }
}

/// Options of fresh sockets, by kind.
#[derive(Debug, Default)]
pub(in crate::files) struct Defaults(HashMap<SocketKind, HashMap<(i32, i32), Vec<u8>>>);

impl Defaults {
    fn of(&mut self, kind: SocketKind) -> Result<&HashMap<(i32, i32), Vec<u8>>> {
        let place = match self.0.entry(kind) {
            Entry::Occupied(known) => return Ok(known.into_mut()),
            Entry::Vacant(place) => place,
        };
        let fresh = socket::create(kind.family, kind.kind, kind.protocol)?;
        let rows = tables(kind).into_iter().flatten();
        let values = rows.filter_map(|row| {
            let value = socket::option(&fresh, row.level, row.name, row.room).ok()?;
            Some(((row.level, row.name), value))
        });
        Ok(place.insert(values.collect()))
    }
}

/// Reads what differs from a fresh socket.
pub(super) fn dump(
    fd: impl AsFd,
    kind: SocketKind,
    connected: bool,
    defaults: &mut Defaults,
) -> Result<Vec<FirnSockoptEntry>> {
    let fd = fd.as_fd();
    let defaults = defaults.of(kind)?;
    let rows = tables(kind).into_iter().flatten();
    let rows = rows.filter(|row| !(connected && row.when == When::Unconnected));
    let differing = rows.filter_map(|row| {
        let default = defaults.get(&(row.level, row.name))?;
        let value = socket::option(fd, row.level, row.name, row.room).ok()?;
        (value != *default).then_some(FirnSockoptEntry {
            level: Some(row.level),
            name: Some(row.name),
            value: Some(value),
        })
    });
    Ok(differing.collect())
}

/// Sets options; those that the kernel refuses are returned by name.
pub(super) fn restore(fd: impl AsFd, entries: &[FirnSockoptEntry]) -> Vec<(String, Errno)> {
    let fd = fd.as_fd();
    let mut refused = Vec::new();
    for entry in entries {
        let (level, name) = (entry.level.unwrap_or(-1), entry.name.unwrap_or(-1));
        let value = entry.value.as_deref().unwrap_or(&[]);
        if let Err(errno) = socket::set_option(fd, level, name, value) {
            refused.push((label(level, name), errno));
        }
    }
    refused
}

/// Names of the options that are not as an image has them.
pub(super) fn lost(fd: impl AsFd, entries: &[FirnSockoptEntry]) -> Vec<String> {
    let fd = fd.as_fd();
    let differs = |entry: &&FirnSockoptEntry| {
        let wanted = entry.value.as_deref().unwrap_or(&[]);
        let (level, name) = (entry.level.unwrap_or(-1), entry.name.unwrap_or(-1));
        socket::option(fd, level, name, wanted.len()).as_deref() != Ok(wanted)
    };
    let lost = entries.iter().filter(differs);
    lost.map(|entry| label(entry.level.unwrap_or(-1), entry.name.unwrap_or(-1)))
        .collect()
}

/// The kind of a socket.
pub(in crate::files) fn kind_of(fd: impl AsFd) -> Result<SocketKind> {
    let fd = fd.as_fd();
    let ask = |name| socket::number(fd, SOL_SOCKET, name);
    let family = ask(socket::SO_DOMAIN)?;
    Ok(SocketKind {
        family,
        kind: ask(socket::SO_TYPE)?,
        protocol: if family == AF_UNIX {
            0
        } else {
            ask(socket::SO_PROTOCOL)?
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found_and_set_again() {
        let kind = SocketKind {
            family: AF_INET,
            kind: SOCK_STREAM,
            protocol: IPPROTO_TCP,
        };
        let make = || socket::create(kind.family, kind.kind, kind.protocol).expect("a socket");
        let (one, other) = (make(), make());
        let mut defaults = Defaults::default();
        assert_eq!(dump(&one, kind, false, &mut defaults), Ok(Vec::new()));
        socket::set_number(&one, SOL_TCP, 18, 4711).expect("TCP_USER_TIMEOUT");
        socket::set_number(&one, SOL_IP, 12, 1).expect("IP_RECVTTL");
        let entries = dump(&one, kind, false, &mut defaults).expect("readable");
        assert_eq!(entries.len(), 2);
        assert!(restore(&other, &entries).is_empty());
        assert_eq!(dump(&other, kind, false, &mut defaults), Ok(entries));
        assert_eq!(label(SOL_TCP, 18), "TCP_USER_TIMEOUT");
    }
}
