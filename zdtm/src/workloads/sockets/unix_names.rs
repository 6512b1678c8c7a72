//! Names of unix sockets.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use anyhow::{Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static NAMES: Workload = Workload::new(
    "sockets/unix-names",
    "paths, relative ones, abstract names, automatic ones and bound clients",
    names,
);
pub static FILES: Workload = Workload::new(
    "sockets/unix-files",
    "files of sockets: owner, removed, replaced by another socket",
    files,
)
.needs(&[Need::Root]);
pub static DATAGRAMS: Workload = Workload::new(
    "sockets/unix-datagrams",
    "datagram sockets that are connected in one direction, in a chain and to a dead peer",
    datagrams,
);

pub static MANY: Workload = Workload::new(
    "sockets/unix-many",
    "a chain of thousands of datagram sockets, and thousands of ends accepted by one listener",
    many,
);

fn bound(kind: i32, name: &[u8]) -> Result<OwnedFd> {
    let socket = sys::socket_of(libc::AF_UNIX, kind, 0)?;
    sys::bind(&socket, &sys::unix_address(name))?;
    Ok(socket)
}

fn names(stage: &Stage) -> Result<()> {
    let relative = bound(libc::SOCK_DGRAM, b"relative")?;
    let closed = bound(libc::SOCK_STREAM, b"\0firn-zdtm-closed")?;
    let automatic = bound(libc::SOCK_DGRAM, b"")?;
    let server = bound(libc::SOCK_STREAM, b"\0firn-zdtm-server")?;
    sys::listen(&server, 5)?;
    let client = bound(libc::SOCK_STREAM, b"client")?;
    sys::connect(&client, &sys::unix_address(b"\0firn-zdtm-server"))?;
    let accepted = sys::accept(&server)?;
    // A name that several ends share while nobody listens there any more.
    let gone = bound(libc::SOCK_STREAM, b"\0firn-zdtm-gone")?;
    sys::listen(&gone, 5)?;
    let mut orphans = Vec::new();
    for _ in 0..2 {
        let client = sys::socket_of(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        sys::connect(&client, &sys::unix_address(b"\0firn-zdtm-gone"))?;
        orphans.push((client, sys::accept(&gone)?));
    }
    drop(gone);
    let mut all = vec![&relative, &closed, &automatic, &server, &client, &accepted];
    all.extend(orphans.iter().flat_map(|(client, end)| [client, end]));
    let read = || -> Result<Vec<Vec<u8>>> {
        all.iter()
            .map(|socket| Ok(sys::socket_name(socket)?))
            .collect()
    };
    let before = read()?;
    stage.ready_and_wait()?;
    let after = read()?;
    ensure!(before == after, "names were {before:?}, are {after:?}");
    ensure!(
        sys::peer_name(&accepted)? == sys::socket_name(&client)?,
        "the client has lost its name"
    );
    sys::send_message(
        &automatic,
        b"to relative",
        Some(&sys::unix_address(b"relative")),
        &[],
    )?;
    let got = sys::receive_message(&relative, 100, libc::MSG_DONTWAIT)?;
    ensure!(
        got.bytes == b"to relative" && got.sender == before[2],
        "got {got:?}"
    );
    for (client, end) in &orphans {
        sys::write(client, b"here")?;
        ensure!(
            sys::read_exact(end, 4)? == b"here",
            "an end leads elsewhere"
        );
    }
    sys::listen(&closed, 1)?;
    let late = sys::socket_of(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    sys::connect(&late, &sys::unix_address(b"\0firn-zdtm-closed"))?;
    Ok(())
}

fn files(stage: &Stage) -> Result<()> {
    let owned = stage.path("owned");
    let _owned = UnixListener::bind(&owned)?;
    std::fs::set_permissions(&owned, PermissionsExt::from_mode(0o640))?;
    std::os::unix::fs::chown(&owned, Some(12), Some(34))?;
    let removed = stage.path("removed");
    let no_file = UnixDatagram::bind(&removed)?;
    let knows_it = UnixDatagram::unbound()?;
    knows_it.connect(&removed)?;
    std::fs::remove_file(&removed)?;
    let replaced = stage.path("replaced");
    let old = UnixListener::bind(&replaced)?;
    let old_client = UnixStream::connect(&replaced)?;
    std::fs::remove_file(&replaced)?;
    let new = UnixListener::bind(&replaced)?;
    stage.ready_and_wait()?;
    let meta = std::fs::metadata(&owned)?;
    let is = (
        meta.mode() & 0o7777,
        meta.uid(),
        meta.gid(),
        meta.file_type().is_socket(),
    );
    ensure!(is == (0o640, 12, 34, true), "the file is {is:?}");
    ensure!(!removed.exists(), "a removed file has come back");
    ensure!(
        no_file.local_addr()?.as_pathname() == Some(&removed),
        "its name is lost"
    );
    knows_it.send(b"still there?")?;
    let mut bytes = [0; 20];
    ensure!(no_file.recv(&mut bytes)? == 12, "the message is cut");
    drop(old.accept()?);
    drop(old_client);
    let client = UnixStream::connect(&replaced)?;
    drop(new.accept()?);
    drop(client);
    Ok(())
}

fn datagrams(stage: &Stage) -> Result<()> {
    let path = |name| stage.path(name);
    let last = UnixDatagram::bind(path("last"))?;
    let middle = UnixDatagram::bind(path("middle"))?;
    let first = UnixDatagram::unbound()?;
    first.connect(path("middle"))?;
    middle.connect(path("last"))?;
    let (widow, dead) = UnixDatagram::pair()?;
    dead.send(b"farewell")?;
    drop(dead);
    let unconnected = UnixDatagram::unbound()?;
    stage.ready_and_wait()?;
    let error = first_error(first.send(b"1"));
    ensure!(
        error == Some(libc::EPERM),
        "a socket with a peer takes others: {error:?}"
    );
    middle.send(b"2")?;
    let mut bytes = [0; 20];
    ensure!(
        last.recv(&mut bytes)? == 1 && bytes[0] == b'2',
        "the last got {bytes:?}"
    );
    let error = first_error(unconnected.send(b"x"));
    ensure!(
        error == Some(libc::ENOTCONN),
        "an unconnected socket sends: {error:?}"
    );
    ensure!(
        widow.recv(&mut bytes)? == 8 && bytes.starts_with(b"farewell"),
        "got {bytes:?}"
    );
    let error = first_error(widow.send(b"x"));
    ensure!(
        error == Some(libc::ECONNREFUSED),
        "sending to the dead: {error:?}"
    );
    ensure!(
        sys::peer_name(first.as_fd())? == sys::socket_name(&middle)?,
        "another peer"
    );
    Ok(())
}

fn first_error<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn many(stage: &Stage) -> Result<()> {
    const LINKS: usize = 3000;
    const CLIENTS: usize = 2000;
    let name = |nr: usize| format!("\0firn-zdtm-link-{nr}").into_bytes();
    let (_, hard) = sys::limit(libc::RLIMIT_NOFILE)?;
    sys::set_limit(libc::RLIMIT_NOFILE, hard, hard)?;
    let chain: Vec<OwnedFd> = (0..LINKS)
        .map(|nr| bound(libc::SOCK_DGRAM, &name(nr)))
        .collect::<Result<_>>()?;
    // A socket that has a peer takes no other: the end of the chain comes first.
    for (nr, pair) in chain.windows(2).enumerate().rev() {
        sys::connect(&pair[1], &sys::unix_address(&name(nr)))?;
    }
    let server = bound(libc::SOCK_STREAM, b"\0firn-zdtm-many")?;
    sys::listen(&server, 5)?;
    let mut connections = Vec::new();
    for _ in 0..CLIENTS {
        let client = sys::socket_of(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        sys::connect(&client, &sys::unix_address(b"\0firn-zdtm-many"))?;
        connections.push((client, sys::accept(&server)?));
    }
    stage.ready_and_wait()?;
    for (nr, pair) in chain.windows(2).enumerate() {
        let peer = sys::peer_name(&pair[1])?;
        ensure!(
            peer == sys::unix_address(&name(nr)),
            "link {nr} leads to {peer:?}"
        );
    }
    for (nr, (client, end)) in connections.iter().enumerate() {
        sys::write(client, &nr.to_ne_bytes())?;
        ensure!(
            sys::read_exact(end, size_of::<usize>())? == nr.to_ne_bytes(),
            "client {nr} leads elsewhere"
        );
    }
    Ok(())
}
