//! Signals, their actions and stacks.

use std::io;
use std::mem;

use super::{Region, check, check_long};

/// A signal handler that looks only at the number.
pub type Handler = extern "C" fn(i32);

/// A signal handler with everything the kernel gives.
pub type InfoHandler = extern "C" fn(i32, *const libc::siginfo_t, *mut libc::c_void);

/// The kernel's own `struct sigaction`, with the restorer that libc hides.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelAction {
    /// Handler address, or `SIG_DFL`, `SIG_IGN`.
    pub handler: usize,
    /// `SA_*` flags.
    pub flags: u64,
    /// Where the handler returns to.
    pub restorer: usize,
    /// Signals blocked in the handler.
    pub mask: u64,
}

/// A set of signals as the kernel has it: bit 0 is signal 1.
pub fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn action(handler: usize, flags: i32) -> libc::sigaction {
    // SAFETY: an all-zero sigaction is a valid one, with an empty mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    action
}

/// Installs a handler.
pub fn handle(signal: i32, handler: Handler, flags: i32) -> io::Result<()> {
    set_action(signal, handler as usize, flags)
}

/// Installs a handler that gets the siginfo.
pub fn handle_info(signal: i32, handler: InfoHandler, flags: i32) -> io::Result<()> {
    set_action(signal, handler as usize, flags | libc::SA_SIGINFO)
}

/// Sets a handler by address, or `SIG_DFL`, `SIG_IGN`.
pub fn set_action(signal: i32, handler: usize, flags: i32) -> io::Result<()> {
    let action = action(handler, flags);
    // SAFETY: the action lives through the call; handlers here touch only atomics.
    check(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Reads a signal's action from the kernel.
pub fn kernel_action(signal: i32) -> io::Result<KernelAction> {
    let mut action = KernelAction {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let nothing = std::ptr::null::<KernelAction>();
    let nr = libc::SYS_rt_sigaction;
    // SAFETY: the action lives through the call and has the kernel's layout.
    let result = unsafe { libc::syscall(nr, signal, nothing, &raw mut action, 8) };
    check_long(result).map(|_| action)
}

/// Writes a signal's action into the kernel, restorer and all.
pub fn set_kernel_action(signal: i32, action: &KernelAction) -> io::Result<()> {
    let nothing = std::ptr::null_mut::<KernelAction>();
    // SAFETY: the action lives through the call and has the kernel's layout.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            std::ptr::from_ref(action),
            nothing,
            8,
        )
    };
    check_long(result).map(drop)
}

/// Changes this thread's signal mask (`SIG_BLOCK`, `SIG_SETMASK`, ...) and returns the old one.
pub fn mask(how: i32, set: u64) -> io::Result<u64> {
    let mut old = 0u64;
    // SAFETY: both sets live through the call and have the kernel's size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const set,
            &raw mut old,
            8,
        )
    };
    check_long(result).map(|_| old)
}

/// Reads the signals pending for this thread or its process.
pub fn pending() -> io::Result<u64> {
    let mut set = 0u64;
    // SAFETY: the set lives through the call and has the kernel's size.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut set, 8) };
    check_long(result).map(|_| set)
}

fn queued(signal: i32, value: usize) -> libc::siginfo_t {
    // SAFETY: an all-zero siginfo is a valid one.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    info.si_signo = signal;
    info.si_code = libc::SI_QUEUE;
    let words: *mut u64 = (&raw mut info).cast();
    // SAFETY: bytes 16..24 hold pid and uid, 24..32 the value; siginfo is 128 bytes long.
    unsafe {
        words.add(2).write(u64::from(super::pid().unsigned_abs()));
        words.add(3).write(value as u64);
    }
    info
}

/// Queues a signal with a value for a whole process.
pub fn queue_to_process(pid: i32, signal: i32, value: usize) -> io::Result<()> {
    let info = queued(signal, value);
    // SAFETY: the siginfo lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &raw const info) };
    check_long(result).map(drop)
}

/// Queues a signal with a value for one thread.
pub fn queue_to_thread(pid: i32, tid: i32, signal: i32, value: usize) -> io::Result<()> {
    let info = queued(signal, value);
    let nr = libc::SYS_rt_tgsigqueueinfo;
    // SAFETY: the siginfo lives through the call.
    check_long(unsafe { libc::syscall(nr, pid, tid, signal, &raw const info) }).map(drop)
}

/// Sends a signal to one thread.
pub fn kill_thread(pid: i32, tid: i32, signal: i32) -> io::Result<()> {
    let arguments = [pid, tid, signal, 0, 0, 0].map(i64::from);
    super::call_plain(libc::SYS_tgkill, arguments).map(drop)
}

/// The value that came with a queued signal.
pub fn info_value(info: &libc::siginfo_t) -> u64 {
    let words: *const u64 = std::ptr::from_ref(info).cast();
    // SAFETY: bytes 24..32 hold the value; siginfo is 128 bytes long.
    unsafe { words.add(3).read() }
}

/// Sets this thread's alternative signal stack.
pub fn set_altstack(stack: Region, flags: i32) -> io::Result<()> {
    let stack = libc::stack_t {
        ss_sp: std::ptr::with_exposed_provenance_mut(stack.addr),
        ss_flags: flags,
        ss_size: stack.len,
    };
    // SAFETY: the region is mapped for the life of the process.
    check(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) }).map(drop)
}

/// Reads this thread's alternative signal stack and its flags.
pub fn altstack() -> io::Result<(Region, i32)> {
    // SAFETY: an all-zero stack_t is a valid one.
    let mut stack: libc::stack_t = unsafe { mem::zeroed() };
    // SAFETY: the stack_t lives through the call.
    check(unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) })?;
    Ok((
        Region {
            addr: stack.ss_sp.addr(),
            len: stack.ss_size,
        },
        stack.ss_flags,
    ))
}

/// Sleeps with another mask until a handler has run, and returns the error, which is EINTR.
pub fn sigsuspend(set: u64) -> io::Error {
    // SAFETY: the set lives through the call and has the kernel's size.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigsuspend, &raw const set, 8) };
    check_long(result)
        .err()
        .unwrap_or_else(|| io::Error::other("no error"))
}

/// Waits for a signal of `set`: number, code and value.
pub fn wait_for(set: u64) -> io::Result<(i32, i32, u64)> {
    take(set, None)
}

/// Takes one pending signal of `set` at once: number, code and value.
pub fn take_pending(set: u64) -> io::Result<(i32, i32, u64)> {
    take(set, Some(super::timespec(std::time::Duration::ZERO)))
}

fn take(set: u64, time: Option<libc::timespec>) -> io::Result<(i32, i32, u64)> {
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: an all-zero siginfo is a valid one.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let nr = libc::SYS_rt_sigtimedwait;
    // SAFETY: set, siginfo and time live through the call.
    let result = unsafe { libc::syscall(nr, &raw const set, &raw mut info, time, 8) };
    check_long(result)?;
    Ok((info.si_signo, info.si_code, info_value(&info)))
}
