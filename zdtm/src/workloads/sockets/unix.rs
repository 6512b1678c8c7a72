//! Connected unix sockets.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static PAIRS: Workload = Workload::new(
    "sockets/unix-pairs",
    "pairs of all types with messages in both directions",
    pairs,
);
pub static LISTENING: Workload = Workload::new(
    "sockets/unix-listening",
    "a server with accepted connections and one that waits",
    listening,
);
pub static HALF: Workload = Workload::new(
    "sockets/unix-half",
    "connections that are shut down or whose other end is closed",
    half,
);
pub static RESET: Workload = Workload::new(
    "sockets/unix-reset",
    "connections whose other end has been closed with something unread in it",
    reset,
);
pub static ACROSS: Workload = Workload::new(
    "sockets/unix-across",
    "a ring of tasks connected by sockets",
    across,
);
pub static OPTIONS: Workload = Workload::new(
    "sockets/unix-options",
    "options, buffer sizes and a filter",
    options,
)
.needs(&[Need::Root]);
pub static PEERS: Workload = Workload::new(
    "sockets/unix-peers",
    "credentials of peers: pairs, clients and servers of other tasks",
    peers,
);

const TYPES: [i32; 3] = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET];

fn message(fd: impl AsFd) -> Result<Vec<u8>> {
    Ok(sys::receive_message(fd, 1 << 17, libc::MSG_DONTWAIT)?.bytes)
}

fn is_empty(fd: impl AsFd) -> bool {
    let error = sys::receive_message(fd, 1, libc::MSG_DONTWAIT).err();
    error.and_then(|error| error.raw_os_error()) == Some(libc::EAGAIN)
}

fn pairs(stage: &Stage) -> Result<()> {
    let large: Vec<u8> = (0..70_000u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    let mut made = Vec::new();
    for kind in TYPES {
        let (one, other) = sys::socket_pair(kind)?;
        sys::write(&one, b"to other")?;
        sys::write(&one, &large)?;
        sys::write(&other, b"back")?;
        made.push((kind, one, other));
    }
    stage.ready_and_wait()?;
    for (kind, one, other) in made {
        if kind == libc::SOCK_STREAM {
            let all = sys::read_exact(&other, 8 + large.len())?;
            ensure!(all[8..] == large, "a stream has changed");
        } else {
            ensure!(
                message(&other)? == b"to other",
                "the first message has changed"
            );
            ensure!(message(&other)? == large, "the second message has changed");
        }
        ensure!(message(&one)? == b"back", "the way back has changed");
        ensure!(
            is_empty(&one) && is_empty(&other),
            "there is something left"
        );
        sys::write(&one, b"more")?;
        ensure!(message(&other)? == b"more", "what is sent does not arrive");
        ensure!(
            sys::sockopt_int(&one, libc::SOL_SOCKET, libc::SO_TYPE)? == kind,
            "another type"
        );
    }
    Ok(())
}

fn listening(stage: &Stage) -> Result<()> {
    let path = stage.path("server");
    let server = UnixListener::bind(&path)?;
    let mut accepted = Vec::new();
    for number in 0..3u8 {
        let mut client = UnixStream::connect(&path)?;
        let (mut end, _) = server.accept()?;
        client.write_all(&[number, 1])?;
        end.write_all(&[number, 2])?;
        accepted.push((client, end));
    }
    let mut waiting = UnixStream::connect(&path)?;
    let silent = sys::socket_of(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    sys::bind(&silent, &sys::unix_address(b"\0firn-zdtm-silent"))?;
    sys::listen(&silent, 3)?;
    stage.ready_and_wait()?;
    for (number, (client, end)) in (0..).zip(&mut accepted) {
        let mut bytes = [0; 2];
        end.read_exact(&mut bytes)?;
        ensure!(bytes == [number, 1], "a request has changed: {bytes:?}");
        client.read_exact(&mut bytes)?;
        ensure!(bytes == [number, 2], "an answer has changed: {bytes:?}");
        let name = end.local_addr()?;
        ensure!(
            name.as_pathname() == Some(&path),
            "the accepted end is called {name:?}"
        );
        ensure!(
            client.peer_addr()?.as_pathname() == Some(&path),
            "the peer has another name"
        );
    }
    let (mut end, _) = server.accept().context("the connection that waited")?;
    waiting.write_all(b"late")?;
    let mut bytes = [0; 4];
    end.read_exact(&mut bytes)?;
    ensure!(&bytes == b"late", "the late connection leads elsewhere");
    let client = UnixStream::connect(&path).context("a new client")?;
    drop(server.accept()?);
    drop(client);
    let client = sys::socket_of(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    sys::connect(&client, &sys::unix_address(b"\0firn-zdtm-silent"))?;
    let end = sys::accept(&silent)?;
    sys::write(&client, b"packet")?;
    ensure!(message(&end)? == b"packet", "the other server is deaf");
    Ok(())
}

fn reset(stage: &Stage) -> Result<()> {
    let left_by_peer = |kind: i32, last: &[u8]| -> Result<OwnedFd> {
        let (own, gone) = sys::socket_pair(kind)?;
        sys::write(&own, b"unread")?;
        if !last.is_empty() {
            sys::write(&gone, last)?;
        }
        Ok(own)
    };
    let silent = left_by_peer(libc::SOCK_STREAM, b"")?;
    let packets = left_by_peer(libc::SOCK_SEQPACKET, b"")?;
    let spoken = left_by_peer(libc::SOCK_STREAM, b"last words")?;
    stage.ready_and_wait()?;
    let said = sys::read_exact(&spoken, 10)?;
    ensure!(said == b"last words", "the closed end said {said:?}");
    for fd in [silent, packets, spoken] {
        let error = sys::read_exact(&fd, 1).err();
        let error = error.and_then(|error| error.raw_os_error());
        ensure!(error == Some(libc::ECONNRESET), "errno is {error:?}");
        let ends = sys::receive_message(&fd, 1, 0)?;
        ensure!(ends.bytes.is_empty(), "it goes on with {:?}", ends.bytes);
    }
    Ok(())
}

fn half(stage: &Stage) -> Result<()> {
    sys::set_action(libc::SIGPIPE, libc::SIG_IGN, 0)?;
    let (writes_no_more, mut reader) = UnixStream::pair()?;
    (&writes_no_more).write_all(b"last words")?;
    (&reader).write_all(b"still heard")?;
    writes_no_more.shutdown(std::net::Shutdown::Write)?;
    let (orphan, gone) = UnixStream::pair()?;
    (&gone).write_all(b"testament")?;
    drop(gone);
    let (packets, gone) = sys::socket_pair(libc::SOCK_SEQPACKET)?;
    sys::write(&gone, b"one")?;
    sys::write(&gone, b"two")?;
    drop(gone);
    let path = stage.path("half-server");
    let server = UnixListener::bind(&path)?;
    let client = UnixStream::connect(&path)?;
    let (accepted, _) = server.accept()?;
    (&client).write_all(b"goodbye")?;
    drop(client);
    stage.ready_and_wait()?;
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    ensure!(text == "last words", "the shut down end said {text:?}");
    ensure!(
        sys::read_exact(&writes_no_more, 11)? == b"still heard",
        "the way back has changed"
    );
    ensure!(
        (&writes_no_more).write(b"x").is_err(),
        "a shut down end can write"
    );
    (&reader).write_all(b"yes")?;
    ensure!(
        sys::read_exact(&writes_no_more, 3)? == b"yes",
        "the open direction is shut"
    );
    text.clear();
    (&orphan).read_to_string(&mut text)?;
    ensure!(text == "testament", "the closed end said {text:?}");
    let error = (&orphan)
        .write(b"x")
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(
        error == Some(libc::EPIPE),
        "writing to nobody gave {error:?}"
    );
    ensure!(
        message(&packets)? == b"one" && message(&packets)? == b"two",
        "packets have changed"
    );
    ensure!(message(&packets)?.is_empty(), "no end of packets");
    text.clear();
    (&accepted).read_to_string(&mut text)?;
    ensure!(text == "goodbye", "the client said {text:?}");
    ensure!(
        accepted.local_addr()?.as_pathname() == Some(&path),
        "the accepted end lost its name"
    );
    Ok(())
}

/// Each task adds one to what it gets and passes it on, through connections of all types in turn.
fn across(stage: &Stage) -> Result<()> {
    const TASKS: usize = 6;
    const END: u8 = 255;
    let mut pairs: Vec<Option<(OwnedFd, OwnedFd)>> = (0..=TASKS)
        .map(|nth| Ok(Some(sys::socket_pair(TYPES[nth % 3])?)))
        .collect::<Result<_>>()?;
    let mut children = Vec::new();
    for index in 0..TASKS {
        let pairs = &mut pairs;
        children.push(stage.child(move |stage| {
            let (_, reader) = pairs[index].take().context("own pair")?;
            let (writer, _) = pairs[index + 1].take().context("next pair")?;
            pairs.clear();
            stage.ready()?;
            let mut byte = [0];
            while byte[0] != END {
                sys::read(&reader, &mut byte)?;
                byte[0] += u8::from(byte[0] != END);
                sys::write(&writer, &byte)?;
            }
            Ok(())
        })?);
    }
    let (first, _) = pairs[0].take().context("the first pair")?;
    let (_, last) = pairs[TASKS].take().context("the last pair")?;
    drop(pairs);
    sys::write(&first, &[10])?;
    stage.ready_and_wait()?;
    sys::write(&first, &[20])?;
    let found = [sys::read_exact(&last, 1)?, sys::read_exact(&last, 1)?].concat();
    ensure!(found == [16, 26], "the ring gave {found:?}, not 16 and 26");
    sys::write(&first, &[END])?;
    children.into_iter().try_for_each(|child| child.reap())
}

fn options(stage: &Stage) -> Result<()> {
    let (one, other) = sys::socket_pair(libc::SOCK_STREAM)?;
    let numbers = [
        (libc::SO_SNDBUF, 30_000),
        (libc::SO_RCVBUF, 50_000),
        (libc::SO_PRIORITY, 5),
        (libc::SO_RCVLOWAT, 3),
        (libc::SO_PASSCRED, 1),
        (libc::SO_TIMESTAMP, 1),
        (libc::SO_MARK, 77),
    ];
    for (name, value) in numbers {
        sys::set_sockopt_int(&one, libc::SOL_SOCKET, name, value)?;
    }
    let time = [9u64.to_ne_bytes(), 250_000u64.to_ne_bytes()].concat();
    sys::set_sockopt(&one, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &time)?;
    let read = |fd: &OwnedFd| -> Result<Vec<Vec<u8>>> {
        let names = numbers
            .iter()
            .map(|(name, _)| *name)
            .chain([libc::SO_RCVTIMEO]);
        names
            .map(|name| Ok(sys::sockopt(fd, libc::SOL_SOCKET, name)?))
            .collect()
    };
    let before = (read(&one)?, read(&other)?);
    stage.ready_and_wait()?;
    let after = (read(&one)?, read(&other)?);
    ensure!(before == after, "options were {before:?}, are {after:?}");
    Ok(())
}

fn peer_of(fd: impl AsFd) -> Result<Vec<u8>> {
    Ok(sys::sockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?)
}

fn peers(stage: &Stage) -> Result<()> {
    let path = stage.path("peers");
    let server = UnixListener::bind(&path)?;
    let (pair, _other) = sys::socket_pair(libc::SOCK_STREAM)?;
    let child = stage.child(|stage| {
        let client = UnixStream::connect(&path)?;
        stage.ready()?;
        let before = peer_of(&client)?;
        stage.wait();
        ensure!(peer_of(&client)? == before, "the client has another server");
        Ok(())
    })?;
    let (accepted, _) = server.accept()?;
    let word = |bytes: Vec<u8>| i32::from_ne_bytes(bytes[..4].try_into().expect("four bytes"));
    let before = [
        word(peer_of(&pair)?),
        word(peer_of(&accepted)?),
        word(peer_of(&server)?),
    ];
    ensure!(
        before == [sys::pid(), child.pid, sys::pid()],
        "unexpected peers {before:?}"
    );
    stage.ready_and_wait()?;
    let after = [
        word(peer_of(&pair)?),
        word(peer_of(&accepted)?),
        word(peer_of(&server)?),
    ];
    ensure!(before == after, "peers were {before:?}, are {after:?}");
    child.finish()
}
