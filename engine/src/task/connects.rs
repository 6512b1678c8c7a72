//! A `connect` that was interrupted, and whose connection has come about since.
//!
//! The kernel makes the call again and then knows that it was under way, so it succeeds. A restored socket is
//! connected and nothing is under way: the same call would fail with EISCONN. So its caller is saved as one whose call
//! has returned.
//!
//! Source: linux net/ipv4/af_inet.c, __inet_stream_connect; arch/x86/entry/syscalls.

use std::os::fd::AsFd;

use firn_sys::ptrace::GeneralRegs;
use firn_sys::socket::{self, IPPROTO_TCP, SO_PROTOCOL, SOL_SOCKET, TCP_CLOSE, TCP_LISTEN, tcp};
use firn_sys::{Pid, pidfd};

use crate::arch::{Abi, restart};

/// Numbers of the call.
const CONNECT: u64 = 42;
const IA32_CONNECT: u64 = 362;
const TCP_SYN_SENT: u32 = 2;
const TCP_SYN_RECV: u32 = 3;

/// The registers of a stopped thread as they are to be saved, when packets of its connections are held off.
pub(super) fn settled(tid: Pid, regs: GeneralRegs, abi: Abi) -> GeneralRegs {
    match fd_of_interrupted(&regs, abi) {
        Some(fd) if is_connected(tid, fd) => GeneralRegs { rax: 0, ..regs },
        _ => regs,
    }
}

/// The descriptor that an interrupted `connect` is about.
fn fd_of_interrupted(regs: &GeneralRegs, abi: Abi) -> Option<i32> {
    let restart = restart::pending(regs)?;
    let fd = match (abi, restart.nr) {
        (Abi::Native, CONNECT) => regs.rdi,
        (Abi::Ia32, IA32_CONNECT) => regs.rbx,
        _ => return None,
    };
    // An int, as the kernel takes it.
    let low = u32::try_from(fd & u64::from(u32::MAX)).ok()?;
    Some(low.cast_signed())
}

fn is_connected(tid: Pid, fd: i32) -> bool {
    let state = || -> firn_sys::Result<u32> {
        let socket = pidfd::getfd(pidfd::open_by_thread(tid)?, fd)?;
        match socket::number(&socket, SOL_SOCKET, SO_PROTOCOL)? {
            IPPROTO_TCP => Ok(tcp::info(socket.as_fd())?.state),
            _ => Ok(TCP_CLOSE),
        }
    };
    let pending = [TCP_CLOSE, TCP_LISTEN, TCP_SYN_SENT, TCP_SYN_RECV];
    state().is_ok_and(|state| !pending.contains(&state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::regs::tests::stopped;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_call_that_has_succeeded_returns() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let there = listener.local_addr().expect("bound");
        let stream = TcpStream::connect(there).expect("it listens");
        let ax = |rax, nr, fd: i32| {
            let regs = GeneralRegs {
                rdi: i64::from(fd).cast_unsigned(),
                ..stopped(rax, nr)
            };
            settled(Pid::this(), regs, Abi::Native).rax.cast_signed()
        };
        assert_eq!(ax(-512, 42, stream.as_raw_fd()), 0);
        assert_eq!(ax(-512, 42, listener.as_raw_fd()), -512, "not a connection");
        assert_eq!(ax(-512, 43, stream.as_raw_fd()), -512, "another call");
        assert_eq!(ax(-4, 42, stream.as_raw_fd()), -4, "not to be restarted");
    }
}
