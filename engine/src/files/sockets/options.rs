//! Options at socket level, which every kind has.
//!
//! At restore those that others depend on (marks, devices, what messages carry) are set before a socket
//! gets its address, the rest when its queues are filled: buffer sizes and filters would be in the way.

use std::os::fd::AsFd;

use firn_proto::SkOptsEntry;
use firn_sys::socket::{
    self, AF_NETLINK, AF_UNIX, SO_BINDTODEVICE, SO_BROADCAST, SO_BUF_LOCK, SO_DONTROUTE,
    SO_KEEPALIVE, SO_LINGER, SO_LOCK_FILTER, SO_MARK, SO_NO_CHECK, SO_OOBINLINE, SO_PASSCRED,
    SO_PASSSEC, SO_PRIORITY, SO_RCVBUF, SO_RCVBUFFORCE, SO_RCVLOWAT, SO_RCVTIMEO, SO_REUSEADDR,
    SO_REUSEPORT, SO_SNDBUF, SO_SNDBUFFORCE, SO_SNDTIMEO, SOL_SOCKET, SOL_TCP, tcp,
};
use firn_sys::{Errno, Result};

use super::extra::{self, Defaults, SocketKind};
use crate::files::error::FileRestoreError;

/// Largest classic filter.
const MAX_FILTER: usize = 4096;
/// Enough room to fill any queue that there was.
const ROOMY: i32 = 1 << 28;

/// Why a socket's options can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionsError {
    /// What was asked.
    pub(super) what: &'static str,
    /// What the kernel said.
    pub(super) source: Errno,
}

/// Reads the options.
pub(super) fn dump(
    fd: impl AsFd,
    kind: SocketKind,
    connected: bool,
    defaults: &mut Defaults,
) -> std::result::Result<SkOptsEntry, OptionsError> {
    let fd = fd.as_fd();
    let failed = |source| OptionsError {
        what: "the socket options",
        source,
    };
    let mut opts = plain(fd, kind).map_err(failed)?;
    opts.so_filter = filter(fd).map_err(|source| OptionsError {
        what: "the socket filter (only classic BPF can be read)",
        source,
    })?;
    opts.firn = extra::dump(fd, kind, connected, defaults).map_err(failed)?;
    let locked = socket::number(fd, SOL_SOCKET, SO_LOCK_FILTER).unwrap_or(0);
    if locked != 0 {
        opts.firn.push(firn_proto::FirnSockoptEntry {
            level: Some(SOL_SOCKET),
            name: Some(SO_LOCK_FILTER),
            value: Some(locked.to_ne_bytes().to_vec()),
        });
    }
    Ok(opts)
}

fn plain(fd: impl AsFd, kind: SocketKind) -> Result<SkOptsEntry> {
    let fd = fd.as_fd();
    let ask = |name| socket::number(fd, SOL_SOCKET, name);
    let number = |name| ask(name).map(i32::cast_unsigned);
    let flag = |name| ask(name).map(|value| Some(value != 0));
    let send = timeout(fd, SO_SNDTIMEO)?;
    let receive = timeout(fd, SO_RCVTIMEO)?;
    let has_credentials = matches!(kind.family, AF_UNIX | AF_NETLINK);
    let linger = socket::option(fd, SOL_SOCKET, SO_LINGER, 8)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u32::from_ne_bytes).unwrap_or(0);
    let lingers = linger.len() == 8 && word(&linger[..4]) != 0;
    let device = socket::option(fd, SOL_SOCKET, SO_BINDTODEVICE, 16).unwrap_or_default();
    let device: Vec<u8> = device.into_iter().take_while(|byte| *byte != 0).collect();
    let mark = number(SO_MARK)?;
    Ok(SkOptsEntry {
        so_sndbuf: number(SO_SNDBUF)?,
        so_rcvbuf: number(SO_RCVBUF)?,
        so_snd_tmo_sec: send.0,
        so_snd_tmo_usec: send.1,
        so_rcv_tmo_sec: receive.0,
        so_rcv_tmo_usec: receive.1,
        reuseaddr: flag(SO_REUSEADDR)?,
        so_priority: Some(number(SO_PRIORITY)?),
        so_rcvlowat: Some(number(SO_RCVLOWAT)?),
        so_mark: (mark != 0).then_some(mark),
        so_passcred: if has_credentials {
            flag(SO_PASSCRED)?
        } else {
            None
        },
        so_passsec: if has_credentials {
            flag(SO_PASSSEC)?
        } else {
            None
        },
        so_dontroute: flag(SO_DONTROUTE)?,
        so_no_check: flag(SO_NO_CHECK)?,
        so_bound_dev: (!device.is_empty()).then_some(device),
        so_reuseport: flag(SO_REUSEPORT)?,
        so_broadcast: flag(SO_BROADCAST)?,
        so_keepalive: flag(SO_KEEPALIVE)?,
        so_oobinline: Some(number(SO_OOBINLINE)?),
        so_linger: lingers.then(|| word(&linger[4..])),
        so_buf_lock: number(SO_BUF_LOCK).ok(),
        ..SkOptsEntry::default()
    })
}

fn timeout(fd: impl AsFd, name: i32) -> Result<(u64, u64)> {
    let value = socket::option(fd, SOL_SOCKET, name, 16)?;
    let (sec, usec) = value.split_at_checked(8).ok_or(Errno::EINVAL)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes);
    match (word(sec), word(usec)) {
        (Ok(sec), Ok(usec)) => Ok((sec, usec)),
        _ => Err(Errno::EINVAL),
    }
}

/// The classic filter, an instruction per number.
fn filter(fd: impl AsFd) -> Result<Vec<u64>> {
    // The length counts instructions here and not bytes.
    let fd = fd.as_fd();
    let nr = socket::filter_len(fd)?;
    if nr == 0 {
        return Ok(Vec::new());
    }
    let bytes = socket::filter(fd, nr.min(MAX_FILTER))?;
    let instructions = bytes.chunks_exact(8).map(|raw| {
        let code = u64::from(u16::from_ne_bytes([raw[0], raw[1]]));
        let k = u64::from(u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]));
        code << 48 | u64::from(raw[2]) << 40 | u64::from(raw[3]) << 32 | k
    });
    Ok(instructions.collect())
}

/// An instruction as the kernel takes it.
fn instruction(packed: u64) -> [u8; 8] {
    let bytes = packed.to_be_bytes();
    let code = u16::from_be_bytes([bytes[0], bytes[1]]).to_ne_bytes();
    let k = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]).to_ne_bytes();
    [code[0], code[1], bytes[2], bytes[3], k[0], k[1], k[2], k[3]]
}

/// Sets what must be there before the socket has an address or messages.
pub(super) fn restore_early(
    fd: impl AsFd,
    opts: &SkOptsEntry,
    name: &str,
) -> std::result::Result<(), FileRestoreError> {
    let fd = fd.as_fd();
    let set = |option: i32, value: i32| {
        let refused = FileRestoreError::refused("set an option of", name);
        socket::set_number(fd, SOL_SOCKET, option, value).map_err(refused)
    };
    // Several sockets may have one address; the real value follows when all have theirs.
    set(SO_REUSEADDR, 1)?;
    if opts.so_reuseport == Some(true) {
        set(SO_REUSEPORT, 1)?;
    }
    if let Some(mark) = opts.so_mark.filter(|mark| *mark != 0) {
        set(SO_MARK, mark.cast_signed())?;
    }
    if let Some(device) = &opts.so_bound_dev {
        let device = [device.as_slice(), &[0]].concat();
        let refused = FileRestoreError::refused("bind to its device", name);
        socket::set_option(fd, SOL_SOCKET, SO_BINDTODEVICE, &device).map_err(refused)?;
    }
    let early: Vec<_> = opts
        .firn
        .iter()
        .filter(|entry| !is_late(entry))
        .cloned()
        .collect();
    report(extra::restore(fd, &early), name);
    // Room for everything that was in the queues.
    let _ = socket::set_number(fd, SOL_SOCKET, SO_SNDBUFFORCE, ROOMY);
    let _ = socket::set_number(fd, SOL_SOCKET, SO_RCVBUFFORCE, ROOMY);
    Ok(())
}

/// Options that belong to a connection, that give a unix socket a name as soon as it sends, and the lock
/// that ends all changes of a filter.
fn is_late(entry: &firn_proto::FirnSockoptEntry) -> bool {
    let late = [SO_LOCK_FILTER, extra::SO_PASSPIDFD].map(Some);
    let late = entry.level == Some(SOL_SOCKET) && late.contains(&entry.name);
    entry.level == Some(SOL_TCP) || late
}

/// Sets everything else, when queues are filled.
pub(super) fn restore_late(
    fd: impl AsFd,
    opts: &SkOptsEntry,
    name: &str,
) -> std::result::Result<(), FileRestoreError> {
    let fd = fd.as_fd();
    let refused = || FileRestoreError::refused("set an option of", name);
    late(fd, opts).map_err(refused())?;
    if !opts.so_filter.is_empty() {
        let program: Vec<u8> = opts
            .so_filter
            .iter()
            .copied()
            .flat_map(instruction)
            .collect();
        let refused = FileRestoreError::refused("attach the filter of", name);
        socket::attach_filter(fd, &program).map_err(refused)?;
    }
    let late: Vec<_> = opts
        .firn
        .iter()
        .filter(|entry| is_late(entry))
        .cloned()
        .collect();
    report(extra::restore(fd, &late), name);
    Ok(())
}

fn late(fd: impl AsFd, opts: &SkOptsEntry) -> Result<()> {
    let fd = fd.as_fd();
    let set = |option: i32, value: i32| socket::set_number(fd, SOL_SOCKET, option, value);
    let flag = |option: i32, value: Option<bool>| match value {
        Some(value) => set(option, value.into()),
        None => Ok(()),
    };
    // The kernel doubles what it is told.
    let half = |size: u32| i32::try_from(size / 2).unwrap_or(i32::MAX);
    set(SO_SNDBUFFORCE, half(opts.so_sndbuf))?;
    set(SO_RCVBUFFORCE, half(opts.so_rcvbuf))?;
    if let Some(lock) = opts.so_buf_lock {
        set(SO_BUF_LOCK, lock.cast_signed())?;
    }
    if let Some(priority) = opts.so_priority {
        set(SO_PRIORITY, priority.cast_signed())?;
    }
    if let Some(mark) = opts.so_rcvlowat {
        // Kinds without it say so.
        let _ = set(SO_RCVLOWAT, mark.cast_signed());
    }
    // With these a unix socket gets a name as soon as it connects or sends.
    flag(SO_PASSCRED, opts.so_passcred)?;
    flag(SO_PASSSEC, opts.so_passsec)?;
    flag(SO_REUSEADDR, opts.reuseaddr)?;
    if opts.so_reuseport == Some(false) {
        set(SO_REUSEPORT, 0)?;
    }
    flag(SO_DONTROUTE, opts.so_dontroute)?;
    flag(SO_NO_CHECK, opts.so_no_check)?;
    flag(SO_BROADCAST, opts.so_broadcast)?;
    flag(SO_KEEPALIVE, opts.so_keepalive)?;
    flag(SO_OOBINLINE, opts.so_oobinline.map(|value| value != 0))?;
    if let Some(seconds) = opts.so_linger {
        let value = [1u32.to_ne_bytes(), seconds.to_ne_bytes()].concat();
        socket::set_option(fd, SOL_SOCKET, SO_LINGER, &value)?;
    }
    let old = [
        (tcp::TCP_KEEPCNT, opts.tcp_keepcnt),
        (tcp::TCP_KEEPIDLE, opts.tcp_keepidle),
        (tcp::TCP_KEEPINTVL, opts.tcp_keepintvl),
    ];
    for (name, value) in old
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    {
        socket::set_number(fd, SOL_TCP, name, value.cast_signed())?;
    }
    for (name, sec, usec) in [
        (SO_SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
        (SO_RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
    ] {
        let value = [sec.to_ne_bytes(), usec.to_ne_bytes()].concat();
        socket::set_option(fd, SOL_SOCKET, name, &value)?;
    }
    Ok(())
}

/// Notes why options could not be set; which ones were lost is told when all have been tried.
fn report(refused: Vec<(String, Errno)>, name: &str) {
    for (option, errno) in refused {
        tracing::info!("{name}: {option} stays as it is: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_sys::socket::{SOCK_DGRAM, SOCK_STREAM};

    #[test]
    fn options_come_back() {
        let kind = SocketKind {
            family: AF_UNIX,
            kind: SOCK_STREAM,
            protocol: 0,
        };
        let (one, _peer) = socket::pair(SOCK_STREAM).expect("a pair");
        for (name, value) in [(SO_SNDBUF, 40_000), (SO_PASSCRED, 1), (SO_PRIORITY, 3)] {
            socket::set_number(&one, SOL_SOCKET, name, value).expect("setsockopt");
        }
        let time = [7u64.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
        socket::set_option(&one, SOL_SOCKET, SO_RCVTIMEO, &time).expect("setsockopt");
        let mut defaults = Defaults::default();
        let opts = dump(&one, kind, true, &mut defaults).expect("readable");
        assert_eq!((opts.so_rcv_tmo_sec, opts.so_sndbuf), (7, 80_000));
        let (other, _peer) = socket::pair(SOCK_STREAM).expect("a pair");
        restore_early(&other, &opts, "socket").expect("settable");
        restore_late(&other, &opts, "socket").expect("settable");
        assert_eq!(dump(&other, kind, true, &mut defaults), Ok(opts));
    }

    #[test]
    fn classic_filters_come_back() {
        let kind = SocketKind {
            family: AF_UNIX,
            kind: SOCK_DGRAM,
            protocol: 0,
        };
        let make = || socket::create(AF_UNIX, SOCK_DGRAM, 0).expect("a socket");
        // Load the word at 4, compare with 7, keep or drop.
        let program = [
            0x20 << 48 | 4,
            0x15 << 48 | 1 << 32 | 7,
            6 << 48 | 0xffff_ffff,
            6 << 48,
        ];
        let one = make();
        let bytes: Vec<u8> = program.into_iter().flat_map(instruction).collect();
        socket::attach_filter(&one, &bytes).expect("a valid program");
        let opts = dump(&one, kind, false, &mut Defaults::default()).expect("readable");
        assert_eq!(opts.so_filter, program);
    }
}
