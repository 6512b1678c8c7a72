//! Datagrams that wait in UDP sockets.
//!
//! They are kept with the addresses they came from and went to, and injected again. For the time of the
//! injection the socket is connected to the sender, so that no other socket of its port gets them.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use firn_proto::InetSkEntry;
use firn_sys::socket::{
    self, AF_INET6, IP_PKTINFO, IPPROTO_UDP, IPPROTO_UDPLITE, IPV6_RECVPKTINFO, Message, SIOCINQ,
    SOCK_DGRAM, SOL_IP, SOL_IPV6, SOL_UDP, UDP_CORK,
};
use firn_sys::{Errno, Result};

use super::super::DumpedSockets;
use super::super::packets::{self, Packet};
use super::{address, inject, local_of, remote_of, shown};
use crate::files::dump::query;
use crate::files::error::{FileDumpError, FileRestoreError};
use crate::files::kind::Dumping;
use crate::files::open_file::Trouble;

const CMSG_IP_PKTINFO: i32 = 8;
const CMSG_IPV6_PKTINFO: i32 = 50;

/// True for UDP and UDP-Lite.
pub(super) fn is_udp(entry: &InetSkEntry) -> bool {
    let udp = [IPPROTO_UDP, IPPROTO_UDPLITE].contains(&entry.proto.cast_signed());
    udp && entry.r#type == SOCK_DGRAM.cast_unsigned()
}

/// Reads what waits in a socket.
pub(super) fn dump(
    dumping: &Dumping<'_>,
    entry: &InetSkEntry,
    sockets: &mut DumpedSockets,
) -> std::result::Result<(), FileDumpError> {
    let file = dumping.file;
    let Some(fd) = dumping.duplicate.filter(|_| is_udp(entry)) else {
        return Ok(());
    };
    let failed = |source| query(file, "the datagrams", source);
    if socket::number(fd, SOL_UDP, UDP_CORK).map_err(failed)? != 0 {
        return Err(FileDumpError::Obstacles(vec![file.obstacle(Trouble::new(
            "a datagram is being put together in it (UDP_CORK)",
            "dump when it has been sent",
        ))]));
    }
    let port = local_of(entry).map_or(0, |local| local.port());
    for message in read(fd, entry).map_err(failed)? {
        let destination = destination_of(&message, port).map(address::to_raw);
        sockets
            .packets
            .add_datagram(dumping.id, message, destination);
    }
    Ok(())
}

/// Reads the queue with the addresses that datagrams were sent to.
fn read(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<Vec<Message>> {
    let is_v6 = entry.family == AF_INET6.cast_unsigned();
    let (level, name) = if is_v6 {
        (SOL_IPV6, IPV6_RECVPKTINFO)
    } else {
        (SOL_IP, IP_PKTINFO)
    };
    let old = socket::number(fd, level, name)?;
    socket::set_number(fd, level, name, 1)?;
    let read = || packets::read_queue(fd, SOCK_DGRAM, 0);
    // An error of an earlier message comes first, once.
    let result = read().or_else(|_| read());
    socket::set_number(fd, level, name, old)?;
    result
}

fn destination_of(message: &Message, port: u16) -> Option<SocketAddr> {
    message.controls.iter().find_map(|control| {
        let ip = match (control.level, control.kind) {
            (SOL_IP, CMSG_IP_PKTINFO) => {
                let octets: [u8; 4] = control.bytes.get(8..12)?.try_into().ok()?;
                octets.into()
            }
            (SOL_IPV6, CMSG_IPV6_PKTINFO) => {
                let octets: [u8; 16] = control.bytes.get(..16)?.try_into().ok()?;
                octets.into()
            }
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    })
}

/// Puts datagrams back; what can't be is counted and returned in words.
pub(super) fn restore(
    fd: BorrowedFd<'_>,
    entry: &InetSkEntry,
    waiting: &[Packet],
) -> std::result::Result<Option<String>, FileRestoreError> {
    if waiting.is_empty() {
        return Ok(None);
    }
    let lost = waiting
        .iter()
        .filter(|packet| put_back(fd, entry, packet).is_err())
        .count();
    let loss = (lost > 0).then(|| {
        let nr = waiting.len();
        format!("{}: {lost} of {nr} datagrams are lost", shown(entry))
    });
    let refused = |action| FileRestoreError::refused(action, shown(entry));
    if let Some(remote) = remote_of(entry).filter(|remote| remote.port() != 0) {
        socket::connect(fd, &address::to_raw(remote)).map_err(refused("connect"))?;
    }
    Ok(loss)
}

fn put_back(fd: BorrowedFd<'_>, entry: &InetSkEntry, packet: &Packet) -> Result<()> {
    let plain = |raw: &[u8]| address::parse(raw).ok_or(Errno::EINVAL);
    let from = plain(&packet.sender)?;
    let to = match packet.destination.as_slice() {
        [] => local_of(entry).ok_or(Errno::EINVAL)?,
        raw => plain(raw)?,
    };
    let before = waiting_bytes(fd);
    let alone = socket::connect(fd, &address::to_raw(from)).is_ok();
    let own = socket::local_address(fd)
        .ok()
        .and_then(|raw| address::parse(&raw));
    if alone && own.is_some_and(|own| own.ip() != to.ip()) {
        // Connected it has an address of its own, at which this one would not arrive.
        socket::disconnect(fd)?;
    }
    let ends = crate::network_lock::Connection {
        local: to,
        remote: from,
    }
    .on_the_wire();
    let protocol = entry.proto.cast_signed();
    let result = inject::datagram(ends.remote, ends.local, protocol, &packet.bytes);
    if alone {
        let _ = socket::disconnect(fd);
    }
    result?;
    // The kernel counts the first one only, so an empty queue tells most.
    match before == 0 && waiting_bytes(fd) == 0 && !packet.bytes.is_empty() {
        true => Err(Errno::ENODATA),
        false => Ok(()),
    }
}

fn waiting_bytes(fd: impl AsFd) -> i32 {
    socket::ioctl_number(fd, SIOCINQ).unwrap_or(0)
}
