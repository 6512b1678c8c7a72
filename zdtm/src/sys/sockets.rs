//! Sockets.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::check;

/// What a message brought.
#[derive(Debug, Default)]
pub struct Received {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Address of its sender, as the kernel gives it.
    pub sender: Vec<u8>,
    /// Descriptors that came with it.
    pub rights: Vec<OwnedFd>,
    /// Process, user and group of the sender.
    pub credentials: Option<(i32, u32, u32)>,
}

/// Sends a message, to an address if one is given, with descriptors.
pub fn send_message(
    fd: impl AsFd,
    bytes: &[u8],
    to: Option<&[u8]>,
    rights: &[RawFd],
) -> io::Result<usize> {
    let mut control = [0u64; 64];
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zero is a valid header.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    if let Some(to) = to {
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = u32::try_from(to.len()).expect("addresses are short");
    }
    if !rights.is_empty() {
        let len = 16 + 4 * rights.len();
        control[0] = u64::try_from(len).expect("few descriptors");
        control[1] = u64::from(libc::SOL_SOCKET.cast_unsigned())
            | u64::from(libc::SCM_RIGHTS.cast_unsigned()) << 32;
        for (index, pair) in rights.chunks(2).enumerate() {
            let low = u64::from(pair[0].cast_unsigned());
            let high = pair.get(1).map_or(0, |fd| u64::from(fd.cast_unsigned()));
            control[2 + index] = low | high << 32;
        }
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = len.next_multiple_of(8);
    }
    // SAFETY: the header names buffers that live until the call returns.
    let sent = unsafe {
        libc::sendmsg(
            fd.as_fd().as_raw_fd(),
            &raw const header,
            libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Sends with `MSG_*` flags to the peer.
pub fn send_flags(fd: impl AsFd, bytes: &[u8], flags: i32) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is as long as told.
    let sent = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives a message of at most `room` bytes; `flags` are `MSG_*`.
pub fn receive_message(fd: impl AsFd, room: usize, flags: i32) -> io::Result<Received> {
    let mut bytes = vec![0u8; room];
    let mut sender = vec![0u8; 128];
    let mut control = [0u64; 128];
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: room,
    };
    // SAFETY: all zero is a valid header.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_name = sender.as_mut_ptr().cast();
    header.msg_namelen = 128;
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: the header names buffers that live until the call returns, with their sizes.
    let got = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut header, flags) };
    bytes.truncate(usize::try_from(got).map_err(|_| io::Error::last_os_error())?);
    sender.truncate(usize::try_from(header.msg_namelen).unwrap_or(0));
    let mut received = Received {
        bytes,
        sender,
        ..Received::default()
    };
    // SAFETY: the macros walk the control data that the kernel has written into our buffer.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            let len = (*at).cmsg_len - 16;
            let data = std::slice::from_raw_parts(libc::CMSG_DATA(at), len);
            let words = data
                .chunks_exact(4)
                .map(|word| i32::from_ne_bytes(word.try_into().expect("four bytes")));
            let words: Vec<i32> = words.collect();
            match (*at).cmsg_type {
                libc::SCM_RIGHTS => {
                    let fds = words.iter().map(|fd| OwnedFd::from_raw_fd(*fd));
                    received.rights.extend(fds);
                }
                libc::SCM_CREDENTIALS => {
                    let (uid, gid) = (words[1].cast_unsigned(), words[2].cast_unsigned());
                    received.credentials = Some((words[0], uid, gid));
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok(received)
}

/// Reads an option of up to 128 bytes.
pub fn sockopt(fd: impl AsFd, level: i32, name: i32) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; 128];
    let mut len = 128u32;
    // SAFETY: the buffer is as large as told.
    check(unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    value.truncate(usize::try_from(len).unwrap_or(0));
    Ok(value)
}

/// Reads an option that is an int.
pub fn sockopt_int(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let value = sockopt(fd, level, name)?;
    let word: [u8; 4] = value
        .get(..4)
        .and_then(|word| word.try_into().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(i32::from_ne_bytes(word))
}

/// Sets an option.
pub fn set_sockopt(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let len = u32::try_from(value.len()).expect("options are short");
    // SAFETY: the value is as long as told.
    check(unsafe {
        let fd = fd.as_fd().as_raw_fd();
        libc::setsockopt(fd, level, name, value.as_ptr().cast(), len)
    })
    .map(drop)
}

/// Sets an option that is an int.
pub fn set_sockopt_int(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_sockopt(fd, level, name, &value.to_ne_bytes())
}

/// Makes a socket of a protocol.
pub fn socket_of(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only; the descriptor is new.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::socket(
            family, kind, protocol,
        ))?))
    }
}

/// Binds a socket to an address.
pub fn bind(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let len = u32::try_from(address.len()).expect("addresses are short");
    // SAFETY: the address is as long as told.
    check(unsafe { libc::bind(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), len) }).map(drop)
}

/// Connects a socket to an address.
pub fn connect(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let len = u32::try_from(address.len()).expect("addresses are short");
    // SAFETY: the address is as long as told.
    check(unsafe { libc::connect(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), len) }).map(drop)
}

/// Listens.
pub fn listen(fd: impl AsFd, backlog: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) }).map(drop)
}

/// Accepts a connection.
pub fn accept(fd: impl AsFd) -> io::Result<OwnedFd> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no address is asked for; the descriptor is new.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::accept(
            fd,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        ))?))
    }
}

/// Ends directions of a connection.
pub fn shutdown(fd: impl AsFd, how: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }).map(drop)
}

/// The socket's own address.
pub fn socket_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    let mut name = vec![0u8; 128];
    let mut len = 128u32;
    // SAFETY: the buffer is as large as told.
    check(unsafe {
        let fd = fd.as_fd().as_raw_fd();
        libc::getsockname(fd, name.as_mut_ptr().cast(), &raw mut len)
    })?;
    name.truncate(usize::try_from(len).unwrap_or(0));
    Ok(name)
}

/// The address of the peer.
pub fn peer_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    let mut name = vec![0u8; 128];
    let mut len = 128u32;
    // SAFETY: the buffer is as large as told.
    check(unsafe {
        let fd = fd.as_fd().as_raw_fd();
        libc::getpeername(fd, name.as_mut_ptr().cast(), &raw mut len)
    })?;
    name.truncate(usize::try_from(len).unwrap_or(0));
    Ok(name)
}

/// The address of a unix socket with that name; a leading NUL makes it abstract.
pub fn unix_address(name: &[u8]) -> Vec<u8> {
    let family = u16::try_from(libc::AF_UNIX).expect("small").to_ne_bytes();
    let end: &[u8] = if name.first().is_some_and(|byte| *byte != 0) {
        &[0]
    } else {
        &[]
    };
    [&family, name, end].concat()
}

/// An instruction of classic BPF: code, jumps and constant.
pub type Instruction = (u16, u8, u8, u32);

/// Attaches a classic filter.
pub fn attach_filter(fd: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    set_program(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program)
}

/// Sets an option that is a classic BPF program.
pub fn set_program(
    fd: impl AsFd,
    level: i32,
    name: i32,
    program: &[Instruction],
) -> io::Result<()> {
    let instruction = |&(code, jt, jf, k): &Instruction| libc::sock_filter { code, jt, jf, k };
    let mut filter: Vec<libc::sock_filter> = program.iter().map(instruction).collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).expect("filters are short"),
        filter: filter.as_mut_ptr(),
    };
    let len = u32::try_from(size_of_val(&program)).expect("small");
    // SAFETY: the program names its instructions, which outlive the call.
    check(unsafe {
        let (fd, value) = (fd.as_fd().as_raw_fd(), (&raw const program).cast());
        libc::setsockopt(fd, level, name, value, len)
    })
    .map(drop)
}

/// Brings the loopback interface of this network namespace up.
pub fn raise_loopback() -> io::Result<()> {
    let flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("small");
    change_interface("lo", libc::SIOCSIFFLAGS, |request| {
        request.ifr_ifru.ifru_flags = flags
    })
}

/// Sets the size of the largest packets of an interface.
pub fn set_mtu(name: &str, bytes: i32) -> io::Result<()> {
    change_interface(name, libc::SIOCSIFMTU, |request| {
        request.ifr_ifru.ifru_mtu = bytes
    })
}

fn change_interface(
    name: &str,
    action: libc::c_ulong,
    fill: impl FnOnce(&mut libc::ifreq),
) -> io::Result<()> {
    let socket = socket_of(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: all zero is a valid request.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    fill(&mut request);
    // SAFETY: the request is read only.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), action, &raw const request) }).map(drop)
}

/// Whether the kernel can run a protocol on a TCP connection. One that is not connected is refused, but with another
/// error for a protocol that is not there.
pub fn has_ulp(name: &str) -> bool {
    let Ok(fd) = socket_of(libc::AF_INET, libc::SOCK_STREAM, 0) else {
        return false;
    };
    let result = set_sockopt(&fd, libc::SOL_TCP, libc::TCP_ULP, name.as_bytes());
    let errno = result.err().and_then(|error| error.raw_os_error());
    errno != Some(libc::ENOENT)
}
