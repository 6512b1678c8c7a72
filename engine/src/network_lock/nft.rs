//! The lock as a table of nftables, made by one batch of netlink messages.
//!
//! ```text
//! table inet CRIU-ID {
//!     set conns4 { type ipv4_addr . inet_service . ipv4_addr . inet_service }
//!     set conns6 { type ipv6_addr . inet_service . ipv6_addr . inet_service }
//!     chain input  { type filter hook input priority raw
//!         meta mark 0xc114 accept
//!         meta nfproto ipv4 meta l4proto tcp ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop
//!         ... ipv6 ... @conns6 drop
//!         meta nfproto ipv4 meta l4proto tcp tcp flags & (fin | syn | rst | ack) == syn
//!             ip daddr ADDRESS tcp dport PORT drop        (for each listening socket)
//!         ... }
//!     chain output { the same without listening sockets }
//! }
//! ```
//!
//! Source: linux include/uapi/linux/netfilter/nf_tables.h (Linux 3.14; concatenations 4.1).

use std::net::{IpAddr, SocketAddr};

use firn_sys::netlink::{
    ACK, Attributes, CREATE, DUMP, EXCLUSIVE, NETFILTER, Netlink, REQUEST, Request,
};
use firn_sys::{Errno, Result};

use super::{Connection, HeldOff, PASS_MARK, Port};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const TCP: u8 = 6;
const APPEND: u16 = 0x800;
const HOOK_INPUT: u32 = 1;
const HOOK_OUTPUT: u32 = 3;
/// Before connection tracking.
const PRIORITY: i32 = -300;
const ACCEPT: u32 = 1;
const DROP: u32 = 0;
/// First of the 4-byte registers.
const REGISTER: u32 = 8;
/// Keys that go into one message, whose attributes are shorter than 64 KiB.
const KEYS_PER_MESSAGE: usize = 400;

/// CRIU 4.2 composes the name in a buffer that holds so much of the run id, and lifts no other table.
pub(super) const RUN_ID_LEN: usize = 21;

/// How the names of all tables begin.
const PREFIX: &str = "CRIU-";

fn table(run_id: &str) -> String {
    format!("{PREFIX}{run_id}")
}

/// Names that the table of a dump may have: with the whole run id, or with what CRIU 4.2 keeps of it.
fn tables(run_id: &str) -> impl Iterator<Item = String> {
    let short = run_id.get(..RUN_ID_LEN);
    [Some(run_id), short.filter(|short| *short != run_id)]
        .into_iter()
        .flatten()
        .map(table)
}

/// A transaction that has been made. To drop it takes 5 to 20 ms, in which the kernel frees what it has replaced
/// (the end of its socket waits for a grace period of RCU), so it is kept until nobody waits for us.
#[derive(Debug)]
#[must_use = "to drop it takes time"]
pub(super) struct Transaction {
    _netlink: Netlink,
}

/// Makes the table.
pub(super) fn lock(run_id: &str, held_off: &HeldOff) -> Result<Transaction> {
    let table = table(run_id);
    let mut requests = vec![
        message(NEW_TABLE, CREATE | EXCLUSIVE).text(1, &table),
        set(&table, "conns4", 1, 16),
        set(&table, "conns6", 2, 40),
    ];
    for (name, hook) in [("input", HOOK_INPUT), ("output", HOOK_OUTPUT)] {
        requests.push(chain(&table, name, hook));
        requests.push(rule(&table, name, |list| {
            let list = meta(list, 3);
            verdict(compare(list, &PASS_MARK.to_ne_bytes()), ACCEPT)
        }));
        for (family, set) in [(NFPROTO_IPV4, "conns4"), (NFPROTO_IPV6, "conns6")] {
            requests.push(rule(&table, name, |list| drop_of(list, family, set)));
        }
    }
    for port in &held_off.ports {
        requests.push(rule(&table, "input", |list| drop_first(list, port)));
    }
    for (set, is_v4) in [("conns4", true), ("conns6", false)] {
        let of_family = held_off
            .connections
            .iter()
            .filter(|c| c.local.is_ipv4() == is_v4);
        let mut keys: Vec<Vec<u8>> = of_family.flat_map(keys).collect();
        keys.sort_unstable();
        keys.dedup();
        for keys in keys.chunks(KEYS_PER_MESSAGE) {
            requests.push(elements(&table, set, keys));
        }
    }
    run(requests)
}

/// Removes the table and all that is in it.
pub(super) fn unlock(run_id: &str) -> Result<Option<Transaction>> {
    let mut done = None;
    for table in tables(run_id) {
        match run(vec![message(DELETE_TABLE, 0).text(1, &table)]) {
            Ok(transaction) => done = Some(transaction),
            // It has the other name, or somebody else has lifted it.
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Whether the table is there.
pub(super) fn is_locked(run_id: &str) -> bool {
    tables(run_id).any(|table| {
        let request = message(GET_TABLE, 0).text(1, &table);
        Netlink::open(NETFILTER)
            .and_then(|mut netlink| netlink.request(request))
            .is_ok()
    })
}

/// Runs whose tables are there.
pub(super) fn runs() -> Result<Vec<String>> {
    let header = [NFPROTO_INET, 0, 0, 0];
    let request = Request::new(SUBSYSTEM << 8 | GET_TABLE, REQUEST | DUMP, &header);
    let mut found = Vec::new();
    Netlink::open(NETFILTER)?.dump(request, |payload| found.extend(run_of(payload)))?;
    Ok(found)
}

/// The run that a table belongs to, if it is a lock.
fn run_of(payload: &[u8]) -> Option<String> {
    const NAME: u16 = 1;
    if *payload.first()? != NFPROTO_INET {
        return None;
    }
    let mut attributes = Attributes(payload.get(4..)?);
    let (_, name) = attributes.find(|(kind, _)| *kind == NAME)?;
    let name = std::str::from_utf8(name.strip_suffix(b"\0").unwrap_or(name)).ok()?;
    name.strip_prefix(PREFIX).map(str::to_owned)
}

/// Runs a transaction.
fn run(requests: Vec<Request>) -> Result<Transaction> {
    let mark = |kind: u16| {
        let header = [&[0, 0][..], &SUBSYSTEM.to_be_bytes()].concat();
        Request::new(kind, REQUEST, &header)
    };
    let mut all = vec![mark(BATCH_BEGIN)];
    all.extend(requests);
    all.push(mark(BATCH_END));
    let mut netlink = Netlink::open(NETFILTER)?;
    netlink.batch(all)?;
    Ok(Transaction { _netlink: netlink })
}

fn message(kind: u16, flags: u16) -> Request {
    Request::new(
        SUBSYSTEM << 8 | kind,
        REQUEST | ACK | flags,
        &[NFPROTO_INET, 0, 0, 0],
    )
}

fn set(table: &str, name: &str, id: u32, key_len: u32) -> Request {
    // The type numbers only tell nft how to print a key.
    let (address, service) = (if key_len == 16 { 7 } else { 8 }, 13);
    let key_type = ((address << 6 | service) << 6 | address) << 6 | service;
    message(NEW_SET, CREATE | EXCLUSIVE)
        .text(1, table)
        .text(2, name)
        .number(3, 0)
        .number(4, key_type)
        .number(5, key_len)
        .number(10, id)
}

fn chain(table: &str, name: &str, hook: u32) -> Request {
    message(NEW_CHAIN, CREATE | EXCLUSIVE)
        .text(1, table)
        .text(3, name)
        .nested(4, |inner| {
            inner.number(1, hook).number(2, PRIORITY.cast_unsigned())
        })
        .number(5, ACCEPT)
        .text(7, "filter")
}

fn rule(table: &str, chain: &str, fill: impl FnOnce(Request) -> Request) -> Request {
    message(NEW_RULE, CREATE | APPEND)
        .text(1, table)
        .text(2, chain)
        .nested(4, fill)
}

fn elements(table: &str, set: &str, keys: &[Vec<u8>]) -> Request {
    message(NEW_ELEMENTS, CREATE)
        .text(1, table)
        .text(2, set)
        .nested(3, |list| {
            keys.iter().fold(list, |list, key| {
                list.nested(1, |element| {
                    element.nested(1, |data| data.attribute(1, key))
                })
            })
        })
}

/// Source and destination of both directions, each part padded to whole registers.
fn keys(connection: &Connection) -> [Vec<u8>; 2] {
    let part = |address: SocketAddr| -> Vec<u8> {
        let mut bytes = match address.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        bytes.extend(address.port().to_be_bytes());
        bytes.extend([0, 0]);
        bytes
    };
    let (local, remote) = (part(connection.local), part(connection.remote));
    [
        [local.clone(), remote.clone()].concat(),
        [remote, local].concat(),
    ]
}

fn expression(list: Request, name: &str, fill: impl FnOnce(Request) -> Request) -> Request {
    list.nested(1, |element| element.text(1, name).nested(2, fill))
}

fn meta(list: Request, key: u32) -> Request {
    expression(list, "meta", |data| data.number(1, REGISTER).number(2, key))
}

fn compare(list: Request, value: &[u8]) -> Request {
    expression(list, "cmp", |data| {
        data.number(1, REGISTER)
            .number(2, 0)
            .nested(3, |inner| inner.attribute(1, value))
    })
}

fn load(list: Request, register: u32, base: u32, offset: u32, len: u32) -> Request {
    expression(list, "payload", |data| {
        data.number(1, register)
            .number(2, base)
            .number(3, offset)
            .number(4, len)
    })
}

fn verdict(list: Request, code: u32) -> Request {
    expression(list, "immediate", |data| {
        data.number(1, 0).nested(2, |inner| {
            inner.nested(2, |verdict| verdict.number(1, code))
        })
    })
}

/// Drops packets whose addresses and ports are in a set.
fn drop_of(list: Request, family: u8, set: &str) -> Request {
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    let (offset, len) = if family == NFPROTO_IPV4 {
        (12, 4)
    } else {
        (8, 16)
    };
    let list = compare(meta(list, 15), &[family]);
    let list = compare(meta(list, 16), &[TCP]);
    let registers = len / 4;
    let list = load(list, REGISTER, NETWORK, offset, len);
    let list = load(list, REGISTER + registers, TRANSPORT, 0, 2);
    let list = load(list, REGISTER + registers + 1, NETWORK, offset + len, len);
    let list = load(list, REGISTER + 2 * registers + 1, TRANSPORT, 2, 2);
    let list = expression(list, "lookup", |data| data.text(1, set).number(2, REGISTER));
    verdict(list, DROP)
}

/// Drops what would begin a connection to a port.
fn drop_first(list: Request, port: &Port) -> Request {
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    const FLAGS: u32 = 13;
    const SYN: u8 = 2;
    const FIN_SYN_RST_ACK: u8 = 0x17;
    let (family, offset, address) = match port.address {
        IpAddr::V4(ip) => (NFPROTO_IPV4, 16, ip.octets().to_vec()),
        IpAddr::V6(ip) => (NFPROTO_IPV6, 24, ip.octets().to_vec()),
    };
    let list = compare(meta(list, 15), &[family]);
    let list = compare(meta(list, 16), &[TCP]);
    let list = load(list, REGISTER, TRANSPORT, FLAGS, 1);
    let list = compare(mask(list, FIN_SYN_RST_ACK), &[SYN]);
    let list = load(list, REGISTER, TRANSPORT, 2, 2);
    let list = compare(list, &port.number.to_be_bytes());
    if port.address.is_unspecified() {
        return verdict(list, DROP);
    }
    let len = u32::from(if family == NFPROTO_IPV4 { 4u8 } else { 16 });
    let list = load(list, REGISTER, NETWORK, offset, len);
    verdict(compare(list, &address), DROP)
}

/// Keeps some bits of a byte.
fn mask(list: Request, bits: u8) -> Request {
    expression(list, "bitwise", |data| {
        data.number(1, REGISTER)
            .number(2, REGISTER)
            .number(3, 1)
            .nested(4, |inner| inner.attribute(1, &[bits]))
            .nested(5, |inner| inner.attribute(1, &[0]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_of_connections_fit_into_one_table() {
        let connection = |port: u16| Connection {
            local: SocketAddr::from(([127, 9, 9, 9], port)),
            remote: SocketAddr::from(([127, 9, 9, 8], 7)),
        };
        let held_off = HeldOff {
            connections: (1..20_000).map(connection).collect(),
            ports: Vec::new(),
        };
        let id = format!("many-{}", firn_sys::Pid::this());
        match lock(&id, &held_off) {
            Ok(_) => {
                assert!(is_locked(&id));
                assert!(unlock(&id).is_ok_and(|done| done.is_some()));
            }
            // Without rights or without nftables there is nothing to test.
            Err(errno) => assert!(errno == Errno::EPERM || errno.raw() == 93, "{errno}"),
        }
    }

    #[test]
    fn the_table_comes_and_goes() {
        let connection = |local: &str, remote: &str| Connection {
            local: local.parse().expect("an address"),
            remote: remote.parse().expect("an address"),
        };
        let port = |address: &str| Port {
            address: address.parse().expect("an address"),
            number: 3,
        };
        let held_off = HeldOff {
            connections: vec![
                connection("127.0.0.1:1", "127.9.9.9:2"),
                connection("[::1]:1", "[::2]:2"),
            ],
            ports: ["0.0.0.0", "::", "127.9.9.9", "::1"].map(port).into(),
        };
        let id = format!("test-{}", firn_sys::Pid::this());
        match lock(&id, &held_off) {
            Ok(_) => {
                assert!(is_locked(&id));
                let unlocked = |id: &str| unlock(id).is_ok_and(|done| done.is_some());
                assert!(unlocked(&id));
                assert!(!is_locked(&id));
                // CRIU 4.2 names its table by the first part of a long id.
                let long = format!("{id:-<36}");
                assert!(lock(&long[..RUN_ID_LEN], &held_off).is_ok());
                assert!(is_locked(&long));
                assert!(unlocked(&long));
                assert!(!is_locked(&long[..RUN_ID_LEN]));
            }
            // Without rights or without nftables there is nothing to test.
            Err(errno) => assert!(errno == Errno::EPERM || errno.raw() == 93, "{errno}"),
        }
    }
}
