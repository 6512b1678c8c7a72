//! Netlink sockets.
//!
//! The kernel tells port, peer and groups by getsockname, getpeername and NETLINK_LIST_MEMBERSHIPS;
//! netlink_diag adds whether only the peer may send, and whether an answer is still being given.
//!
//! Unread messages can't be put back: the kernel sends them, and a program trusts exactly those that come
//! from port 0. So a socket that has some refuses the dump, and so does one that the kernel serves as the
//! owner of a queue or log of netfilter. What the kernel announces to groups while nobody is there is lost,
//! as it is for a program that has not asked yet.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_proto::{FdTypes, FileEntry, FirnNetlinkSkEntry, NetlinkSkEntry};
use firn_sys::netlink::NETFILTER;
use firn_sys::sock_diag::{self, NetlinkSocket};
use firn_sys::socket::{
    self, AF_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_LIST_MEMBERSHIPS, SOCK_RAW, SOL_NETLINK,
};
use firn_sys::{Errno, Result};

use super::extra::kind_of;
use super::{DumpedSockets, NET_NS_ID, inode_of, is_of_protocol, options, protocol_name};
use crate::files::dump::{DumpState, query};
use crate::files::error::{FileDumpError, FileRestoreError};
use crate::files::kind::{Dumping, FileKind};
use crate::files::open::{self, Opener};
use crate::files::open_file::{OpenFile, Trouble};

/// State of a socket that only its peer may send to.
const CONNECTED: u32 = 1;
/// Groups that an address has room for.
const GROUPS_OF_ADDRESS: u32 = 32;
/// Room for this many groups; netfilter, which has most, has a dozen and generic netlink some hundred.
const MAX_GROUPS: usize = 1 << 16;

/// Netlink sockets.
pub(in crate::files) struct NetlinkSocketKind;

impl FileKind for NetlinkSocketKind {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Netlinksk
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        is_of_protocol(file, &["NETLINK"])
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> std::result::Result<FileEntry, FileDumpError> {
        let entry = dump(dumping, &mut state.collected.sockets)?;
        Ok(FileEntry {
            r#type: FdTypes::Netlinksk.into(),
            id: dumping.id,
            nlsk: Some(Box::new(entry)),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> std::result::Result<OwnedFd, FileRestoreError> {
        let part = entry.nlsk.as_deref();
        let entry = FileRestoreError::expect_member(entry, part, "a netlink socket")?;
        open_again(entry, &mut opener.sockets.losses)
    }
}

/// The netlink sockets of a dump.
#[derive(Debug, Default)]
pub(super) struct DumpedNetlink {
    /// All of the namespace, as soon as there is one to be dumped.
    known: Option<HashMap<u32, NetlinkSocket>>,
}

impl DumpedNetlink {
    /// What netlink_diag tells; it lists only those with a port or a group.
    fn diag(&mut self, ino: u32) -> Result<NetlinkSocket> {
        let known = match self.known.take() {
            Some(known) => known,
            None => sock_diag::netlink_sockets()?,
        };
        let known = self.known.insert(known);
        Ok(known.get(&ino).copied().unwrap_or_default())
    }
}

fn dump(
    dumping: &Dumping<'_>,
    sockets: &mut DumpedSockets,
) -> std::result::Result<NetlinkSkEntry, FileDumpError> {
    let file = dumping.file;
    let fd = dumping
        .duplicate
        .ok_or_else(|| query(file, "the socket", Errno::EBADF))?;
    sockets.check_namespace(dumping, fd)?;
    let failed = |source| query(file, "the netlink socket", source);
    let kind = kind_of(fd).map_err(failed)?;
    let place = Place::read(fd).map_err(failed)?;
    let diag = sockets.netlink.diag(inode_of(file)).map_err(failed)?;
    let waiting = socket::waiting(fd).map_err(failed)?;
    if let Some(trouble) = trouble(kind.protocol, place.port, &diag, waiting) {
        let trouble = Trouble {
            kind: protocol_name(file),
            ..trouble
        };
        return Err(FileDumpError::Obstacles(vec![file.obstacle(trouble)]));
    }
    let is_connected = diag.state == CONNECTED || place.peer_port != 0;
    let opts = options::dump(fd, kind, is_connected, &mut sockets.defaults)
        .map_err(|error| query(file, error.what, error.source))?;
    Ok(NetlinkSkEntry {
        id: dumping.id,
        ino: inode_of(file),
        protocol: kind.protocol.cast_unsigned(),
        state: u32::from(is_connected),
        flags: file.image_flags(),
        portid: place.port,
        groups: place.groups,
        dst_portid: place.peer_port,
        dst_group: diag.peer_group,
        fown: dumping.fown,
        opts,
        ns_id: Some(NET_NS_ID),
        // The other type does the same, but a program can ask for it.
        firn: (kind.kind != SOCK_RAW).then_some(FirnNetlinkSkEntry {
            r#type: Some(kind.kind.cast_unsigned()),
        }),
    })
}

/// What keeps a socket from being dumped. `waiting` says whether messages and whether errors wait.
fn trouble(
    protocol: i32,
    port: u32,
    diag: &NetlinkSocket,
    waiting: (bool, bool),
) -> Option<Trouble> {
    let (has_messages, has_error) = waiting;
    if has_messages && !has_error || diag.is_answered {
        return Some(Trouble::new(
            "messages of the kernel wait in it, which nobody but the kernel can send again",
            "dump when the task has read them",
        ));
    }
    if has_error {
        return Some(Trouble::new(
            "an error waits in it, most likely that messages were lost (ENOBUFS)",
            "dump when the task has read it",
        ));
    }
    let owned = (protocol == NETFILTER && port != 0).then(|| owned_by(port))?;
    owned.map(|what| {
        Trouble::new(
            format!("it is bound to {what}, and the kernel shows no more of that"),
            "dump when the task has unbound it",
        )
    })
}

/// The queue or log of netfilter that belongs to a port.
fn owned_by(port: u32) -> Option<String> {
    let read =
        |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/netfilter/{name}"));
    let queue = owner_line(&read("nfnetlink_queue").unwrap_or_default(), port);
    let log = || owner_line(&read("nfnetlink_log").unwrap_or_default(), port);
    let queue = queue.map(|number| format!("queue {number} of netfilter"));
    queue.or_else(|| log().map(|number| format!("log group {number} of netfilter")))
}

/// The first number of the line whose second is the port.
fn owner_line(text: &str, port: u32) -> Option<u32> {
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<u32>().ok());
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let first = number(words.next())?;
        (number(words.next()) == Some(port)).then_some(first)
    })
}

/// Where a socket is, whom it talks to, and what it listens to.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    port: u32,
    peer_port: u32,
    /// A bit per group, without empty words at the end.
    groups: Vec<u32>,
}

impl Place {
    fn read(fd: BorrowedFd<'_>) -> Result<Place> {
        let port = |raw: Vec<u8>| -> Result<u32> {
            let bytes = raw.get(4..8).ok_or(Errno::EINVAL)?;
            Ok(u32::from_ne_bytes(bytes.try_into().expect("four bytes")))
        };
        let name = NETLINK_LIST_MEMBERSHIPS;
        let bytes = socket::option(fd, SOL_NETLINK, name, MAX_GROUPS / 8)?;
        let words = bytes.chunks_exact(4);
        let mut groups: Vec<u32> = words
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
            .collect();
        let used = groups.iter().rposition(|word| *word != 0);
        groups.truncate(used.map_or(0, |last| last + 1));
        Ok(Place {
            port: port(socket::local_address(fd)?)?,
            peer_port: port(socket::peer_address(fd)?)?,
            groups,
        })
    }
}

fn address(port: u32, groups: u32) -> Vec<u8> {
    let family = u16::try_from(AF_NETLINK).expect("small");
    let mut raw = family.to_ne_bytes().to_vec();
    raw.extend([0; 2]);
    raw.extend(port.to_ne_bytes());
    raw.extend(groups.to_ne_bytes());
    raw
}

fn open_again(
    entry: &NetlinkSkEntry,
    losses: &mut Vec<String>,
) -> std::result::Result<OwnedFd, FileRestoreError> {
    let name = shown(entry);
    let refused = |action| FileRestoreError::refused(action, name.clone());
    let kind = entry.firn.and_then(|firn| firn.r#type);
    let kind = kind.map_or(SOCK_RAW, u32::cast_signed);
    let fd = socket::create(AF_NETLINK, kind, entry.protocol.cast_signed())
        .map_err(refused("create"))?;
    options::restore_early(&fd, &entry.opts, &name)?;
    if entry.portid != 0 {
        let lost = bind(&fd, entry.portid, &name).map_err(refused("bind"))?;
        losses.extend(lost);
    }
    for group in numbers(&entry.groups) {
        let name = NETLINK_ADD_MEMBERSHIP;
        socket::set_option(&fd, SOL_NETLINK, name, &group.to_ne_bytes())
            .map_err(refused("join a group with"))?;
    }
    if entry.state == CONNECTED {
        let group = match entry.dst_group {
            0 => 0,
            group @ 1..=GROUPS_OF_ADDRESS => 1 << (group - 1),
            _ => return Err(FileRestoreError::corrupt(entry.id, "its peer is no group")),
        };
        socket::connect(&fd, &address(entry.dst_portid, group)).map_err(refused("connect"))?;
    }
    options::restore_late(&fd, &entry.opts, &name)?;
    open::set_flags(&fd, entry.flags, &name)?;
    Ok(fd)
}

/// Numbers of the groups in a mask.
fn numbers(groups: &[u32]) -> impl Iterator<Item = u32> {
    let words = groups.iter().take(MAX_GROUPS / 32).zip(0u32..);
    words.flat_map(|(word, at)| {
        let bits = (0..32).filter(move |bit| word & 1 << bit != 0);
        bits.map(move |bit| at * 32 + bit + 1)
    })
}

/// Binds to the old port, or to any where that is taken: the kernel chose it, and few ask for it.
fn bind(fd: impl AsFd, port: u32, name: &str) -> Result<Option<String>> {
    let fd = fd.as_fd();
    match socket::bind(fd, &address(port, 0)) {
        Err(Errno::EADDRINUSE) => {
            socket::bind(fd, &address(0, 0))?;
            Ok(Some(format!("{name} has another port: {port} is taken")))
        }
        result => result.map(|()| None),
    }
}

/// A socket in words.
pub(super) fn shown(entry: &NetlinkSkEntry) -> String {
    let protocol = match entry.protocol {
        0 => "route",
        2 => "user",
        4 => "sock_diag",
        6 => "xfrm",
        9 => "audit",
        11 => "connector",
        12 => "netfilter",
        15 => "uevent",
        16 => "generic",
        number => return format!("netlink socket {} of protocol {number}", entry.portid),
    };
    format!("netlink {protocol} socket {}", entry.portid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_numbered_from_one() {
        let all: Vec<u32> = numbers(&[0x8000_0001, 0, 2]).collect();
        assert_eq!(all, [1, 32, 66]);
    }

    #[test]
    fn places_are_read_and_taken_again() {
        let entry = |port| NetlinkSkEntry {
            portid: port,
            groups: vec![1 << 4, 1],
            state: CONNECTED,
            ..NetlinkSkEntry::default()
        };
        let opts = |fd: &OwnedFd| {
            let kind = kind_of(fd).expect("a socket");
            options::dump(
                fd,
                kind,
                true,
                &mut super::super::extra::Defaults::default(),
            )
        };
        let first = socket::create(AF_NETLINK, SOCK_RAW, 0).expect("a socket");
        let entry = NetlinkSkEntry {
            opts: opts(&first).expect("readable"),
            ..entry(0x7f00_0000 | std::process::id())
        };
        let mut losses = Vec::new();
        let fd = open_again(&entry, &mut losses).expect("a free port");
        assert!(losses.is_empty());
        let place = Place::read(fd.as_fd()).expect("readable");
        assert_eq!((place.port, place.peer_port), (entry.portid, 0));
        assert_eq!(place.groups, entry.groups);
        let other = open_again(&entry, &mut losses).expect("any port");
        assert_eq!(losses.len(), 1);
        assert_ne!(
            Place::read(other.as_fd()).expect("readable").port,
            entry.portid
        );
    }

    #[test]
    fn owners_of_queues_are_found() {
        let text =
            "    0  31589     0 2  4016     0     0        0  1\n    7     12     0 2  4016\n";
        assert_eq!(owner_line(text, 12), Some(7));
        assert_eq!(owner_line(text, 7), None);
    }

    #[test]
    fn unread_messages_and_errors_refuse() {
        let idle = NetlinkSocket::default();
        let why = |waiting| trouble(0, 1, &idle, waiting).map(|trouble| trouble.reason);
        assert_eq!(why((false, false)), None);
        assert!(why((true, false)).is_some_and(|why| why.starts_with("messages")));
        assert!(why((true, true)).is_some_and(|why| why.contains("ENOBUFS")));
        let answered = NetlinkSocket {
            is_answered: true,
            ..idle
        };
        assert!(trouble(0, 1, &answered, (false, false)).is_some());
    }
}
