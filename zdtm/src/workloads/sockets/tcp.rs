//! TCP sockets, with both ends in the tree.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};

use crate::{Child, Stage, Workload, sys};

pub static LISTENING: Workload = Workload::new(
    "sockets/tcp-listening",
    "servers over IPv4, IPv6 and both, with options",
    listening,
);
pub static CONNECTED: Workload = Workload::new(
    "sockets/tcp-connected",
    "connections over IPv4, IPv6 and mapped addresses with bytes in both directions",
    connected,
);
pub static FULL: Workload = Workload::new(
    "sockets/tcp-full",
    "a connection whose queues are full",
    full,
);
pub static HALF: Workload = Workload::new(
    "sockets/tcp-half",
    "connections of which one or both directions are closed",
    half,
);
pub static ACROSS: Workload = Workload::new(
    "sockets/tcp-across",
    "a server task and clients that talk all the time",
    across,
)
.moves(&["syscall"]);
pub static CLOSED: Workload = Workload::new(
    "sockets/tcp-closed",
    "sockets that are bound, fresh, or whose connection has ended",
    closed,
);

pub static MANY: Workload = Workload::new(
    "sockets/tcp-many",
    "more connections of several processes than the engine may have descriptors",
    many,
)
.descriptor_limit(DESCRIPTORS);

/// What one process may have, and the engine.
const DESCRIPTORS: usize = 150;

const V4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

fn pair(address: SocketAddr) -> Result<(TcpStream, TcpStream)> {
    let server = TcpListener::bind(address)?;
    let client = TcpStream::connect(server.local_addr()?)?;
    Ok((server.accept()?.0, client))
}

fn exchange(mut one: &TcpStream, mut other: &TcpStream) -> Result<()> {
    one.write_all(b"ping")?;
    let mut bytes = [0; 4];
    other.read_exact(&mut bytes)?;
    ensure!(&bytes == b"ping", "got {bytes:?}");
    other.write_all(b"pong")?;
    one.read_exact(&mut bytes)?;
    ensure!(&bytes == b"pong", "got {bytes:?}");
    Ok(())
}

/// Addresses of both ends, and the congestion control.
type End = (Option<SocketAddr>, Option<SocketAddr>, Vec<u8>);

fn listening(stage: &Stage) -> Result<()> {
    let servers = [
        TcpListener::bind(V4)?,
        TcpListener::bind(V6)?,
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?,
    ];
    sys::set_sockopt_int(&servers[0], libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3)?;
    sys::set_sockopt_int(&servers[0], libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 5)?;
    sys::set_sockopt_int(&servers[1], libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    sys::set_sockopt_int(&servers[1], libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77)?;
    let read = || -> Result<Vec<i32>> {
        let mut values = Vec::new();
        for server in &servers {
            for name in [
                libc::TCP_DEFER_ACCEPT,
                libc::TCP_FASTOPEN,
                libc::TCP_KEEPIDLE,
            ] {
                values.push(sys::sockopt_int(server, libc::IPPROTO_TCP, name)?);
            }
            for name in [libc::SO_KEEPALIVE, libc::SO_REUSEADDR, libc::SO_RCVBUF] {
                values.push(sys::sockopt_int(server, libc::SOL_SOCKET, name)?);
            }
        }
        Ok(values)
    };
    let before = (
        read()?,
        servers.each_ref().map(|server| server.local_addr().ok()),
    );
    stage.ready_and_wait()?;
    let after = (
        read()?,
        servers.each_ref().map(|server| server.local_addr().ok()),
    );
    ensure!(before == after, "was {before:?}, is {after:?}");
    for server in &servers[1..] {
        let port = server.local_addr()?.port();
        let client = TcpStream::connect((Ipv6Addr::LOCALHOST, port))?;
        exchange(&server.accept()?.0, &client)?;
    }
    let port = servers[2].local_addr()?.port();
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("a client over IPv4")?;
    exchange(&servers[2].accept()?.0, &client)
}

fn many(stage: &Stage) -> Result<()> {
    let limit = u64::try_from(DESCRIPTORS)?;
    sys::set_limit(libc::RLIMIT_NOFILE, limit, limit)?;
    let process = |nr: usize| {
        stage.child(move |stage| {
            // Two thirds of what it may have; with a listener, so that both are more than the engine may have.
            let listeners = (0..DESCRIPTORS / 6).map(|_| TcpListener::bind(V4));
            let listeners = listeners.collect::<std::io::Result<Vec<_>>>()?;
            let pairs = (0..DESCRIPTORS / 4)
                .map(|at| pair(if (at + nr).is_multiple_of(2) { V4 } else { V6 }));
            let pairs = pairs.collect::<Result<Vec<_>>>()?;
            for (server, client) in &pairs {
                let mut client = client;
                client.write_all(&[7; 3])?;
                server.set_nodelay(true)?;
            }
            stage.ready_and_wait()?;
            for (server, client) in &pairs {
                let mut server = server;
                let mut bytes = [0; 3];
                server.read_exact(&mut bytes)?;
                ensure!(bytes == [7; 3] && server.nodelay()?, "got {bytes:?}");
                exchange(server, client)?;
            }
            listeners.iter().try_for_each(|listener| {
                let client = TcpStream::connect(listener.local_addr()?)?;
                exchange(&listener.accept()?.0, &client)
            })
        })
    };
    let processes: Vec<Child> = (0..4).map(process).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    processes.into_iter().try_for_each(Child::finish)
}

fn connected(stage: &Stage) -> Result<()> {
    let dual = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, dual.local_addr()?.port()))?;
    let mut pairs = vec![pair(V4)?, pair(V6)?, (dual.accept()?.0, client)];
    for (one, other) in &mut pairs {
        one.write_all(b"to the client")?;
        other.write_all(b"to the server")?;
        other.set_nodelay(true)?;
    }
    let read = || -> Result<Vec<End>> {
        let ends = pairs.iter().flat_map(|(one, other)| [one, other]);
        ends.map(|end| {
            let congestion = sys::sockopt(end, libc::IPPROTO_TCP, libc::TCP_CONGESTION)?;
            Ok((end.local_addr().ok(), end.peer_addr().ok(), congestion))
        })
        .collect()
    };
    let before = read()?;
    stage.ready_and_wait()?;
    let after = read()?;
    ensure!(before == after, "was {before:?}, is {after:?}");
    for (one, other) in &mut pairs {
        let mut bytes = [0; 13];
        other.read_exact(&mut bytes)?;
        ensure!(&bytes == b"to the client", "the client got {bytes:?}");
        one.read_exact(&mut bytes)?;
        ensure!(&bytes == b"to the server", "the server got {bytes:?}");
        exchange(one, other)?;
        exchange(other, one)?;
        ensure!(other.nodelay()?, "TCP_NODELAY is lost");
    }
    Ok(())
}

fn full(stage: &Stage) -> Result<()> {
    let (mut one, mut other) = pair(V4)?;
    one.set_nonblocking(true)?;
    let piece: Vec<u8> = (0..100_003u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    let mut sent = 0;
    // The queue grows while the other end takes in what it can.
    while let Ok(len) = one.write(&piece[sent % piece.len()..]) {
        sent += len;
    }
    stage.ready_and_wait()?;
    one.set_nonblocking(false)?;
    one.shutdown(Shutdown::Write)?;
    let mut all = Vec::new();
    other.read_to_end(&mut all)?;
    ensure!(
        all.len() == sent,
        "{sent} bytes were sent, {} came",
        all.len()
    );
    let wrong = (0..all.len()).find(|at| all[*at] != piece[at % piece.len()]);
    ensure!(wrong.is_none(), "byte {wrong:?} is another one");
    Ok(())
}

fn half(stage: &Stage) -> Result<()> {
    let mut pairs = Vec::new();
    for address in [V4, V6] {
        let (mut one, mut other) = pair(address)?;
        one.write_all(b"last words")?;
        other.write_all(b"heard")?;
        one.shutdown(Shutdown::Write)?;
        pairs.push((one, other));
    }
    let (mut both, mut end) = pair(V4)?;
    both.write_all(b"bye")?;
    end.write_all(b"cheers")?;
    both.shutdown(Shutdown::Write)?;
    end.shutdown(Shutdown::Write)?;
    stage.ready_and_wait()?;
    for (one, other) in &mut pairs {
        let mut text = String::new();
        other.read_to_string(&mut text)?;
        ensure!(text == "last words", "the closed direction gave {text:?}");
        ensure!(one.write(b"x").is_err(), "a closed direction takes more");
        other.write_all(b" and more")?;
        other.shutdown(Shutdown::Write)?;
        text.clear();
        one.read_to_string(&mut text)?;
        ensure!(text == "heard and more", "the open direction gave {text:?}");
    }
    Ok(())
}

fn closed(stage: &Stage) -> Result<()> {
    let fresh = sys::socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let bound = sys::socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let address = |port: u16| {
        let mut raw = vec![2, 0];
        raw.extend(port.to_be_bytes());
        raw.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        raw
    };
    sys::bind(&bound, &address(0))?;
    let name = sys::socket_name(&bound)?;
    let (ended, other) = pair(V4)?;
    drop(other);
    (&ended).read_to_end(&mut Vec::new())?;
    ended.shutdown(Shutdown::Write)?;
    stage.ready_and_wait()?;
    ensure!(
        sys::socket_name(&bound)? == name,
        "the bound one has another port"
    );
    ensure!(
        (&ended).read(&mut [0])? == 0,
        "an ended connection gives more"
    );
    sys::listen(&bound, 1)?;
    sys::connect(&fresh, &name)?;
    let end = sys::accept(&bound)?;
    sys::write(&fresh, b"x")?;
    ensure!(
        sys::read_exact(&end, 1)? == b"x",
        "the new connection is deaf"
    );
    Ok(())
}

/// Clients count up with the server, as fast as they can.
fn across(stage: &Stage) -> Result<()> {
    const CLIENTS: usize = 4;
    let server = TcpListener::bind(V4)?;
    let address = server.local_addr()?;
    let mut children = Vec::new();
    for _ in 0..CLIENTS {
        children.push(stage.child(|stage| {
            let mut stream = TcpStream::connect(address)?;
            stage.ready()?;
            let mut number = 0u64;
            while !stage.stopping() {
                stream.write_all(&number.to_be_bytes())?;
                let mut answer = [0; 8];
                stream.read_exact(&mut answer)?;
                ensure!(
                    u64::from_be_bytes(answer) == number + 1,
                    "{number} became {answer:?}"
                );
                number += 2;
            }
            Ok(())
        })?);
    }
    let echo = stage.child(|stage| {
        let mut streams = Vec::new();
        for _ in 0..CLIENTS {
            streams.push(server.accept()?.0);
        }
        stage.ready()?;
        while !streams.is_empty() {
            let mut ended = Vec::new();
            for (at, stream) in streams.iter_mut().enumerate() {
                let mut number = [0; 8];
                match stream.read_exact(&mut number) {
                    Ok(()) => {
                        let next = u64::from_be_bytes(number) + 1;
                        stream.write_all(&next.to_be_bytes())?;
                    }
                    Err(_) => ended.push(at),
                }
            }
            for at in ended.into_iter().rev() {
                streams.remove(at);
            }
        }
        Ok(())
    })?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(|child| child.finish())?;
    echo.reap()
}
