//! Robust futex lists and restartable sequences: what a thread registers with the kernel.

use std::io;

use super::{Region, check_long};

/// A robust list with one lock in it, laid out in shared memory.
///
/// ```text
/// 0   head.next  ─→ 24        24  entry.next ─→ 0
/// 8   head.futex_offset       ..
/// 16  head.list_op_pending    offset of the lock word is counted from the entry
/// ```
#[derive(Debug)]
pub struct RobustList {
    memory: Region,
}

const ENTRY: usize = 24;
const HEAD_LEN: usize = 24;

impl RobustList {
    /// Writes a list into `memory` and registers it; the lock word is `lock` bytes into the mapping.
    pub fn install(memory: Region, lock: usize) -> io::Result<RobustList> {
        let entry = memory.addr + ENTRY;
        memory.put(0, &entry.to_ne_bytes());
        memory.put(8, &(lock - ENTRY).to_ne_bytes());
        memory.put(16, &0usize.to_ne_bytes());
        memory.put(ENTRY, &memory.addr.to_ne_bytes());
        // SAFETY: the head stays mapped until the task ends.
        let result = unsafe { libc::syscall(libc::SYS_set_robust_list, memory.addr, HEAD_LEN) };
        check_long(result).map(|_| RobustList { memory })
    }

    /// The address of the list's head.
    pub fn head(&self) -> usize {
        self.memory.addr
    }
}

/// Reads this thread's robust list from the kernel: address and length of the head.
pub fn robust_list() -> io::Result<(usize, usize)> {
    let (mut head, mut len) = (0usize, 0usize);
    let nr = libc::SYS_get_robust_list;
    // SAFETY: both words live through the call.
    check_long(unsafe { libc::syscall(nr, 0, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// The signature that code before an abort address must carry; glibc's on x86.
pub const RSEQ_SIGNATURE: u32 = 0x5305_3053;

const RSEQ_FLAG_UNREGISTER: i32 = 1;

/// Registers `area` of `len` bytes as this thread's rseq area.
pub fn register_rseq(area: Region, len: u32) -> io::Result<()> {
    rseq(area.addr, len, 0)
}

/// Takes back the registration of this thread's rseq area.
pub fn unregister_rseq(addr: usize, len: u32) -> io::Result<()> {
    rseq(addr, len, RSEQ_FLAG_UNREGISTER)
}

fn rseq(addr: usize, len: u32, flags: i32) -> io::Result<()> {
    // SAFETY: the kernel writes to the area at every preemption; it stays mapped with the thread.
    let result = unsafe { libc::syscall(libc::SYS_rseq, addr, len, flags, RSEQ_SIGNATURE) };
    check_long(result).map(drop)
}

/// Where glibc keeps this thread's rseq area.
pub fn libc_rseq() -> io::Result<usize> {
    unsafe extern "C" {
        static __rseq_offset: isize;
    }
    // SAFETY: glibc sets the offset before main.
    let offset = unsafe { __rseq_offset };
    let base = usize::try_from(super::fs_base()?).map_err(io::Error::other)?;
    Ok(base.wrapping_add_signed(offset))
}

/// Binds this thread to one CPU.
pub fn run_on_cpu(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero set is a valid one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number is below the size of the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set lives through the call.
    super::check(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }).map(drop)
}

/// Lists the CPUs this thread may run on.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    // SAFETY: an all-zero set is a valid one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set lives through the call.
    super::check(unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) })?;
    // SAFETY: the numbers are below the size of the set.
    Ok((0..1024)
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect())
}
