//! Open files.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firn_proto::{FdTypes, FileEntry, InetSkEntry, UnixSkEntry};
use serde::Serialize;

use super::lossy;
use crate::tools::set::SetImages;

/// An open file and the descriptors that lead to it.
#[derive(Debug, Serialize)]
pub struct FileInfo {
    /// What it is.
    pub kind: &'static str,
    /// Path, address or number.
    pub name: String,
    /// Whether its path no longer leads to it, so that the checkpoint has its content or a link.
    pub deleted: bool,
    /// Bytes that wait in it.
    pub waiting_bytes: u64,
    /// Its descriptors.
    pub descriptors: Vec<DescriptorInfo>,
}

/// A descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DescriptorInfo {
    /// The first process that has it; others may share the table.
    pub pid: u32,
    /// Its number.
    pub fd: u32,
}

/// Lists the files that have descriptors, by kind.
pub(super) fn files(set: &SetImages) -> Vec<FileInfo> {
    let mut descriptors: BTreeMap<(i32, u32), Vec<DescriptorInfo>> = BTreeMap::new();
    let owners = set.ids.iter().rev();
    let owners: BTreeMap<u64, u64> = owners
        .map(|(pid, ids)| (u64::from(ids.files_id), *pid))
        .collect();
    for (table, entries) in &set.fdinfos {
        let owner = owners.get(table).copied();
        let pid = owner.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        for entry in entries {
            let (key, fd) = ((entry.message.r#type, entry.message.id), entry.message.fd);
            let descriptor = DescriptorInfo { pid, fd };
            descriptors.entry(key).or_default().push(descriptor);
        }
    }
    let deleted: BTreeSet<u32> = set.remaps.iter().map(|r| r.message.orig_id).collect();
    let waiting = Waiting::of(set);
    let mut files: Vec<FileInfo> = descriptors
        .into_iter()
        .filter_map(|(key, descriptors)| {
            let file = &set.files.get(&key)?.message;
            Some(FileInfo {
                kind: kind_of(file),
                name: name_of(set, file),
                deleted: deleted.contains(&file.id),
                waiting_bytes: waiting.in_file(file),
                descriptors,
            })
        })
        .collect();
    files.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    files
}

fn kind_of(file: &FileEntry) -> &'static str {
    const FILE_KIND: u32 = 0o170_000;
    const DIRECTORY: u32 = 0o040_000;
    const DEVICE: u32 = 0o020_000;
    match FdTypes::try_from(file.r#type).unwrap_or(FdTypes::Und) {
        FdTypes::Reg => match file.reg.as_ref().and_then(|reg| reg.mode).unwrap_or(0) & FILE_KIND {
            DIRECTORY => "directory",
            DEVICE => "device",
            _ => "file",
        },
        FdTypes::Pipe => "pipe",
        FdTypes::Fifo => "fifo",
        FdTypes::Inetsk => "inet socket",
        FdTypes::Unixsk => "unix socket",
        FdTypes::Eventfd => "eventfd",
        FdTypes::Eventpoll => "epoll",
        FdTypes::Inotify => "inotify",
        FdTypes::Signalfd => "signalfd",
        FdTypes::Packetsk => "packet socket",
        FdTypes::Tty | FdTypes::CtlTty => "terminal",
        FdTypes::Fanotify => "fanotify",
        FdTypes::Netlinksk => "netlink socket",
        FdTypes::Ns => "namespace",
        FdTypes::Tunf => "tun device",
        FdTypes::Ext => "external",
        FdTypes::Timerfd => "timerfd",
        FdTypes::Memfd => "memfd",
        FdTypes::Bpfmap => "bpf map",
        FdTypes::Pidfd => "pidfd",
        FdTypes::FirnUring => "io_uring ring",
        FdTypes::AutofsPipe => "autofs pipe",
        FdTypes::Und => "unknown",
    }
}

fn name_of(set: &SetImages, file: &FileEntry) -> String {
    let path = |id: u32| {
        let file = set.file(FdTypes::Reg, id)?;
        Some(lossy(&file.reg.as_ref()?.name))
    };
    let memfd = |inode: u32| {
        let inode = u64::from(inode);
        let found = set
            .memfds
            .iter()
            .find(|memfd| memfd.message.inode_id == inode)?;
        Some(lossy(&found.message.name))
    };
    let regular = file.reg.as_ref().map(|reg| lossy(&reg.name));
    let named = regular
        .or_else(|| {
            file.pipe
                .as_ref()
                .map(|pipe| format!("pipe:[{}]", pipe.pipe_id))
        })
        .or_else(|| path(file.fifo.as_ref()?.regf_id?))
        .or_else(|| path(file.tty.as_ref()?.regf_id?))
        .or_else(|| memfd(file.memfd.as_ref()?.inode_id))
        .or_else(|| file.isk.as_deref().map(inet_name))
        .or_else(|| file.usk.as_deref().map(unix_name))
        .or_else(|| {
            file.pidfd
                .as_ref()
                .map(|pidfd| format!("task {}", pidfd.nspid))
        })
        .or_else(|| anonymous_name(file));
    named.unwrap_or_else(|| format!("#{}", file.id))
}

/// The little that tells files without a name apart.
fn anonymous_name(file: &FileEntry) -> Option<String> {
    const NAMESPACES: [(u32, &str); 8] = [
        (0x80, "time"),
        (0x0002_0000, "mnt"),
        (0x0200_0000, "cgroup"),
        (0x0400_0000, "uts"),
        (0x0800_0000, "ipc"),
        (0x1000_0000, "user"),
        (0x2000_0000, "pid"),
        (0x4000_0000, "net"),
    ];
    if let Some(map) = &file.bpf {
        return Some(format!(
            "{} (up to {} entries)",
            lossy(&map.map_name),
            map.max_entries
        ));
    }
    if let Some(namespace) = &file.nsf {
        let known = NAMESPACES
            .iter()
            .find(|(flag, _)| *flag == namespace.ns_cflag);
        return known.map(|(_, name)| (*name).to_owned());
    }
    if let Some(epoll) = &file.epfd {
        return Some(format!("watches {} files", epoll.tfd.len()));
    }
    if let Some(inotify) = &file.ify {
        return Some(format!("{} watches", inotify.wd.len()));
    }
    if let Some(fanotify) = &file.ffy {
        return Some(format!("{} marks", fanotify.mark.len()));
    }
    if let Some(eventfd) = &file.efd {
        return Some(format!("count {}", eventfd.counter));
    }
    let plugin = file.ext.as_ref()?.firn.as_ref()?.plugin.as_ref()?;
    Some(format!("of plugin {plugin}"))
}

fn state_name(state: u32) -> &'static str {
    match state {
        1 => "connected",
        7 => "unconnected",
        10 => "listening",
        2..=11 => "closing or opening",
        _ => "in an unknown state",
    }
}

fn inet_name(socket: &InetSkEntry) -> String {
    let protocol = match socket.proto {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        136 => "udplite".to_owned(),
        other => format!("protocol {other}"),
    };
    let source = endpoint(&socket.src_addr, socket.src_port);
    let state = state_name(socket.state);
    match socket.dst_port {
        0 => format!("{protocol} {source} {state}"),
        port => format!(
            "{protocol} {source} to {} {state}",
            endpoint(&socket.dst_addr, port)
        ),
    }
}

fn endpoint(words: &[u32], port: u32) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let v4 = <[u8; 4]>::try_from(&bytes[..]).map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
    let v6 = <[u8; 16]>::try_from(&bytes[..]).map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes)));
    match v4.or(v6) {
        Ok(IpAddr::V4(address)) => format!("{address}:{port}"),
        Ok(IpAddr::V6(address)) => format!("[{address}]:{port}"),
        Err(_) => format!("?:{port}"),
    }
}

fn unix_name(socket: &UnixSkEntry) -> String {
    let kind = match socket.r#type {
        1 => "stream",
        2 => "datagram",
        5 => "seqpacket",
        _ => "unknown",
    };
    let name = match &socket.name[..] {
        [] => format!("#{}", socket.ino),
        [0, abstract_name @ ..] => format!("@{}", lossy(abstract_name)),
        path => lossy(path).trim_end_matches('\0').to_owned(),
    };
    let peer = match socket.peer {
        0 => String::new(),
        peer => format!(" to #{peer}"),
    };
    format!("{kind} {name}{peer} {}", state_name(socket.state))
}

/// Bytes that wait, by the number of the pipe, fifo or socket.
#[derive(Debug, Default)]
struct Waiting {
    pipes: BTreeMap<u32, u64>,
    fifos: BTreeMap<u32, u64>,
    sockets: BTreeMap<u32, u64>,
}

impl Waiting {
    fn of(set: &SetImages) -> Self {
        let mut waiting = Self::default();
        for (data, sums) in [
            (&set.pipes_data, &mut waiting.pipes),
            (&set.fifos_data, &mut waiting.fifos),
        ] {
            for content in data.iter().map(|placed| &placed.message) {
                *sums.entry(content.pipe_id).or_default() += u64::from(content.bytes);
            }
        }
        for packet in set.packets.iter().map(|placed| &placed.message) {
            let sum = waiting.sockets.entry(packet.id_for).or_default();
            *sum += u64::from(packet.length);
        }
        waiting
    }

    fn in_file(&self, file: &FileEntry) -> u64 {
        let sum = match (&file.pipe, &file.fifo, &file.usk) {
            (Some(pipe), _, _) => self.pipes.get(&pipe.pipe_id),
            (_, Some(fifo), _) => self.fifos.get(&fifo.pipe_id),
            (_, _, Some(_)) => self.sockets.get(&file.id),
            _ => None,
        };
        sum.copied().unwrap_or(0)
    }
}
