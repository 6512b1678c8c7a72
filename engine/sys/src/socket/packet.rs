//! Packet sockets.
//!
//! Source: man 7 packet; linux include/uapi/linux/if_packet.h.

use std::os::fd::AsFd;

use super::{AF_PACKET, SOL_PACKET, set_option};
use crate::{Errno, Result};

/// `PACKET_ADD_MEMBERSHIP`.
const ADD_MEMBERSHIP: i32 = 1;
/// `PACKET_RX_RING`.
pub const RX_RING: i32 = 5;
/// `PACKET_STATISTICS`; reading it sets it to zero.
pub const STATISTICS: i32 = 6;
/// `PACKET_COPY_THRESH`.
pub const COPY_THRESH: i32 = 7;
/// `PACKET_AUXDATA`.
pub const AUXDATA: i32 = 8;
/// `PACKET_ORIGDEV`.
pub const ORIGDEV: i32 = 9;
/// `PACKET_VERSION`.
pub const VERSION: i32 = 10;
/// `PACKET_RESERVE`.
pub const RESERVE: i32 = 12;
/// `PACKET_TX_RING`.
pub const TX_RING: i32 = 13;
/// `PACKET_LOSS`.
pub const LOSS: i32 = 14;
/// `PACKET_VNET_HDR`.
pub const VNET_HDR: i32 = 15;
/// `PACKET_TIMESTAMP`.
pub const TIMESTAMP: i32 = 17;
/// `PACKET_FANOUT`.
pub const FANOUT: i32 = 18;
/// `PACKET_VNET_HDR_SZ` (Linux 6.4).
pub const VNET_HDR_SZ: i32 = 24;
/// More times than any program joins one group.
pub const MAX_TIMES: usize = 1 << 16;
/// Longest hardware address.
const MAX_ADDRESS: usize = 32;

/// A membership to be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Membership<'a> {
    /// Interface.
    pub index: u32,
    /// `PACKET_MR_MULTICAST` and so on.
    pub kind: u16,
    /// Hardware address.
    pub address: &'a [u8],
}

/// Joins a group.
///
/// # Errors
/// ENODEV, EINVAL for an address that the interface does not have the length of.
pub fn join(fd: impl AsFd, membership: &Membership<'_>) -> Result<()> {
    let len = u16::try_from(membership.address.len()).map_err(|_| Errno::EINVAL)?;
    let mut request = membership.index.to_ne_bytes().to_vec();
    request.extend(membership.kind.to_ne_bytes());
    request.extend(len.to_ne_bytes());
    request.extend(membership.address);
    request.resize(request.len().max(8 + MAX_ADDRESS), 0);
    set_option(fd, SOL_PACKET, ADD_MEMBERSHIP, &request)
}

/// Whether a fanout group chooses by a BPF program.
pub fn chooses_by_program(fanout: u32) -> bool {
    const CLASSIC_BPF: u32 = 6;
    const EXTENDED_BPF: u32 = 7;
    matches!(fanout >> 16 & 0xff, CLASSIC_BPF | EXTENDED_BPF)
}

/// `struct sockaddr_ll` with an interface and a protocol in network order.
pub fn address(index: u32, protocol: u16) -> Vec<u8> {
    let family = u16::try_from(AF_PACKET).expect("small");
    let mut raw = family.to_ne_bytes().to_vec();
    raw.extend(protocol.to_ne_bytes());
    raw.extend(index.to_ne_bytes());
    raw.extend([0; 12]);
    raw
}

/// The address of sockets of type SOCK_PACKET: an interface's name.
pub fn old_address(name: &str) -> Vec<u8> {
    let family = u16::try_from(AF_PACKET).expect("small");
    let mut raw = family.to_ne_bytes().to_vec();
    raw.extend(name.bytes().take(13));
    raw.resize(16, 0);
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_kernels_layout() {
        let raw = address(7, 3u16.to_be());
        assert_eq!(raw[..8], [17, 0, 0, 3, 7, 0, 0, 0]);
        assert_eq!(raw.len(), 20);
        assert_eq!(old_address("eth0"), b"\x11\0eth0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn programs_are_told_by_the_way_to_choose() {
        assert!(chooses_by_program(7 << 16 | 5));
        assert!(!chooses_by_program(1 << 16 | 6));
    }
}
