//! What a socket tells about itself: addresses and options.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use firn_proto::{
    FileEntry, FirnInetSkEntry, InetSkEntry, IpOptsEntry, IpOptsRawEntry, SkShutdown, TcpOptsEntry,
};
use firn_sys::socket::{
    self, AF_INET6, ICMP_FILTER, ICMPV6_FILTER, IP_FREEBIND, IP_HDRINCL, IP_NODEFRAG, IP_PKTINFO,
    IP_TOS, IP_TTL, IPPROTO_ICMP, IPPROTO_ICMPV6, IPV6_FREEBIND, IPV6_HDRINCL, IPV6_RECVPKTINFO,
    IPV6_V6ONLY, SOCK_RAW, SOL_ICMPV6, SOL_IP, SOL_IPV6, SOL_RAW, SOL_TCP, TCP_CLOSE,
    TCP_ESTABLISHED, tcp,
};
use firn_sys::{Errno, Result};

use super::super::extra::{Defaults, SocketKind, kind_of};
use super::super::{NET_NS_ID, inode_of, options};
use super::tcp_dump::SYN_SENT;
use super::{address, file_entry, groups, listed};
use crate::files::dump::query;
use crate::files::error::FileDumpError;
use crate::files::kind::Dumping;

/// Makes the entry of a socket, without what belongs to a TCP connection.
pub(super) fn describe(
    dumping: &Dumping<'_>,
    defaults: &mut Defaults,
) -> std::result::Result<InetSkEntry, FileDumpError> {
    let file = dumping.file;
    let fd = dumping
        .duplicate
        .ok_or_else(|| query(file, "the socket", Errno::EBADF))?;
    let failed = |source| query(file, "the socket", source);
    let kind = kind_of(fd).map_err(failed)?;
    let is_tcp = kind.protocol == socket::IPPROTO_TCP && kind.kind == socket::SOCK_STREAM;
    let state = if is_tcp {
        tcp::info(fd).map_err(failed)?
    } else {
        closed()
    };
    let remote = match socket::peer_address(fd) {
        Ok(raw) => address::parse(&raw),
        Err(_) if is_tcp && state.state != SYN_SENT => None,
        Err(_) => listed::peer(inode_of(file), kind),
    };
    let connected = remote.is_some() && state.state != socket::TCP_LISTEN;
    let local = address::parse(&socket::local_address(fd).map_err(failed)?);
    let local = local.ok_or_else(|| failed(Errno::EINVAL))?;
    let remote = remote.unwrap_or_else(|| nowhere(local));
    let opts = options::dump(fd, kind, connected, defaults)
        .map_err(|error| query(file, error.what, error.source))?;
    let shutdown = if is_tcp {
        tcp_shutdown(fd, state.state)
    } else {
        shutdown_of(fd)
    };
    let shutdown = shutdown.map_err(failed)?;
    let was_connected = is_tcp && state.state == TCP_CLOSE && shutdown.is_some();
    let src_port = match kind.kind {
        SOCK_RAW => u32::try_from(kind.protocol).unwrap_or(0),
        // The port is no longer its own.
        _ if was_connected => 0,
        _ => local.port().into(),
    };
    let mut entry = InetSkEntry {
        state: if is_tcp {
            state.state
        } else {
            datagram_state(connected)
        },
        src_port,
        dst_port: remote.port().into(),
        backlog: if state.state == socket::TCP_LISTEN {
            state.backlog
        } else {
            0
        },
        src_addr: address::to_words(local.ip()),
        dst_addr: address::to_words(remote.ip()),
        opts,
        ip_opts: Some(ip_options(fd, kind)),
        ns_id: Some(NET_NS_ID),
        shutdown: shutdown.map(Into::into),
        tcp_opts: is_tcp.then(|| tcp_options(fd)),
        firn: extension(fd, kind, local, remote).map_err(failed)?,
        ..unconnected(dumping, kind)
    };
    if kind.family == AF_INET6 {
        let v6only = socket::number(fd, SOL_IPV6, IPV6_V6ONLY).map_err(failed)?;
        entry.v6only = Some(v6only != 0);
        if address::needs_scope(local.ip())
            && let SocketAddr::V6(local) = local
            && let Ok(name) = socket::interface_name(local.scope_id())
        {
            entry.ifname = Some(name.into_bytes());
        }
    }
    Ok(entry)
}

/// What is said of any socket.
fn unconnected(dumping: &Dumping<'_>, kind: SocketKind) -> InetSkEntry {
    let nowhere = match kind.family {
        AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    InetSkEntry {
        id: dumping.id,
        ino: inode_of(dumping.file),
        family: kind.family.cast_unsigned(),
        r#type: kind.kind.cast_unsigned(),
        proto: kind.protocol.cast_unsigned(),
        state: TCP_CLOSE,
        src_addr: address::to_words(nowhere),
        dst_addr: address::to_words(nowhere),
        flags: dumping.file.image_flags(),
        fown: dumping.fown,
        ..InetSkEntry::default()
    }
}

/// The entry of a socket that the restore will be given.
pub(in crate::files) fn describe_external(
    dumping: &Dumping<'_>,
) -> std::result::Result<FileEntry, FileDumpError> {
    let failed = |source| query(dumping.file, "the socket", source);
    let fd = dumping.duplicate.ok_or(Errno::EBADF).map_err(failed)?;
    let kind = kind_of(fd).map_err(failed)?;
    Ok(file_entry(InetSkEntry {
        firn: Some(FirnInetSkEntry {
            external: Some(true),
            ..FirnInetSkEntry::default()
        }),
        ..unconnected(dumping, kind)
    }))
}

/// What an unconnected socket that is not TCP would say.
fn closed() -> tcp::Info {
    tcp::Info {
        state: TCP_CLOSE,
        ..tcp::Info::default()
    }
}

fn datagram_state(connected: bool) -> u32 {
    if connected {
        TCP_ESTABLISHED
    } else {
        TCP_CLOSE
    }
}

fn nowhere(like: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match like {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}

/// Shut down directions of a socket without a connection.
fn shutdown_of(fd: impl AsFd) -> Result<Option<SkShutdown>> {
    let (reading, both) = socket::hang_ups(fd)?;
    Ok(match (reading, both) {
        (_, true) => Some(SkShutdown::Both),
        (true, false) => Some(SkShutdown::Read),
        (false, false) => None,
    })
}

fn tcp_shutdown(fd: impl AsFd, state: u32) -> Result<Option<SkShutdown>> {
    const FIN_WAIT1: u32 = 4;
    const FIN_WAIT2: u32 = 5;
    const CLOSE_WAIT: u32 = 8;
    const LAST_ACK: u32 = 9;
    const CLOSING: u32 = 11;
    let reads_no_more = socket::hang_ups(fd)?.0;
    Ok(match state {
        // A socket that was never connected hangs up as well, but has not ended reading.
        TCP_CLOSE if reads_no_more => Some(SkShutdown::Both),
        LAST_ACK | CLOSING => Some(SkShutdown::Both),
        FIN_WAIT1 | FIN_WAIT2 if reads_no_more => Some(SkShutdown::Both),
        FIN_WAIT1 | FIN_WAIT2 => Some(SkShutdown::Write),
        CLOSE_WAIT => Some(SkShutdown::Read),
        _ if reads_no_more && state == TCP_ESTABLISHED => Some(SkShutdown::Read),
        _ => None,
    })
}

fn ip_options(fd: BorrowedFd<'_>, kind: SocketKind) -> IpOptsEntry {
    let flag = |level, name| socket::number(fd, level, name).ok().map(|value| value != 0);
    let number = |name| {
        socket::number(fd, SOL_IP, name)
            .ok()
            .map(i32::cast_unsigned)
    };
    let is_raw = kind.kind == SOCK_RAW;
    if kind.family == AF_INET6 {
        return IpOptsEntry {
            freebind: flag(SOL_IPV6, IPV6_FREEBIND),
            pktinfo: flag(SOL_IPV6, IPV6_RECVPKTINFO),
            raw: is_raw.then(|| raw_options(fd, kind)),
            ..IpOptsEntry::default()
        };
    }
    IpOptsEntry {
        freebind: flag(SOL_IP, IP_FREEBIND),
        pktinfo: flag(SOL_IP, IP_PKTINFO),
        tos: number(IP_TOS),
        ttl: number(IP_TTL),
        raw: is_raw.then(|| raw_options(fd, kind)),
    }
}

fn raw_options(fd: BorrowedFd<'_>, kind: SocketKind) -> IpOptsRawEntry {
    let is_v6 = kind.family == AF_INET6;
    let flag = |level, name| socket::number(fd, level, name).ok().map(|value| value != 0);
    let filter = match kind.protocol {
        IPPROTO_ICMP if !is_v6 => socket::option(fd, SOL_RAW, ICMP_FILTER, 4),
        IPPROTO_ICMPV6 if is_v6 => socket::option(fd, SOL_ICMPV6, ICMPV6_FILTER, 32),
        _ => Ok(Vec::new()),
    };
    let words = filter.unwrap_or_default();
    let words = words.chunks_exact(4);
    IpOptsRawEntry {
        hdrincl: match is_v6 {
            true => flag(SOL_IPV6, IPV6_HDRINCL),
            false => flag(SOL_IP, IP_HDRINCL),
        },
        nodefrag: if is_v6 {
            None
        } else {
            flag(SOL_IP, IP_NODEFRAG)
        },
        checksum: None,
        icmpv_filter: words
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
            .collect(),
    }
}

fn tcp_options(fd: BorrowedFd<'_>) -> TcpOptsEntry {
    let number = |name| socket::number(fd, SOL_TCP, name).ok();
    let flag = |name| number(name).map(|value| value != 0);
    TcpOptsEntry {
        cork: flag(tcp::TCP_CORK),
        nodelay: flag(tcp::TCP_NODELAY),
        keepcnt: number(tcp::TCP_KEEPCNT).map(i32::cast_unsigned),
        keepidle: number(tcp::TCP_KEEPIDLE).map(i32::cast_unsigned),
        keepintvl: number(tcp::TCP_KEEPINTVL).map(i32::cast_unsigned),
    }
}

fn extension(
    fd: BorrowedFd<'_>,
    kind: SocketKind,
    local: SocketAddr,
    remote: SocketAddr,
) -> Result<Option<FirnInetSkEntry>> {
    let scope = |address| match address {
        SocketAddr::V6(address) => address.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    let scope = [scope(local), scope(remote)]
        .into_iter()
        .find(|scope| *scope != 0);
    let firn = FirnInetSkEntry {
        scope_id: scope,
        membership: groups::memberships(fd, kind)?,
        external: None,
    };
    Ok((firn != FirnInetSkEntry::default()).then_some(firn))
}
