//! Packet sockets on the loopback interface.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::sys::Region;
use crate::{Need, Stage, Workload, sys};

pub static CAPTURE: Workload = Workload::new(
    "sockets/packet-capture",
    "packet sockets with interfaces, protocols, options, memberships and a filter",
    capture,
)
.needs(&[Need::Root]);
pub static RINGS: Workload = Workload::new(
    "sockets/packet-rings",
    "packet sockets with mapped rings of all versions, one shared with a child",
    rings,
)
.needs(&[Need::Root]);
pub static FANOUT: Workload = Workload::new(
    "sockets/packet-fanout",
    "packet sockets that share their frames",
    fanout,
)
.needs(&[Need::Root]);
pub static BY_PROGRAM: Workload = Workload::new(
    "sockets/packet-fanout-bpf",
    "a group of packet sockets that a BPF program chooses from",
    by_program,
)
.needs(&[Need::Root])
.refused(&["fanout group chooses by a BPF program"]);

pub(super) const SOL_PACKET: i32 = 263;
const ADD_MEMBERSHIP: i32 = 1;
pub(super) const RX_RING: i32 = 5;
pub(super) const TX_RING: i32 = 13;
pub(super) const VERSION: i32 = 10;
const FANOUT_GROUP: i32 = 18;
const FANOUT_DATA: i32 = 22;
/// AUXDATA, ORIGDEV, RESERVE, LOSS, VNET_HDR, TIMESTAMP, QDISC_BYPASS, IGNORE_OUTGOING, VERSION.
const OPTIONS: [i32; 9] = [8, 9, 12, 14, 15, 17, 20, 23, VERSION];
const ALL: u16 = 3;
pub(super) const IPV4: u16 = 0x800;
pub(super) const LO: u32 = 1;
const BLOCK: u32 = 1 << 16;
const FRAME: u32 = 1 << 11;
const BLOCKS: u32 = 4;

pub(super) fn address(index: u32, protocol: u16) -> Vec<u8> {
    let family = u16::try_from(libc::AF_PACKET).expect("small");
    let mut raw = family.to_ne_bytes().to_vec();
    raw.extend(protocol.to_be_bytes());
    raw.extend(index.to_ne_bytes());
    raw.resize(20, 0);
    raw
}

pub(super) fn packet_socket(kind: i32, protocol: u16) -> Result<OwnedFd> {
    let protocol = i32::from(protocol.to_be());
    sys::socket_of(libc::AF_PACKET, kind, protocol).context("making a packet socket")
}

/// A datagram with that text travels over lo.
pub(super) fn send(text: &[u8]) -> Result<()> {
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    sender.send_to(text, receiver.local_addr()?)?;
    receiver.recv(&mut [0; 100])?;
    Ok(())
}

/// Frames that have the text in them, among those that wait.
fn heard(fd: impl AsFd, text: &[u8]) -> usize {
    let next = || sys::receive_message(fd.as_fd(), 1 << 16, libc::MSG_DONTWAIT).ok();
    let all = std::iter::from_fn(next);
    all.filter(|frame| frame.bytes.ends_with(text)).count()
}

fn options(fd: impl AsFd) -> Result<Vec<i32>> {
    let fd = fd.as_fd();
    let all = OPTIONS.iter();
    all.map(|name| Ok(sys::sockopt_int(fd, SOL_PACKET, *name)?))
        .collect()
}

fn join(fd: impl AsFd, kind: u16, hardware: &[u8]) -> Result<()> {
    let mut request = LO.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(u16::try_from(hardware.len())?.to_ne_bytes());
    request.extend(hardware);
    request.resize(16, 0);
    sys::set_sockopt(fd, SOL_PACKET, ADD_MEMBERSHIP, &request).context("joining a group")
}

/// How many sockets want all frames of lo, as rtnetlink tells it.
fn promiscuity() -> Result<u32> {
    const IFLA_PROMISCUITY: u16 = 30;
    let fd = sys::socket_of(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    let mut request = 32u32.to_ne_bytes().to_vec();
    request.extend(libc::RTM_GETLINK.to_ne_bytes());
    request.extend(1u16.to_ne_bytes());
    request.extend([0; 12]);
    request.extend(LO.to_ne_bytes());
    request.resize(32, 0);
    let kernel = [16u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    sys::send_message(&fd, &request, Some(&kernel), &[])?;
    let answer = sys::receive_message(&fd, 1 << 16, 0)?.bytes;
    let mut rest = answer.get(32..).context("a short answer")?;
    while let [a, b, c, d, ..] = *rest {
        let len = usize::from(u16::from_ne_bytes([a, b]));
        if u16::from_ne_bytes([c, d]) == IFLA_PROMISCUITY {
            let value = rest.get(4..8).context("a short attribute")?;
            return Ok(u32::from_ne_bytes(value.try_into()?));
        }
        rest = rest.get(len.max(4).next_multiple_of(4)..).unwrap_or(&[]);
    }
    anyhow::bail!("no promiscuity in {} bytes", answer.len())
}

fn capture(stage: &Stage) -> Result<()> {
    let (raw, datagram) = (libc::SOCK_RAW, libc::SOCK_DGRAM);
    let all = packet_socket(raw, ALL)?;
    let ipv4 = packet_socket(datagram, 0)?;
    sys::bind(&ipv4, &address(LO, IPV4))?;
    let idle = packet_socket(raw, 0)?;
    let filtered = packet_socket(raw, ALL)?;
    sys::bind(&filtered, &address(LO, ALL))?;
    sys::attach_filter(&filtered, &[(6, 0, 0, 0)])?;
    let everywhere = packet_socket(datagram, IPV4)?;
    for (name, value) in OPTIONS.into_iter().zip([1, 1, 16, 1, 1, 32, 1, 1, 1]) {
        sys::set_sockopt_int(&all, SOL_PACKET, name, value).context("setting an option")?;
    }
    const PROMISC: u16 = 1;
    const UNICAST: u16 = 3;
    join(&all, PROMISC, &[])?;
    join(&all, PROMISC, &[])?;
    join(&ipv4, PROMISC, &[])?;
    join(&ipv4, UNICAST, &[2, 0, 0, 0, 0, 7])?;
    let sockets = [&all, &ipv4, &idle, &filtered, &everywhere];
    let look = || -> Result<(Vec<_>, u32)> {
        let each = sockets
            .iter()
            .map(|fd| Ok((options(fd)?, sys::socket_name(fd)?)));
        Ok((each.collect::<Result<Vec<_>>>()?, promiscuity()?))
    };
    let before = look()?;
    ensure!(before.1 == 3, "lo counts {} listeners", before.1);
    stage.ready_and_wait()?;
    let after = look()?;
    ensure!(before == after, "was {before:?}, is {after:?}");
    send(b"a datagram to be seen")?;
    let counts = sockets.map(|fd| heard(fd, b"a datagram to be seen"));
    // The first one ignores what goes out; the kernel shows it again when it comes in.
    ensure!(
        counts[2] == 0 && counts[3] == 0,
        "heard what is not theirs: {counts:?}"
    );
    for at in [0, 1, 4] {
        ensure!(counts[at] > 0, "socket {at} heard nothing: {counts:?}");
    }
    Ok(())
}

fn ring(fd: impl AsFd, name: i32, version: i32) -> Result<()> {
    let is_v3 = version == 2 && name == RX_RING;
    let timeout = if is_v3 { 10 } else { 0 };
    let words = [BLOCK, BLOCKS, FRAME, BLOCK / FRAME * BLOCKS, timeout, 0, 0];
    let request: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    sys::set_sockopt(fd, SOL_PACKET, name, &request).context("making a ring")
}

fn mapped(fd: impl AsFd, rings: u32) -> Result<Region> {
    let len = usize::try_from(BLOCK * BLOCKS * rings)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    Region::file(fd.as_fd(), len, prot, libc::MAP_SHARED).context("mapping a ring")
}

/// Waits until the text is somewhere in the ring.
fn arrives(region: &Region, text: &[u8]) -> Result<()> {
    let len = usize::try_from(BLOCK * BLOCKS)?;
    for _ in 0..200 {
        let bytes = region.get(0, len);
        if bytes.windows(text.len()).any(|window| window == text) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    anyhow::bail!("nothing comes into the ring")
}

/// Sends a frame through the ring behind the one for receiving.
fn transmit(fd: impl AsFd, region: &Region, text: &[u8]) -> Result<()> {
    /// Where the payload of a frame begins: behind `struct tpacket2_hdr`.
    const HEADER: usize = 32;
    const SEND_REQUEST: u32 = 1;
    let at = usize::try_from(BLOCK * BLOCKS)?;
    // Any kind of frame will do: addresses, a protocol for experiments, text.
    let frame = [&[0; 12][..], &[0x88, 0xb5], text].concat();
    region.put(at + HEADER, &frame);
    region.put(at + 4, &u32::try_from(frame.len())?.to_ne_bytes());
    region.put(at, &SEND_REQUEST.to_ne_bytes());
    sys::send_message(fd, b"", Some(&address(LO, 0x88b5)), &[]).context("sending")?;
    Ok(())
}

fn rings(stage: &Stage) -> Result<()> {
    let mut sockets = Vec::new();
    for version in [0, 1, 2] {
        let fd = packet_socket(libc::SOCK_RAW, 0)?;
        sys::set_sockopt_int(&fd, SOL_PACKET, VERSION, version)?;
        ring(&fd, RX_RING, version)?;
        let both = version == 1;
        if both {
            ring(&fd, TX_RING, version)?;
        }
        sys::bind(&fd, &address(LO, ALL))?;
        let region = mapped(&fd, if both { 2 } else { 1 })?;
        sockets.push((fd, region));
    }
    let unmapped = packet_socket(libc::SOCK_RAW, 0)?;
    ring(&unmapped, RX_RING, 0)?;
    sys::bind(&unmapped, &address(LO, ALL))?;
    let (_, shared) = &sockets[0];
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        arrives(shared, b"seen by both")
    })?;
    stage.ready_and_wait()?;
    send(b"seen by both")?;
    for (_, region) in &sockets {
        arrives(region, b"seen by both")?;
    }
    child.finish()?;
    let (fd, region) = &sockets[1];
    transmit(fd, region, b"through the ring")?;
    arrives(&sockets[2].1, b"through the ring")?;
    arrives(&mapped(&unmapped, 1)?, b"through the ring")
}

fn fanout(stage: &Stage) -> Result<()> {
    /// Group 4711, frames in turn.
    const IN_TURN: i32 = 1 << 16 | 4711;
    let mut group = Vec::new();
    for _ in 0..2 {
        let fd = packet_socket(libc::SOCK_DGRAM, 0)?;
        sys::bind(&fd, &address(LO, IPV4))?;
        sys::set_sockopt_int(&fd, SOL_PACKET, FANOUT_GROUP, IN_TURN)?;
        group.push(fd);
    }
    stage.ready_and_wait()?;
    for fd in &group {
        let own = sys::sockopt_int(fd, SOL_PACKET, FANOUT_GROUP)?;
        ensure!(own == IN_TURN, "the group is {own:#x}");
    }
    for _ in 0..6 {
        send(b"for one of two")?;
    }
    let counts: Vec<usize> = group
        .iter()
        .map(|fd| heard(fd, b"for one of two"))
        .collect();
    ensure!(
        counts.iter().sum::<usize>() == 6,
        "together they heard {counts:?}"
    );
    ensure!(
        counts.iter().all(|count| *count > 0),
        "one heard all: {counts:?}"
    );
    Ok(())
}

fn by_program(stage: &Stage) -> Result<()> {
    const BY_CLASSIC_BPF: i32 = 6 << 16 | 12;
    let fd = packet_socket(libc::SOCK_RAW, ALL)?;
    sys::set_sockopt_int(&fd, SOL_PACKET, FANOUT_GROUP, BY_CLASSIC_BPF)?;
    sys::set_program(&fd, SOL_PACKET, FANOUT_DATA, &[(6, 0, 0, 0)])?;
    stage.ready_and_wait()
}
