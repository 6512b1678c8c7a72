//! Making internet sockets.
//!
//! ```text
//! listeners, datagram and raw sockets   bound, connected, members of their groups
//! connections                           in repair mode
//! finish                                datagrams, shutdowns, options
//! resume                                connections, when the network is free again
//! ```

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_images::ImageDir;
use firn_proto::{FdTypes, InetSkEntry, IpOptsEntry, IpOptsRawEntry, SkShutdown};
use firn_sys::socket::{
    self, AF_INET6, ICMP_FILTER, ICMPV6_FILTER, IP_FREEBIND, IP_HDRINCL, IP_NODEFRAG, IP_PKTINFO,
    IP_TOS, IP_TTL, IPPROTO_ICMP, IPPROTO_ICMPV6, IPV6_FREEBIND, IPV6_HDRINCL, IPV6_RECVPKTINFO,
    IPV6_V6ONLY, SOCK_RAW, SOL_ICMPV6, SOL_IP, SOL_IPV6, SOL_RAW, TCP_ESTABLISHED, TCP_LISTEN,
};
use firn_sys::{Errno, Result};

use super::super::options;
use super::super::packets::PacketRestore;
use super::orphans::Orphans;
use super::tcp_restore::{self, Resting, connection_of};
use super::{address, datagrams, groups, is_connection, is_tcp, local_of, remote_of, shown};
use crate::files::FileRestoreOptions;
use crate::files::error::FileRestoreError;
use crate::files::open;
use crate::files::shelf::{OpenedFiles, Room, Shelf};
use crate::network_lock::{Connection, Port};

type Outcome<T> = std::result::Result<T, FileRestoreError>;

/// The internet sockets of a restore.
#[derive(Debug, Default)]
pub(in crate::files) struct RestoredInet<'a> {
    entries: Vec<&'a InetSkEntry>,
    made: Shelf<u32>,
    resting: Vec<Resting>,
    gives_up: bool,
    losses: Vec<String>,
}

/// The TCP connections among entries.
pub(in crate::files) fn connections<'a>(
    entries: impl Iterator<Item = &'a InetSkEntry>,
) -> Vec<Connection> {
    let connected = entries.filter(|entry| is_connection(entry));
    connected.filter_map(connection_of).collect()
}

/// Where a socket listens for TCP connections.
pub(in crate::files) fn ports(entry: &InetSkEntry) -> Vec<Port> {
    let listens = is_tcp(entry) && entry.state == TCP_LISTEN;
    let local = local_of(entry).filter(|_| listens);
    let v6only = entry.v6only == Some(true);
    local.map_or_else(Vec::new, |local| Port::of_listener(local, v6only).collect())
}

impl<'a> RestoredInet<'a> {
    /// Makes all sockets.
    pub(in crate::files) fn make(
        mut entries: Vec<&'a InetSkEntry>,
        images: &ImageDir,
        options: &FileRestoreOptions,
        gives_up: bool,
        room: &Room,
    ) -> Outcome<Self> {
        entries.sort_by_key(|entry| entry.id);
        let mut set = RestoredInet {
            entries: entries.clone(),
            gives_up: gives_up || options.sockets.tcp_close,
            made: Shelf::new(room.part(4)),
            ..RestoredInet::default()
        };
        let ends_of = |entry: &InetSkEntry| connection_of(entry).map(Connection::on_the_wire);
        let here = entries.iter().copied().filter(|entry| is_connection(entry));
        let here: HashMap<Connection, &InetSkEntry> = here
            .filter_map(|entry| Some((ends_of(entry)?, entry)))
            .collect();
        // Connections come last: in repair mode they may share an address with a listener.
        let (connected, plain): (Vec<&InetSkEntry>, Vec<&InetSkEntry>) =
            entries.into_iter().partition(|entry| is_connection(entry));
        let orphans = Orphans::of(here.keys().copied());
        for entry in plain {
            let fd = create(entry)?;
            set_up(&fd, entry, &orphans, &mut set.losses)?;
            set.made.insert(entry.id, fd)?;
        }
        for entry in connected {
            let fd = create(entry)?;
            if set.gives_up {
                // As closed by the peer; the call fails and marks the socket all the same.
                let _ = socket::shutdown(&fd, socket::SHUT_RDWR);
            } else {
                let peer = ends_of(entry).map(Connection::reversed);
                let peer = peer.and_then(|peer| here.get(&peer).copied());
                let allowed = peer.is_some() || options.sockets.tcp_established;
                if !allowed {
                    return Err(FileRestoreError::TcpEstablished {
                        object: shown(entry),
                    });
                }
                set.resting
                    .push(tcp_restore::make(&fd, entry, images, peer, &orphans)?);
            }
            set.made.insert(entry.id, fd)?;
        }
        Ok(set)
    }

    /// Hands a socket out.
    pub(in crate::files) fn take(&mut self, id: u32) -> Outcome<Option<OwnedFd>> {
        Ok(self.made.remove(&id)?)
    }

    /// Puts datagrams back and sets what remains.
    pub(in crate::files) fn finish(
        mut self,
        packets: &mut PacketRestore,
        opened: &OpenedFiles,
    ) -> Outcome<(Vec<Resting>, Vec<String>)> {
        for entry in &self.entries {
            let Some(fd) = opened.get(&(FdTypes::Inetsk, entry.id))? else {
                continue;
            };
            if datagrams::is_udp(entry) {
                let lost = datagrams::restore(fd.as_fd(), entry, &packets.take(entry.id))?;
                self.losses.extend(lost);
            }
            let closed = self.gives_up && is_connection(entry);
            finish_one(fd.as_fd(), entry, closed)?;
        }
        Ok((self.resting, self.losses))
    }
}

fn create(entry: &InetSkEntry) -> Outcome<OwnedFd> {
    let name = shown(entry);
    let refused = |action| FileRestoreError::refused(action, name.clone());
    let (family, kind) = (entry.family.cast_signed(), entry.r#type.cast_signed());
    let fd = socket::create(family, kind, entry.proto.cast_signed()).map_err(refused("create"))?;
    if let Some(v6only) = entry.v6only.filter(|_| family == AF_INET6) {
        set_v6only(&fd, v6only).map_err(refused("set up"))?;
    }
    options::restore_early(&fd, &entry.opts, &name)?;
    if let Some(opts) = &entry.ip_opts {
        set_ip_options(&fd, entry, opts).map_err(refused("set an option of"))?;
    }
    Ok(fd)
}

/// Raw sockets refuse any change, even to what they have.
fn set_v6only(fd: impl AsFd, value: bool) -> Result<()> {
    let fd = fd.as_fd();
    let value = i32::from(value);
    match socket::number(fd, SOL_IPV6, IPV6_V6ONLY) {
        Ok(present) if present == value => Ok(()),
        _ => socket::set_number(fd, SOL_IPV6, IPV6_V6ONLY, value),
    }
}

/// Gives a socket without a connection its addresses.
fn set_up(
    fd: &OwnedFd,
    entry: &InetSkEntry,
    orphans: &Orphans,
    losses: &mut Vec<String>,
) -> Outcome<()> {
    let name = shown(entry);
    let refused = |action| FileRestoreError::refused(action, name.clone());
    let corrupt = || FileRestoreError::corrupt(entry.id, "its address is not possible");
    let mut local = local_of(entry).ok_or_else(corrupt)?;
    if let (std::net::SocketAddr::V6(local), Some(device)) = (&mut local, &entry.ifname) {
        let index = socket::interface_index(&String::from_utf8_lossy(device));
        local.set_scope_id(index.map_err(refused("find the interface of"))?);
    }
    if entry.r#type == SOCK_RAW.cast_unsigned() {
        // Images repeat the protocol there.
        local.set_port(0);
    }
    if local.port() != 0 || !local.ip().is_unspecified() {
        let bound = orphans.end_for(|| socket::bind(fd, &address::to_raw(local)));
        bound.map_err(refused("bind"))?;
    }
    for membership in entry.firn.iter().flat_map(|firn| &firn.membership) {
        if let Err(errno) = groups::join(fd, entry.family, membership) {
            losses.push(format!(
                "{name} is no longer a member of a multicast group: {errno}"
            ));
        }
    }
    if entry.state == TCP_LISTEN {
        socket::listen(fd, entry.backlog).map_err(refused("listen with"))?;
    }
    let remote = remote_of(entry).ok_or_else(corrupt)?;
    if !is_tcp(entry) && (entry.state == TCP_ESTABLISHED || remote.port() != 0) {
        socket::connect(fd, &address::to_raw(remote)).map_err(refused("connect"))?;
    }
    Ok(())
}

fn set_ip_options(fd: impl AsFd, entry: &InetSkEntry, opts: &IpOptsEntry) -> Result<()> {
    let fd = fd.as_fd();
    let set = |level, name, value: Option<i32>| match value {
        Some(value) => socket::set_number(fd, level, name, value),
        None => Ok(()),
    };
    if entry.family == AF_INET6.cast_unsigned() {
        set(SOL_IPV6, IPV6_FREEBIND, opts.freebind.map(i32::from))?;
        set(SOL_IPV6, IPV6_RECVPKTINFO, opts.pktinfo.map(i32::from))?;
    } else {
        set(SOL_IP, IP_FREEBIND, opts.freebind.map(i32::from))?;
        set(SOL_IP, IP_PKTINFO, opts.pktinfo.map(i32::from))?;
        set(SOL_IP, IP_TOS, opts.tos.map(u32::cast_signed))?;
        set(SOL_IP, IP_TTL, opts.ttl.map(u32::cast_signed))?;
    }
    match &opts.raw {
        Some(raw) => set_raw_options(fd, entry, raw),
        None => Ok(()),
    }
}

fn set_raw_options(fd: BorrowedFd<'_>, entry: &InetSkEntry, raw: &IpOptsRawEntry) -> Result<()> {
    let is_v6 = entry.family == AF_INET6.cast_unsigned();
    let filter: Vec<u8> = raw
        .icmpv_filter
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    match entry.proto.cast_signed() {
        _ if filter.is_empty() => {}
        IPPROTO_ICMP if !is_v6 => socket::set_option(fd, SOL_RAW, ICMP_FILTER, &filter)?,
        IPPROTO_ICMPV6 if is_v6 => socket::set_option(fd, SOL_ICMPV6, ICMPV6_FILTER, &filter)?,
        _ => return Err(Errno::EINVAL),
    }
    if let Some(value) = raw.nodefrag {
        socket::set_number(fd, SOL_IP, IP_NODEFRAG, value.into())?;
    }
    match raw.hdrincl {
        Some(value) if is_v6 => socket::set_number(fd, SOL_IPV6, IPV6_HDRINCL, value.into()),
        Some(value) => socket::set_number(fd, SOL_IP, IP_HDRINCL, value.into()),
        None => Ok(()),
    }
}

fn finish_one(fd: BorrowedFd<'_>, entry: &InetSkEntry, closed: bool) -> Outcome<()> {
    let name = shown(entry);
    let how = match entry.shutdown() {
        SkShutdown::None => None,
        SkShutdown::Read => Some(socket::SHUT_RD),
        SkShutdown::Write => Some(socket::SHUT_WR),
        SkShutdown::Both => Some(socket::SHUT_RDWR),
    };
    if let Some(how) = how.filter(|_| !is_connection(entry)) {
        // Sockets without a connection are marked although the call fails.
        let _ = socket::shutdown(fd, how);
    }
    if let Some(opts) = entry.tcp_opts.as_ref().filter(|_| is_tcp(entry)) {
        let refused = FileRestoreError::refused("set an option of", name.clone());
        tcp_restore::set_options(fd, opts).map_err(refused)?;
    }
    let mut opts = entry.opts.clone();
    if closed {
        opts.firn.clear();
    }
    options::restore_late(fd, &opts, &name)?;
    open::set_flags(fd, entry.flags, &name)
}
