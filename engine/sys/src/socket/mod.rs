//! Sockets, with addresses and options as plain bytes.
//!
//! Source: man 2 socket, bind, connect, listen, accept, shutdown, getsockopt; man 7 socket, unix, tcp.

mod message;
mod names;
pub mod packet;
pub mod tcp;

pub use message::{Control, Message, Outgoing, peek, peek_stream, receive_urgent, send};
pub use names::*;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::{Errno, Result, epoll};

/// The largest address that any family has, `struct sockaddr_storage`.
const MAX_ADDRESS: usize = 128;

/// A process as SCM_CREDENTIALS and SO_PEERCRED tell of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// Process id; 0 stands for one that has none here.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Makes a socket, close-on-exec.
///
/// # Errors
/// EAFNOSUPPORT, EPROTONOSUPPORT, EPERM, EMFILE.
pub fn create(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: socket takes numbers only; the descriptor that it returns is new.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        own(fd)
    }
}

/// Makes a connected pair of unix sockets, close-on-exec.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn pair(kind: i32) -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the array of two outlives the call; both descriptors are new.
    unsafe {
        let kind = kind | libc::SOCK_CLOEXEC;
        let result = libc::socketpair(AF_UNIX, kind, 0, fds.as_mut_ptr());
        Errno::check(i64::from(result))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// Takes the result of a call that makes a descriptor.
///
/// # Safety
/// A value that is not negative must be a new descriptor.
unsafe fn own(fd: i32) -> Result<OwnedFd> {
    Errno::check(i64::from(fd))?;
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address_len(address: &[u8]) -> Result<u32> {
    match address.len() {
        len @ 2..=MAX_ADDRESS => u32::try_from(len).map_err(|_| Errno::EINVAL),
        _ => Err(Errno::EINVAL),
    }
}

/// Gives a socket an address.
///
/// # Errors
/// EADDRINUSE, EADDRNOTAVAIL, EACCES, EINVAL for a socket that has one.
pub fn bind(fd: impl AsFd, address: &[u8]) -> Result<()> {
    let len = address_len(address)?;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the address outlives the call and has the length that is told.
    let result = unsafe { libc::bind(fd, address.as_ptr().cast(), len) };
    Errno::check(i64::from(result)).map(drop)
}

/// Gives a socket an address that is a path, which is looked up in another root or working directory
/// than this process's.
///
/// # Errors
/// As of [`bind`]; ENOENT, EPERM for the directories.
pub fn bind_in(
    fd: impl AsFd,
    address: &[u8],
    root: Option<&std::path::Path>,
    directory: Option<&std::path::Path>,
) -> Result<()> {
    let fd = fd.as_fd();
    let work = move || {
        // SAFETY: from here on this thread, and no other, has directories of its own.
        Errno::check(i64::from(unsafe { libc::unshare(libc::CLONE_FS) }))?;
        if let Some(root) = root {
            rustix::process::chroot(root)?;
            rustix::process::chdir("/")?;
        }
        if let Some(directory) = directory {
            rustix::process::chdir(directory)?;
        }
        bind(fd, address)
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or(Err(Errno::EIO)))
}

/// Connects a socket.
///
/// # Errors
/// ECONNREFUSED, EAGAIN, EINPROGRESS, EISCONN and others.
pub fn connect(fd: impl AsFd, address: &[u8]) -> Result<()> {
    let len = address_len(address)?;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the address outlives the call and has the length that is told.
    let result = unsafe { libc::connect(fd, address.as_ptr().cast(), len) };
    Errno::check(i64::from(result)).map(drop)
}

/// Takes a connection back from a datagram socket, or resets a stream.
///
/// # Errors
/// EINVAL for kinds that can't.
pub fn disconnect(fd: impl AsFd) -> Result<()> {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&0u16.to_ne_bytes());
    connect(fd, &address)
}

/// Lets a socket accept connections, of which `backlog` may wait.
///
/// # Errors
/// EADDRINUSE, EINVAL.
pub fn listen(fd: impl AsFd, backlog: u32) -> Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // SAFETY: listen takes numbers only.
    let result = unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) };
    Errno::check(i64::from(result)).map(drop)
}

/// Takes the oldest waiting connection, close-on-exec.
///
/// # Errors
/// EAGAIN, ECONNABORTED.
pub fn accept(fd: impl AsFd) -> Result<OwnedFd> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no address is asked for; the descriptor is new.
    unsafe {
        own(libc::accept4(
            fd,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        ))
    }
}

/// Ends directions: 0 reading, 1 writing, 2 both.
///
/// # Errors
/// ENOTCONN, after which the directions may be marked all the same.
pub fn shutdown(fd: impl AsFd, how: i32) -> Result<()> {
    // SAFETY: shutdown takes numbers only.
    let result = unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) };
    Errno::check(i64::from(result)).map(drop)
}

/// The socket's own address, as long as the kernel says.
///
/// # Errors
/// EBADF, ENOTSOCK.
pub fn local_address(fd: impl AsFd) -> Result<Vec<u8>> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: `address_by` passes room and its length.
    address_by(|room, len| unsafe { libc::getsockname(fd, room, len) })
}

/// The address of the peer.
///
/// # Errors
/// ENOTCONN.
pub fn peer_address(fd: impl AsFd) -> Result<Vec<u8>> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: `address_by` passes room and its length.
    address_by(|room, len| unsafe { libc::getpeername(fd, room, len) })
}

fn address_by(ask: impl FnOnce(*mut libc::sockaddr, *mut u32) -> i32) -> Result<Vec<u8>> {
    let mut room = vec![0u8; MAX_ADDRESS];
    let mut len = 128u32;
    Errno::check(i64::from(ask(room.as_mut_ptr().cast(), &raw mut len)))?;
    room.truncate(usize::try_from(len).unwrap_or(0));
    Ok(room)
}

/// Reads an option of at most `room` bytes.
///
/// # Errors
/// ENOPROTOOPT for options that the kind does not have; EOPNOTSUPP, EINVAL.
pub fn option(fd: impl AsFd, level: i32, name: i32, room: usize) -> Result<Vec<u8>> {
    option_with(fd, level, name, vec![0; room])
}

/// Reads an option whose buffer also tells what is asked for.
///
/// # Errors
/// As of [`option`].
pub fn option_with(fd: impl AsFd, level: i32, name: i32, mut room: Vec<u8>) -> Result<Vec<u8>> {
    let fd = fd.as_fd().as_raw_fd();
    let mut len = u32::try_from(room.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the buffer has the length that is told and outlives the call.
    let result =
        unsafe { libc::getsockopt(fd, level, name, room.as_mut_ptr().cast(), &raw mut len) };
    Errno::check(i64::from(result))?;
    room.truncate(usize::try_from(len).unwrap_or(0));
    Ok(room)
}

/// Sets an option.
///
/// # Errors
/// ENOPROTOOPT, EINVAL, EPERM.
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let len = u32::try_from(value.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the value has the length that is told and outlives the call.
    let result = unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), len) };
    Errno::check(i64::from(result)).map(drop)
}

/// Reads an option that is an int.
///
/// # Errors
/// As of [`option`].
pub fn number(fd: impl AsFd, level: i32, name: i32) -> Result<i32> {
    let value = option(fd, level, name, 4)?;
    match *value.as_slice() {
        [a, b, c, d] => Ok(i32::from_ne_bytes([a, b, c, d])),
        [byte] => Ok(i32::from(byte)),
        _ => Err(Errno::EINVAL),
    }
}

/// Sets an option that is an int.
///
/// # Errors
/// As of [`set_option`].
pub fn set_number(fd: impl AsFd, level: i32, name: i32, value: i32) -> Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// Lets reading and accept(2) wait that long and no longer.
///
/// # Errors
/// As man 2 setsockopt.
pub fn set_receive_timeout(fd: impl AsFd, timeout: std::time::Duration) -> Result<()> {
    let words = [timeout.as_secs(), u64::from(timeout.subsec_micros())];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    set_option(fd, SOL_SOCKET, SO_RCVTIMEO, &value)
}

/// What the network namespace of a socket is known by: different for each, as long as the machine runs.
///
/// # Errors
/// ENOPROTOOPT before Linux 5.14.
pub fn namespace_cookie(fd: impl AsFd) -> Result<u64> {
    let value = option(fd, SOL_SOCKET, SO_NETNS_COOKIE, 8)?;
    let bytes = value.try_into().map_err(|_| Errno::EINVAL)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// SO_PEERCRED.
///
/// # Errors
/// EBADF.
pub fn peer_credentials(fd: impl AsFd) -> Result<Credentials> {
    let value = option(fd, SOL_SOCKET, libc::SO_PEERCRED, 12)?;
    Credentials::parse(&value).ok_or(Errno::EINVAL)
}

impl Credentials {
    fn parse(bytes: &[u8]) -> Option<Credentials> {
        let word = |at: usize| -> Option<[u8; 4]> { bytes.get(at..at + 4)?.try_into().ok() };
        Some(Credentials {
            pid: i32::from_ne_bytes(word(0)?),
            uid: u32::from_ne_bytes(word(4)?),
            gid: u32::from_ne_bytes(word(8)?),
        })
    }
}

/// The file that a unix socket is bound to, opened with O_PATH (Linux 4.20).
///
/// # Errors
/// ENOENT for a socket that is bound to none, EPERM without CAP_NET_ADMIN.
pub fn unix_file(fd: impl AsFd) -> Result<OwnedFd> {
    // SAFETY: the request takes no argument and returns a new descriptor.
    unsafe { own(libc::ioctl(fd.as_fd().as_raw_fd(), SIOCUNIXFILE)) }
}

/// An int that an ioctl gives, such as the bytes that wait in a queue.
///
/// # Errors
/// ENOTTY, EINVAL for a socket in the wrong state.
pub fn ioctl_number(fd: impl AsFd, request: u64) -> Result<i32> {
    let mut value = 0i32;
    // SAFETY: the requests of this module write one int.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value) };
    Errno::check(i64::from(result))?;
    Ok(value)
}

/// Whether a socket hangs up: end of reading (POLLRDHUP), and of both directions (POLLHUP).
///
/// # Errors
/// EINTR.
pub fn hang_ups(fd: impl AsFd) -> Result<(bool, bool)> {
    let events = epoll::poll(fd, libc::POLLRDHUP)?;
    Ok((events & libc::POLLRDHUP != 0, events & libc::POLLHUP != 0))
}

/// Whether something waits to be read, and whether an error waits to be told; neither is taken.
///
/// # Errors
/// EINTR.
pub fn waiting(fd: impl AsFd) -> Result<(bool, bool)> {
    let events = epoll::poll(fd, libc::POLLIN)?;
    Ok((events & libc::POLLIN != 0, events & libc::POLLERR != 0))
}

/// Number of the interface with that name.
///
/// # Errors
/// ENODEV.
pub fn interface_index(name: &str) -> Result<u32> {
    let name = std::ffi::CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the name ends in NUL and outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(Errno::last()),
        index => Ok(index),
    }
}

/// Name of the interface with that number.
///
/// # Errors
/// ENXIO.
pub fn interface_name(index: u32) -> Result<String> {
    let mut room = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the room is as large as the call may fill.
    let name = unsafe { libc::if_indextoname(index, room.as_mut_ptr().cast()) };
    if name.is_null() {
        return Err(Errno::last());
    }
    let len = room.iter().position(|byte| *byte == 0).unwrap_or(0);
    Ok(String::from_utf8_lossy(&room[..len]).into_owned())
}

/// Number of instructions of the classic filter; 0 without one.
///
/// # Errors
/// EACCES for a filter that is not classic BPF.
/// Source: man 7 socket; linux net/core/filter.c, sk_get_filter (the length counts instructions).
pub fn filter_len(fd: impl AsFd) -> Result<usize> {
    let mut len = 0u32;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: with a length of 0 nothing but the length is written.
    let result = unsafe {
        libc::getsockopt(
            fd,
            SOL_SOCKET,
            SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    Errno::check(i64::from(result))?;
    usize::try_from(len).map_err(|_| Errno::EINVAL)
}

/// The instructions of the classic filter, 8 bytes each.
///
/// # Errors
/// EINVAL when there are more than `nr`.
pub fn filter(fd: impl AsFd, nr: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; nr * 8];
    let mut len = u32::try_from(nr).map_err(|_| Errno::EINVAL)?;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `len` instructions of 8 bytes, for which there is room.
    let result = unsafe {
        let room = bytes.as_mut_ptr().cast();
        libc::getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, room, &raw mut len)
    };
    Errno::check(i64::from(result))?;
    bytes.truncate(usize::try_from(len).unwrap_or(0) * 8);
    Ok(bytes)
}

/// Attaches a classic filter, 8 bytes per instruction.
///
/// # Errors
/// EINVAL for a program that the kernel does not accept.
pub fn attach_filter(fd: impl AsFd, program: &[u8]) -> Result<()> {
    let mut filter: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|raw| libc::sock_filter {
            code: u16::from_ne_bytes([raw[0], raw[1]]),
            jt: raw[2],
            jf: raw[3],
            k: u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| Errno::EINVAL)?,
        filter: filter.as_mut_ptr(),
    };
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the program names its instructions, which outlive the call.
    let result = unsafe {
        let value = std::ptr::from_ref(&program).cast();
        let len = u32::try_from(size_of::<libc::sock_fprog>()).expect("small");
        libc::setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, value, len)
    };
    Errno::check(i64::from(result)).map(drop)
}
