//! Packets of our own making that look as if they came from a peer.
//!
//! They leave through a raw socket and come back in at once, because their destination is an address of
//! this machine. Their mark lets them pass the network lock.

use std::net::{IpAddr, SocketAddr};

use firn_sys::socket::{
    self, AF_INET, AF_INET6, IPPROTO_RAW, IPPROTO_TCP, IPPROTO_UDP, Outgoing, SO_MARK, SOCK_RAW,
    SOL_SOCKET,
};
use firn_sys::{Errno, Result};

use super::address;
use crate::network_lock::{Connection, PASS_MARK};

const FIN_AND_ACK: u8 = 0x11;
const HOPS: u8 = 64;

/// The end of a peer's stream.
pub(super) struct TcpEnd {
    /// Addresses as they travel.
    pub(super) ends: Connection,
    /// Sequence number of the end.
    pub(super) seq: u32,
    /// What the peer has acknowledged.
    pub(super) ack: u32,
    /// The peer's window.
    pub(super) window: u16,
}

/// Lets a connection receive the end of its peer's stream.
pub(super) fn end_of_stream(end: &TcpEnd) -> Result<()> {
    let (from, to) = (end.ends.remote, end.ends.local);
    let mut segment = Vec::with_capacity(20);
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(end.seq.to_be_bytes());
    segment.extend(end.ack.to_be_bytes());
    segment.extend([5 << 4, FIN_AND_ACK]);
    segment.extend(end.window.to_be_bytes());
    segment.extend([0; 4]);
    send(from, to, IPPROTO_TCP, segment, 16)
}

/// Lets a UDP socket of this machine receive a datagram.
pub(super) fn datagram(
    from: SocketAddr,
    to: SocketAddr,
    protocol: i32,
    bytes: &[u8],
) -> Result<()> {
    let len = u16::try_from(8 + bytes.len()).map_err(|_| Errno::EMSGSIZE)?;
    let mut packet = Vec::with_capacity(len.into());
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    // UDP-Lite has its coverage here; 0 is all of it.
    let field = if protocol == IPPROTO_UDP { len } else { 0 };
    packet.extend(field.to_be_bytes());
    packet.extend([0; 2]);
    packet.extend(bytes);
    send(from, to, protocol, packet, 6)
}

/// Sends a packet whose checksum stands at an offset.
fn send(
    from: SocketAddr,
    to: SocketAddr,
    protocol: i32,
    mut packet: Vec<u8>,
    checksum_at: usize,
) -> Result<()> {
    let protocol = u8::try_from(protocol).map_err(|_| Errno::EINVAL)?;
    let sum = checksum(from.ip(), to.ip(), protocol, &packet)?;
    packet[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    let header = header(from.ip(), to.ip(), protocol, packet.len())?;
    let family = if to.is_ipv4() { AF_INET } else { AF_INET6 };
    let raw = socket::create(family, SOCK_RAW, IPPROTO_RAW)?;
    socket::set_number(&raw, SOL_SOCKET, SO_MARK, PASS_MARK.cast_signed())?;
    let bytes = [header, packet].concat();
    let mut destination = to;
    destination.set_port(0);
    let destination = address::to_raw(destination);
    let message = Outgoing {
        bytes: &bytes,
        destination: Some(&destination),
        ..Outgoing::default()
    };
    socket::send(&raw, &message).map(drop)
}

fn header(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Result<Vec<u8>> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(20 + len).map_err(|_| Errno::EMSGSIZE)?;
            // The kernel fills in identification and checksum.
            let mut header = vec![0x45, 0];
            header.extend(total.to_be_bytes());
            header.extend([0, 0, 0, 0, HOPS, protocol, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            Ok(header)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let len = u16::try_from(len).map_err(|_| Errno::EMSGSIZE)?;
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(len.to_be_bytes());
            header.extend([protocol, HOPS]);
            header.extend(from.octets());
            header.extend(to.octets());
            Ok(header)
        }
        _ => Err(Errno::EINVAL),
    }
}

/// The checksum over addresses, protocol, length and packet.
fn checksum(from: IpAddr, to: IpAddr, protocol: u8, packet: &[u8]) -> Result<u16> {
    let mut bytes = Vec::with_capacity(packet.len() + 40);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            bytes.extend(from.octets());
            bytes.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            bytes.extend(from.octets());
            bytes.extend(to.octets());
        }
        _ => return Err(Errno::EINVAL),
    }
    let len = u32::try_from(packet.len()).map_err(|_| Errno::EMSGSIZE)?;
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(packet);
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).expect("folded to 16 bits");
    // For UDP 0 would mean that there is none.
    Ok(if sum == 0 { 0xffff } else { sum })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_add_up_to_zero() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        for (from, to) in [("10.1.2.3", "127.0.0.1"), ("fe80::1", "::1")] {
            let (from, to) = (ip(from), ip(to));
            let mut packet = vec![1, 2, 3, 4, 0, 11, 0, 0, b'a', b'b', b'c'];
            let sum = checksum(from, to, 17, &packet).expect("same family");
            packet[6..8].copy_from_slice(&sum.to_be_bytes());
            assert_eq!(checksum(from, to, 17, &packet), Ok(0xffff));
        }
        assert!(checksum(ip("::1"), ip("1.2.3.4"), 6, &[]).is_err());
    }
}
