//! TCP connections in states that pass, options of connections, and what can't be kept.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail, ensure};

use crate::{Need, Stage, Workload, sys};

pub static ENDING: Workload = Workload::new(
    "sockets/tcp-ending",
    "connections whose ends wait behind full queues: FIN_WAIT1, LAST_ACK, CLOSING",
    ending,
);
pub static CONNECTING: Workload = Workload::new(
    "sockets/tcp-connecting",
    "a connection whose server has not answered yet",
    connecting,
)
// Newer kernels (6.18.44) let nobody else filter what a TCP socket gets.
.needs(&[Need::Root])
.dump_options(&["--tcp-established"])
.restore_options(&["--tcp-established"]);
pub static CONNECTED: Workload = Workload::new(
    "sockets/tcp-connected-meanwhile",
    "a task stopped in a call that has connected its socket since",
    connected,
);
pub static OPTIONS: Workload = Workload::new(
    "sockets/tcp-options",
    "a connection with options of all levels",
    options,
);
pub static CLOSE: Workload = Workload::new(
    "sockets/tcp-close",
    "a connection that is given up, and a server that is not",
    close,
)
.dump_options(&["--tcp-close"]);
pub static WAITING: Workload = Workload::new(
    "sockets/tcp-waiting",
    "a connection that nobody has accepted",
    waiting,
)
.refused(&[
    "1 connections wait to be accepted",
    "127.0.0.1",
    "--skip-in-flight",
]);
pub static URGENT: Workload = Workload::new(
    "sockets/tcp-urgent",
    "urgent data that nobody has read",
    urgent,
)
.refused(&["urgent data wait"]);
pub static MPTCP: Workload = Workload::new("sockets/mptcp", "a socket of Multipath TCP", |stage| {
    hold(stage, libc::AF_INET, libc::IPPROTO_MPTCP)
})
.refused(&["MPTCP", "multipathtcp=0"]);
pub static KTLS: Workload = Workload::new(
    "sockets/ktls",
    "a connection that the kernel encrypts",
    |stage| {
        let (client, server) = pair()?;
        sys::set_sockopt(&client, libc::SOL_TCP, libc::TCP_ULP, b"tls")?;
        stage.ready_and_wait()?;
        drop((client, server));
        Ok(())
    },
)
.needs(&[Need::Ulp("tls")])
.refused(&["the protocol tls", "--external"]);
pub static VSOCK: Workload = Workload::new("sockets/vsock", "a socket to the host", |stage| {
    hold(stage, libc::AF_VSOCK, 0)
})
.refused(&["AF_VSOCK"]);

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const SYN_SENT: u8 = 2;
const ESTABLISHED: u8 = 1;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

fn pair() -> Result<(TcpStream, TcpStream)> {
    let server = TcpListener::bind(LOCAL)?;
    let client = TcpStream::connect(server.local_addr()?)?;
    Ok((server.accept()?.0, client))
}

fn state(fd: impl AsFd) -> Result<u8> {
    let info = sys::sockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    info.first().copied().context("an empty TCP_INFO")
}

/// Waits until the connection is in that state.
fn reaches(fd: impl AsFd, wanted: u8) -> Result<()> {
    let fd = fd.as_fd();
    for _ in 0..200 {
        if state(fd)? == wanted {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    bail!("state {} instead of {wanted}", state(fd)?)
}

/// Writes as much as both queues take; returns how much that was.
fn fill(mut stream: &TcpStream) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let mut sent = 0;
    // The queue grows while the other end takes in what it can.
    for _ in 0..3 {
        while let Ok(len) = stream.write(&[7; 4096]) {
            sent += len;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    stream.set_nonblocking(false)?;
    Ok(sent)
}

fn ending(stage: &Stage) -> Result<()> {
    // The end of our stream waits behind bytes that the peer has no room for.
    let (one, other) = pair()?;
    let first = fill(&one)?;
    one.shutdown(Shutdown::Write)?;
    reaches(&one, FIN_WAIT1)?;
    // The same with a peer that has closed its direction before.
    let (late, early) = pair()?;
    let second = fill(&late)?;
    early.shutdown(Shutdown::Write)?;
    (&late).read_to_end(&mut Vec::new())?;
    late.shutdown(Shutdown::Write)?;
    reaches(&late, LAST_ACK)?;
    reaches(&early, FIN_WAIT2)?;
    // And with a peer that closes after us.
    let (both, end) = pair()?;
    let third = fill(&both)?;
    both.shutdown(Shutdown::Write)?;
    (&end).write_all(b"parting words")?;
    end.shutdown(Shutdown::Write)?;
    reaches(&both, CLOSING)?;
    stage.ready_and_wait()?;
    for (mut reader, sent) in [(&other, first), (&early, second), (&end, third)] {
        let mut all = Vec::new();
        reader.read_to_end(&mut all)?;
        ensure!(
            all.len() == sent,
            "{sent} bytes were sent, {} came",
            all.len()
        );
        ensure!(all.iter().all(|byte| *byte == 7), "they are other ones");
    }
    (&other).write_all(b"the open direction")?;
    other.shutdown(Shutdown::Write)?;
    for (mut reader, text) in [(&one, "the open direction"), (&both, "parting words")] {
        let mut said = String::new();
        reader.read_to_string(&mut said)?;
        ensure!(said == text, "{text:?} is {said:?}");
        ensure!(reader.write(b"x").is_err(), "a closed direction takes more");
    }
    Ok(())
}

/// The server's filter drops everything until the restore.
fn connecting(stage: &Stage) -> Result<()> {
    let server = TcpListener::bind(LOCAL)?;
    sys::attach_filter(&server, &[(6, 0, 0, 0)])?;
    let client = sys::socket_of(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    let begun = sys::connect(&client, &sys::socket_name(&server)?);
    let errno = begun.err().and_then(|error| error.raw_os_error());
    ensure!(errno == Some(libc::EINPROGRESS), "connecting: {errno:?}");
    ensure!(state(&client)? == SYN_SENT, "state {}", state(&client)?);
    let name = sys::socket_name(&client)?;
    stage.ready_and_wait()?;
    ensure!(
        sys::socket_name(&client)? == name,
        "the client has another port"
    );
    ensure!(state(&client)? == SYN_SENT, "state {}", state(&client)?);
    sys::set_sockopt_int(&server, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)?;
    let (mut accepted, from) = server.accept()?;
    ensure!(name[2..4] == from.port().to_be_bytes(), "{from} connects");
    reaches(&client, ESTABLISHED)?;
    sys::write(&client, b"here we are")?;
    let mut heard = [0; 11];
    accepted.read_exact(&mut heard)?;
    ensure!(&heard == b"here we are", "heard {heard:?}");
    Ok(())
}

/// The server takes no more connections until the caller has stopped.
fn connected(stage: &Stage) -> Result<()> {
    let server = sys::socket_of(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    sys::listen(&server, 0)?;
    let name = sys::socket_name(&server)?;
    let [first, client] = [(); 2].map(|()| sys::socket_of(libc::AF_INET, libc::SOCK_STREAM, 0));
    let (first, client) = (first?, client?);
    sys::connect(&first, &name)?;
    let child = stage.child(|stage| {
        stage.ready()?;
        sys::connect(&client, &name).context("the call that was under way")?;
        sys::write(&client, b"connected")?;
        Ok(())
    })?;
    reaches(&client, SYN_SENT)?;
    sys::kill(child.pid, libc::SIGSTOP)?;
    sys::wait_status(child.pid, libc::WUNTRACED)?;
    let _first = sys::accept(&server)?;
    // Its first packet went lost; it comes again after a second.
    let mut accepted = std::fs::File::from(sys::accept(&server)?);
    reaches(&client, ESTABLISHED)?;
    stage.ready_and_wait()?;
    sys::kill(child.pid, libc::SIGCONT)?;
    child.finish()?;
    let mut heard = [0; 9];
    accepted.read_exact(&mut heard)?;
    ensure!(&heard == b"connected", "heard {heard:?}");
    Ok(())
}

/// Options with values that are not those of a fresh socket, by level and name.
const CHANGED: [(i32, i32, i32); 24] = [
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 7),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 90_000),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT, 4),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2, 9),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 16_384),
    (libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 1),
    (libc::IPPROTO_TCP, 36, 1),
    (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
    (libc::IPPROTO_IP, libc::IP_TTL, 33),
    (libc::IPPROTO_IP, libc::IP_RECVTTL, 1),
    (libc::IPPROTO_IP, libc::IP_MINTTL, 2),
    (
        libc::IPPROTO_IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_DO,
    ),
    (libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 4),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 2),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 90_000),
    (libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 1 << 30),
];

fn options(stage: &Stage) -> Result<()> {
    let (one, mut other) = pair()?;
    for (level, name, value) in CHANGED {
        sys::set_sockopt_int(&one, level, name, value)
            .with_context(|| format!("setting option {name} of level {level}"))?;
    }
    sys::set_sockopt(&one, libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno")?;
    sys::set_sockopt(
        &one,
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &[1, 0, 0, 0, 5, 0, 0, 0],
    )?;
    let names = CHANGED.iter().map(|(level, name, _)| (*level, *name));
    let more = [
        (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
        (libc::SOL_SOCKET, libc::SO_LINGER),
        (libc::SOL_SOCKET, libc::SO_SNDBUF),
        (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    ];
    let names: Vec<(i32, i32)> = names.chain(more).collect();
    let look = || -> Result<Vec<Vec<u8>>> {
        names
            .iter()
            .map(|(level, name)| Ok(sys::sockopt(&one, *level, *name)?))
            .collect()
    };
    // Corked bytes wait at the socket.
    sys::set_sockopt_int(&other, libc::IPPROTO_TCP, libc::TCP_CORK, 1)?;
    other.write_all(b"held back")?;
    let (before, handshake) = (look()?, info(&one)?);
    stage.ready_and_wait()?;
    let after = look()?;
    for ((was, is), name) in before.iter().zip(&after).zip(&names) {
        ensure!(was == is, "option {name:?} was {was:?}, is {is:?}");
    }
    ensure!(
        info(&one)? == handshake,
        "{handshake:?} is {:?}",
        info(&one)?
    );
    let corked = sys::sockopt_int(&other, libc::IPPROTO_TCP, libc::TCP_CORK)?;
    ensure!(corked == 1, "the cork is gone");
    sys::set_sockopt_int(&other, libc::IPPROTO_TCP, libc::TCP_CORK, 0)?;
    let mut heard = [0; 9];
    (&one).read_exact(&mut heard)?;
    ensure!(&heard == b"held back", "heard {heard:?}");
    Ok(())
}

/// Options of the handshake, shifts of the windows, and the sizes of segments both ways.
fn info(fd: impl AsFd) -> Result<(u8, u8, i32)> {
    let fd = fd.as_fd();
    let info = sys::sockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    let [.., options, shifts] = info.get(..7).context("a short TCP_INFO")? else {
        bail!("a short TCP_INFO");
    };
    let mss = sys::sockopt_int(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG)?;
    Ok((*options, *shifts, mss))
}

fn close(stage: &Stage) -> Result<()> {
    let server = TcpListener::bind(LOCAL)?;
    let mut client = TcpStream::connect(server.local_addr()?)?;
    let mut accepted = server.accept()?.0;
    stage.ready_and_wait()?;
    if stage.may_have_been_restored() {
        ensure!(
            accepted.read(&mut [0])? == 0,
            "a connection that was given up gives more"
        );
        ensure!(
            client.write(b"x").is_err(),
            "a connection that was given up takes more"
        );
    } else {
        client.write_all(b"x")?;
        accepted.read_exact(&mut [0])?;
    }
    let mut client = TcpStream::connect(server.local_addr()?)?;
    client.write_all(b"anew")?;
    let mut heard = [0; 4];
    server.accept()?.0.read_exact(&mut heard)?;
    ensure!(&heard == b"anew", "heard {heard:?}");
    Ok(())
}

fn waiting(stage: &Stage) -> Result<()> {
    let server = TcpListener::bind(LOCAL)?;
    let mut client = TcpStream::connect(server.local_addr()?)?;
    stage.ready_and_wait()?;
    let (mut accepted, _) = server.accept()?;
    client.write_all(b"still there")?;
    let mut heard = [0; 11];
    accepted.read_exact(&mut heard)?;
    ensure!(&heard == b"still there", "heard {heard:?}");
    Ok(())
}

fn urgent(stage: &Stage) -> Result<()> {
    let (one, other) = pair()?;
    sys::send_flags(&other, b"!", libc::MSG_OOB)?;
    stage.ready_and_wait()?;
    let byte = sys::receive_message(&one, 1, libc::MSG_OOB)?.bytes;
    ensure!(byte == b"!", "the urgent byte is {byte:?}");
    Ok(())
}

fn hold(stage: &Stage, family: i32, protocol: i32) -> Result<()> {
    let _socket = sys::socket_of(family, libc::SOCK_STREAM, protocol)?;
    stage.ready_and_wait()
}
