//! Internet addresses: as the kernel has them, as images have them, as std has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use firn_sys::socket::{AF_INET, AF_INET6};

/// Reads a `struct sockaddr_in` or `sockaddr_in6`.
pub(super) fn parse(raw: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes([*raw.first()?, *raw.get(1)?]));
    let port = u16::from_be_bytes([*raw.get(2)?, *raw.get(3)?]);
    if family == AF_INET {
        let octets: [u8; 4] = raw.get(4..8)?.try_into().ok()?;
        return Some(SocketAddr::new(Ipv4Addr::from(octets).into(), port));
    }
    if family == AF_INET6 {
        let octets: [u8; 16] = raw.get(8..24)?.try_into().ok()?;
        let scope = u32::from_ne_bytes(raw.get(24..28)?.try_into().ok()?);
        return Some(SocketAddrV6::new(octets.into(), port, 0, scope).into());
    }
    None
}

/// The address as the kernel takes it.
pub(super) fn to_raw(address: SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut raw = u16::try_from(family).expect("small").to_ne_bytes().to_vec();
    raw.extend(address.port().to_be_bytes());
    match address {
        SocketAddr::V4(address) => {
            raw.extend(address.ip().octets());
            raw.extend([0; 8]);
        }
        SocketAddr::V6(address) => {
            raw.extend([0; 4]);
            raw.extend(address.ip().octets());
            raw.extend(address.scope_id().to_ne_bytes());
        }
    }
    raw
}

/// The address in words copied from network order.
pub(super) fn to_words(ip: IpAddr) -> Vec<u32> {
    let octets = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    octets
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
        .collect()
}

/// The address of an image; None for one that is too short for its family or has no port.
pub(super) fn from_words(family: u32, words: &[u32], port: u32, scope: u32) -> Option<SocketAddr> {
    let octets: Vec<u8> = words.iter().copied().flat_map(u32::to_ne_bytes).collect();
    let port = u16::try_from(port).ok()?;
    if family == AF_INET.cast_unsigned() {
        let octets: [u8; 4] = octets.get(..4)?.try_into().ok()?;
        return Some(SocketAddr::new(Ipv4Addr::from(octets).into(), port));
    }
    let octets: [u8; 16] = octets.get(..16)?.try_into().ok()?;
    Some(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope).into())
}

/// Whether an IPv6 address means something only together with an interface.
pub(super) fn needs_scope(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => {
            let first = ip.segments()[0];
            first & 0xffc0 == 0xfe80 || first & 0xff0f == 0xff02 || first & 0xff0f == 0xff01
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_all_forms() {
        for text in ["127.0.0.1:80", "[::1]:443", "[fe80::1%7]:9", "0.0.0.0:0"] {
            let address: SocketAddr = text.parse().expect("an address");
            assert_eq!(parse(&to_raw(address)), Some(address));
            let family = if address.is_ipv4() { AF_INET } else { AF_INET6 };
            let scope = match address {
                SocketAddr::V6(address) => address.scope_id(),
                SocketAddr::V4(_) => 0,
            };
            let words = to_words(address.ip());
            let port = address.port().into();
            assert_eq!(
                from_words(family.cast_unsigned(), &words, port, scope),
                Some(address)
            );
        }
        assert_eq!(parse(&[]), None);
        assert_eq!(from_words(2, &[], 1, 0), None);
    }
}
