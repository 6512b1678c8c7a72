//! Multicast groups that a socket is a member of.
//!
//! No call lists them, but each group of an interface can be asked for: the kernel knows a filter of
//! sources exactly where there is a membership.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use firn_proto::FirnMembershipEntry;
use firn_sys::Result;
use firn_sys::socket::{
    self, AF_INET6, MCAST_JOIN_GROUP, MCAST_MSFILTER, SOCK_DGRAM, SOCK_RAW, SOL_IP, SOL_IPV6,
};

use super::super::extra::SocketKind;
use super::address;

/// Room for this many sources in an answer.
const MAX_SOURCES: usize = 64;
/// Where the address of the group begins in `struct group_filter`, where the mode, and where the sources.
const GROUP: usize = 8;
const MODE: usize = GROUP + 128;
const SOURCES: usize = MODE + 8;
const STORAGE: usize = 128;

/// Reads all memberships of a socket.
pub(super) fn memberships(fd: impl AsFd, kind: SocketKind) -> Result<Vec<FirnMembershipEntry>> {
    let fd = fd.as_fd();
    if !matches!(kind.kind, SOCK_DGRAM | SOCK_RAW) {
        return Ok(Vec::new());
    }
    let (known, level) = match kind.family {
        AF_INET6 => (known_v6(), SOL_IPV6),
        _ => (known_v4(), SOL_IP),
    };
    let ask = |(index, group): (u32, IpAddr)| {
        let mut room = filter_of(index, group, 0);
        let sources = u32::try_from(MAX_SOURCES).expect("few");
        room[MODE + 4..MODE + 8].copy_from_slice(&sources.to_ne_bytes());
        room.resize(SOURCES + MAX_SOURCES * STORAGE, 0);
        let answer = socket::option_with(fd, level, MCAST_MSFILTER, room).ok()?;
        let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
        let nr = usize::try_from(word(MODE + 4)?).ok()?.min(MAX_SOURCES);
        let sources = answer.get(SOURCES..)?.chunks(STORAGE).take(nr);
        Some(FirnMembershipEntry {
            interface: Some(socket::interface_name(index).ok()?),
            group: Some(octets(group)),
            mode: word(MODE),
            source: sources
                .filter_map(|raw| Some(octets(address::parse(raw)?.ip())))
                .collect(),
        })
    };
    Ok(known.into_iter().filter_map(ask).collect())
}

/// Joins a group again; one of an interface that is not here is left out.
pub(super) fn join(fd: impl AsFd, family: u32, entry: &FirnMembershipEntry) -> Result<()> {
    let fd = fd.as_fd();
    let level = if family == AF_INET6.cast_unsigned() {
        SOL_IPV6
    } else {
        SOL_IP
    };
    let Some(group) = entry.group.as_deref().and_then(ip_of) else {
        return Err(firn_sys::Errno::EINVAL);
    };
    let index = socket::interface_index(entry.interface.as_deref().unwrap_or_default())?;
    let request = filter_of(index, group, 0);
    socket::set_option(fd, level, MCAST_JOIN_GROUP, &request[..MODE])?;
    let sources: Vec<IpAddr> = entry.source.iter().filter_map(|raw| ip_of(raw)).collect();
    const EXCLUDE: u32 = 0;
    let mode = entry.mode.unwrap_or(EXCLUDE);
    if mode == EXCLUDE && sources.is_empty() {
        return Ok(());
    }
    let mut filter = filter_of(index, group, mode);
    let nr = u32::try_from(sources.len()).unwrap_or(0);
    filter[MODE + 4..MODE + 8].copy_from_slice(&nr.to_ne_bytes());
    for source in sources {
        filter.extend(storage(source));
    }
    socket::set_option(fd, level, MCAST_MSFILTER, &filter)
}

/// `struct group_filter` without sources; its beginning is `struct group_req`.
fn filter_of(index: u32, group: IpAddr, mode: u32) -> Vec<u8> {
    let mut raw = index.to_ne_bytes().to_vec();
    raw.resize(GROUP, 0);
    raw.extend(storage(group));
    raw.extend(mode.to_ne_bytes());
    raw.extend([0; 4]);
    raw
}

fn storage(ip: IpAddr) -> Vec<u8> {
    let mut raw = address::to_raw((ip, 0).into());
    raw.resize(STORAGE, 0);
    raw
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip_of(raw: &[u8]) -> Option<IpAddr> {
    match raw.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(raw).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(raw).ok()?).into()),
        _ => None,
    }
}

/// Groups of all interfaces, from /proc/net/igmp.
fn known_v4() -> Vec<(u32, IpAddr)> {
    let text = std::fs::read_to_string("/proc/thread-self/net/igmp").unwrap_or_default();
    parse_v4(&text)
}

fn parse_v4(text: &str) -> Vec<(u32, IpAddr)> {
    let mut index = 0;
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            index = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            found.push((index, IpAddr::from(Ipv4Addr::from(group.to_ne_bytes()))));
        }
    }
    found
}

/// Groups of all interfaces, from /proc/net/igmp6.
fn known_v6() -> Vec<(u32, IpAddr)> {
    let text = std::fs::read_to_string("/proc/thread-self/net/igmp6").unwrap_or_default();
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let index = words.next()?.parse().ok()?;
        let group = u128::from_str_radix(words.nth(1)?, 16).ok()?;
        Some((index, IpAddr::from(Ipv6Addr::from(group))))
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_sys::socket::AF_INET;

    #[test]
    fn memberships_are_found_and_joined_again() {
        let kind = SocketKind {
            family: AF_INET,
            kind: SOCK_DGRAM,
            protocol: 17,
        };
        let make = || socket::create(AF_INET, SOCK_DGRAM, 0).expect("a socket");
        let (one, other) = (make(), make());
        let entry = FirnMembershipEntry {
            interface: Some("lo".to_owned()),
            group: Some(vec![239, 1, 2, 3]),
            mode: Some(0),
            source: vec![vec![127, 0, 0, 9]],
        };
        if join(&one, 2, &entry).is_err() {
            // Without a loopback interface that is up.
            return;
        }
        let found = memberships(&one, kind).expect("readable");
        assert_eq!(found, [entry]);
        assert_eq!(memberships(&other, kind), Ok(Vec::new()));
    }

    #[test]
    fn the_list_of_groups_is_parsed() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     2      V3\n\t\t\t\t030201EF     1 0:00000000\t\t0\n\
            \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let groups: Vec<String> = parse_v4(text)
            .iter()
            .map(|(i, g)| format!("{i} {g}"))
            .collect();
        assert_eq!(groups, ["1 239.1.2.3", "1 224.0.0.1"]);
    }
}
