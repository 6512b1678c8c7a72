//! Files: every number that leads to one, and what stands behind them.

use std::collections::BTreeSet;

use firn_proto::{FdTypes, FileEntry, InetSkEntry, RemapFilePathEntry, RemapType};

use super::{Fault, Findings};
use crate::ImageKind;
use crate::tools::set::{Placed, SetImages};

/// Connection states that have a stream image: established and half-closed.
const CONNECTED: [u32; 6] = [1, 4, 5, 8, 9, 11];
const STREAM: u32 = 1;
const TCP: u32 = 6;
/// SCM_RIGHTS.
const SCM_RIGHTS: u32 = 1;
/// In old images, marks a ghost where the type is absent.
const OLD_GHOST: u32 = 1 << 31;

pub(super) fn check_files(set: &SetImages, found: &mut Findings) {
    if !set.has(ImageKind::Files, 0) {
        let needed_by = "every process".to_owned();
        return found.file(ImageKind::Files, 0, Fault::Missing(needed_by));
    }
    if set.is_damaged(ImageKind::Files, 0) {
        return;
    }
    let sockets = set
        .files
        .values()
        .filter_map(|file| file.message.usk.as_ref());
    let inodes: BTreeSet<u32> = sockets.map(|socket| socket.ino).collect();
    for placed in set.files.values() {
        check_entry(set, placed, &inodes, found);
    }
    check_tables(set, found);
    check_directories(set, found);
    for placed in &set.remaps {
        check_remap(set, placed, found);
    }
    check_contents(set, found);
}

fn dangling(from: impl Into<String>, what: &'static str, id: impl Into<u64>) -> Fault {
    Fault::Dangling {
        from: from.into(),
        what,
        id: id.into(),
    }
}

/// Gives the number that the member for the entry's type has.
fn inner_id(file: &FileEntry) -> Option<u32> {
    Some(match FdTypes::try_from(file.r#type).ok()? {
        FdTypes::Reg => file.reg.as_ref()?.id,
        FdTypes::Pipe => file.pipe.as_ref()?.id,
        FdTypes::Fifo => file.fifo.as_ref()?.id,
        FdTypes::Inetsk => file.isk.as_ref()?.id,
        FdTypes::Unixsk => file.usk.as_ref()?.id,
        FdTypes::Eventfd => file.efd.as_ref()?.id,
        FdTypes::Eventpoll => file.epfd.as_ref()?.id,
        FdTypes::Inotify => file.ify.as_ref()?.id,
        FdTypes::Signalfd => file.sgfd.as_ref()?.id,
        FdTypes::Packetsk => file.psk.as_ref()?.id,
        FdTypes::Tty => file.tty.as_ref()?.id,
        FdTypes::Fanotify => file.ffy.as_ref()?.id,
        FdTypes::Netlinksk => file.nlsk.as_ref()?.id,
        FdTypes::Ns => file.nsf.as_ref()?.id,
        FdTypes::Tunf => file.tunf.as_ref()?.id,
        FdTypes::Ext => file.ext.as_ref()?.id,
        FdTypes::Timerfd => file.tfd.as_ref()?.id,
        FdTypes::Memfd => file.memfd.as_ref()?.id,
        FdTypes::Bpfmap => file.bpf.as_ref()?.id,
        FdTypes::Pidfd => file.pidfd.as_ref()?.id,
        FdTypes::FirnUring => file.firn_uring.as_ref()?.id,
        FdTypes::Und | FdTypes::CtlTty | FdTypes::AutofsPipe => return None,
    })
}

fn type_name(kind: i32) -> String {
    FdTypes::try_from(kind).map_or_else(|_| kind.to_string(), |kind| kind.as_str_name().to_owned())
}

fn check_entry(
    set: &SetImages,
    placed: &Placed<FileEntry>,
    inodes: &BTreeSet<u32>,
    found: &mut Findings,
) {
    let file = &placed.message;
    let mut bad = |fault| found.entry(ImageKind::Files, 0, placed, fault);
    if inner_id(file) != Some(file.id) {
        let kind = type_name(file.r#type);
        return bad(Fault::FileType { id: file.id, kind });
    }
    let regular = [
        ("fifo", file.fifo.as_ref().and_then(|fifo| fifo.regf_id)),
        ("terminal", file.tty.as_ref().and_then(|tty| tty.regf_id)),
    ];
    for (what, id) in regular {
        if let Some(id) = id.filter(|id| !set.has_reg(*id)) {
            bad(dangling(format!("{what} {}", file.id), "regular file", id));
        }
    }
    if let Some(tty) = &file.tty
        && !set
            .ttys
            .iter()
            .any(|info| info.message.id == tty.tty_info_id)
    {
        bad(dangling(
            format!("terminal {}", file.id),
            "terminal info",
            tty.tty_info_id,
        ));
    }
    if let Some(memfd) = &file.memfd {
        let inode = u64::from(memfd.inode_id);
        if !set.memfds.iter().any(|m| m.message.inode_id == inode) {
            bad(dangling(format!("memfd {}", file.id), "memfd inode", inode));
        }
    }
    let peers = file.usk.as_ref().map(|socket| socket.peer);
    if let Some(peer) = peers.filter(|peer| *peer != 0 && !inodes.contains(peer)) {
        bad(dangling(format!("socket {}", file.id), "peer socket", peer));
    }
    if let Some(socket) = file.isk.as_ref().filter(|socket| has_stream(set, socket)) {
        let ino = socket.ino.into();
        if !set.has(ImageKind::TcpStream, ino) {
            let needed_by = format!("TCP socket {}", socket.id);
            found.file(ImageKind::TcpStream, ino, Fault::Missing(needed_by));
        }
    }
}

fn has_stream(set: &SetImages, socket: &InetSkEntry) -> bool {
    let closed = set.inventory.as_ref().and_then(|inv| inv.tcp_close) == Some(true);
    let tcp = socket.r#type == STREAM && socket.proto == TCP;
    tcp && !closed && CONNECTED.contains(&socket.state)
}

/// Checks descriptor tables.
fn check_tables(set: &SetImages, found: &mut Findings) {
    for (id, table) in &set.fdinfos {
        let mut fds = BTreeSet::new();
        for placed in table {
            let fd = &placed.message;
            let mut bad = |fault| found.entry(ImageKind::Fdinfo, *id, placed, fault);
            if !fds.insert(fd.fd) {
                let (what, id) = ("descriptor", fd.fd.into());
                bad(Fault::Twice { what, id });
            }
            if !set.files.contains_key(&(fd.r#type, fd.id)) {
                let from = format!("descriptor {} of type {}", fd.fd, type_name(fd.r#type));
                bad(dangling(from, "file", fd.id));
            }
        }
    }
}

/// Checks working directories, roots and executables.
fn check_directories(set: &SetImages, found: &mut Findings) {
    for (pid, fs) in &set.fs {
        for (field, id) in [("cwd_id", fs.cwd_id), ("root_id", fs.root_id)] {
            if !set.has_reg(id) {
                found.file(ImageKind::Fs, *pid, dangling(field, "regular file", id));
            }
        }
    }
    for (pid, mm) in &set.mms {
        if !set.has_reg(mm.exe_file_id) {
            let fault = dangling("exe_file_id", "regular file", mm.exe_file_id);
            found.file(ImageKind::Mm, *pid, fault);
        }
    }
}

fn check_remap(set: &SetImages, placed: &Placed<RemapFilePathEntry>, found: &mut Findings) {
    let remap = &placed.message;
    let kind = ImageKind::RemapFpath;
    if !set.has_reg(remap.orig_id) {
        let fault = dangling("orig_id", "regular file", remap.orig_id);
        found.entry(kind, 0, placed, fault);
    }
    let old_kind = match remap.remap_id & OLD_GHOST {
        0 => RemapType::Linked,
        _ => RemapType::Ghost,
    };
    let given = remap.remap_type.map(RemapType::try_from);
    match given.unwrap_or(Ok(old_kind)) {
        Ok(RemapType::Linked) if !set.has_reg(remap.remap_id) => {
            let fault = dangling("remap_id", "regular file", remap.remap_id);
            found.entry(kind, 0, placed, fault);
        }
        Ok(RemapType::Ghost) => {
            let ghost = match remap.remap_type {
                Some(_) => remap.remap_id,
                None => remap.remap_id & !OLD_GHOST,
            };
            if !set.has(ImageKind::GhostFile, ghost.into()) {
                let needed_by = format!("deleted file {}", remap.orig_id);
                found.file(
                    ImageKind::GhostFile,
                    ghost.into(),
                    Fault::Missing(needed_by),
                );
            }
        }
        Ok(RemapType::Linked | RemapType::Procfs) => {}
        Err(_) => {
            let value = u64::try_from(remap.remap_type.unwrap_or(0)).unwrap_or(u64::MAX);
            let field = "remap_type";
            found.entry(kind, 0, placed, Fault::Value { field, value });
        }
    }
}

/// Checks that bytes in pipes and sockets belong to something.
fn check_contents(set: &SetImages, found: &mut Findings) {
    let pipes = set
        .files
        .values()
        .filter_map(|file| file.message.pipe.as_ref());
    let pipes: BTreeSet<u32> = pipes.map(|pipe| pipe.pipe_id).collect();
    let fifos = set
        .files
        .values()
        .filter_map(|file| file.message.fifo.as_ref());
    let fifos: BTreeSet<u32> = fifos.map(|fifo| fifo.pipe_id).collect();
    for (kind, data, known) in [
        (ImageKind::PipesData, &set.pipes_data, &pipes),
        (ImageKind::FifoData, &set.fifos_data, &fifos),
    ] {
        let mut seen = BTreeSet::new();
        for placed in data {
            let id = placed.message.pipe_id;
            if !known.contains(&id) {
                found.entry(kind, 0, placed, dangling("pipe_id", "pipe", id));
            }
            let firn = placed.message.firn.as_ref();
            let packets = firn.map(|firn| firn.packets.iter().map(|len| u64::from(*len)).sum());
            if let Some(value) = packets.filter(|sum: &u64| *sum != u64::from(placed.message.bytes))
            {
                let field = "sum of the packets' lengths";
                found.entry(kind, 0, placed, Fault::Value { field, value });
            }
            if !seen.insert(id) {
                let (what, id) = ("content of pipe", id.into());
                found.entry(kind, 0, placed, Fault::Twice { what, id });
            }
        }
    }
    check_bpf_data(set, found);
    let numbers: BTreeSet<u32> = set.files.keys().map(|(_, id)| *id).collect();
    for placed in &set.packets {
        let packet = &placed.message;
        let mut bad = |fault| found.entry(ImageKind::SkQueues, 0, placed, fault);
        let receivers = [FdTypes::Unixsk, FdTypes::Inetsk, FdTypes::Packetsk];
        if !receivers
            .iter()
            .any(|kind| set.file(*kind, packet.id_for).is_some())
        {
            bad(dangling("id_for", "socket", packet.id_for));
        }
        let rights = packet.scm.iter().filter(|scm| scm.r#type == SCM_RIGHTS);
        for id in rights
            .flat_map(|scm| &scm.rights)
            .filter(|id| !numbers.contains(id))
        {
            bad(dangling("rights", "file", *id));
        }
    }
}

/// Checks that the contents of BPF maps belong to one and have its sizes.
fn check_bpf_data(set: &SetImages, found: &mut Findings) {
    for placed in &set.bpf_data {
        let data = &placed.message;
        let mut bad = |fault| found.entry(ImageKind::BpfmapData, 0, placed, fault);
        let mut maps = set
            .files
            .values()
            .filter_map(|file| file.message.bpf.as_ref());
        let Some(map) = maps.find(|map| map.map_id == data.map_id) else {
            bad(dangling("map_id", "BPF map", data.map_id));
            continue;
        };
        for (field, bytes, size) in [
            ("keys_bytes", data.keys_bytes, map.key_size),
            ("values_bytes", data.values_bytes, map.value_size),
        ] {
            let value = u64::from(bytes);
            if value != u64::from(size) * u64::from(data.count) {
                bad(Fault::Value { field, value });
            }
        }
    }
}
