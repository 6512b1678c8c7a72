//! Children that keep descriptors, where there are more than one process may have.
//!
//! A keeper has a copy of the descriptor table of the process that made it, as of that moment, of which it
//! closes what it is not asked to keep; then it sleeps until it is killed. It never runs code of this process:
//! a few system calls and no stack. What it has is fetched by pidfd_getfd, by this process or by any other
//! that may trace it, under the number that it had here.
//!
//! Source: man 2 clone3, close_range, pidfd_getfd.

use std::arch::asm;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use linux_raw_sys::general::clone_args;

use crate::clone3::{child_of, no_args};
use crate::{Errno, Pid, Result, pidfd, signal, task, wait};

/// A child with some descriptors of this process. Dropping it ends it and closes them.
#[derive(Debug)]
pub struct Keeper {
    pid: Pid,
    pidfd: OwnedFd,
    /// What the child reads and writes: it lives in this process' memory.
    orders: Box<Orders>,
}

/// What a keeper does before it sleeps, and whether it does.
#[derive(Debug)]
#[repr(C)]
struct Orders {
    sleeps: AtomicU32,
    /// First and last number of each range to close.
    close: Vec<[u32; 2]>,
}

impl Keeper {
    /// Makes a child that keeps these descriptors, and no others. It dies with the calling thread, whatever
    /// that dies of.
    ///
    /// # Errors
    /// EAGAIN: too many processes. ENOMEM.
    pub fn of(kept: &[BorrowedFd<'_>]) -> Result<Keeper> {
        let orders = Box::new(Orders {
            sleeps: AtomicU32::new(0),
            close: others(kept),
        });
        let pid = spawn(&orders)?;
        // The child reads its orders until it is gone.
        let pidfd = pidfd::open(pid).inspect_err(|_| end(pid))?;
        let keeper = Keeper { pid, pidfd, orders };
        keeper.wait_until_it_sleeps()?;
        Ok(keeper)
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// A duplicate of what had that number here when the keeper was made.
    ///
    /// # Errors
    /// EMFILE. EPERM where a security module forbids it. ESRCH when somebody has killed the keeper.
    pub fn get(&self, number: RawFd) -> Result<OwnedFd> {
        pidfd::getfd(&self.pidfd, number)
    }

    fn wait_until_it_sleeps(&self) -> Result<()> {
        while self.orders.sleeps.load(Ordering::Acquire) == 0 {
            if wait::try_wait(self.pid)?.is_some() {
                return Err(Errno::ESRCH);
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        end(self.pid);
    }
}

/// Kills a child and waits until all that it had is closed.
fn end(pid: Pid) {
    let _ = task::kill(pid, libc::SIGKILL);
    while let Ok(wait::Status::Stopped { .. } | wait::Status::Continued) | Err(Errno::EINTR) =
        wait::wait(pid)
    {}
}

/// The ranges of numbers between those that are kept.
fn others(kept: &[BorrowedFd<'_>]) -> Vec<[u32; 2]> {
    let number = |fd: &BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
    let mut kept: Vec<u32> = kept.iter().map(number).collect();
    kept.sort_unstable();
    let mut ranges = Vec::new();
    let mut next = 0;
    for number in kept {
        if number > next {
            ranges.push([next, number - 1]);
        }
        next = number + 1;
    }
    ranges.push([next, u32::MAX]);
    ranges
}

fn spawn(orders: &Orders) -> Result<Pid> {
    let args = clone_args {
        // The memory is shared, because a copy of it costs more than all the rest.
        flags: u64::from(libc::CLONE_VM.cast_unsigned()),
        // No signal tells anybody of its end, and nothing else is asked for.
        ..no_args()
    };
    let _blocked = signal::block_all();
    let result: i64;
    // SAFETY: the parent's path is a plain system call; the child's path uses no stack, reads and writes
    // nothing but the orders, which its owner keeps until it is gone, and never returns.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov edi, {set_parent_death_signal}",
            "mov esi, {kill}",
            "mov eax, {prctl}",
            "syscall",
            // A parent that died before sends no signal.
            "mov eax, {getppid}",
            "syscall",
            "cmp eax, r15d",
            "je 6f",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "6:",
            // Where Yama restricts tracing: the tasks are no parents of the keeper.
            "mov edi, {set_ptracer}",
            "mov rsi, -1",
            "mov eax, {prctl}",
            "syscall",
            "3:",
            "test r13, r13",
            "jz 4f",
            "mov edi, dword ptr [r12]",
            "mov esi, dword ptr [r12 + 4]",
            "xor edx, edx",
            "mov eax, {close_range}",
            "syscall",
            "add r12, 8",
            "dec r13",
            "jmp 3b",
            "4:",
            "mov dword ptr [r14], 1",
            "5:",
            "mov eax, {pause}",
            "syscall",
            "jmp 5b",
            "2:",
            set_parent_death_signal = const libc::PR_SET_PDEATHSIG,
            kill = const libc::SIGKILL,
            set_ptracer = const libc::PR_SET_PTRACER,
            prctl = const libc::SYS_prctl,
            close_range = const libc::SYS_close_range,
            pause = const libc::SYS_pause,
            getppid = const libc::SYS_getppid,
            exit = const libc::SYS_exit_group,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const args,
            in("rsi") size_of::<clone_args>(),
            in("r12") orders.close.as_ptr(),
            in("r13") orders.close.len(),
            in("r14") orders.sleeps.as_ptr(),
            in("r15") u64::from(Pid::this().raw().cast_unsigned()),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    child_of(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn what_is_kept_comes_back() {
        let (reader, writer) = crate::pipe::create().expect("a pipe");
        let number = reader.as_raw_fd();
        let keeper = Keeper::of(&[reader.as_fd()]).expect("a child");
        drop(reader);
        let mut writer = std::fs::File::from(writer);
        writer
            .write_all(b"kept")
            .expect("the keeper has the reader");
        let mut bytes = [0; 4];
        let mut reader = std::fs::File::from(keeper.get(number).expect("it is kept"));
        reader.read_exact(&mut bytes).expect("what was written");
        assert_eq!(&bytes, b"kept");
        assert_eq!(
            keeper.get(writer.as_raw_fd()).map(drop),
            Err(Errno::EBADF),
            "nothing else is kept"
        );
    }

    #[test]
    fn its_end_closes_what_it_kept() {
        let (reader, writer) = crate::pipe::create().expect("a pipe");
        let keeper = Keeper::of(&[writer.as_fd()]).expect("a child");
        drop(writer);
        let pid = keeper.pid();
        drop(keeper);
        let mut bytes = Vec::new();
        let mut reader = std::fs::File::from(reader);
        reader.read_to_end(&mut bytes).expect("the end of the file");
        assert!(!std::fs::exists(format!("/proc/{pid}")).expect("proc"));
    }

    #[test]
    fn the_rest_is_closed() {
        let (one, other) = crate::pipe::create().expect("a pipe");
        let (low, high) = (one.as_raw_fd(), other.as_raw_fd());
        let ranges = others(&[other.as_fd(), one.as_fd()]);
        for range in &ranges {
            assert!(range[0] <= range[1]);
            for fd in [low, high] {
                assert!(!(range[0]..=range[1]).contains(&fd.cast_unsigned()));
            }
        }
        assert_eq!(ranges.last().expect("one")[1], u32::MAX);
        assert_eq!(others(&[]), [[0, u32::MAX]]);
    }
}
