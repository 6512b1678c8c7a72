//! ptrace: stopping tasks, reading and setting their registers, driving them.
//!
//! All requests must come from the thread that seized the task, and except for [`seize`] and
//! [`interrupt`] the task must be in a ptrace stop.
//!
//! Source: man 2 ptrace; linux include/uapi/linux/ptrace.h.

use std::ffi::c_void;
use std::ptr::{null_mut, without_provenance_mut};

use crate::{Errno, Pid, Result};

/// General registers, as PTRACE_GETREGS gives them to a 64-bit tracer.
pub type GeneralRegs = libc::user_regs_struct;

const NT_X86_XSTATE: usize = 0x202;
const NT_X86_SHSTK: usize = 0x204;
const PTRACE_ARCH_PRCTL: u32 = 30;
const PTRACE_GET_THREAD_AREA: u32 = 25;
const PTRACE_SET_THREAD_AREA: u32 = 26;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;

/// Stop every syscall with a distinguishable signal number (SIGTRAP | 0x80).
pub const O_TRACESYSGOOD: u32 = 1;
/// Suspend seccomp filters while traced.
pub const O_SUSPEND_SECCOMP: u32 = 1 << 21;
/// Kill the tracee when the tracer dies.
pub const O_EXITKILL: u32 = 1 << 20;

/// The stop signal of a system call stop with [`O_TRACESYSGOOD`].
pub const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// Event number of a group stop or interrupt stop.
pub const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;

fn request(request: u32, pid: Pid, addr: *mut c_void, data: *mut c_void) -> Result<u64> {
    // SAFETY: each caller passes addresses that fit its request and outlive the call.
    let result = unsafe { libc::ptrace(request, pid.raw(), addr, data) };
    Errno::check(result)
}

fn number(value: usize) -> *mut c_void {
    without_provenance_mut(value)
}

fn bits(value: u32) -> *mut c_void {
    number(usize::try_from(value).expect("usize has at least 32 bits"))
}

/// Attaches without stopping the task.
///
/// # Errors
/// EPERM: another tracer has it, it is a kernel thread, or rights are missing. ESRCH: gone or a zombie.
pub fn seize(tid: Pid, options: u32) -> Result<()> {
    request(libc::PTRACE_SEIZE, tid, null_mut(), bits(options)).map(drop)
}

/// Asks a seized task to stop; the stop is reported by wait.
///
/// # Errors
/// ESRCH: gone.
pub fn interrupt(tid: Pid) -> Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, null_mut(), null_mut()).map(drop)
}

/// Changes the options given to [`seize`].
///
/// # Errors
/// ESRCH: gone or not stopped.
pub fn set_options(tid: Pid, options: u32) -> Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, null_mut(), bits(options)).map(drop)
}

/// Lets the task run, delivering `signal` unless it is 0.
///
/// # Errors
/// ESRCH: gone or not stopped.
pub fn cont(tid: Pid, signal: i32) -> Result<()> {
    request(
        libc::PTRACE_CONT,
        tid,
        null_mut(),
        bits(signal.cast_unsigned()),
    )
    .map(drop)
}

/// Lets the task run to the next entry or exit of a system call.
///
/// # Errors
/// ESRCH: gone or not stopped.
pub fn cont_to_syscall(tid: Pid) -> Result<()> {
    request(libc::PTRACE_SYSCALL, tid, null_mut(), null_mut()).map(drop)
}

/// Keeps a group-stopped task stopped but listening for SIGCONT.
///
/// # Errors
/// ESRCH, EIO when it is in no group stop.
pub fn listen(tid: Pid) -> Result<()> {
    request(libc::PTRACE_LISTEN, tid, null_mut(), null_mut()).map(drop)
}

/// Detaches and lets the task run on, delivering `signal` unless it is 0.
///
/// # Errors
/// ESRCH: gone or not stopped.
pub fn detach(tid: Pid, signal: i32) -> Result<()> {
    request(
        libc::PTRACE_DETACH,
        tid,
        null_mut(),
        bits(signal.cast_unsigned()),
    )
    .map(drop)
}

/// Reads the general registers, all 64 bits of them also in 32-bit code.
///
/// # Errors
/// ESRCH: gone or not stopped.
pub fn general_regs(tid: Pid) -> Result<GeneralRegs> {
    // SAFETY: all-zero bytes are a valid user_regs_struct, which holds integers only.
    let mut regs: GeneralRegs = unsafe { std::mem::zeroed() };
    // The regset has the layout of the code that the task runs, PTRACE_GETREGS that of the tracer.
    request(
        libc::PTRACE_GETREGS,
        tid,
        null_mut(),
        (&raw mut regs).cast(),
    )?;
    Ok(regs)
}

/// Sets the general registers, fs and gs base included; the code segment decides whether the task goes
/// on in 64-bit or in 32-bit code.
///
/// # Errors
/// ESRCH; EIO or EINVAL for values the kernel refuses.
pub fn set_general_regs(tid: Pid, regs: &GeneralRegs) -> Result<()> {
    request(
        libc::PTRACE_SETREGS,
        tid,
        null_mut(),
        std::ptr::from_ref(regs).cast_mut().cast(),
    )
    .map(drop)
}

/// A segment descriptor as set_thread_area(2) takes it.
///
/// Source: linux arch/x86/include/uapi/asm/ldt.h, struct user_desc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct SegmentDescriptor {
    /// Number of the entry in the global descriptor table.
    pub entry: u32,
    /// Address of its first byte.
    pub base: u32,
    /// Largest offset, in bytes or pages.
    pub limit: u32,
    /// Bit 0 seg_32bit, 1 and 2 contents, 3 read_exec_only, 4 limit_in_pages, 5 seg_not_present,
    /// 6 useable.
    pub flags: u32,
}

/// Reads a thread-local segment: an entry of the global descriptor table that each thread has for itself.
///
/// # Errors
/// ESRCH; EIO on kernels without 32-bit programs.
pub fn thread_area(tid: Pid, entry: u32) -> Result<SegmentDescriptor> {
    let mut descriptor = SegmentDescriptor::default();
    request(
        PTRACE_GET_THREAD_AREA,
        tid,
        bits(entry),
        (&raw mut descriptor).cast(),
    )?;
    Ok(descriptor)
}

/// Sets a thread-local segment, and the base of the segment register that has it selected.
///
/// # Errors
/// As [`thread_area`]; EINVAL for descriptors that the kernel refuses.
pub fn set_thread_area(tid: Pid, mut descriptor: SegmentDescriptor) -> Result<()> {
    request(
        PTRACE_SET_THREAD_AREA,
        tid,
        bits(descriptor.entry),
        (&raw mut descriptor).cast(),
    )
    .map(drop)
}

/// Reads the extended state (x87, SSE, AVX, ...) in the XSAVE area's standard format, at most `max_len`
/// bytes.
///
/// # Errors
/// ESRCH; ENODEV where the CPU has no XSAVE.
pub fn xstate(tid: Pid, max_len: usize) -> Result<Vec<u8>> {
    let mut buffer = vec![0u8; max_len];
    let len = xstate_into(tid, &mut buffer)?;
    buffer.truncate(len);
    Ok(buffer)
}

/// Reads as [`xstate`] does, into `area`; returns how many bytes came.
///
/// # Errors
/// As of [`xstate`].
pub fn xstate_into(tid: Pid, area: &mut [u8]) -> Result<usize> {
    regset(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, area)
}

/// Sets the extended state; `area` must have the size that [`xstate`] returns on this machine.
///
/// # Errors
/// EFAULT for a short area, EINVAL for reserved bits.
pub fn set_xstate(tid: Pid, area: &[u8]) -> Result<()> {
    let mut iov = iovec(area.as_ptr().cast_mut().cast(), area.len());
    request(
        libc::PTRACE_SETREGSET,
        tid,
        number(NT_X86_XSTATE),
        (&raw mut iov).cast(),
    )
    .map(drop)
}

/// See [`crate::shadow_stack::pointer`].
pub(crate) fn shadow_stack_pointer(tid: Pid) -> Result<u64> {
    let mut pointer = [0; 8];
    regset(libc::PTRACE_GETREGSET, tid, NT_X86_SHSTK, &mut pointer)?;
    Ok(u64::from_ne_bytes(pointer))
}

/// See [`crate::shadow_stack::set_pointer`].
pub(crate) fn set_shadow_stack_pointer(tid: Pid, pointer: u64) -> Result<()> {
    let mut pointer = pointer.to_ne_bytes();
    regset(libc::PTRACE_SETREGSET, tid, NT_X86_SHSTK, &mut pointer).map(drop)
}

/// Makes an arch_prctl call about another thread: those that the kernel lets a tracer make.
pub(crate) fn arch_prctl(tid: Pid, code: usize, value: u64) -> Result<()> {
    let value = number(usize::try_from(value).expect("usize has 64 bits"));
    request(PTRACE_ARCH_PRCTL, tid, value, number(code)).map(drop)
}

/// Reads or sets a register set; returns the number of bytes moved.
fn regset(kind: u32, tid: Pid, set: usize, bytes: &mut [u8]) -> Result<usize> {
    let mut iov = iovec(bytes.as_mut_ptr().cast(), bytes.len());
    request(kind, tid, number(set), (&raw mut iov).cast())?;
    Ok(iov.iov_len)
}

/// Reads the blocked signals; bit n-1 is signal n.
///
/// # Errors
/// ESRCH.
pub fn signal_mask(tid: Pid) -> Result<u64> {
    let mut mask = 0u64;
    request(
        libc::PTRACE_GETSIGMASK,
        tid,
        number(8),
        (&raw mut mask).cast(),
    )?;
    Ok(mask)
}

/// Sets the blocked signals.
///
/// # Errors
/// ESRCH.
pub fn set_signal_mask(tid: Pid, mut mask: u64) -> Result<()> {
    request(
        libc::PTRACE_SETSIGMASK,
        tid,
        number(8),
        (&raw mut mask).cast(),
    )
    .map(drop)
}

/// Raw bytes of a siginfo_t.
pub type SiginfoBytes = [u8; 128];

/// Which queue of pending signals is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalQueue {
    /// The thread's own.
    Thread,
    /// That of the whole thread group.
    Process,
}

/// Copies all pending signals of a queue without taking them out.
///
/// # Errors
/// ESRCH.
/// Source: man 2 ptrace, PTRACE_PEEKSIGINFO (Linux 3.10).
pub fn pending_signals(tid: Pid, queue: SignalQueue) -> Result<Vec<SiginfoBytes>> {
    const BATCH: usize = 32;
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let flags = if queue == SignalQueue::Process {
        PTRACE_PEEKSIGINFO_SHARED
    } else {
        0
    };
    let mut all = Vec::new();
    loop {
        let off = u64::try_from(all.len()).expect("few signals");
        let mut args = Args { off, flags, nr: 32 };
        let mut batch = [[0u8; 128]; BATCH];
        let got = request(
            libc::PTRACE_PEEKSIGINFO,
            tid,
            (&raw mut args).cast(),
            batch.as_mut_ptr().cast(),
        )?;
        let got = usize::try_from(got).unwrap_or(0).min(BATCH);
        all.extend_from_slice(&batch[..got]);
        if got < BATCH {
            return Ok(all);
        }
    }
}

/// Signal of the present signal-delivery stop, if it is one.
///
/// # Errors
/// EINVAL: the stop has no siginfo (a group stop).
pub fn siginfo(tid: Pid) -> Result<SiginfoBytes> {
    let mut info = [0u8; 128];
    request(
        libc::PTRACE_GETSIGINFO,
        tid,
        null_mut(),
        info.as_mut_ptr().cast(),
    )?;
    Ok(info)
}

/// A thread's registered rseq area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfig {
    /// Address of `struct rseq`; 0 when none is registered.
    pub address: u64,
    /// Its length in bytes as registered.
    pub len: u32,
    /// Signature before abort handlers.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    /// Unused.
    pub pad: u32,
}

/// Reads where the thread's rseq area is.
///
/// # Errors
/// ESRCH; EIO on kernels before 5.13 or without rseq.
pub fn rseq_config(tid: Pid) -> Result<RseqConfig> {
    let mut config = RseqConfig {
        address: 0,
        len: 0,
        signature: 0,
        flags: 0,
        pad: 0,
    };
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        number(size_of::<RseqConfig>()),
        (&raw mut config).cast(),
    )?;
    Ok(config)
}

/// Reads a seccomp filter of the thread, as `struct sock_filter` instructions; number 0 is the oldest.
///
/// # Errors
/// ENOENT: no such filter. EACCES: the caller lacks CAP_SYS_ADMIN or is under seccomp itself.
/// Source: man 2 ptrace, PTRACE_SECCOMP_GET_FILTER (Linux 4.4).
pub fn seccomp_filter(tid: Pid, nth: usize) -> Result<Vec<u8>> {
    const MAX_INSTRUCTIONS: usize = 4096;
    let mut program = vec![0u64; MAX_INSTRUCTIONS];
    let got = request(
        PTRACE_SECCOMP_GET_FILTER,
        tid,
        number(nth),
        program.as_mut_ptr().cast(),
    )?;
    let got = usize::try_from(got).unwrap_or(0);
    let bytes = program.iter().take(got).flat_map(|word| word.to_le_bytes());
    Ok(bytes.collect())
}

/// Reads the flags that a seccomp filter was installed with, as far as the kernel keeps them.
///
/// # Errors
/// As [`seccomp_filter`].
/// Source: man 2 ptrace, PTRACE_SECCOMP_GET_METADATA (Linux 4.16).
pub fn seccomp_flags(tid: Pid, nth: usize) -> Result<u64> {
    let mut metadata = [u64::try_from(nth).unwrap_or(u64::MAX), 0];
    request(
        PTRACE_SECCOMP_GET_METADATA,
        tid,
        number(size_of_val(&metadata)),
        metadata.as_mut_ptr().cast(),
    )?;
    Ok(metadata[1])
}

/// A thread's syscall user dispatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct DispatchConfig {
    /// PR_SYS_DISPATCH_*; 0 is off.
    pub mode: u64,
    /// Address of the byte that switches it.
    pub selector: u64,
    /// Start of the code that is let through.
    pub offset: u64,
    /// Length of that code.
    pub len: u64,
}

/// Reads the thread's syscall user dispatch.
///
/// # Errors
/// ESRCH; EIO before Linux 6.4.
pub fn syscall_dispatch(tid: Pid) -> Result<DispatchConfig> {
    let mut config = DispatchConfig::default();
    request(
        PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        number(size_of::<DispatchConfig>()),
        (&raw mut config).cast(),
    )?;
    Ok(config)
}

/// Sets the thread's syscall user dispatch.
///
/// # Errors
/// ESRCH; EINVAL, EFAULT for impossible addresses; EIO before Linux 6.4.
pub fn set_syscall_dispatch(tid: Pid, mut config: DispatchConfig) -> Result<()> {
    request(
        PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        number(size_of::<DispatchConfig>()),
        (&raw mut config).cast(),
    )
    .map(drop)
}

fn iovec(base: *mut c_void, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base,
        iov_len: len,
    }
}
