//! Sockets, one module per family.
//!
//! At dump a socket is asked through a duplicate of its descriptor, and through sock_diag for what only
//! that tells; nothing about it changes that is not put back. At restore all sockets are made by the
//! coordinator before any task lives ([`SocketSet::make`]), handed out like other files, and finished when
//! every file is open, because queues may hold descriptors of any kind ([`SocketSet::finish`]).

mod extra;
mod inet;
mod lingering;
mod netlink;
mod options;
mod packet;
mod packet_ring;
mod packets;
mod settings;
mod unix;

pub(crate) use inet::let_connections_go_on;
pub(super) use inet::{InetSocketKind, describe_external, is_internet};
pub(super) use netlink::NetlinkSocketKind;
pub(super) use packet::PacketSocketKind;
pub(super) use packets::{PacketRestore, files_in_flight};
pub use settings::{NetworkLock, OutsidePeer, SocketDumpOptions, SocketRestoreOptions};
pub(super) use unix::UnixSocketKind;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use firn_images::{ImageDir, ImageSetWriter};
use firn_proto::{FdTypes, FileEntry, InventoryEntry};
use firn_sys::file::{self, S_IFSOCK};
use firn_sys::socket;

use super::FileRestoreOptions;
use super::dump::query;
use super::entries::Entries;
use super::error::{FileDumpError, FileRestoreError};
use super::external::Inherited;
use super::kind::Dumping;
use super::open_file::{OpenFile, Trouble};
use super::shelf::{OpenedFiles, Room};
use crate::network_lock::{self, HeldOff, Leftover, LockedNetwork};

/// Number of the network namespace in images: all tasks have the same one.
const NET_NS_ID: u32 = 2;

/// True for a socket that is held by a descriptor, and not for the name of one opened with O_PATH.
pub(super) fn is_socket(file: &OpenFile) -> bool {
    let is_socket = file.stat.file_type() == S_IFSOCK && file.link.starts_with(b"socket:[");
    is_socket && !file.is_path_only()
}

/// The protocol, as sockfs tells it.
///
/// Source: linux net/socket.c, `system.sockprotoname`.
pub(super) fn protocol_name(file: &OpenFile) -> Option<String> {
    let name = file::xattr(&file.proc_path(), c"system.sockprotoname").ok()?;
    let name = name.strip_suffix(b"\0").unwrap_or(&name);
    Some(String::from_utf8_lossy(name).into_owned())
}

/// True for a socket that is held by a descriptor and of one of these protocols.
fn is_of_protocol(file: &OpenFile, protocols: &[&str]) -> bool {
    is_socket(file) && protocol_name(file).is_some_and(|name| protocols.contains(&name.as_str()))
}

/// The inode number, which is a socket's number in images.
pub(super) fn inode_of(file: &OpenFile) -> u32 {
    u32::try_from(file.stat.ino & 0xffff_ffff).expect("masked")
}

/// The sockets of a dump.
#[derive(Debug, Default)]
pub(super) struct DumpedSockets {
    pub(super) unix: unix::DumpedUnix,
    pub(super) tcp: inet::DumpedTcp,
    pub(super) packets: packets::PacketDump,
    netlink: netlink::DumpedNetlink,
    pub(super) packet: packet::DumpedPacket,
    defaults: extra::Defaults,
    /// Cookie of our own network namespace, once somebody has asked.
    namespace: Option<u64>,
}

impl DumpedSockets {
    /// Refuses a socket of another network namespace than ours.
    fn check_namespace(
        &mut self,
        dumping: &Dumping<'_>,
        fd: BorrowedFd<'_>,
    ) -> Result<(), FileDumpError> {
        let failed = |source| query(dumping.file, "the network namespace of the socket", source);
        let own = match self.namespace {
            Some(own) => own,
            None => {
                let probe = socket::create(socket::AF_UNIX, socket::SOCK_DGRAM, 0);
                let own = probe.and_then(socket::namespace_cookie).map_err(failed)?;
                *self.namespace.insert(own)
            }
        };
        match socket::namespace_cookie(fd).map_err(failed)? == own {
            true => Ok(()),
            false => Err(FileDumpError::Obstacles(vec![
                dumping.file.obstacle(foreign_namespace()),
            ])),
        }
    }

    /// Writes the images of queues and connections.
    pub(super) fn write(&self, images: &ImageSetWriter) -> Result<(), FileDumpError> {
        self.packets.write(images)?;
        self.tcp.write(images)
    }
}

/// What is wrong with a socket of another network namespace.
fn foreign_namespace() -> Trouble {
    Trouble::new(
        "the socket belongs to another network namespace",
        "dump it from the namespace that it belongs to",
    )
}

/// The sockets of a restore.
#[derive(Debug)]
pub(super) struct SocketSet<'a> {
    unix: unix::RestoredUnix<'a>,
    inet: inet::RestoredInet<'a>,
    /// What waits in them.
    packets: PacketRestore,
    /// What is not as it was, in sentences.
    losses: Vec<String>,
}

/// All sockets made, and what is left to be done.
#[derive(Debug)]
pub(super) struct Finished {
    resting: Vec<inet::Resting>,
    losses: Vec<String>,
}

impl<'a> SocketSet<'a> {
    /// Makes all sockets of the images.
    pub(super) fn make(
        entries: &'a Entries,
        images: &ImageDir,
        inherited: &Inherited,
        options: &'a FileRestoreOptions,
        closes_tcp: bool,
        room: &Room,
    ) -> Result<SocketSet<'a>, FileRestoreError> {
        let unix = entries.all().filter_map(|entry| entry.usk.as_deref());
        let unix = unix.filter(|socket| !inherited.has_socket(socket.ino));
        let inet = entries
            .all()
            .filter_map(|entry| entry.isk.as_deref())
            .filter(|socket| !inherited.has_socket(socket.ino))
            .collect();
        Ok(SocketSet {
            unix: unix::RestoredUnix::make(unix.collect(), options, room)?,
            inet: inet::RestoredInet::make(inet, images, options, closes_tcp, room)?,
            packets: PacketRestore::load(images)?,
            losses: Vec::new(),
        })
    }

    /// Hands the socket of an entry out, once.
    pub(super) fn take(&mut self, fd_type: FdTypes, id: u32) -> Result<OwnedFd, FileRestoreError> {
        let found = match fd_type {
            FdTypes::Unixsk => self.unix.take(id)?,
            FdTypes::Inetsk => self.inet.take(id)?,
            _ => None,
        };
        found.ok_or_else(|| FileRestoreError::corrupt(id, "it is asked for twice"))
    }

    /// Fills queues and sets what ends a socket's making, when all files are open.
    pub(super) fn finish(self, opened: &OpenedFiles) -> Result<Finished, FileRestoreError> {
        let mut packets = self.packets;
        let mut losses = self.losses;
        losses.extend(self.unix.finish(&mut packets, opened)?);
        let (resting, lost) = self.inet.finish(&mut packets, opened)?;
        losses.extend(lost);
        Ok(Finished { resting, losses })
    }
}

fn is_socket_type(kind: FdTypes) -> bool {
    use FdTypes::{Inetsk, Netlinksk, Packetsk, Unixsk};
    matches!(kind, Unixsk | Inetsk | Netlinksk | Packetsk)
}

/// Options of a socket that are not as they were, in a sentence each. Options that this kernel does not
/// know, or does not let us set, stay behind; the socket works without them.
fn lost_options(entry: &FileEntry, fd: BorrowedFd<'_>) -> Vec<String> {
    let (opts, name) = match entry {
        FileEntry { usk: Some(usk), .. } => (&usk.opts, unix::shown(usk)),
        FileEntry { isk: Some(isk), .. } => (&isk.opts, inet::shown(isk)),
        FileEntry {
            nlsk: Some(nlsk), ..
        } => (&nlsk.opts, netlink::shown(nlsk)),
        FileEntry { psk: Some(psk), .. } => (&psk.opts, packet::shown(psk)),
        _ => return Vec::new(),
    };
    let lost = extra::lost(fd, &opts.firn).into_iter();
    lost.map(|option| format!("{name}: {option} can't be set as it was"))
        .collect()
}

/// What the lock of a dump holds off, by its images.
pub(crate) fn held_off(images: &ImageDir) -> Result<HeldOff, FileRestoreError> {
    Ok(held_off_of(&Entries::read(images)?))
}

fn held_off_of(entries: &Entries) -> HeldOff {
    let inet = || entries.all().filter_map(|entry| entry.isk.as_deref());
    HeldOff {
        connections: inet::connections(inet()),
        ports: inet().flat_map(inet::ports).collect(),
    }
}

/// The network of a restore: locked until all connections have been made.
#[derive(Debug, Default)]
pub(super) struct RestoredNetwork {
    lock: Option<LockedNetwork>,
    /// What is left of it.
    leftover: Option<Leftover>,
    resting: Vec<inet::Resting>,
    losses: Vec<String>,
}

impl RestoredNetwork {
    /// Locks the connections of the images, or takes the lock of the dump over.
    pub(super) fn lock(
        entries: &Entries,
        inventory: &InventoryEntry,
        options: &FileRestoreOptions,
    ) -> Result<RestoredNetwork, FileRestoreError> {
        let held_off = held_off_of(entries);
        let closes = inventory.tcp_close == Some(true) || options.sockets.tcp_close;
        let run_id = inventory.dump_criu_run_id.as_deref().unwrap_or_default();
        let method = inventory.network_lock_method;
        // Without connections there is a lock only where the dump was to keep them.
        let is_needed = match held_off.connections.is_empty() {
            true => method.is_some_and(|method| network_lock::is_locked(run_id, method, &held_off)),
            false => !closes || method.is_some(),
        };
        if !is_needed {
            return Ok(RestoredNetwork::default());
        }
        let lock = LockedNetwork::take_over(run_id, method.unwrap_or(0), &held_off)?;
        Ok(RestoredNetwork {
            lock: Some(lock),
            ..RestoredNetwork::default()
        })
    }

    /// What sockets have lost, in sentences. Connections that are given up lose everything.
    pub(super) fn losses(
        &self,
        entries: &Entries,
        opened: &OpenedFiles,
    ) -> Result<Vec<String>, FileRestoreError> {
        let resting = |id: u32| self.resting.iter().any(|one| one.id() == id);
        let given_up = |entry: &FileEntry| {
            let isk = entry.isk.as_ref();
            isk.is_some_and(|isk| inet::is_connection(isk) && !resting(isk.id))
        };
        let mut lost = Vec::new();
        for key in opened.keys().filter(|(kind, _)| is_socket_type(*kind)) {
            let entry = entries.get(key.0, key.1);
            if let Some(entry) = entry.filter(|entry| !given_up(entry))
                && let Some(fd) = opened.get(&key)?
            {
                lost.extend(lost_options(entry, fd.as_fd()));
            }
        }
        lost.sort_unstable();
        lost.extend_from_slice(&self.losses);
        Ok(lost)
    }

    /// Whether the lock is up.
    pub(super) fn is_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// Takes sockets that are complete, with the connections that do not run yet.
    pub(super) fn rest(&mut self, finished: Finished) {
        self.resting = finished.resting;
        self.losses = finished.losses;
    }

    /// Ends repair mode and queues what had been sent, while the lock still drops all of it. From here on the
    /// lock stays if the restore fails, as connections that are closed are no longer silent.
    pub(super) fn wake(&mut self, opened: &OpenedFiles) -> Result<(), FileRestoreError> {
        if let Some(lock) = &mut self.lock {
            lock.stay();
        }
        self.each(opened, inet::Resting::wake)?;
        self.each(opened, inet::Resting::queue)
    }

    /// Lifts the lock and has the kernel send what is queued. The tasks live without this process already,
    /// so nothing of this may fail.
    pub(super) fn free(&mut self, opened: &OpenedFiles) {
        if let Some(lock) = self.lock.take() {
            self.leftover = Some(lock.lift());
        }
        let pushed = self.each(opened, |one, fd| {
            one.push(fd);
            Ok(())
        });
        if let Err(error) = pushed {
            tracing::warn!("what was unsent waits for the kernel's timer: {error}");
        }
        self.resting.clear();
    }

    fn each(
        &self,
        opened: &OpenedFiles,
        act: impl Fn(&inet::Resting, BorrowedFd<'_>) -> Result<(), FileRestoreError>,
    ) -> Result<(), FileRestoreError> {
        for one in &self.resting {
            if let Some(fd) = opened.get(&(FdTypes::Inetsk, one.id()))? {
                act(one, fd.as_fd())?;
            }
        }
        Ok(())
    }
}

impl SocketDumpOptions {
    /// Whether the tree may go without a unix peer with that inode number.
    fn permits_outside(&self, ino: u32) -> bool {
        self.ext_unix || self.ext_unix_inodes.contains(&ino)
    }
}
