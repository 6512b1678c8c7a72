//! Single system calls made by a stopped task, through a `syscall` instruction that it has anyway.

use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::ptrace::GeneralRegs;
use firn_sys::wait::Status;
use firn_sys::{Errno, Pid, nr, procfs, ptrace, wait};

use super::{InjectError, trace};
use crate::arch::{Abi, Landing, regs};
use crate::memory::AddressRange;

/// One system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallSpec {
    /// Whose numbers and registers it has.
    pub abi: Abi,
    /// Its number.
    pub nr: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

impl CallSpec {
    fn mmap(abi: Abi, address: u64, len: u64, prot: u64, flags: u64) -> CallSpec {
        let nr = match abi {
            Abi::Native => nr::MMAP,
            Abi::Ia32 => nr::ia32::MMAP2,
        };
        let args = [address, len, prot, flags, NO_FILE, 0];
        CallSpec { abi, nr, args }
    }

    /// The call that makes an arena: shared, so that it can be seen from here, and with all its pages, since many
    /// threads that begin at the same time would wait for each other at their faults. That of 32-bit code gives
    /// an address below 4 GiB.
    pub fn map_arena(abi: Abi, len: usize) -> CallSpec {
        let prot = PROT_READ | PROT_WRITE | PROT_EXEC;
        let flags = MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE;
        CallSpec::mmap(abi, 0, in_64_bits(len), prot, flags)
    }

    /// munmap.
    pub fn unmap(abi: Abi, address: u64, len: u64) -> CallSpec {
        let nr = match abi {
            Abi::Native => nr::MUNMAP,
            Abi::Ia32 => nr::ia32::MUNMAP,
        };
        let args = [address, len, 0, 0, 0, 0];
        CallSpec { abi, nr, args }
    }
}

fn in_64_bits(len: usize) -> u64 {
    u64::try_from(len).expect("lengths fit 64 bits")
}

const PROT_READ: u64 = 1;
const PROT_WRITE: u64 = 2;
const PROT_EXEC: u64 = 4;
const MAP_SHARED: u64 = 1;
const MAP_FIXED: u64 = 0x10;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_POPULATE: u64 = 0x8000;
const PAGE: u64 = 4096;
/// The descriptor -1, as 32-bit code has it, too.
const NO_FILE: u64 = u64::MAX;
/// The one stop signal that a mask can't hold back.
pub const SIGSTOP: i32 = 19;
/// SIGKILL and SIGSTOP, which no mask holds.
pub(super) const NEVER_BLOCKED: u64 = 1 << 8 | 1 << 18;
/// What a register has that stands for the result of a call which is yet to be made: -ENOSYS.
const NOT_MADE: u64 = (-38i64).cast_unsigned();
/// Arguments of a call that takes none, by which its maker is known.
const MARK: u64 = 0x4e52_4946;
/// No more than this much of one mapping is searched for an instruction.
const SEARCH_LIMIT: u64 = 1 << 20;

/// Whether these registers are those of a thread that sleeps where [`call_all`] lets it enter the kernel.
pub(super) fn sleeps_for_us(regs: &GeneralRegs) -> bool {
    regs.rdx == MARK && regs.rsi == MARK
}

/// One call to be made by one stopped thread.
#[derive(Debug)]
pub struct RemoteCall {
    tid: Pid,
    old: GeneralRegs,
    instruction: u64,
    call: CallSpec,
    /// Where the thread goes on after the call if nobody holds it any more.
    landing: Option<Landing>,
    result: i64,
    swallowed_stop: bool,
}

impl RemoteCall {
    /// Prepares a call; `old` are the thread's registers, of which segments and the like are kept.
    pub fn new(tid: Pid, old: GeneralRegs, instruction: u64, call: CallSpec) -> RemoteCall {
        RemoteCall {
            tid,
            old,
            instruction,
            call,
            landing: None,
            result: 0,
            swallowed_stop: false,
        }
    }

    /// Lets the thread go on there if nobody holds it after the call.
    pub(super) fn landing_on(mut self, landing: Option<Landing>) -> RemoteCall {
        self.landing = landing;
        self
    }

    /// Another call by the same instruction.
    pub fn followed_by(&self, call: CallSpec) -> RemoteCall {
        RemoteCall::new(self.tid, self.old, self.instruction, call).landing_on(self.landing)
    }

    /// The thread.
    pub fn tid(&self) -> Pid {
        self.tid
    }

    /// The same call once more.
    pub fn again(&self) -> RemoteCall {
        self.followed_by(self.call)
    }

    /// True when a SIGSTOP came in between and was held back; it must be sent again afterwards.
    pub fn swallowed_stop(&self) -> bool {
        self.swallowed_stop
    }

    /// What the call returned.
    ///
    /// # Errors
    /// The call's own errno.
    pub fn result(&self) -> Result<u64, Errno> {
        match self.result {
            error @ -4095..0 => Err(Errno::from_raw(
                i32::try_from(-error).expect("errnos are small"),
            )),
            value => Ok(value.cast_unsigned()),
        }
    }
}

/// Makes all calls, every thread at the same time, and leaves the threads at the calls' exit stops.
///
/// # Errors
/// A thread died or stopped for another reason.
///
/// # Preconditions
/// Every thread is in a ptrace stop of the calling thread, with all signals blocked.
pub fn call_all(calls: &mut [RemoteCall]) -> Result<(), InjectError> {
    for call in calls.iter() {
        call.begin()?;
    }
    finish_all(calls)
}

impl RemoteCall {
    /// Lets the thread enter the kernel.
    ///
    /// With a landing it does so by a call that would only sleep; which one it makes is settled at the entry stop,
    /// with the place where it goes on. So it comes to no harm if its tracer dies, at any moment.
    pub(super) fn begin(&self) -> Result<(), InjectError> {
        let CallSpec { abi, nr, args } = self.call;
        let regs = match self.landing {
            None => abi.at_call(&self.old, self.instruction, number(nr), args),
            Some(_) => abi.at_call(&self.old, self.instruction, abi.sleep_nr(), [MARK; 6]),
        };
        self.set(&regs)?;
        go_on(self.tid)
    }

    /// Settles at the entry stop which call it is.
    fn settle(&self) -> Result<(), InjectError> {
        let Some(landing) = self.landing else {
            return Ok(());
        };
        let CallSpec { abi, nr, args } = self.call;
        let regs = abi.at_call(&self.old, self.instruction, number(nr), args);
        self.set(&landing.with(GeneralRegs {
            orig_rax: number(nr),
            rax: NOT_MADE,
            ..regs
        }))
    }

    fn set(&self, regs: &GeneralRegs) -> Result<(), InjectError> {
        ptrace::set_general_regs(self.tid, regs).map_err(trace(self.tid, "set the registers"))
    }
}

fn number(nr: i64) -> u64 {
    u64::try_from(nr).expect("call numbers are positive")
}

/// Waits for the ends of calls that have begun.
pub(super) fn finish_all(calls: &mut [RemoteCall]) -> Result<(), InjectError> {
    for call in calls.iter_mut() {
        call.swallowed_stop |= await_syscall_stop(call.tid)?;
        call.settle()?;
        go_on(call.tid)?;
    }
    for call in calls.iter_mut() {
        call.swallowed_stop |= await_syscall_stop(call.tid)?;
        let regs = ptrace::general_regs(call.tid).map_err(trace(call.tid, "read the registers"))?;
        call.result = regs::syscall_result(&regs);
    }
    Ok(())
}

fn go_on(tid: Pid) -> Result<(), InjectError> {
    ptrace::cont_to_syscall(tid).map_err(trace(tid, "resume the thread"))
}

/// Waits for the entry or exit stop of a system call, passing over stops of a stopped thread group.
/// Returns true when a SIGSTOP was held back.
fn await_syscall_stop(tid: Pid) -> Result<bool, InjectError> {
    let mut swallowed = false;
    loop {
        match wait::wait_soon(tid).map_err(trace(tid, "wait for the thread"))? {
            Status::Stopped {
                signal: ptrace::SYSCALL_STOP,
                ..
            } => return Ok(swallowed),
            Status::Stopped {
                event: ptrace::EVENT_STOP,
                ..
            } => go_on(tid)?,
            // SIGSTOP can't be blocked.
            Status::Stopped {
                signal: SIGSTOP,
                event: 0,
            } => {
                swallowed = true;
                go_on(tid)?;
            }
            Status::Stopped { signal, event } => {
                return Err(InjectError::UnexpectedStop { tid, signal, event });
            }
            Status::Ended(_) => return Err(InjectError::Died(tid)),
            Status::Continued => {}
        }
    }
}

/// Makes an arena where memory that is both writable and executable is refused (PR_SET_MDWE, SELinux):
/// writable memory, then an executable first page in its place.
///
/// # Errors
/// The calls were refused.
pub fn map_in_two_parts(refused: &RemoteCall, len: usize) -> Result<u64, InjectError> {
    let len = in_64_bits(len);
    let one = |call: CallSpec, what| -> Result<u64, InjectError> {
        let mut calls = [refused.followed_by(call)];
        call_all(&mut calls)?;
        calls[0].result().map_err(|source| InjectError::Call {
            tid: refused.tid,
            what,
            source,
        })
    };
    let (abi, shared) = (refused.call.abi, MAP_SHARED | MAP_ANONYMOUS);
    let writable = CallSpec::mmap(abi, 0, len, PROT_READ | PROT_WRITE, shared);
    let address = one(writable, "mapping the arena")?;
    let prot = PROT_READ | PROT_EXEC;
    let code = CallSpec::mmap(abi, address, PAGE, prot, shared | MAP_FIXED);
    one(code, "mapping the executor's page")?;
    Ok(address)
}

/// The instruction by which a stopped thread has entered the call it was stopped in, if it is that of this
/// kind of code: known without a look at the memory map, which takes the kernel much longer than all the
/// rest.
pub fn instruction_just_used(tid: Pid, regs: &GeneralRegs, abi: Abi) -> Option<u64> {
    let address = regs::call_instruction(regs)?;
    let wanted = abi.call_instruction();
    let (mut bytes, len) = ([0u8; 2], wanted.len());
    process_vm::read(tid, &[RemoteRange { address, len }], &mut bytes).ok()?;
    (bytes == wanted).then_some(address)
}

/// Finds an instruction of this kind that makes a system call in the task's executable memory: in its
/// vdso as a rule.
///
/// # Errors
/// The task has none, or its maps can't be read.
pub fn find_syscall_instruction(pid: Pid, abi: Abi) -> Result<u64, InjectError> {
    executable_ranges(pid)
        .into_iter()
        .find_map(|range| search(pid, range.start, range.end, abi.call_instruction()))
        .ok_or(InjectError::NoSyscallInstruction(pid))
}

/// All code of a task, that of the vdso first; none where its maps can't be read.
pub(super) fn executable_ranges(pid: Pid) -> Vec<AddressRange> {
    let maps = procfs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut executable: Vec<(AddressRange, bool)> =
        maps.lines().filter_map(executable_range).collect();
    executable.sort_by_key(|(_, is_vdso)| !is_vdso);
    executable.into_iter().map(|(range, _)| range).collect()
}

/// The addresses in a line of maps, if there is code, and whether it is the vdso's.
fn executable_range(line: &str) -> Option<(AddressRange, bool)> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    if !fields.next()?.contains('x') || line.ends_with("[vsyscall]") {
        return None;
    }
    let parse = |hex| u64::from_str_radix(hex, 16).ok();
    let range = AddressRange::new(parse(start)?, parse(end)?);
    Some((range, line.ends_with("[vdso]")))
}

fn search(pid: Pid, start: u64, end: u64, instruction: [u8; 2]) -> Option<u64> {
    let len = usize::try_from((end - start).min(SEARCH_LIMIT)).ok()?;
    let mut bytes = vec![0u8; len];
    let got = process_vm::read(
        pid,
        &[RemoteRange {
            address: start,
            len,
        }],
        &mut bytes,
    )
    .ok()?;
    let at = bytes[..got]
        .windows(2)
        .position(|pair| pair == instruction)?;
    Some(start + u64::try_from(at).ok()?)
}

#[cfg(test)]
mod tests {
    use firn_proto::UserX86RegsEntry;

    use super::*;
    use crate::arch::restart::Resumption;

    #[test]
    fn finds_executable_ranges_only() {
        let vdso = "7ffd1000-7ffd3000 r-xp 00000000 00:00 0     [vdso]";
        assert_eq!(
            executable_range(vdso),
            Some((AddressRange::new(0x7ffd_1000, 0x7ffd_3000), true))
        );
        assert_eq!(executable_range("1000-2000 rw-p 00000000 00:00 0"), None);
        let vsyscall = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(executable_range(vsyscall), None);
    }

    #[test]
    fn finds_an_instruction_in_this_process() {
        let at = find_syscall_instruction(Pid::this(), Abi::Native).unwrap();
        let mut bytes = [0u8; 2];
        let range = RemoteRange {
            address: at,
            len: 2,
        };
        process_vm::read(Pid::this(), &[range], &mut bytes).unwrap();
        assert_eq!(bytes, Abi::Native.call_instruction());
        let inside = GeneralRegs {
            rip: at + 2,
            orig_rax: 35,
            ..regs::from_image(&UserX86RegsEntry::default(), Resumption::AsStored)
        };
        assert_eq!(
            instruction_just_used(Pid::this(), &inside, Abi::Native),
            Some(at)
        );
        let elsewhere = GeneralRegs {
            rip: at + 3,
            ..inside
        };
        assert_eq!(
            instruction_just_used(Pid::this(), &elsewhere, Abi::Native),
            None
        );
        let outside = GeneralRegs {
            orig_rax: u64::MAX,
            ..inside
        };
        assert_eq!(
            instruction_just_used(Pid::this(), &outside, Abi::Native),
            None
        );
    }
}
