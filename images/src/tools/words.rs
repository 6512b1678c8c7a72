//! Names that stand for numbers in JSON meant for people.
//!
//! The names are those that crit prints, so that its users find what they know. Bits without a
//! name follow as one hexadecimal number.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Names and the numbers they stand for.
pub(crate) type Words = &'static [(&'static str, u64)];

const PROT: Words = &[("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)];

const MAP: Words = &[
    ("MAP_SHARED", 1),
    ("MAP_PRIVATE", 2),
    ("MAP_ANON", 0x20),
    ("MAP_GROWSDOWN", 0x100),
];

const VMA_STATUS: Words = &[
    ("VMA_AREA_REGULAR", 1),
    ("VMA_AREA_STACK", 1 << 1),
    ("VMA_AREA_VSYSCALL", 1 << 2),
    ("VMA_AREA_VDSO", 1 << 3),
    ("VMA_AREA_HEAP", 1 << 5),
    ("VMA_FILE_PRIVATE", 1 << 6),
    ("VMA_FILE_SHARED", 1 << 7),
    ("VMA_ANON_SHARED", 1 << 8),
    ("VMA_ANON_PRIVATE", 1 << 9),
    ("VMA_AREA_SYSVIPC", 1 << 10),
    ("VMA_AREA_SOCKET", 1 << 11),
    ("VMA_AREA_VVAR", 1 << 12),
    ("VMA_AREA_AIORING", 1 << 13),
    ("VMA_UNSUPP", 1 << 31),
];

const OPEN: Words = &[
    ("O_WRONLY", 0o1),
    ("O_RDWR", 0o2),
    ("O_CREAT", 0o100),
    ("O_EXCL", 0o200),
    ("O_NOCTTY", 0o400),
    ("O_TRUNC", 0o1000),
    ("O_APPEND", 0o2000),
    ("O_NONBLOCK", 0o4000),
    ("O_DSYNC", 0o10000),
    ("FASYNC", 0o20000),
    ("O_DIRECT", 0o40000),
    ("O_LARGEFILE", 0o100_000),
    ("O_DIRECTORY", 0o200_000),
    ("O_NOFOLLOW", 0o400_000),
    ("O_NOATIME", 0o1_000_000),
    ("O_CLOEXEC", 0o2_000_000),
];

const PAGE_RUN: Words = &[("PE_PARENT", 1), ("PE_LAZY", 2), ("PE_PRESENT", 4)];

const SEALS: Words = &[
    ("F_SEAL_SEAL", 1),
    ("F_SEAL_SHRINK", 2),
    ("F_SEAL_GROW", 4),
    ("F_SEAL_WRITE", 8),
    ("F_SEAL_FUTURE_WRITE", 16),
];

const FAMILY: Words = &[
    ("UNIX", 1),
    ("INET", 2),
    ("INET6", 10),
    ("NETLINK", 16),
    ("PACKET", 17),
];
const SOCKET_TYPE: Words = &[("STREAM", 1), ("DGRAM", 2), ("RAW", 3), ("SEQPACKET", 5)];
const PROTOCOL: Words = &[("IP", 0), ("TCP", 6), ("UDP", 17), ("UDPLITE", 136)];

const TCP_STATE: Words = &[
    ("ESTABLISHED", 1),
    ("SYN_SENT", 2),
    ("SYN_RECV", 3),
    ("FIN_WAIT1", 4),
    ("FIN_WAIT2", 5),
    ("TIME_WAIT", 6),
    ("CLOSE", 7),
    ("CLOSE_WAIT", 8),
    ("LAST_ACK", 9),
    ("LISTEN", 10),
];

// The other words that crit has here say the wrong thing (it calls a stopped task a zombie), so
// those states stay numbers, which crit reads as well.
const TASK_STATE: Words = &[("Alive", 1)];

/// Finds the names of a `flags` option.
pub(crate) fn flags(option: &str) -> Option<Words> {
    Some(match option {
        "mmap.prot" => PROT,
        "mmap.flags" => MAP,
        "mmap.status" => VMA_STATUS,
        "rfile.flags" => OPEN,
        "pmap.flags" => PAGE_RUN,
        "seals.flags" => SEALS,
        _ => return None,
    })
}

/// Finds the names of a `dict` option, which depend on the field.
pub(crate) fn dict(option: &str, field: &str) -> Option<Words> {
    Some(match (option, field) {
        ("gen", "task_state") => TASK_STATE,
        ("sk", "family") => FAMILY,
        ("sk", "type") => SOCKET_TYPE,
        ("sk", "proto") => PROTOCOL,
        ("sk", "state") => TCP_STATE,
        _ => return None,
    })
}

/// Writes a number as names of its bits.
pub(crate) fn join_flags(words: Words, value: u64) -> String {
    let mut left = value;
    let mut parts = Vec::new();
    for (name, bit) in words {
        if value & bit != 0 {
            parts.push((*name).to_owned());
            left &= !bit;
        }
    }
    if left != 0 {
        parts.push(format!("{left:#x}"));
    }
    parts.join(" | ")
}

/// Reads what [`join_flags`] writes.
pub(crate) fn split_flags(words: Words, text: &str) -> Option<u64> {
    if text.is_empty() {
        return Some(0);
    }
    text.split('|').map(str::trim).try_fold(0, |bits, part| {
        let named = words.iter().find(|(name, _)| *name == part);
        Some(bits | named.map_or_else(|| number(part), |(_, bit)| Some(*bit))?)
    })
}

/// Finds the name of a number.
pub(crate) fn name_of(words: Words, value: u64) -> Option<&'static str> {
    words
        .iter()
        .find(|(_, v)| *v == value)
        .map(|(name, _)| *name)
}

/// Finds the number of a name; all the names that crit may have written are known.
pub(crate) fn value_of(words: Words, name: &str) -> Option<u64> {
    let named = words.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
    named.or_else(|| match name {
        "Zombie" if words == TASK_STATE => Some(3),
        "Stopped" if words == TASK_STATE => Some(6),
        _ => number(name),
    })
}

/// Reads a decimal or `0x` hexadecimal number.
pub(crate) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16).ok(),
        None if !text.starts_with('+') => text.parse().ok(),
        _ => None,
    }
}

/// Writes a device number as `major:minor`.
pub(crate) fn device(value: u64, user: bool) -> String {
    let (major, minor) = if user {
        (
            (value >> 8) & 0xfff,
            (value & 0xff) | ((value >> 12) & 0xf_ff00),
        )
    } else {
        (value >> 20, value & 0xf_ffff)
    };
    format!("{major}:{minor}")
}

/// Reads what [`device`] writes.
pub(crate) fn parse_device(text: &str, user: bool) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let (major, minor) = (major.parse::<u64>().ok()?, minor.parse::<u64>().ok()?);
    if major > 0xfff || minor > 0xf_ffff {
        return None;
    }
    Some(if user {
        (minor & 0xff) | (major << 8) | ((minor & 0xf_ff00) << 12)
    } else {
        major << 20 | minor
    })
}

/// Writes the words of a network address; `None` if it is neither IPv4 nor IPv6.
pub(crate) fn address(words: &[u64]) -> Option<String> {
    let mut bytes = Vec::with_capacity(16);
    for word in words {
        // Words of network-order memory read by a little-endian machine.
        bytes.extend_from_slice(&u32::try_from(*word).ok()?.to_le_bytes());
    }
    match words.len() {
        1 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).to_string()),
        4 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string()),
        _ => None,
    }
}

/// Reads what [`address`] writes.
pub(crate) fn parse_address(text: &str) -> Option<Vec<u64>> {
    let bytes = match text.parse::<Ipv4Addr>() {
        Ok(address) => address.octets().to_vec(),
        Err(_) => text.parse::<Ipv6Addr>().ok()?.octets().to_vec(),
    };
    let word = |b: &[u8]| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Some(bytes.chunks_exact(4).map(word).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_read_as_crit_writes_them() {
        assert_eq!(join_flags(PROT, 3), "PROT_READ | PROT_WRITE");
        assert_eq!(
            join_flags(MAP, 0x22_0022),
            "MAP_PRIVATE | MAP_ANON | 0x220000"
        );
        assert_eq!(join_flags(PROT, 0), "");
        for value in [0, 1, 7, 0x22_0022, u64::from(u32::MAX)] {
            assert_eq!(split_flags(MAP, &join_flags(MAP, value)), Some(value));
        }
        assert_eq!(split_flags(MAP, "MAP_PRIVATE | MAP_NONSENSE"), None);
    }

    #[test]
    fn devices_have_two_encodings() {
        assert_eq!(device(0x80_0001, false), "8:1");
        assert_eq!(device(0x0801, true), "8:1");
        assert_eq!(device(u64::from(u32::MAX), true), "4095:1048575");
        for value in [0, 0x0801, 0x1234_5678, u64::from(u32::MAX)] {
            assert_eq!(parse_device(&device(value, true), true), Some(value));
            assert_eq!(parse_device(&device(value, false), false), Some(value));
        }
        assert_eq!(parse_device("4096:0", true), None);
    }

    #[test]
    fn addresses_are_of_either_family() {
        assert_eq!(address(&[16_777_343]).as_deref(), Some("127.0.0.1"));
        assert_eq!(address(&[0, 0, 0, 16_777_216]).as_deref(), Some("::1"));
        assert_eq!(address(&[1, 2]), None);
        assert_eq!(parse_address("::1"), Some(vec![0, 0, 0, 16_777_216]));
    }

    #[test]
    fn words_of_crit_that_we_do_not_print_are_read() {
        assert_eq!(name_of(TASK_STATE, 3), None);
        assert_eq!(value_of(TASK_STATE, "Zombie"), Some(3));
        assert_eq!(value_of(PROTOCOL, "TCP"), Some(6));
        assert_eq!(value_of(PROTOCOL, "0x11"), Some(17));
    }
}
