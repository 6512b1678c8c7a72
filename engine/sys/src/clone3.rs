//! clone3 into a syscall program: the child never executes code of this process.
//!
//! Source: man 2 clone3 (Linux 5.3; set_tid 5.5).

use std::arch::asm;

use linux_raw_sys::general::clone_args;

use crate::{Errno, Pid, Result, signal};

/// All signals that are not ignored get their default action (Linux 5.5).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// Where the child starts.
#[derive(Debug, Clone, Copy)]
pub struct ProgramEntry {
    /// Address of the executor.
    pub executor: u64,
    /// Address of the program's first record.
    pub record: u64,
    /// Address of the program's context.
    pub context: u64,
}

/// Forks a child with the pid `set_tid` that runs a syscall program from its first instruction.
///
/// The child inherits this thread's memory copy-on-write, but jumps straight to the executor with no
/// stack and all signals blocked, so no library code of this process runs in it. The caller may be
/// multi-threaded. Signal handlers are not inherited; what is ignored here is ignored there.
///
/// # Errors
/// EEXIST: the pid is taken. EPERM: CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) is missing.
///
/// # Safety
/// The entry must name an executor and a program that are mapped, shared, in this process; the program
/// must first unregister the inherited rseq area and must not touch memory of this process.
pub unsafe fn spawn_program(
    flags: u64,
    exit_signal: i32,
    set_tid: Option<Pid>,
    entry: ProgramEntry,
) -> Result<Pid> {
    let tid = set_tid.map_or(0, Pid::raw);
    let args = clone_args {
        flags: flags | CLONE_CLEAR_SIGHAND,
        exit_signal: u64::from(exit_signal.cast_unsigned()),
        set_tid: if set_tid.is_some() {
            address_of(&tid)
        } else {
            0
        },
        set_tid_size: u64::from(set_tid.is_some()),
        ..no_args()
    };
    let _blocked = signal::block_all();
    let result: i64;
    // SAFETY: the parent's path is a plain system call; the child's path leaves for the executor and
    // uses nothing of this function's frame.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rbp, r12",
            "mov r15, r13",
            "xor esp, esp",
            "jmp r14",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const args,
            in("rsi") size_of::<clone_args>(),
            in("r12") entry.record,
            in("r13") entry.context,
            in("r14") entry.executor,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    child_of(result)
}

/// Forks a child that ends at once with this exit code; it stays a zombie until it is waited for.
///
/// # Errors
/// EAGAIN: too many processes.
pub fn spawn_dead(code: u8) -> Result<Pid> {
    spawn_into(None, libc::SYS_exit_group, code)
}

/// Forks a child that sleeps until it is killed, with a pid of choice or any. It dies with the calling thread,
/// whatever that dies of.
///
/// # Errors
/// EEXIST: the pid is taken. EPERM without the right to choose it. EAGAIN: too many processes.
pub fn spawn_paused(wanted: Option<Pid>) -> Result<Pid> {
    let _blocked = signal::block_all();
    spawn_into(wanted, libc::SYS_pause, 0)
}

/// Forks a child that makes one system call again and again, as long as the calling thread lives.
fn spawn_into(wanted: Option<Pid>, nr: i64, argument: u8) -> Result<Pid> {
    let tid = wanted.map_or(0, Pid::raw);
    let args = clone_args {
        // No signal tells anybody of its end.
        exit_signal: 0,
        set_tid: wanted.map_or(0, |_| address_of(&tid)),
        set_tid_size: u64::from(wanted.is_some()),
        ..no_args()
    };
    let result: i64;
    // SAFETY: the parent's path is a plain system call; the child's path is another one that never
    // goes on and uses nothing of this function's frame.
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
            "cmp eax, r14d",
            "je 3f",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "3:",
            "mov rdi, r12",
            "mov rax, r13",
            "syscall",
            "jmp 3b",
            "2:",
            set_parent_death_signal = const libc::PR_SET_PDEATHSIG,
            kill = const libc::SIGKILL,
            prctl = const libc::SYS_prctl,
            getppid = const libc::SYS_getppid,
            exit = const libc::SYS_exit_group,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const args,
            in("rsi") size_of::<clone_args>(),
            in("r12") u64::from(argument),
            in("r13") nr,
            in("r14") u64::from(Pid::this().raw().cast_unsigned()),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    child_of(result)
}

/// Arguments that ask for nothing.
pub(crate) fn no_args() -> clone_args {
    clone_args {
        flags: 0,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    }
}

/// The child, or the errno, that clone3 has returned.
pub(crate) fn child_of(result: i64) -> Result<Pid> {
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        Ok(errno) => Err(Errno::from_raw(-errno)),
        Err(_) => Err(Errno::EINVAL),
    }
}

fn address_of<T>(value: &T) -> u64 {
    let address = std::ptr::from_ref(value).addr();
    u64::try_from(address).expect("addresses fit 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paused_child_lives_until_it_is_killed() {
        let pid = spawn_paused(None).expect("a child");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there");
        assert!(!status.contains("zombie"), "{status}");
        assert!(crate::wait::try_wait(pid).expect("our child").is_none());
        crate::task::kill(pid, libc::SIGKILL).expect("our child");
        crate::wait::wait(pid).expect("our child");
    }

    #[test]
    fn a_paused_child_does_not_outlive_who_made_it() {
        let maker = std::thread::spawn(|| {
            let pid = spawn_paused(None).expect("a child");
            // Until it sleeps it may not have asked to die with us.
            let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("our child");
            while !stat().contains(") S ") {
                std::thread::yield_now();
            }
            pid
        });
        let pid = maker.join().expect("no panic");
        for _ in 0..1000 {
            if crate::wait::try_wait(pid).expect("our child").is_some() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        crate::task::kill(pid, libc::SIGKILL).expect("our child");
        panic!("it lives on");
    }
}
