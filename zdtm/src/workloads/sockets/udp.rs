//! Datagram and raw sockets over IPv4 and IPv6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static QUEUES: Workload = Workload::new(
    "sockets/udp-queues",
    "datagrams that wait, with senders: connected or not, IPv4, IPv6 and mapped, UDP-Lite",
    queues,
);
pub static OPTIONS: Workload = Workload::new(
    "sockets/udp-options",
    "devices, marks, foreign addresses, types of service, locked filters",
    options,
)
.needs(&[Need::Root]);
pub static SHARED: Workload = Workload::new(
    "sockets/udp-reuseport",
    "sockets of several tasks that share a port",
    shared,
);
pub static GROUPS: Workload = Workload::new(
    "sockets/udp-groups",
    "members of multicast groups, with sources",
    groups,
);
pub static RAW: Workload = Workload::new(
    "sockets/raw",
    "raw and ICMP sockets with filters and headers of their own",
    raw,
)
.needs(&[Need::Root]);
pub static CORKED: Workload = Workload::new(
    "sockets/udp-corked",
    "a datagram that is being put together",
    corked,
)
.refused(&["UDP_CORK"]);

const V4: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
const V6: (Ipv6Addr, u16) = (Ipv6Addr::LOCALHOST, 0);

fn raw_v4(address: SocketAddrV4) -> Vec<u8> {
    let mut raw = 2u16.to_ne_bytes().to_vec();
    raw.extend(address.port().to_be_bytes());
    raw.extend(address.ip().octets());
    raw.resize(16, 0);
    raw
}

/// Receives what waits, and compares texts and senders.
fn expect(socket: &UdpSocket, expected: &[(&[u8], SocketAddr)]) -> Result<()> {
    socket.set_nonblocking(true)?;
    for (text, sender) in expected {
        let mut room = vec![0; 70_000];
        let (len, from) = socket
            .recv_from(&mut room)
            .with_context(|| format!("{} bytes of {sender} are missing", text.len()))?;
        ensure!(
            &room[..len] == *text,
            "{} bytes became {len} others",
            text.len()
        );
        ensure!(from == *sender, "it is from {from}, not {sender}");
    }
    ensure!(socket.recv(&mut [0]).is_err(), "more than there was");
    socket.set_nonblocking(false)?;
    Ok(())
}

fn queues(stage: &Stage) -> Result<()> {
    let large: Vec<u8> = (0..9000u32).map(|n| n.to_le_bytes()[0]).collect();
    let (plain, connected) = (UdpSocket::bind(V4)?, UdpSocket::bind(V4)?);
    let (six, dual) = (
        UdpSocket::bind(V6)?,
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?,
    );
    let (one, other, six_sender) = (
        UdpSocket::bind(V4)?,
        UdpSocket::bind(V4)?,
        UdpSocket::bind(V6)?,
    );
    connected.connect(one.local_addr()?)?;
    one.send_to(b"first", plain.local_addr()?)?;
    other.send_to(&large, plain.local_addr()?)?;
    one.send_to(b"", plain.local_addr()?)?;
    one.send_to(b"last", plain.local_addr()?)?;
    one.send_to(b"to the connected one", connected.local_addr()?)?;
    six_sender.send_to(b"over six", six.local_addr()?)?;
    let dual_port = dual.local_addr()?.port();
    one.send_to(b"mapped", (Ipv4Addr::LOCALHOST, dual_port))?;
    six_sender.send_to(b"plain", (Ipv6Addr::LOCALHOST, dual_port))?;
    let lite = || sys::socket_of(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE);
    let (lite, lite_sender) = (lite()?, lite()?);
    for fd in [&lite, &lite_sender] {
        sys::bind(fd, &raw_v4(SocketAddrV4::new(V4.0, 0)))?;
    }
    sys::send_message(&lite_sender, b"light", Some(&sys::socket_name(&lite)?), &[])?;
    let (one_at, other_at, six_at) = (
        one.local_addr()?,
        other.local_addr()?,
        six_sender.local_addr()?,
    );
    // A sender may be gone by now.
    drop(other);
    stage.ready_and_wait()?;
    expect(
        &plain,
        &[
            (b"first", one_at),
            (&large, other_at),
            (b"", one_at),
            (b"last", one_at),
        ],
    )?;
    expect(&connected, &[(b"to the connected one", one_at)])?;
    ensure!(
        connected.peer_addr()? == one_at,
        "connected to {}",
        connected.peer_addr()?
    );
    expect(&six, &[(b"over six", six_at)])?;
    let mapped = SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), one_at.port());
    expect(&dual, &[(b"mapped", mapped), (b"plain", six_at)])?;
    let got = sys::receive_message(&lite, 100, libc::MSG_DONTWAIT)?;
    ensure!(got.bytes == b"light", "UDP-Lite gives {got:?}");
    ensure!(
        got.sender == sys::socket_name(&lite_sender)?,
        "it is from {:?}",
        got.sender
    );
    one.send_to(b"new", plain.local_addr()?)?;
    let mut room = [0; 9];
    ensure!(plain.recv(&mut room)? == 3, "new ones do not arrive");
    Ok(())
}

/// Options with values that are not those of a fresh socket, by level and name; of IPv4, then of IPv6.
const CHANGED: [&[(i32, i32, i32)]; 2] = [
    &[
        (libc::SOL_SOCKET, libc::SO_MARK, 77),
        (libc::SOL_SOCKET, libc::SO_BROADCAST, 1),
        (libc::SOL_SOCKET, libc::SO_TIMESTAMP, 1),
        (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1),
        (libc::SOL_SOCKET, libc::SO_NO_CHECK, 1),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x20),
        (libc::IPPROTO_IP, libc::IP_TTL, 9),
        (libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        (libc::IPPROTO_IP, libc::IP_RECVTOS, 1),
        (libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1),
        (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, 5),
        (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, 0),
        (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1),
        (libc::IPPROTO_UDP, 103, 1200),
        (libc::IPPROTO_UDP, 104, 1),
    ],
    &[
        (libc::SOL_SOCKET, libc::SO_MARK, 78),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x40),
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 8),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, 6),
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1),
    ],
];

fn set_all(fd: impl AsFd, options: &[(i32, i32, i32)]) -> Result<()> {
    let fd = fd.as_fd();
    options.iter().try_for_each(|(level, name, value)| {
        sys::set_sockopt_int(fd, *level, *name, *value)
            .with_context(|| format!("setting option {name} of level {level}"))
    })
}

fn check_all(fd: impl AsFd, options: &[(i32, i32, i32)]) -> Result<()> {
    let fd = fd.as_fd();
    options.iter().try_for_each(|(level, name, value)| {
        let is = sys::sockopt_int(fd, *level, *name)?;
        ensure!(
            is == *value,
            "option {name} of level {level} is {is}, not {value}"
        );
        Ok(())
    })
}

fn options(stage: &Stage) -> Result<()> {
    let four = sys::socket_of(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let six = sys::socket_of(libc::AF_INET6, libc::SOCK_DGRAM, 0)?;
    set_all(&four, CHANGED[0])?;
    set_all(&six, CHANGED[1])?;
    sys::set_sockopt(&four, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0")?;
    // Addresses that this machine does not have.
    let foreign = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 77), 4711);
    sys::bind(&four, &raw_v4(foreign))?;
    let free = sys::socket_of(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    sys::set_sockopt_int(&free, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
    sys::bind(
        &free,
        &raw_v4(SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 78), 4712)),
    )?;
    // Takes datagrams of 8 + 3 bytes and drops others, for good.
    let filtered = UdpSocket::bind(V4)?;
    let by_length = [
        (0x80, 0, 0, 0),
        (0x15, 0, 1, 11),
        (6, 0, 0, u32::MAX),
        (6, 0, 0, 0),
    ];
    sys::attach_filter(&filtered, &by_length)?;
    sys::set_sockopt_int(&filtered, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1)?;
    let look = || -> Result<Vec<Vec<u8>>> {
        let all = [&four, &six, &free];
        all.iter().map(|fd| Ok(sys::socket_name(fd)?)).collect()
    };
    let before = look()?;
    stage.ready_and_wait()?;
    ensure!(look()? == before, "{before:?} is {:?}", look()?);
    check_all(&four, CHANGED[0])?;
    check_all(&six, CHANGED[1])?;
    let device = sys::sockopt(&four, libc::SOL_SOCKET, libc::SO_BINDTODEVICE)?;
    ensure!(device.starts_with(b"lo\0"), "bound to {device:?}");
    let sender = UdpSocket::bind(V4)?;
    for text in [&b"four"[..], b"two"] {
        sender.send_to(text, filtered.local_addr()?)?;
    }
    expect(&filtered, &[(b"two", sender.local_addr()?)])?;
    let again = sys::attach_filter(&filtered, &by_length);
    ensure!(again.is_err(), "the filter is no longer locked");
    Ok(())
}

fn shared(stage: &Stage) -> Result<()> {
    const SOCKETS: usize = 3;
    let make = |port: u16| -> Result<OwnedFd> {
        let fd = sys::socket_of(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        sys::set_sockopt_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        sys::bind(&fd, &raw_v4(SocketAddrV4::new(V4.0, port)))?;
        Ok(fd)
    };
    let first = UdpSocket::from(make(0)?);
    let port = first.local_addr()?.port();
    let own = UdpSocket::from(make(port)?);
    let child = stage.child(|stage| {
        let third = UdpSocket::from(make(port)?);
        stage.ready_and_wait()?;
        ensure!(third.local_addr()?.port() == port, "another port");
        third.set_nonblocking(true)?;
        let mut heard = 0usize;
        // The parent says when everything has been sent.
        let mut room = [0; 64];
        while let Ok(len) = third.recv(&mut room) {
            heard += usize::from(&room[..len] == b"for one of them");
        }
        std::fs::write(stage.path("heard"), heard.to_string())?;
        Ok(())
    })?;
    stage.ready_and_wait()?;
    const SENT: usize = 64;
    for _ in 0..SENT {
        let sender = UdpSocket::bind(V4)?;
        sender.send_to(b"for one of them", (V4.0, port))?;
    }
    let mut counts = Vec::new();
    for socket in [&first, &own] {
        socket.set_nonblocking(true)?;
        let mut heard = 0;
        while socket.recv(&mut [0; 64]).is_ok() {
            heard += 1;
        }
        counts.push(heard);
    }
    child.finish()?;
    counts.push(std::fs::read_to_string(stage.path("heard"))?.parse()?);
    ensure!(
        counts.len() == SOCKETS && counts.iter().sum::<usize>() == SENT,
        "{counts:?}"
    );
    ensure!(
        counts.iter().all(|count| *count > 0),
        "one hears nothing: {counts:?}"
    );
    Ok(())
}

fn source_request(group: Ipv4Addr, source: Ipv4Addr) -> Vec<u8> {
    [group, Ipv4Addr::LOCALHOST, source]
        .iter()
        .flat_map(Ipv4Addr::octets)
        .collect()
}

fn groups(stage: &Stage) -> Result<()> {
    const ADD_SOURCE: i32 = 39;
    let (group, picky) = (Ipv4Addr::new(239, 7, 7, 7), Ipv4Addr::new(239, 7, 7, 8));
    let six_group: Ipv6Addr = "ff02::7:7".parse()?;
    let member = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    member.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST)?;
    let request = source_request(picky, Ipv4Addr::new(127, 0, 0, 2));
    sys::set_sockopt(&member, libc::IPPROTO_IP, ADD_SOURCE, &request)?;
    let six = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    six.join_multicast_v6(&six_group, 1)?;
    let stranger = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    sys::set_sockopt_int(&stranger, libc::IPPROTO_IP, libc::IP_MULTICAST_ALL, 0)?;
    stage.ready_and_wait()?;
    let sender_at = |last: u8| -> Result<UdpSocket> {
        let sender = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, last), 0))?;
        let lo = Ipv4Addr::LOCALHOST.octets();
        sys::set_sockopt(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &lo)?;
        Ok(sender)
    };
    let (one, two) = (sender_at(1)?, sender_at(2)?);
    let port = member.local_addr()?.port();
    one.send_to(b"to all", (group, port))?;
    one.send_to(b"of another source", (picky, port))?;
    two.send_to(b"of the source", (picky, port))?;
    expect(
        &member,
        &[
            (b"to all", one.local_addr()?),
            (b"of the source", two.local_addr()?),
        ],
    )?;
    one.send_to(b"to nobody", (group, stranger.local_addr()?.port()))?;
    expect(&stranger, &[])?;
    // The loopback interface has no route to it; a member can't join once more, though.
    let again = six.join_multicast_v6(&six_group, 1).err();
    let errno = again.and_then(|error| error.raw_os_error());
    ensure!(errno == Some(libc::EADDRINUSE), "joining again: {errno:?}");
    Ok(())
}

/// An echo request with a checksum, whose identifier the kernel replaces on ICMP sockets.
fn echo_request(sequence: u16) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0, 0x12, 0x34];
    packet.extend(sequence.to_be_bytes());
    let words = packet
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded & 0xffff).expect("masked");
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

fn raw(stage: &Stage) -> Result<()> {
    const SOL_RAW: i32 = 255;
    const ICMP_FILTER: i32 = 1;
    /// All types but echo replies are dropped.
    const ONLY_REPLIES: i32 = !1;
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    let icmp = sys::socket_of(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    sys::set_sockopt_int(&icmp, SOL_RAW, ICMP_FILTER, ONLY_REPLIES)?;
    let own_headers = sys::socket_of(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let six = sys::socket_of(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
    sys::set_sockopt(&six, libc::IPPROTO_ICMPV6, 1, &[0xaa; 32])?;
    let private = sys::socket_of(libc::AF_INET, libc::SOCK_RAW, 253)?;
    let lo = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    sys::bind(&private, &raw_v4(lo))?;
    sys::set_sockopt_int(&private, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
    let ping = sys::socket_of(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
    sys::connect(&ping, &raw_v4(lo))?;
    let id = sys::socket_name(&ping)?;
    stage.ready_and_wait()?;
    ensure!(
        sys::sockopt_int(&icmp, SOL_RAW, ICMP_FILTER)? == ONLY_REPLIES,
        "the ICMP filter"
    );
    let filter = sys::sockopt(&six, libc::IPPROTO_ICMPV6, 1)?;
    ensure!(filter == [0xaa; 32], "the ICMPv6 filter is {filter:?}");
    for (fd, value) in [(&own_headers, 1), (&private, 1), (&icmp, 0)] {
        let is = sys::sockopt_int(fd, libc::IPPROTO_IP, libc::IP_HDRINCL)?;
        ensure!(is == value, "IP_HDRINCL is {is}, not {value}");
    }
    ensure!(
        sys::socket_name(&ping)? == id,
        "the echo identifier has changed"
    );
    sys::write(&ping, &echo_request(7))?;
    let reply = sys::receive_message(&ping, 100, 0)?;
    ensure!(reply.bytes.first() == Some(&0), "the reply is {reply:?}");
    ensure!(
        reply.bytes.get(6..8) == Some(&[0, 7]),
        "the reply is {reply:?}"
    );
    let seen = sys::receive_message(&icmp, 100, libc::MSG_DONTWAIT)?;
    ensure!(
        seen.bytes.get(20) == Some(&0),
        "the raw socket sees {seen:?}"
    );
    let to = raw_v4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
    let source = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let packet = ip_packet(253, b"a protocol of our own");
    sys::send_message(&own_headers, &packet, Some(&to), &[])?;
    let got = sys::receive_message(&private, 100, 0).with_context(|| format!("from {source}"))?;
    ensure!(got.bytes.ends_with(b"a protocol of our own"), "got {got:?}");
    Ok(())
}

/// An IPv4 packet from and to this machine.
fn ip_packet(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + payload.len()).expect("short");
    let mut packet = vec![0x45, 0];
    packet.extend(len.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    packet.extend(Ipv4Addr::LOCALHOST.octets());
    packet.extend(Ipv4Addr::LOCALHOST.octets());
    packet.extend(payload);
    packet
}

fn corked(stage: &Stage) -> Result<()> {
    let (one, other) = (UdpSocket::bind(V4)?, UdpSocket::bind(V4)?);
    one.connect(other.local_addr()?)?;
    sys::set_sockopt_int(&one, libc::IPPROTO_UDP, 1, 1)?;
    one.send(b"one half ")?;
    stage.ready_and_wait()?;
    one.send(b"and the other")?;
    sys::set_sockopt_int(&one, libc::IPPROTO_UDP, 1, 0)?;
    expect(&other, &[(b"one half and the other", one.local_addr()?)])
}
