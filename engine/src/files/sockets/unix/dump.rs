//! Reading unix sockets.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use firn_proto::{
    FdTypes, FileEntry, FilePermsEntry, FirnUnixSkEntry, SkOptsEntry, SkShutdown, UnixSkEntry,
};
use firn_sys::sock_diag::{self, UnixSocket};
use firn_sys::socket::{
    self, Message, SIOCINQ, SO_PEEK_OFF, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, TCP_ESTABLISHED,
    TCP_LISTEN,
};
use firn_sys::{Errno, Pid, epoll, file};

use super::super::extra::{Defaults, SocketKind};
use super::super::packets::{self, to_image};
use super::super::{NET_NS_ID, foreign_namespace, inode_of, options};
use super::USK_EXTERN;
use crate::files::SocketDumpOptions;
use crate::files::dump::query;
use crate::files::error::FileDumpError;
use crate::files::kind::Dumping;
use crate::files::open_file::{OpenFile, Trouble};
use crate::files::outside;
use crate::obstacle::Obstacle;

/// Highest number of an entry that does not clash with others: stubs count on from the files.
type NewId<'a> = &'a mut dyn FnMut() -> u32;

/// The unix sockets of a dump.
#[derive(Debug, Default)]
pub(in crate::files) struct DumpedUnix {
    /// All of the namespace, as soon as there is one to be dumped.
    known: Option<HashMap<u32, UnixSocket>>,
    held: Vec<Held>,
    /// What waits in sockets, by number, and is not in the images yet.
    queues: VecDeque<(u32, Vec<Message>)>,
}

/// What came of settling who the peers are.
#[derive(Debug, Default)]
pub(in crate::files) struct Settled {
    /// What is in the way.
    pub(in crate::files) obstacles: Vec<Obstacle>,
    /// Entries that stand for peers outside.
    pub(in crate::files) stubs: Vec<FileEntry>,
    /// What is left out, in words.
    pub(in crate::files) warnings: Vec<String>,
}

#[derive(Debug)]
struct Held {
    ino: u32,
    file: OpenFile,
}

impl DumpedUnix {
    /// Reads everything about a socket but its queue.
    pub(super) fn add(
        &mut self,
        dumping: &Dumping<'_>,
        defaults: &mut Defaults,
    ) -> Result<UnixSkEntry, FileDumpError> {
        let file = dumping.file;
        let fd = dumping
            .duplicate
            .ok_or_else(|| query(file, "the socket", Errno::EBADF))?;
        let ino = inode_of(file);
        let diag = self.diag(file, ino)?.clone();
        let kind = SocketKind {
            family: socket::AF_UNIX,
            kind: i32::try_from(diag.kind).unwrap_or(0),
            protocol: 0,
        };
        let opts = options::dump(fd, kind, diag.state == TCP_ESTABLISHED, defaults)
            .map_err(|error| query(file, error.what, error.source))?;
        let mut entry = UnixSkEntry {
            id: dumping.id,
            ino,
            r#type: diag.kind,
            state: diag.state,
            flags: file.image_flags(),
            uflags: 0,
            backlog: diag.send_queue,
            peer: diag.peer.unwrap_or(0),
            fown: dumping.fown,
            opts,
            name: diag.name.clone(),
            shutdown: (diag.shutdown != 0).then(|| shutdown_of(diag.shutdown).into()),
            ns_id: Some(NET_NS_ID),
            firn: extension(fd, &diag)
                .map_err(|source| query(file, "the socket's peer", source))?,
            ..UnixSkEntry::default()
        };
        if diag.name.first().is_some_and(|byte| *byte != 0) {
            describe_file(fd, file.pid, &mut entry);
        }
        // Now, because a tree may have more sockets than this process may have descriptors.
        let is_reset = entry.firn.as_ref().and_then(|firn| firn.reset) == Some(true);
        let messages = messages(file, fd, &diag, is_reset)?;
        if !messages.is_empty() {
            self.queues.push_back((dumping.id, messages));
        }
        self.held.push(Held {
            ino,
            file: file.clone(),
        });
        Ok(entry)
    }

    fn diag(&mut self, file: &OpenFile, ino: u32) -> Result<&UnixSocket, FileDumpError> {
        if self.known.is_none() {
            let known = sock_diag::unix_sockets();
            self.known = Some(known.map_err(|source| query(file, "the list of sockets", source))?);
        }
        let known = self.known.as_ref().expect("just read");
        known
            .get(&ino)
            .ok_or_else(|| FileDumpError::Obstacles(vec![file.obstacle(foreign_namespace())]))
    }

    /// The messages of the next socket whose are not in the images yet: its number and what waits there.
    pub(in crate::files) fn next_queue(&mut self) -> Option<(u32, Vec<Message>)> {
        self.queues.pop_front()
    }

    /// Settles who the peers are, when all sockets are known.
    pub(in crate::files) fn settle_peers(
        &self,
        entries: &mut [FileEntry],
        options: &SocketDumpOptions,
        inside: &[Pid],
        new_id: NewId<'_>,
    ) -> Settled {
        let mut settled = Settled::default();
        let mut stubs: HashMap<u32, FileEntry> = HashMap::new();
        let held: HashMap<u32, &Held> = self.held.iter().map(|held| (held.ino, held)).collect();
        let inodes: HashSet<u32> = held.keys().copied().collect();
        let mut outside = HashMap::new();
        let listeners = self.listeners();
        for entry in entries.iter_mut().filter_map(|entry| entry.usk.as_mut()) {
            let Some(held) = held.get(&entry.ino) else {
                continue;
            };
            let known = self.known.as_ref().expect("read with the first socket");
            let diag = &known[&entry.ino];
            let is_outside = |ino: &u32| !inodes.contains(ino);
            let waits = entry.state == TCP_LISTEN && diag.waiting.iter().any(is_outside);
            if waits && options.skip_in_flight {
                let (pid, place) = (held.file.pid, held.file.place);
                let what = "clients that wait to be accepted are left out";
                settled
                    .warnings
                    .push(format!("task {pid}: {place}: {what}"));
            } else if waits {
                settled.obstacles.push(held.file.obstacle(outside_client()));
            }
            let connected = entry.state == TCP_ESTABLISHED;
            if connected && entry.peer == 0 && entry.r#type != kind_number(SOCK_DGRAM) {
                let found = wait_for_listener(entry, diag, held, &listeners);
                settled.obstacles.extend(found);
            }
            if entry.peer == 0 || inodes.contains(&entry.peer) {
                continue;
            }
            if !options.permits_outside(entry.peer) {
                let link = format!("socket:[{}]", entry.peer).into_bytes();
                outside.insert(link, held.file.clone());
                continue;
            }
            let peer = known.get(&entry.peer);
            stand_in_for_peer(entry, peer, &mut stubs, new_id);
        }
        let held = outside_obstacles(&outside, inside);
        settled.obstacles.extend(held);
        settled.stubs = stubs.into_values().collect();
        settled
    }

    /// Who listens, by the sockets that wait to be accepted.
    fn listeners(&self) -> HashMap<u32, u32> {
        let known = self.known.iter().flat_map(HashMap::values);
        known
            .flat_map(|listener| listener.waiting.iter().map(|ino| (*ino, listener.ino)))
            .collect()
    }
}

/// Notes whom a connected socket without a peer waits for.
/// What waits in a socket's queue.
fn messages(
    file: &OpenFile,
    fd: BorrowedFd<'_>,
    diag: &UnixSocket,
    is_reset: bool,
) -> Result<Vec<Message>, FileDumpError> {
    let kind = i32::try_from(diag.kind).unwrap_or(0);
    let waiting = match diag.state {
        TCP_LISTEN => return Ok(Vec::new()),
        _ => socket::ioctl_number(fd, SIOCINQ).unwrap_or(0),
    };
    let waiting = usize::try_from(waiting).unwrap_or(0);
    if kind != SOCK_DGRAM && waiting == 0 {
        return Ok(Vec::new());
    }
    if kind != SOCK_STREAM && is_reset {
        return Err(FileDumpError::Obstacles(vec![file.obstacle(Trouble::new(
            "its peer has left an error before the messages, which a look at these would take",
            "dump when the task has received the error",
        ))]));
    }
    packets::read_queue(fd, kind, waiting).map_err(|errno| match errno {
        Errno::EIO => FileDumpError::Obstacles(vec![file.obstacle(Trouble::new(
            "an urgent byte waits in the socket",
            "dump when the task has read it",
        ))]),
        errno => query(file, "the messages", errno),
    })
}

fn wait_for_listener(
    entry: &mut UnixSkEntry,
    diag: &UnixSocket,
    held: &Held,
    listeners: &HashMap<u32, u32>,
) -> Option<Obstacle> {
    entry.peer = *listeners.get(&entry.ino)?;
    (diag.send_queue != 0).then(|| {
        held.file.obstacle(Trouble::new(
            "it has sent messages to a server that has not accepted it yet, and nothing shows them",
            "dump when the server has accepted the connection",
        ))
    })
}

fn kind_number(kind: i32) -> u32 {
    kind.cast_unsigned()
}

fn shutdown_of(mask: u32) -> SkShutdown {
    match mask {
        1 => SkShutdown::Read,
        2 => SkShutdown::Write,
        3 => SkShutdown::Both,
        _ => SkShutdown::None,
    }
}

fn extension(fd: impl AsFd, diag: &UnixSocket) -> firn_sys::Result<Option<FirnUnixSkEntry>> {
    let fd = fd.as_fd();
    let who = socket::peer_credentials(fd)?;
    let peek_off = socket::number(fd, SOL_SOCKET, SO_PEEK_OFF)?;
    let firn = FirnUnixSkEntry {
        peer_creds: (who.pid > 0).then(|| to_image(who)),
        peek_off: (peek_off >= 0).then_some(peek_off),
        outside_peer: None,
        lost_peer: (diag.kind == kind_number(SOCK_DGRAM) && diag.peer == Some(0)).then_some(true),
        reset: is_reset(fd, diag)?.then_some(true),
    };
    Ok((firn != FirnUnixSkEntry::default()).then_some(firn))
}

/// Whether a connection has an error to tell, which poll shows without taking it. ECONNRESET is the only one there is.
///
/// Source: linux net/unix/af_unix.c, unix_release_sock.
fn is_reset(fd: BorrowedFd<'_>, diag: &UnixSocket) -> firn_sys::Result<bool> {
    let is_connection = diag.kind != kind_number(SOCK_DGRAM);
    let has_peer = diag.peer.is_some_and(|peer| peer != 0);
    Ok(is_connection && !has_peer && epoll::poll(fd, 0)? & epoll::POLLERR != 0)
}

/// Fills in what belongs to the file that a socket is bound to.
fn describe_file(fd: impl AsFd, pid: Pid, entry: &mut UnixSkEntry) {
    let path = entry
        .name
        .strip_suffix(b"\0")
        .unwrap_or(&entry.name)
        .to_vec();
    let Ok(bound) = socket::unix_file(fd) else {
        entry.deleted = Some(true);
        return;
    };
    let link = std::fs::read_link(format!("/proc/self/fd/{}", bound.as_raw_fd()));
    let link = link.map(|path| std::os::unix::ffi::OsStringExt::into_vec(path.into_os_string()));
    let link: Vec<u8> = link.unwrap_or_default();
    let stat = file::stat(&bound).unwrap_or_default();
    entry.file_perms = Some(FilePermsEntry {
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
    });
    let real = link.strip_suffix(b" (deleted)").unwrap_or(&link);
    let mut full = path.clone();
    if path.first() != Some(&b'/') {
        let tail = [b"/", path.as_slice()].concat();
        let dir = match real.strip_suffix(tail.as_slice()) {
            Some(dir) => dir.to_vec(),
            None => working_directory(pid),
        };
        full = [dir.as_slice(), tail.as_slice()].concat();
        entry.name_dir = Some(dir);
    }
    let there = file::lstat_path(&crate::files::locate::to_path(&full));
    if stat.nlink == 0 || !there.is_ok_and(|found| found.same_file(&stat)) {
        entry.deleted = Some(true);
    }
}

fn working_directory(pid: Pid) -> Vec<u8> {
    let link = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    std::os::unix::ffi::OsStringExt::into_vec(link.into_os_string())
}

/// Notes a peer outside: a datagram socket gets an entry that stands for it, as in CRIU's images; a
/// connection keeps the name.
fn stand_in_for_peer(
    entry: &mut UnixSkEntry,
    peer: Option<&UnixSocket>,
    stubs: &mut HashMap<u32, FileEntry>,
    new_id: NewId<'_>,
) {
    let name = peer.map(|peer| peer.name.clone()).unwrap_or_default();
    if entry.r#type == kind_number(SOCK_DGRAM) {
        stubs
            .entry(entry.peer)
            .or_insert_with(|| stub(entry.peer, name, new_id()));
        return;
    }
    entry.peer = 0;
    let firn = entry.firn.get_or_insert_default();
    firn.outside_peer = Some(name);
}

fn stub(ino: u32, name: Vec<u8>, id: u32) -> FileEntry {
    FileEntry {
        r#type: FdTypes::Unixsk.into(),
        id,
        usk: Some(Box::new(UnixSkEntry {
            id,
            ino,
            r#type: kind_number(SOCK_DGRAM),
            state: TCP_LISTEN,
            flags: file::O_RDWR.cast_unsigned(),
            uflags: USK_EXTERN,
            name,
            ns_id: Some(NET_NS_ID),
            opts: SkOptsEntry::default(),
            ..UnixSkEntry::default()
        })),
        ..FileEntry::default()
    }
}

fn outside_client() -> Trouble {
    Trouble::new(
        "a process outside of the tree waits to be accepted by this socket",
        "dump when it has been accepted, or add --skip-in-flight, which ends its connection",
    )
}

/// Who outside holds the other ends.
fn outside_obstacles(sockets: &HashMap<Vec<u8>, OpenFile>, inside: &[Pid]) -> Vec<Obstacle> {
    let held = outside::obstacles_with(sockets, inside, |holder, link| {
        let peer = String::from_utf8_lossy(link);
        Trouble::new(
            format!("it is connected to {peer}, which {holder} outside the tree holds"),
            "dump the tree that contains both, close the connection, or add --ext-unix-sk",
        )
    });
    let found: HashSet<String> = held
        .iter()
        .map(|o| format!("{}{}", o.pid, o.object))
        .collect();
    let mut obstacles = held;
    for file in sockets.values() {
        let unknown = file.obstacle(Trouble::new(
            "it is connected to a socket outside the tree",
            "dump the tree that contains both, close the connection, or add --ext-unix-sk",
        ));
        if !found.contains(&format!("{}{}", unknown.pid, unknown.object)) {
            obstacles.push(unknown);
        }
    }
    obstacles
}
