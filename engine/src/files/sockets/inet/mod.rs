//! Internet sockets: TCP, UDP and UDP-Lite, raw and ICMP ones, over IPv4 and IPv6.

mod abandoned;
mod address;
mod datagrams;
mod describe;
mod groups;
mod inject;
mod listed;
mod orphans;
mod restore;
mod tcp_dump;
mod tcp_restore;

pub(crate) use abandoned::let_connections_go_on;
pub(in crate::files) use describe::describe_external;
pub(in crate::files) use restore::{RestoredInet, connections, ports};
pub(in crate::files) use tcp_dump::DumpedTcp;
pub(in crate::files) use tcp_restore::Resting;

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, InetSkEntry};
use firn_sys::socket::{IPPROTO_TCP, SOCK_STREAM};

use super::is_of_protocol;
use crate::files::dump::DumpState;
use crate::files::error::{FileDumpError, FileRestoreError};
use crate::files::kind::{Dumping, FileKind};
use crate::files::open::Opener;
use crate::files::open_file::OpenFile;

/// Protocols as sockfs calls them.
const PROTOCOLS: [&str; 10] = [
    "TCP",
    "TCPv6",
    "UDP",
    "UDPv6",
    "UDP-Lite",
    "UDPLITEv6",
    "RAW",
    "RAWv6",
    "PING",
    "PINGv6",
];

/// Internet sockets.
pub(in crate::files) struct InetSocketKind;

impl FileKind for InetSocketKind {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Inetsk
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        is_of_protocol(file, &PROTOCOLS)
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let options = state.collected.options.sockets.clone();
        let sockets = &mut state.collected.sockets;
        if let Some(fd) = dumping.duplicate {
            sockets.check_namespace(dumping, fd)?;
        }
        let entry = describe::describe(dumping, &mut sockets.defaults)?;
        if is_tcp(&entry) {
            sockets.tcp.add(dumping, &entry, &options)?;
        } else {
            datagrams::dump(dumping, &entry, sockets)?;
        }
        Ok(file_entry(entry))
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        opener.sockets.take(FdTypes::Inetsk, entry.id)
    }
}

fn file_entry(entry: InetSkEntry) -> FileEntry {
    FileEntry {
        r#type: FdTypes::Inetsk.into(),
        id: entry.id,
        isk: Some(Box::new(entry)),
        ..FileEntry::default()
    }
}

/// True for a socket of an internet family, also of protocols that are not saved.
pub(in crate::files) fn is_internet(file: &OpenFile) -> bool {
    const OTHERS: [&str; 6] = ["MPTCP", "MPTCPv6", "SCTP", "SCTPv6", "DCCP", "DCCPv6"];
    is_of_protocol(file, &PROTOCOLS) || is_of_protocol(file, &OTHERS)
}

/// True for TCP, and not for a raw socket of its protocol.
fn is_tcp(entry: &InetSkEntry) -> bool {
    (entry.r#type, entry.proto) == (SOCK_STREAM.cast_unsigned(), IPPROTO_TCP.cast_unsigned())
}

/// True for a TCP socket with a connection.
pub(super) fn is_connection(entry: &InetSkEntry) -> bool {
    is_tcp(entry) && tcp_dump::is_connected(entry.state)
}

/// A socket in words.
pub(super) fn shown(entry: &InetSkEntry) -> String {
    let protocol = match (entry.r#type.cast_signed(), entry.proto.cast_signed()) {
        (SOCK_STREAM, IPPROTO_TCP) => "TCP",
        (firn_sys::socket::SOCK_RAW, _) => "raw",
        (_, firn_sys::socket::IPPROTO_UDP) => "UDP",
        (_, firn_sys::socket::IPPROTO_UDPLITE) => "UDP-Lite",
        _ => "ICMP",
    };
    match (local_of(entry), remote_of(entry)) {
        (Some(local), Some(remote)) if remote.port() != 0 => {
            format!("{protocol} socket {local} to {remote}")
        }
        (Some(local), _) => format!("{protocol} socket {local}"),
        _ => format!("{protocol} socket {}", entry.id),
    }
}

fn scope_of(entry: &InetSkEntry) -> u32 {
    entry
        .firn
        .as_ref()
        .and_then(|firn| firn.scope_id)
        .unwrap_or(0)
}

/// The socket's own address.
fn local_of(entry: &InetSkEntry) -> Option<std::net::SocketAddr> {
    address::from_words(
        entry.family,
        &entry.src_addr,
        entry.src_port,
        scope_of(entry),
    )
}

/// The peer's address.
fn remote_of(entry: &InetSkEntry) -> Option<std::net::SocketAddr> {
    address::from_words(
        entry.family,
        &entry.dst_addr,
        entry.dst_port,
        scope_of(entry),
    )
}
