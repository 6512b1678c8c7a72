//! Messages with addresses and ancillary data.
//!
//! Source: man 2 recvmsg, sendmsg; man 3 cmsg; man 7 unix.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{Credentials, SOL_SOCKET};
use crate::{Errno, Result};

const SCM_RIGHTS: i32 = 1;
const SCM_CREDENTIALS: i32 = 2;
/// Room for 253 descriptors, credentials and what else may come.
const CONTROL_ROOM: usize = 4096;

/// Ancillary data that this module does not take apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Level.
    pub level: i32,
    /// Type.
    pub kind: i32,
    /// Content.
    pub bytes: Vec<u8>,
}

/// A message that was looked at.
#[derive(Debug, Default)]
pub struct Message {
    /// Content.
    pub bytes: Vec<u8>,
    /// How long it is; more than there are bytes where the room was too small.
    pub len: usize,
    /// Address of the sender; empty for none.
    pub sender: Vec<u8>,
    /// Duplicates of the descriptors in it, close-on-exec.
    pub rights: Vec<OwnedFd>,
    /// The sender.
    pub credentials: Option<Credentials>,
    /// Everything else.
    pub controls: Vec<Control>,
}

/// Reads what waits next, or at SO_PEEK_OFF, without taking it; None when nothing does.
///
/// # Errors
/// ENOTCONN, ECONNRESET, and whatever error waits at the socket.
pub fn peek(fd: impl AsFd, room: usize) -> Result<Option<Message>> {
    let mut bytes = vec![0u8; room];
    let mut sender = vec![0u8; 128];
    let mut control = vec![0u64; CONTROL_ROOM / 8];
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = sender.as_mut_ptr().cast();
    header.msg_namelen = 128;
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_ROOM;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header names buffers that outlive the call, with their lengths.
    let got = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut header, flags) };
    let got = match Errno::check(i64::try_from(got).unwrap_or(-1)) {
        Err(Errno::EAGAIN) => return Ok(None),
        got => usize::try_from(got?).map_err(|_| Errno::EINVAL)?,
    };
    bytes.truncate(got);
    sender.truncate(usize::try_from(header.msg_namelen).unwrap_or(0));
    let mut message = Message {
        bytes,
        len: got,
        sender,
        ..Message::default()
    };
    // SAFETY: the header describes the control data that the kernel wrote.
    unsafe { take_controls(&header, &mut message) };
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(Errno::ENOSPC);
    }
    Ok(Some(message))
}

/// # Safety
/// The header must be as recvmsg left it, with its buffers alive.
unsafe fn take_controls(header: &libc::msghdr, message: &mut Message) {
    // SAFETY: CMSG_* walk the control buffer of the header within its length.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !at.is_null() {
        // SAFETY: as above; a header is followed by its data.
        let (level, kind, data) = unsafe {
            let one = at.read_unaligned();
            let len = one.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            let data = std::slice::from_raw_parts(libc::CMSG_DATA(at), len);
            (one.cmsg_level, one.cmsg_type, data.to_vec())
        };
        match (level, kind) {
            (SOL_SOCKET, SCM_RIGHTS) => {
                let fds = data.chunks_exact(4).map(|fd| {
                    let raw = i32::from_ne_bytes([fd[0], fd[1], fd[2], fd[3]]);
                    // SAFETY: the kernel made these descriptors for us just now.
                    unsafe { OwnedFd::from_raw_fd(raw) }
                });
                message.rights.extend(fds);
            }
            (SOL_SOCKET, SCM_CREDENTIALS) => message.credentials = Credentials::parse(&data),
            _ => message.controls.push(Control {
                level,
                kind,
                bytes: data,
            }),
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        at = unsafe { libc::CMSG_NXTHDR(header, at) };
    }
}

/// Reads up to `room` bytes of a stream without taking them. (For TCP the flag that [`peek`] uses to learn
/// the length of a message would throw the bytes away.)
///
/// # Errors
/// EAGAIN when nothing waits; ENOTCONN.
pub fn peek_stream(fd: impl AsFd, room: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; room];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer has the length that is told.
    let got = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), room, flags) };
    let got = Errno::check(i64::try_from(got).unwrap_or(-1))?;
    bytes.truncate(usize::try_from(got).unwrap_or(0));
    Ok(bytes)
}

/// Looks at the urgent byte; None when there is none.
///
/// # Errors
/// EAGAIN: it is announced and not there yet.
pub fn receive_urgent(fd: impl AsFd) -> Result<Option<u8>> {
    let mut byte = 0u8;
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: room for one byte, told as such.
    let got = unsafe { libc::recv(fd.as_fd().as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    match Errno::check(i64::try_from(got).unwrap_or(-1)) {
        Ok(1) => Ok(Some(byte)),
        Ok(_) | Err(Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// A message to send.
#[derive(Debug, Default, Clone, Copy)]
pub struct Outgoing<'a> {
    /// Content.
    pub bytes: &'a [u8],
    /// Where to; None for a connected socket.
    pub destination: Option<&'a [u8]>,
    /// Descriptors to pass.
    pub rights: &'a [BorrowedFd<'a>],
    /// Who is said to send it.
    pub credentials: Option<Credentials>,
    /// Of a TCP stream: what follows does not go into the same segment.
    pub ends_segment: bool,
}

/// Sends a message without sleeping; returns the number of bytes taken.
///
/// # Errors
/// EAGAIN when there is no room; ESRCH when no process has the pid of the credentials; EPERM; EPIPE.
pub fn send(fd: impl AsFd, message: &Outgoing<'_>) -> Result<usize> {
    let mut buffer = control_data(message);
    let mut vector = libc::iovec {
        iov_base: message.bytes.as_ptr().cast_mut().cast(),
        iov_len: message.bytes.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(address) = message.destination {
        header.msg_name = address.as_ptr().cast_mut().cast();
        header.msg_namelen = super::address_len(address)?;
    }
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    if !buffer.is_empty() {
        header.msg_control = buffer.as_mut_ptr().cast();
        header.msg_controllen = buffer.len() * 8;
    }
    let end = if message.ends_segment {
        libc::MSG_EOR
    } else {
        0
    };
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | end;
    // SAFETY: the header names buffers that outlive the call, with their lengths; none is written to.
    let sent = unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const header, flags) };
    let sent = Errno::check(i64::try_from(sent).unwrap_or(-1))?;
    usize::try_from(sent).map_err(|_| Errno::EINVAL)
}

/// Ancillary data in words, so that headers are aligned.
fn control_data(message: &Outgoing<'_>) -> Vec<u64> {
    let mut bytes = Vec::new();
    if !message.rights.is_empty() {
        let fds = message.rights.iter().map(|fd| fd.as_raw_fd());
        let data: Vec<u8> = fds.flat_map(i32::to_ne_bytes).collect();
        push_control(&mut bytes, SCM_RIGHTS, &data);
    }
    if let Some(who) = message.credentials {
        let mut data = who.pid.to_ne_bytes().to_vec();
        data.extend(who.uid.to_ne_bytes());
        data.extend(who.gid.to_ne_bytes());
        push_control(&mut bytes, SCM_CREDENTIALS, &data);
    }
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
        .collect()
}

fn push_control(bytes: &mut Vec<u8>, kind: i32, data: &[u8]) {
    bytes.extend((16 + data.len()).to_ne_bytes());
    bytes.extend(SOL_SOCKET.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;

    #[test]
    fn descriptors_and_bytes_are_looked_at_and_stay() {
        let (a, b) = pair(SOCK_STREAM).expect("a pair");
        let file = std::fs::File::open("/dev/null").expect("null");
        let rights = [file.as_fd()];
        let message = Outgoing {
            bytes: b"hello",
            rights: &rights,
            ..Outgoing::default()
        };
        assert_eq!(send(&a, &message), Ok(5));
        for _ in 0..2 {
            let seen = peek(&b, 100).expect("peek").expect("a message");
            assert_eq!(
                (seen.bytes.as_slice(), seen.rights.len()),
                (&b"hello"[..], 1)
            );
        }
        assert!(peek(&a, 100).expect("peek").is_none());
    }

    #[test]
    fn credentials_come_with_the_message() {
        let (a, b) = pair(SOCK_DGRAM).expect("a pair");
        set_number(&b, SOL_SOCKET, SO_PASSCRED, 1).expect("setsockopt");
        send(
            &a,
            &Outgoing {
                bytes: b"x",
                ..Outgoing::default()
            },
        )
        .expect("send");
        let seen = peek(&b, 10).expect("peek").expect("a message");
        let pid = crate::Pid::this().raw();
        assert_eq!(seen.credentials.map(|c| c.pid), Some(pid));
        assert_eq!(peer_credentials(&a).map(|c| c.pid), Ok(pid));
    }
}
