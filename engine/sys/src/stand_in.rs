//! Short-lived processes in whose name something is done.
//!
//! The kernel remembers with a unix socket who connected it, and with a message who sent it. A stand-in has
//! the wanted pid and user and makes a few calls, on the memory and the descriptors of this process, which
//! sleeps meanwhile.
//!
//! Source: man 2 clone3 (set_tid, Linux 5.5), man 7 unix.

use std::arch::asm;
use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general::clone_args;

use crate::clone3::no_args;
use crate::socket::Credentials;
use crate::{Errno, Pid, Result, signal, wait};

/// What a stand-in does, in the name of the process.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Pair {
        kind: i32,
        fds: *mut i32,
    },
    Listen {
        fd: i32,
        backlog: i32,
    },
    Connect {
        fd: i32,
        address: *const u8,
        len: u32,
    },
    Send {
        fd: i32,
        header: *const libc::msghdr,
    },
}

/// Makes a connected pair of unix sockets.
///
/// # Errors
/// EEXIST: the pid is taken. EPERM without the rights to choose pid and user.
pub fn pair(who: Credentials, kind: i32) -> Result<(std::os::fd::OwnedFd, std::os::fd::OwnedFd)> {
    let mut fds = [-1; 2];
    let kind = kind | libc::SOCK_CLOEXEC;
    perform(
        who,
        Deed::Pair {
            kind,
            fds: fds.as_mut_ptr(),
        },
    )?;
    // SAFETY: the stand-in shares our descriptors and made these two for us.
    unsafe { Ok((crate::pidfd::own(fds[0]), crate::pidfd::own(fds[1]))) }
}

/// Listens, which notes the caller as the peer of everybody who connects.
///
/// # Errors
/// As of [`pair`] and listen(2).
pub fn listen(who: Credentials, fd: impl AsFd, backlog: u32) -> Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    perform(
        who,
        Deed::Listen {
            fd: fd.as_fd().as_raw_fd(),
            backlog,
        },
    )
}

/// Connects, which notes the caller as the peer of the accepted socket.
///
/// # Errors
/// As of [`pair`] and connect(2).
pub fn connect(who: Credentials, fd: impl AsFd, address: &[u8]) -> Result<()> {
    let len = u32::try_from(address.len()).map_err(|_| Errno::EINVAL)?;
    let deed = Deed::Connect {
        fd: fd.as_fd().as_raw_fd(),
        address: address.as_ptr(),
        len,
    };
    perform(who, deed)
}

/// Sends a message without descriptors; the receiver sees the stand-in's credentials.
///
/// # Errors
/// As of [`pair`] and sendmsg(2); EMSGSIZE where only a part was taken.
pub fn send(
    who: Credentials,
    fd: impl AsFd,
    bytes: &[u8],
    destination: Option<&[u8]>,
) -> Result<()> {
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(address) = destination {
        header.msg_name = address.as_ptr().cast_mut().cast();
        header.msg_namelen = u32::try_from(address.len()).map_err(|_| Errno::EINVAL)?;
    }
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    let fd = fd.as_fd().as_raw_fd();
    perform(
        who,
        Deed::Send {
            fd,
            header: &raw const header,
        },
    )
}

/// What the stand-in finds on its stack.
struct Orders {
    who: Credentials,
    deed: Deed,
    result: i64,
}

/// Makes the stand-in, lets it do its deed, and waits until it is gone.
fn perform(who: Credentials, deed: Deed) -> Result<()> {
    let mut orders = Orders {
        who,
        deed,
        result: -i64::from(libc::EIO),
    };
    let mut stack = vec![0u128; 1024];
    let tid = who.pid;
    let args = clone_args {
        flags: u64::from((libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES).cast_unsigned()),
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        stack: address(stack.as_mut_ptr()),
        stack_size: 16 * 1024,
        set_tid: address((&raw const tid).cast_mut()),
        set_tid_size: 1,
        ..no_args()
    };
    let _blocked = signal::block_all();
    let _dumpable = Dumpable::note();
    // SAFETY: the child runs on a stack of its own in our memory while this thread sleeps (CLONE_VFORK); it
    // makes raw system calls only, none of which touches thread-local state, and never returns.
    let pid = unsafe { clone_into(&args, &mut orders) };
    let pid = match i32::try_from(pid) {
        Ok(pid) if pid > 0 => Pid::from_raw(pid),
        Ok(errno) => return Err(Errno::from_raw(-errno)),
        Err(_) => return Err(Errno::EINVAL),
    };
    drop(stack);
    loop {
        match wait::wait(pid) {
            Ok(wait::Status::Ended(_)) => break,
            Ok(_) | Err(Errno::EINTR) => {}
            // SIGCHLD is ignored, so nobody has to reap it.
            Err(_) => break,
        }
    }
    // SAFETY: the child wrote it before it ended.
    let result = unsafe { (&raw const orders.result).read_volatile() };
    match i32::try_from(result) {
        Ok(0..) => Ok(()),
        Ok(errno) => Err(Errno::from_raw(-errno)),
        Err(_) => Err(Errno::EIO),
    }
}

/// A child that becomes another user takes the right to be looked at from the memory that it shares with
/// us; this gives it back.
struct Dumpable(i32);

impl Dumpable {
    fn note() -> Dumpable {
        // SAFETY: prctl without pointers.
        Dumpable(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) })
    }
}

impl Drop for Dumpable {
    fn drop(&mut self) {
        // Only 0 and 1 can be set; 2 is what the child has left behind then.
        // SAFETY: prctl without pointers.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, self.0.clamp(0, 1)) };
    }
}

fn address<T>(pointer: *mut T) -> u64 {
    u64::try_from(pointer.addr()).expect("addresses fit 64 bits")
}

/// # Safety
/// As described in [`perform`].
unsafe fn clone_into(args: &clone_args, orders: &mut Orders) -> i64 {
    let result: i64;
    // SAFETY: the parent's path is a plain system call; the child calls `act`, which does not return.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<clone_args>(),
            in("r12") std::ptr::from_mut(orders),
            in("r13") act as unsafe extern "C" fn(*mut Orders) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// The stand-in: becomes the user, acts, and ends.
///
/// # Safety
/// Runs as the child of [`clone_into`] only.
unsafe extern "C" fn act(orders: *mut Orders) -> ! {
    // SAFETY: the parent sleeps, its memory is ours; the calls' arguments come from the parent, which
    // checked them.
    unsafe {
        let who = (*orders).who;
        let gid = i64::from(who.gid);
        let uid = i64::from(who.uid);
        let mut result = call(libc::SYS_setresgid, [gid, gid, gid]);
        if result >= 0 {
            result = call(libc::SYS_setresuid, [uid, uid, uid]);
        }
        if result >= 0 {
            result = match (*orders).deed {
                Deed::Pair { kind, fds } => call4(
                    libc::SYS_socketpair,
                    [
                        i64::from(libc::AF_UNIX),
                        i64::from(kind),
                        0,
                        fds.expose_provenance().cast_signed() as i64,
                    ],
                ),
                Deed::Listen { fd, backlog } => {
                    call(libc::SYS_listen, [i64::from(fd), i64::from(backlog), 0])
                }
                Deed::Connect { fd, address, len } => call(
                    libc::SYS_connect,
                    [
                        i64::from(fd),
                        address.expose_provenance().cast_signed() as i64,
                        i64::from(len),
                    ],
                ),
                Deed::Send { fd, header } => call(
                    libc::SYS_sendmsg,
                    [
                        i64::from(fd),
                        header.expose_provenance().cast_signed() as i64,
                        i64::from(libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL),
                    ],
                ),
            };
        }
        (&raw mut (*orders).result).write_volatile(result);
        call(libc::SYS_exit, [0; 3]);
    }
    unreachable!("exit does not return");
}

/// # Safety
/// As of the call.
unsafe fn call(nr: i64, args: [i64; 3]) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { call4(nr, [args[0], args[1], args[2], 0]) }
}

/// # Safety
/// As of the call.
unsafe fn call4(nr: i64, args: [i64; 4]) -> i64 {
    let result: i64;
    // SAFETY: the caller's promise; nothing but registers and what the call writes changes.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket;

    #[test]
    fn a_pair_has_the_credentials_of_its_maker() {
        // A pid that nobody has for long.
        let pid = (60_000..).find(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists());
        let who = Credentials {
            pid: pid.expect("a free pid"),
            uid: 12,
            gid: 34,
        };
        match pair(who, socket::SOCK_STREAM) {
            Ok((a, b)) => {
                assert_eq!(socket::peer_credentials(&a), Ok(who));
                assert_eq!(socket::peer_credentials(&b), Ok(who));
            }
            Err(Errno::EPERM | Errno::EINVAL | Errno::EEXIST) => {}
            Err(errno) => panic!("{errno}"),
        }
    }
}
