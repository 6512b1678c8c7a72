//! Netlink sockets.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static PLACES: Workload = Workload::new(
    "sockets/netlink-places",
    "netlink sockets of several protocols with ports, groups, peers and options",
    places,
)
.needs(&[Need::Root]);
pub static EVENTS: Workload = Workload::new(
    "sockets/netlink-events",
    "members of groups who hear of changes after the restore, one through a filter",
    events,
)
.needs(&[Need::Root]);
pub static PEERS: Workload = Workload::new(
    "sockets/netlink-peers",
    "two tasks that talk over netlink",
    peers,
);
pub static UNREAD: Workload = Workload::new(
    "sockets/netlink-unread",
    "a netlink socket with an answer that nobody has read",
    unread,
)
.refused(&["messages of the kernel wait in it", "NETLINK"]);

const SOL_NETLINK: i32 = 270;
const ADD_MEMBERSHIP: i32 = 1;
const LIST_MEMBERSHIPS: i32 = 9;
/// PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK.
const FLAGS: [i32; 7] = [3, 4, 5, 8, 10, 11, 12];
const ROUTE: i32 = libc::NETLINK_ROUTE;
const LINK_GROUP: u32 = 1;
/// A group beyond those that an address has room for: changes of VLANs of bridges.
const FAR_GROUP: u32 = 33;

fn address(port: u32, groups: u32) -> Vec<u8> {
    let family = u16::try_from(libc::AF_NETLINK)
        .expect("small")
        .to_ne_bytes();
    let (port, groups) = (port.to_ne_bytes(), groups.to_ne_bytes());
    [&family[..], &[0; 2], &port, &groups].concat()
}

fn join(fd: impl AsFd, group: u32) -> Result<()> {
    let group = group.cast_signed();
    sys::set_sockopt_int(fd, SOL_NETLINK, ADD_MEMBERSHIP, group).context("joining a group")
}

/// A request for all interfaces, or for what else a dump of `kind` gives.
fn request(kind: u16, seq: u32) -> Vec<u8> {
    const REQUEST_ALL: u16 = 0x301;
    let mut bytes = 20u32.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(REQUEST_ALL.to_ne_bytes());
    bytes.extend(seq.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes
}

/// Its address, its peer's, its groups, its options.
type Seen = (Vec<u8>, Vec<u8>, Vec<u8>, Vec<i32>);

/// What a program can ask a socket about itself.
fn seen(fd: &OwnedFd) -> Result<Seen> {
    let groups = sys::sockopt(fd, SOL_NETLINK, LIST_MEMBERSHIPS)?;
    let mut options = Vec::new();
    for name in FLAGS {
        options.push(sys::sockopt_int(fd, SOL_NETLINK, name)?);
    }
    for name in [
        libc::SO_TYPE,
        libc::SO_PROTOCOL,
        libc::SO_PASSCRED,
        libc::SO_RCVBUF,
    ] {
        options.push(sys::sockopt_int(fd, libc::SOL_SOCKET, name)?);
    }
    Ok((sys::socket_name(fd)?, sys::peer_name(fd)?, groups, options))
}

fn places(stage: &Stage) -> Result<()> {
    let (raw, datagram) = (libc::SOCK_RAW, libc::SOCK_DGRAM);
    let make = |kind, protocol| sys::socket_of(libc::AF_NETLINK, kind, protocol);
    let sockets = [
        make(raw, ROUTE)?,
        make(datagram, ROUTE)?,
        make(raw, ROUTE)?,
        make(raw, libc::NETLINK_SOCK_DIAG)?,
        make(datagram, libc::NETLINK_KOBJECT_UEVENT)?,
        make(raw, libc::NETLINK_GENERIC)?,
        make(raw, libc::NETLINK_NETFILTER)?,
        make(raw, libc::NETLINK_ROUTE)?,
    ];
    let [
        unbound,
        any,
        chosen,
        diag,
        uevent,
        generic,
        netfilter,
        listener,
    ] = &sockets;
    sys::bind(any, &address(0, 0))?;
    sys::bind(chosen, &address(0x1234_5678, 1 << 4))?;
    join(chosen, FAR_GROUP)?;
    sys::connect(diag, &address(0, 0))?;
    sys::bind(uevent, &address(0, 2))?;
    sys::set_sockopt_int(uevent, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    sys::set_sockopt_int(uevent, libc::SOL_SOCKET, libc::SO_RCVBUF, 70_000)?;
    sys::bind(generic, &address(0, 1 << 15))?;
    for name in FLAGS {
        sys::set_sockopt_int(netfilter, SOL_NETLINK, name, 1).context("setting an option")?;
    }
    // A member without a port.
    join(listener, FAR_GROUP)?;
    sys::set_sockopt_int(unbound, SOL_NETLINK, FLAGS[5], 1)?;
    let look = || sockets.iter().map(seen).collect::<Result<Vec<_>>>();
    let before = look()?;
    stage.ready_and_wait()?;
    let after = look()?;
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        ensure!(before == after, "socket {at} was {before:?}, is {after:?}");
    }
    for fd in [any, chosen, unbound] {
        sys::send_message(
            fd,
            &request(libc::RTM_GETLINK, 77),
            Some(&address(0, 0)),
            &[],
        )?;
        let answer = sys::receive_message(fd, 1 << 16, 0)?;
        let kind = answer.bytes.get(4..6).context("a short answer")?;
        ensure!(
            kind == libc::RTM_NEWLINK.to_ne_bytes(),
            "the answer is {:?}",
            answer.bytes
        );
        ensure!(
            answer.sender == address(0, 0),
            "it comes from {:?}",
            answer.sender
        );
    }
    Ok(())
}

fn events(stage: &Stage) -> Result<()> {
    let route = || sys::socket_of(libc::AF_NETLINK, libc::SOCK_RAW, ROUTE);
    let (plain, deaf, far) = (route()?, route()?, route()?);
    for fd in [&plain, &deaf] {
        sys::bind(fd, &address(0, 1 << (LINK_GROUP - 1)))?;
    }
    sys::bind(&far, &address(0, 0))?;
    join(&far, LINK_GROUP)?;
    sys::attach_filter(&deaf, &[(6, 0, 0, 0)]).context("a filter that drops all")?;
    stage.ready_and_wait()?;
    // An interface changes.
    sys::set_mtu("lo", 40_000).context("setting the size of packets of lo")?;
    for fd in [&plain, &far] {
        let event = sys::receive_message(fd, 1 << 16, libc::MSG_DONTWAIT).context("an event")?;
        let kind = event.bytes.get(4..6).context("a short event")?;
        ensure!(
            kind == libc::RTM_NEWLINK.to_ne_bytes(),
            "the event is {:?}",
            event.bytes
        );
    }
    let heard = sys::receive_message(&deaf, 1 << 16, libc::MSG_DONTWAIT);
    ensure!(heard.is_err(), "the filter has let {heard:?} pass");
    Ok(())
}

fn peers(stage: &Stage) -> Result<()> {
    let user = || sys::socket_of(libc::AF_NETLINK, libc::SOCK_DGRAM, libc::NETLINK_USERSOCK);
    let own = user()?;
    sys::bind(&own, &address(4711, 0))?;
    let other = user()?;
    sys::bind(&other, &address(4712, 0))?;
    let child = stage.child(|stage| {
        sys::connect(&other, &address(4711, 0))?;
        stage.ready_and_wait()?;
        ensure!(
            sys::peer_name(&other)? == address(4711, 0),
            "the peer is lost"
        );
        sys::write(&other, b"from the child")?;
        let heard = sys::receive_message(&other, 100, 0)?;
        ensure!(heard.bytes == b"from the parent", "heard {heard:?}");
        Ok(())
    })?;
    stage.ready_and_wait()?;
    sys::send_message(&own, b"from the parent", Some(&address(4712, 0)), &[])?;
    sys::kill(child.pid, libc::SIGTERM)?;
    let heard = sys::receive_message(&own, 100, 0)?;
    ensure!(heard.bytes == b"from the child", "heard {heard:?}");
    ensure!(
        heard.sender == address(4712, 0),
        "it comes from {:?}",
        heard.sender
    );
    child.reap()
}

fn unread(stage: &Stage) -> Result<()> {
    let fd = sys::socket_of(libc::AF_NETLINK, libc::SOCK_RAW, ROUTE)?;
    sys::send_message(
        &fd,
        &request(libc::RTM_GETLINK, 5),
        Some(&address(0, 0)),
        &[],
    )?;
    stage.ready_and_wait()?;
    let answer = sys::receive_message(&fd, 1 << 16, 0)?;
    ensure!(
        answer.bytes.get(8..12) == Some(&5u32.to_ne_bytes()[..]),
        "{:?}",
        answer.bytes
    );
    Ok(())
}
