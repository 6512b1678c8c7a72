//! What only the lists of sockets in /proc/net tell: connections that nobody has accepted yet, which have no
//! descriptor and so no inode number, and peers without a port, which getpeername takes for none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use firn_sys::socket::{
    AF_INET6, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM,
};

use super::super::extra::SocketKind;

/// As many peers as a message names.
const NAMED: usize = 3;

/// Peer of a socket whose getpeername says that it has none: of a raw or ICMP socket, which needs no port, or
/// of a TCP socket that has not been answered yet.
pub(super) fn peer(ino: u32, kind: SocketKind) -> Option<SocketAddr> {
    let name = match (kind.kind, kind.protocol) {
        (SOCK_RAW, _) => "raw",
        (SOCK_STREAM, IPPROTO_TCP) => "tcp",
        (SOCK_DGRAM, IPPROTO_ICMP | IPPROTO_ICMPV6) => "icmp",
        _ => return None,
    };
    let suffix = if kind.family == AF_INET6 { "6" } else { "" };
    peer_in(&read(&format!("{name}{suffix}")), ino)
}

fn peer_in(text: &str, ino: u32) -> Option<SocketAddr> {
    text.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_it = words.get(9)?.parse::<u32>() == Ok(ino);
        let peer = parse(words.get(2)?).filter(|_| is_it)?;
        (!peer.ip().is_unspecified()).then_some(peer)
    })
}

fn read(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
}

/// Who waits at a listening port, in words: `2 connections wait to be accepted (of 10.0.0.7:4711, ...)`.
pub(super) fn waiting(port: u16, nr: u32) -> String {
    let lists = ["tcp", "tcp6"].map(read);
    let peers: Vec<SocketAddr> = lists.iter().flat_map(|text| peers_in(text, port)).collect();
    let mut named: Vec<String> = peers.iter().take(NAMED).map(ToString::to_string).collect();
    if peers.len() > NAMED {
        named.push("...".to_owned());
    }
    let of = match named.is_empty() {
        true => String::new(),
        false => format!(" (of {})", named.join(", ")),
    };
    format!("{nr} connections wait to be accepted{of}")
}

/// Peers of the connections of a port that have no descriptor.
fn peers_in(text: &str, port: u16) -> impl Iterator<Item = SocketAddr> {
    const ESTABLISHED: &str = "01";
    const CLOSE_WAIT: &str = "08";
    text.lines().skip(1).filter_map(move |line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, local, remote, state, .., _, _, inode] = *words.get(..10)? else {
            return None;
        };
        let waits = [ESTABLISHED, CLOSE_WAIT].contains(&state) && inode == "0";
        (waits && parse(local)?.port() == port).then(|| parse(remote))?
    })
}

/// An address as the kernel prints it: words of the address in its own order, port.
fn parse(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words = ip.as_bytes().chunks(8).map(|word| {
        let word = std::str::from_utf8(word)
            .ok()
            .filter(|word| word.len() == 8)?;
        Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
    });
    let octets: Vec<u8> = words.collect::<Option<Vec<_>>>()?.concat();
    let ip = match octets.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into(),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(IpAddr::to_canonical(&ip), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_without_a_descriptor_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 77 1 0 100 0 0 10 0\n\
            1: 0100007F:1F90 0200007F:8235 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1\n\
            2: 0100007F:1F90 0100007F:8236 01 00000000:00000000 00:00000000 00000000     0        0 78 1 0 20 4 30 10 -1\n\
            3: 0100007F:1F91 0100007F:8237 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1\n";
        let peers: Vec<String> = peers_in(text, 8080).map(|peer| peer.to_string()).collect();
        assert_eq!(peers, ["127.0.0.2:33333"]);
    }

    #[test]
    fn peers_of_raw_sockets_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            1: 00000000:0001 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 77 2 0 0\n\
            6: 0100007F:0006 0200007F:0000 01 00000000:00000000 00:00000000 00000000     0        0 78 2 0 0\n";
        assert_eq!(peer_in(text, 78), "127.0.0.2:0".parse().ok());
        assert_eq!((peer_in(text, 77), peer_in(text, 7)), (None, None));
    }

    #[test]
    fn mapped_addresses_are_shown_as_they_travel() {
        let mapped = parse("0000000000000000FFFF00000100007F:0050");
        assert_eq!(mapped, "127.0.0.1:80".parse().ok());
        assert_eq!(
            parse("00000000000000000000000001000000:0050"),
            "[::1]:80".parse().ok()
        );
        assert_eq!(parse("01:0050"), None);
    }
}
