//! Numbers of families, kinds, levels and options, as the kernel's headers name them.

pub use libc::{
    AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_RAW,
    IPPROTO_TCP, IPPROTO_UDP, IPPROTO_UDPLITE, SHUT_RD, SHUT_RDWR, SHUT_WR, SOCK_DGRAM, SOCK_RAW,
    SOCK_SEQPACKET, SOCK_STREAM,
};
pub use libc::{
    IP_FREEBIND, IP_HDRINCL, IP_PKTINFO, IP_TOS, IP_TTL, IPV6_FREEBIND, IPV6_HDRINCL,
    IPV6_RECVPKTINFO, IPV6_TCLASS, IPV6_UNICAST_HOPS, IPV6_V6ONLY,
};
pub use libc::{
    SO_ATTACH_FILTER, SO_BINDTODEVICE, SO_BROADCAST, SO_DOMAIN, SO_DONTROUTE, SO_GET_FILTER,
    SO_KEEPALIVE, SO_LINGER, SO_LOCK_FILTER, SO_MARK, SO_NO_CHECK, SO_OOBINLINE, SO_PASSCRED,
    SO_PASSSEC, SO_PEEK_OFF, SO_PRIORITY, SO_PROTOCOL, SO_RCVBUF, SO_RCVBUFFORCE, SO_RCVLOWAT,
    SO_RCVTIMEO, SO_REUSEADDR, SO_REUSEPORT, SO_SNDBUF, SO_SNDBUFFORCE, SO_SNDTIMEO, SO_TYPE,
    SOL_SOCKET,
};

/// Type of packet sockets as they were before Linux 2.2.
pub const SOCK_PACKET: i32 = 10;
/// Level of IPv4 options.
pub const SOL_IP: i32 = 0;
/// Level of IPv6 options.
pub const SOL_IPV6: i32 = 41;
/// Level of ICMPv6 options.
pub const SOL_ICMPV6: i32 = 58;
/// Level of TCP options.
pub const SOL_TCP: i32 = 6;
/// Level of UDP options.
pub const SOL_UDP: i32 = 17;
/// Level of UDP-Lite options.
pub const SOL_UDPLITE: i32 = 136;
/// Level of options of raw sockets.
pub const SOL_RAW: i32 = 255;
/// Level of options of packet sockets.
pub const SOL_PACKET: i32 = 263;
/// Level of netlink options.
pub const SOL_NETLINK: i32 = 270;
/// Joins a multicast group of netlink.
pub const NETLINK_ADD_MEMBERSHIP: i32 = 1;
/// The groups of a netlink socket, a bit each.
pub const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// The network namespace.
pub(super) const SO_NETNS_COOKIE: i32 = 71;
/// Which buffer sizes have been set by hand.
pub const SO_BUF_LOCK: i32 = 72;
/// IP_NODEFRAG.
pub const IP_NODEFRAG: i32 = 22;
/// Filter of a raw ICMP socket.
pub const ICMP_FILTER: i32 = 1;
/// Filter of a raw ICMPv6 socket.
pub const ICMPV6_FILTER: i32 = 1;
/// Whether a datagram is being put together.
pub const UDP_CORK: i32 = 1;
/// Joins a multicast group.
pub const MCAST_JOIN_GROUP: i32 = 42;
/// Reads or sets the sources of a membership.
pub const MCAST_MSFILTER: i32 = 48;

/// `TCP_ESTABLISHED`, also of unix sockets.
pub const TCP_ESTABLISHED: u32 = 1;
/// `TCP_CLOSE`, also of unix sockets.
pub const TCP_CLOSE: u32 = 7;
/// `TCP_LISTEN`, also of unix sockets.
pub const TCP_LISTEN: u32 = 10;

/// Bytes that wait to be read.
pub const SIOCINQ: u64 = 0x541b;
/// Bytes that wait to be sent or acknowledged.
pub const SIOCOUTQ: u64 = 0x5411;
/// Bytes that have never been sent.
pub const SIOCOUTQNSD: u64 = 0x894b;
pub(super) const SIOCUNIXFILE: u64 = 0x89e0;
