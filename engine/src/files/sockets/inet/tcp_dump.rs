//! Reading TCP connections.
//!
//! ```text
//! lock     packets of all connections are held off, and what would begin one to a listening socket
//! wait     nobody may wait to be accepted now, as nothing can be done for them
//! repair   each connection goes into repair mode, in which nothing that is done to it is sent
//! read     sequence numbers, windows, handshake options, both queues
//! leave    after a kill the sockets vanish in repair mode, without a word to the peers, and the lock
//!          stays for the restore; in all other cases repair mode and lock end
//! ```

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{FileEntry, InetSkEntry, TcpStreamEntry};
use firn_sys::socket::tcp::{self, Queue, Repair};
use firn_sys::socket::{
    self, SIOCINQ, SIOCOUTQ, SIOCOUTQNSD, SO_REUSEADDR, SOL_SOCKET, SOL_TCP, TCP_CLOSE,
    TCP_ESTABLISHED, TCP_LISTEN,
};
use firn_sys::{Errno, Pid, Result, rlimit};

use super::{listed, local_of, remote_of};
use crate::files::SocketDumpOptions;
use crate::files::dump::query;
use crate::files::error::FileDumpError;
use crate::files::kind::Dumping;
use crate::files::open_file::{OpenFile, Place, Trouble};
use crate::files::shelf::{self, Room, Shelf, ShelfError};
use crate::inject::{HeldConnection, Journal};
use crate::network_lock::{Connection, HeldOff, Leftover, LockedNetwork, Port};
use crate::obstacle::Obstacle;

/// States by the kernel's numbers.
pub(super) const SYN_SENT: u32 = 2;
const SYN_RECV: u32 = 3;
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;

/// Bit of the handshake options: timestamps.
pub(super) const OPT_TIMESTAMPS: u32 = 1;
/// SACK.
pub(super) const OPT_SACK: u32 = 2;
/// Window scaling.
pub(super) const OPT_WSCALE: u32 = 4;

/// Whether our end has been closed in that state.
pub(super) fn has_sent_fin(state: u32) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING)
}

/// Whether the peer's end has been closed in that state.
pub(super) fn has_received_fin(state: u32) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// Whether a socket in that state has a connection.
pub(super) fn is_connected(state: u32) -> bool {
    matches!(state, TCP_ESTABLISHED | SYN_SENT) || has_sent_fin(state) || has_received_fin(state)
}

/// The TCP connections of a dump. Dropping it lets them go on.
#[derive(Debug, Default)]
pub(in crate::files) struct DumpedTcp {
    held: Vec<Held>,
    /// Connections and listeners, by their numbers in images: the tasks may have more than this process.
    sockets: Option<Shelf<u32>>,
    listeners: Vec<Listener>,
    lock: Option<LockedNetwork>,
    /// What is left of it when it has been lifted, or is the restore's.
    leftover: Option<Leftover>,
    streams: Vec<Stream>,
    is_killed: bool,
    /// Where connections are noted while they are held.
    journal: Option<Journal>,
}

#[derive(Debug)]
struct Held {
    id: u32,
    ino: u32,
    file: OpenFile,
    connection: Connection,
    reuses_address: i32,
    in_repair: bool,
}

impl Held {
    /// Where a task has it; None for one that is in a message only, of which this process has a descriptor.
    fn in_task(&self) -> Option<HeldConnection> {
        let Place::Fd(fd) = self.file.place else {
            return None;
        };
        if self.file.pid == Pid::this() {
            return None;
        }
        Some(HeldConnection {
            pid: self.file.pid,
            fd,
            reuses_address: self.reuses_address != 0,
        })
    }
}

#[derive(Debug)]
struct Listener {
    id: u32,
    file: OpenFile,
    ports: Vec<Port>,
}

/// What reading the connections has shown.
#[derive(Debug, Default)]
pub(in crate::files) struct FoundTcp {
    /// What is in the way.
    pub(in crate::files) obstacles: Vec<Obstacle>,
    /// What is left out, in words.
    pub(in crate::files) left_out: Vec<String>,
}

#[derive(Debug)]
struct Stream {
    ino: u32,
    entry: TcpStreamEntry,
    received: Vec<u8>,
    sent: Vec<u8>,
}

impl DumpedTcp {
    /// Notes a socket.
    pub(super) fn add(
        &mut self,
        dumping: &Dumping<'_>,
        entry: &InetSkEntry,
        options: &SocketDumpOptions,
    ) -> std::result::Result<(), FileDumpError> {
        let file = dumping.file;
        let fd = dumping
            .duplicate
            .ok_or_else(|| query(file, "the socket", Errno::EBADF))?;
        let failed = |source| query(file, "the TCP socket", source);
        let refuse = |trouble| Err(FileDumpError::Obstacles(vec![file.obstacle(trouble)]));
        let ulp = socket::option(fd, SOL_TCP, tcp::TCP_ULP, 16).unwrap_or_default();
        if let Some(trouble) = upper_protocol(&ulp, &file.link_text()) {
            return refuse(trouble);
        }
        let info = tcp::info(fd).map_err(failed)?;
        if info.state == TCP_LISTEN {
            self.keep(dumping, fd)?;
            self.listeners.push(Listener {
                id: dumping.id,
                file: file.clone(),
                ports: super::ports(entry),
            });
            return Ok(());
        }
        if info.state == SYN_RECV {
            return refuse(Trouble::new(
                "its handshake is not complete",
                "dump when the connection stands",
            ));
        }
        if !is_connected(info.state) {
            return Ok(());
        }
        if !options.tcp_close && !matches!(socket::receive_urgent(fd), Ok(None)) {
            return refuse(Trouble::new(
                "urgent data wait in the connection",
                "dump when the task has read them",
            ));
        }
        let ends = (local_of(entry), remote_of(entry));
        let (Some(local), Some(remote)) = ends else {
            return Err(failed(Errno::EINVAL));
        };
        let reuses_address = socket::number(fd, SOL_SOCKET, SO_REUSEADDR).map_err(failed)?;
        self.keep(dumping, fd)?;
        self.held.push(Held {
            id: dumping.id,
            ino: entry.ino,
            file: file.clone(),
            connection: Connection { local, remote },
            reuses_address,
            in_repair: false,
        });
        Ok(())
    }

    fn keep(
        &mut self,
        dumping: &Dumping<'_>,
        fd: BorrowedFd<'_>,
    ) -> std::result::Result<(), FileDumpError> {
        let fd = fd.try_clone_to_owned();
        let fd = fd.map_err(|error| query(dumping.file, "the TCP socket", error.into()))?;
        let shelf = self.sockets.get_or_insert_with(|| {
            let room = Room::within(rlimit::descriptor_limit(), Arc::default());
            Shelf::new(room)
        });
        Ok(shelf.insert(dumping.id, fd)?)
    }

    /// Locks all connections and reads them.
    pub(in crate::files) fn lock_and_read(
        &mut self,
        entries: &mut [FileEntry],
        run_id: &str,
        options: &SocketDumpOptions,
        journal: Option<&Journal>,
    ) -> std::result::Result<FoundTcp, FileDumpError> {
        let mut found = FoundTcp {
            obstacles: self.leading_outside(options),
            ..FoundTcp::default()
        };
        if !found.obstacles.is_empty() {
            self.look_at_listeners(options, &mut found)?;
            return Ok(found);
        }
        let held_off = self.held_off(options);
        if !held_off.is_empty() {
            let way = options.network_lock;
            self.journal = journal.cloned();
            if let Some(journal) = journal {
                journal.will_hold(run_id, self.held.iter().filter_map(Held::in_task));
            }
            self.lock = Some(LockedNetwork::lock(run_id, way, &held_off)?);
        }
        self.look_at_listeners(options, &mut found)?;
        if options.tcp_close || !found.obstacles.is_empty() {
            return Ok(found);
        }
        let mut states = HashMap::new();
        for held in &mut self.held {
            let failed = |source| query(&held.file, "the TCP connection", source);
            let fd =
                socket_of(self.sockets.as_ref(), held.id)?.ok_or_else(|| failed(Errno::EBADF))?;
            tcp::set_repair(&fd, Repair::On).map_err(failed)?;
            held.in_repair = true;
            let (state, stream) = read(&fd, held.ino).map_err(failed)?;
            states.insert(held.id, state);
            self.streams.extend(stream);
        }
        for entry in entries.iter_mut().filter_map(|entry| entry.isk.as_mut()) {
            if let Some(state) = states.get(&entry.id) {
                // A last packet may have come in before the lock.
                entry.state = *state;
            }
        }
        Ok(found)
    }

    /// What has to be held off. Where no connection is to be kept, nothing stays behind a tree that is gone.
    fn held_off(&self, options: &SocketDumpOptions) -> HeldOff {
        if options.tcp_close || (self.held.is_empty() && !options.tcp_established) {
            return HeldOff::default();
        }
        let ports = self.listeners.iter().flat_map(|listener| &listener.ports);
        HeldOff {
            connections: self.held.iter().map(|held| held.connection).collect(),
            ports: ports.copied().collect(),
        }
    }

    /// Looks who waits to be accepted. Where new ones are held off nobody can come after this look.
    fn look_at_listeners(
        &self,
        options: &SocketDumpOptions,
        found: &mut FoundTcp,
    ) -> std::result::Result<(), FileDumpError> {
        for Listener { id, file, ports } in &self.listeners {
            let failed = |source| query(file, "the TCP socket", source);
            let fd = socket_of(self.sockets.as_ref(), *id)?.ok_or_else(|| failed(Errno::EBADF))?;
            let info = tcp::info(fd).map_err(failed)?;
            if info.waiting == 0 {
                continue;
            }
            let waiting =
                listed::waiting(ports.first().map_or(0, |port| port.number), info.waiting);
            if options.skip_in_flight {
                let place = format!("task {}: {}", file.pid, file.place);
                found
                    .left_out
                    .push(format!("{place}: {waiting} and are left out"));
                continue;
            }
            found.obstacles.push(file.obstacle(Trouble::new(
                waiting,
                "dump when they have been accepted, or add --skip-in-flight, which leaves them out",
            )));
        }
        Ok(())
    }

    /// Connections to peers outside, where those are not to be kept.
    fn leading_outside(&self, options: &SocketDumpOptions) -> Vec<Obstacle> {
        if options.tcp_established || options.tcp_close {
            return Vec::new();
        }
        let ends = self.held.iter().map(|held| held.connection.on_the_wire());
        let inside: HashSet<Connection> = ends.collect();
        let outside = |held: &&Held| !inside.contains(&held.connection.on_the_wire().reversed());
        let tell = |held: &Held| {
            held.file.obstacle(Trouble::new(
                format!(
                    "it is connected to {} outside the tree",
                    held.connection.remote
                ),
                "add --tcp-established to keep the connection, or --tcp-close to give it up",
            ))
        };
        self.held.iter().filter(outside).map(tell).collect()
    }

    /// How the network is locked, as images have it.
    pub(in crate::files) fn lock_method(&self) -> Option<u32> {
        self.lock.as_ref().map(LockedNetwork::method)
    }

    /// The tasks are about to be killed: their connections are to vanish without a word, and what comes
    /// for them is held off until they are restored.
    pub(in crate::files) fn give_up(&mut self) {
        self.is_killed = true;
        self.leftover = self.lock.take().map(LockedNetwork::keep);
    }

    /// The tasks go on: so do the connections.
    pub(in crate::files) fn go_on(&mut self) {
        if let Some(lock) = self.lock.take() {
            self.leftover = Some(lock.lift());
        }
        for held in self.held.iter_mut().filter(|held| held.in_repair) {
            held.in_repair = false;
            let remote = held.connection.remote;
            let fd = match socket_of(self.sockets.as_ref(), held.id) {
                Ok(Some(fd)) => fd,
                Ok(None) => continue,
                Err(error) => {
                    tracing::error!("the connection to {remote} stays in repair mode: {error}");
                    continue;
                }
            };
            let ended = tcp::set_repair(&fd, Repair::Off);
            // Repair mode has changed it.
            let reuse = socket::set_number(&fd, SOL_SOCKET, SO_REUSEADDR, held.reuses_address);
            if let Err(errno) = ended.and(reuse) {
                tracing::error!("the connection to {remote} stays in repair mode: {errno}");
            }
        }
        if let Some(journal) = self.journal.take() {
            journal.hold_no_more();
        }
    }

    /// Writes the connections.
    pub(in crate::files) fn write(
        &self,
        images: &ImageSetWriter,
    ) -> std::result::Result<(), FileDumpError> {
        for stream in &self.streams {
            let mut writer = images.writer(ImageKind::TcpStream, stream.ino.into());
            writer.entry(&stream.entry)?;
            writer.payload(&stream.received)?;
            writer.payload(&stream.sent)?;
            writer.finish()?;
        }
        Ok(())
    }
}

impl Drop for DumpedTcp {
    fn drop(&mut self) {
        if !self.is_killed {
            self.go_on();
        }
    }
}

/// What is wrong with a connection whose option TCP_ULP is that: a name with NULs behind it, or nothing.
fn upper_protocol(ulp: &[u8], link: &str) -> Option<Trouble> {
    let name: Vec<u8> = ulp.iter().copied().take_while(|byte| *byte != 0).collect();
    let trouble = |name| {
        Trouble::new(
            format!("the kernel runs the protocol {name} on the connection, whose keys it keeps"),
            format!(
                "let the program do it itself, or close the connection, or add --external '{link}' here and \
                 --inherit-fd 'fd[N]:{link}' to the restore",
            ),
        )
    };
    (!name.is_empty()).then(|| trouble(String::from_utf8_lossy(&name)))
}

fn socket_of(
    sockets: Option<&Shelf<u32>>,
    id: u32,
) -> std::result::Result<Option<shelf::Held<'_>>, ShelfError> {
    sockets.map_or(Ok(None), |shelf| shelf.get(&id))
}

/// Reads a connection in repair mode: its state, and everything else where it is not closed by now.
fn read(fd: impl AsFd, ino: u32) -> Result<(u32, Option<Stream>)> {
    let fd = fd.as_fd();
    let info = tcp::info(fd)?;
    if info.state == TCP_CLOSE {
        return Ok((info.state, None));
    }
    let len = |request| -> Result<u32> {
        u32::try_from(socket::ioctl_number(fd, request)?).map_err(|_| Errno::EINVAL)
    };
    // The end of our stream counts as a byte until it is acknowledged.
    let end = u32::from(has_sent_fin(info.state));
    let inq_len = len(SIOCINQ)?;
    let outq_len = len(SIOCOUTQ)?.saturating_sub(end);
    let unsent = len(SIOCOUTQNSD)?.saturating_sub(end);
    let peek_off = socket::number(fd, SOL_SOCKET, socket::SO_PEEK_OFF).unwrap_or(-1);
    if peek_off >= 0 {
        socket::set_number(fd, SOL_SOCKET, socket::SO_PEEK_OFF, -1)?;
    }
    let queues = read_queue(fd, Queue::Receive, inq_len)
        .and_then(|received| Ok((received, read_queue(fd, Queue::Send, outq_len)?)));
    if peek_off >= 0 {
        socket::set_number(fd, SOL_SOCKET, socket::SO_PEEK_OFF, peek_off)?;
    }
    tcp::choose_queue(fd, None)?;
    let ((inq_seq, received), (outq_seq, sent)) = queues?;
    let window = tcp::window(fd).ok();
    let has = |option| info.options & option != 0;
    let flag = |name| -> Result<Option<bool>> {
        let value = socket::number(fd, SOL_TCP, name)?;
        Ok((value != 0).then_some(true))
    };
    let mss = socket::number(fd, SOL_TCP, tcp::TCP_MAXSEG)?;
    let entry = TcpStreamEntry {
        inq_len,
        inq_seq,
        outq_len,
        outq_seq,
        opt_mask: info.options,
        snd_wscale: if has(OPT_WSCALE) { info.snd_wscale } else { 0 },
        mss_clamp: mss.cast_unsigned(),
        rcv_wscale: has(OPT_WSCALE).then_some(info.rcv_wscale),
        timestamp: if has(OPT_TIMESTAMPS) {
            Some(tcp::timestamp(fd)?)
        } else {
            None
        },
        cork: flag(tcp::TCP_CORK)?,
        nodelay: flag(tcp::TCP_NODELAY)?,
        unsq_len: Some(unsent),
        snd_wl1: window.map(|window| window.snd_wl1),
        snd_wnd: window.map(|window| window.snd_wnd),
        max_window: window.map(|window| window.max_window),
        rcv_wnd: window.map(|window| window.rcv_wnd),
        rcv_wup: window.map(|window| window.rcv_wup),
    };
    let stream = Stream {
        ino,
        entry,
        received,
        sent,
    };
    Ok((info.state, Some(stream)))
}

fn read_queue(fd: impl AsFd, queue: Queue, len: u32) -> Result<(u32, Vec<u8>)> {
    let fd = fd.as_fd();
    tcp::choose_queue(fd, Some(queue))?;
    let seq = tcp::sequence(fd)?;
    let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
    if len == 0 {
        return Ok((seq, Vec::new()));
    }
    // One byte more shows that there are no more.
    let bytes = socket::peek_stream(fd, len + 1)?;
    match bytes.len() == len {
        true => Ok((seq, bytes)),
        false => Err(Errno::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_tls_is_refused_by_name() {
        // As the kernel gives it: sixteen bytes.
        let trouble = upper_protocol(b"tls\0\0\0\0\0\0\0\0\0\0\0\0\0", "socket:[7]");
        let trouble = trouble.expect("a protocol");
        assert!(
            trouble.reason.contains("protocol tls"),
            "{}",
            trouble.reason
        );
        let hint = trouble.hint.expect("one may do something");
        assert!(hint.contains("--external 'socket:[7]'"), "{hint}");
        assert!(upper_protocol(b"", "socket:[7]").is_none());
        assert!(upper_protocol(&[0; 16], "socket:[7]").is_none());
    }
}
