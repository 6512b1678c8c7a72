//! Kernel calls as the workloads want them: thin, typed, with the raw meaning of their arguments.
//!
//! Workloads test exact kernel behaviour, so these go past libraries that soften it (retries, cached
//! ids, hidden buffers).

mod aio;
mod anonymous;
mod autofs;
mod bpf;
mod cpu;
mod files;
mod filters;
mod futexes;
mod memory;
mod numa;
mod objects;
mod process;
mod rights;
mod ring;
mod robust;
mod semaphores;
mod shadow_stack;
mod signal;
mod sockets;
mod sysv;
mod terminal;
mod time;
mod timers;
mod vdso;

pub use aio::*;
pub use anonymous::*;
pub use autofs::*;
pub use bpf::*;
pub use cpu::*;
pub use files::*;
pub use filters::*;
pub use futexes::*;
pub use memory::*;
pub use numa::*;
pub use objects::*;
pub use process::*;
pub use rights::*;
pub use ring::*;
pub use robust::*;
pub use semaphores::*;
pub use shadow_stack::*;
pub use signal::*;
pub use sockets::*;
pub use sysv::*;
pub use terminal::*;
pub use time::*;
pub use timers::*;
pub use vdso::*;

use std::io;

/// Turns the -1 convention of libc into a result.
fn check(result: i32) -> io::Result<i32> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Turns the -1 convention of libc's `syscall` into a result.
fn check_long(result: i64) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Makes a system call by number.
///
/// # Safety
/// The arguments must be right for the call: pointers in them valid for what it reads and writes.
pub unsafe fn call(number: i64, arguments: [usize; 6]) -> io::Result<u64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller vouches for the arguments.
    check_long(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

/// Makes a system call by number whose arguments are plain numbers, none of them an address that
/// the kernel writes to.
pub fn call_plain(number: i64, arguments: [i64; 6]) -> io::Result<u64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: numbers only; the kernel reads and writes no memory of ours through them.
    check_long(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

/// Sets errno.
pub fn set_errno(value: i32) {
    // SAFETY: the address is this thread's own errno.
    unsafe { *libc::__errno_location() = value }
}

/// The size of a page in bytes.
pub const PAGE: usize = 4096;
