//! What messages in unix sockets carry.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::{Stage, Workload, sys};

pub static RIGHTS: Workload = Workload::new(
    "sockets/unix-rights",
    "descriptors in messages, some of which nobody else has",
    rights,
);
pub static NESTED: Workload = Workload::new(
    "sockets/unix-nested",
    "a socket in a message, with a message in it that has a socket",
    nested,
);
pub static CREDENTIALS: Workload = Workload::new(
    "sockets/unix-credentials",
    "messages that tell who sent them, also from a task that is dead",
    credentials,
);
pub static SENDERS: Workload = Workload::new(
    "sockets/unix-senders",
    "datagrams of many senders, named, nameless and gone",
    senders,
);
pub static PEEK_OFFSET: Workload =
    Workload::new("sockets/unix-peek-offset", "SO_PEEK_OFF", peek_offset);

fn rights(stage: &Stage) -> Result<()> {
    let (one, other) = sys::socket_pair(libc::SOCK_SEQPACKET)?;
    let (stream, stream_end) = sys::socket_pair(libc::SOCK_STREAM)?;
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(stage.path("sent"))?;
    file.write_all(b"0123456789")?;
    file.seek(SeekFrom::Start(4))?;
    let (reader, writer) = sys::pipe(0)?;
    sys::write(&writer, b"in the pipe")?;
    let fds = [file.as_raw_fd(), reader.as_raw_fd()];
    sys::send_message(&one, b"file and pipe", None, &fds)?;
    sys::send_message(&one, b"plain", None, &[])?;
    sys::send_message(
        &one,
        b"writer",
        None,
        &[writer.as_raw_fd(), writer.as_raw_fd()],
    )?;
    sys::send_message(&stream, b"s", None, &[file.as_raw_fd()])?;
    // The file stays open here as well: it must be the same one. The pipe is only in the messages.
    drop((reader, writer));
    stage.ready_and_wait()?;
    let got = sys::receive_message(&other, 100, 0)?;
    ensure!(
        got.bytes == b"file and pipe" && got.rights.len() == 2,
        "the first is {got:?}"
    );
    let [sent, reader]: [OwnedFd; 2] = got.rights.try_into().ok().context("two descriptors")?;
    let own = file.as_raw_fd();
    ensure!(
        sys::same_open_file(sys::pid(), own, sys::pid(), sent.as_raw_fd())?,
        "another file"
    );
    let mut rest = String::new();
    std::fs::File::from(sent).read_to_string(&mut rest)?;
    ensure!(rest == "456789", "the file gives {rest:?}");
    let got = sys::receive_message(&other, 100, 0)?;
    ensure!(
        got.bytes == b"plain" && got.rights.is_empty(),
        "the second is {got:?}"
    );
    let got = sys::receive_message(&other, 100, 0)?;
    ensure!(got.rights.len() == 2, "the third is {got:?}");
    sys::write(&got.rights[1], b" and more")?;
    drop(got);
    let mut all = String::new();
    std::fs::File::from(reader).read_to_string(&mut all)?;
    ensure!(all == "in the pipe and more", "the pipe gives {all:?}");
    let got = sys::receive_message(&stream_end, 100, 0)?;
    ensure!(
        got.bytes == b"s" && got.rights.len() == 1,
        "the stream gives {got:?}"
    );
    let same = sys::same_open_file(sys::pid(), own, sys::pid(), got.rights[0].as_raw_fd())?;
    ensure!(same, "the stream brings another file");
    Ok(())
}

fn nested(stage: &Stage) -> Result<()> {
    let (outer, outer_end) = sys::socket_pair(libc::SOCK_STREAM)?;
    let (middle, middle_end) = sys::socket_pair(libc::SOCK_DGRAM)?;
    let (inner, inner_end) = sys::socket_pair(libc::SOCK_STREAM)?;
    sys::write(&inner, b"innermost")?;
    sys::send_message(&middle, b"m", None, &[inner_end.as_raw_fd()])?;
    sys::send_message(&outer, b"o", None, &[middle_end.as_raw_fd()])?;
    drop((inner_end, middle_end));
    stage.ready_and_wait()?;
    let got = sys::receive_message(&outer_end, 10, 0)?;
    let middle_end = got
        .rights
        .into_iter()
        .next()
        .context("no socket in the outer one")?;
    let got = sys::receive_message(&middle_end, 10, 0)?;
    let inner_end = got
        .rights
        .into_iter()
        .next()
        .context("no socket in the middle one")?;
    ensure!(
        sys::read_exact(&inner_end, 9)? == b"innermost",
        "the innermost has changed"
    );
    sys::write(&inner_end, b"answer")?;
    ensure!(
        sys::read_exact(&inner, 6)? == b"answer",
        "the way back is lost"
    );
    Ok(())
}

fn credentials(stage: &Stage) -> Result<()> {
    let (from, to) = sys::socket_pair(libc::SOCK_DGRAM)?;
    let (stream_from, stream_to) = sys::socket_pair(libc::SOCK_STREAM)?;
    for socket in [&to, &stream_to] {
        sys::set_sockopt_int(socket, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    }
    sys::write(&from, b"by the root")?;
    sys::write(&stream_from, b"root")?;
    let child = stage.child(|stage| {
        sys::write(&from, b"by a child")?;
        sys::write(&stream_from, b"child")?;
        stage.ready_and_wait()
    })?;
    let dead = stage.child(|stage| {
        sys::write(&from, b"by the dead")?;
        stage.ready()
    })?;
    let dead_pid = dead.pid;
    dead.reap()?;
    stage.ready_and_wait()?;
    for (text, pid) in [
        ("by the root", sys::pid()),
        ("by a child", child.pid),
        ("by the dead", dead_pid),
    ] {
        let got = sys::receive_message(&to, 100, libc::MSG_DONTWAIT)?;
        ensure!(got.bytes == text.as_bytes(), "{text} is {got:?}");
        let who = got.credentials.map(|(pid, ..)| pid);
        ensure!(who == Some(pid), "{text} ({pid}) says {who:?}");
    }
    for (text, pid) in [("root", sys::pid()), ("child", child.pid)] {
        let got = sys::receive_message(&stream_to, 100, libc::MSG_DONTWAIT)?;
        let who = got.credentials.map(|(pid, ..)| pid);
        ensure!(
            got.bytes == text.as_bytes() && who == Some(pid),
            "{text} ({pid}) is {got:?}"
        );
    }
    child.finish()
}

fn senders(stage: &Stage) -> Result<()> {
    let make = |name: Option<&[u8]>| -> Result<OwnedFd> {
        let socket = sys::socket_of(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
        if let Some(name) = name {
            sys::bind(&socket, &sys::unix_address(name))?;
        }
        Ok(socket)
    };
    let path = stage.path("receiver");
    let address = sys::unix_address(path.as_os_str().as_encoded_bytes());
    let receiver = make(Some(path.as_os_str().as_encoded_bytes()))?;
    let names: [Option<&[u8]>; 5] = [
        Some(b"\0firn-zdtm-a"),
        None,
        Some(b"b"),
        Some(b"\0firn-zdtm-gone"),
        Some(b""),
    ];
    let mut sockets = Vec::new();
    let mut expected = Vec::new();
    for (nth, name) in (0u8..).zip(names) {
        let sender = make(name)?;
        sys::send_message(&sender, &[nth; 3], Some(&address), &[])?;
        let own = if name.is_some() {
            sys::socket_name(&sender)?
        } else {
            Vec::new()
        };
        expected.push((vec![nth; 3], own));
        if nth != 3 {
            sockets.push(sender);
        }
    }
    let (one, other) = sys::socket_pair(libc::SOCK_DGRAM)?;
    for nth in 0..40u8 {
        sys::write(&one, &vec![nth; usize::from(nth)])?;
    }
    stage.ready_and_wait()?;
    for (bytes, sender) in expected {
        let got = sys::receive_message(&receiver, 100, libc::MSG_DONTWAIT)?;
        ensure!(got.bytes == bytes, "{bytes:?} is {got:?}");
        ensure!(
            got.sender == sender,
            "{bytes:?} is from {:?}, not {sender:?}",
            got.sender
        );
    }
    for nth in 0..40u8 {
        let got = sys::receive_message(&other, 100, libc::MSG_DONTWAIT)?;
        ensure!(
            got.bytes == vec![nth; usize::from(nth)],
            "message {nth} is {got:?}"
        );
    }
    sys::send_message(&sockets[0], b"new", Some(&address), &[])?;
    ensure!(
        sys::receive_message(&receiver, 100, 0)?.bytes == b"new",
        "new ones do not arrive"
    );
    Ok(())
}

fn peek_offset(stage: &Stage) -> Result<()> {
    let (one, other) = sys::socket_pair(libc::SOCK_STREAM)?;
    sys::write(&one, b"0123456789")?;
    sys::set_sockopt_int(&other, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 4)?;
    stage.ready_and_wait()?;
    let peeked = sys::receive_message(&other, 3, libc::MSG_PEEK)?.bytes;
    ensure!(peeked == b"456", "peeking gives {peeked:?}");
    ensure!(
        sys::read_exact(&other, 10)? == b"0123456789",
        "the stream has changed"
    );
    ensure!(
        sys::sockopt_int(&one, libc::SOL_SOCKET, libc::SO_PEEK_OFF)? == -1,
        "peek offset"
    );
    Ok(())
}
