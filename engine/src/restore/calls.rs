//! Calls that the kernel goes on with for the rest of their time: what it has noted of them can be set by nothing but
//! the call itself, which therefore is made again, for that rest, and stopped in.
//!
//! | the thread was in | it is brought back by |
//! |---|---|
//! | a sleep of 64-bit code | its program, which ends with it (`thread.rs`) |
//! | a sleep of 32-bit code | the call that it was in: the kernel notes which kind made it |
//! | a wait (`poll`, `futex`) | the call that it was in, which waits for the same things |
//!
//! The call is made by the thread's own instruction with all signals blocked; both of its ends are stops, so
//! that nothing of the thread's own code runs. One that is over by then gives its result.

use firn_proto::CoreEntry;
use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::ptrace::{self, GeneralRegs};
use firn_sys::wait::Status as WaitStatus;
use firn_sys::{Pid, wait};

use super::RestoreError;
use super::takeover::failed;
use super::thread;
use crate::arch::restart::{self, Resumption};
use crate::arch::{Abi, regs, waits};

/// What a sleep returns that has ended.
const SLEPT: u64 = 0;

/// Brings a stopped thread back into its call, and returns the registers with which it goes on. `has_slept` says
/// that the sleep of its program, if that sleeps, is over.
///
/// # Preconditions
/// Memory, descriptors and extended state of the thread are those that it is to have; only its registers may be
/// anything.
pub(super) fn go_back(
    tid: Pid,
    core: &CoreEntry,
    has_slept: bool,
) -> Result<GeneralRegs, RestoreError> {
    let info = core.thread_info.as_ref().expect("checked while loading");
    let with = |resumption| regs::from_image(&info.gpregs, resumption);
    let ended = |result| GeneralRegs {
        rax: result,
        ..with(Resumption::AsStored)
    };
    let resumption = thread::resumption(core);
    Ok(match resumption {
        // Its program has only parked.
        Resumption::Sleep { nr, .. } if thread::abi(core) == Abi::Ia32 => {
            match enter(tid, &regs::ia32_sleep(&info.gpregs, nr))? {
                None => with(resumption),
                Some(_) => ended(SLEPT),
            }
        }
        Resumption::Sleep { .. } if has_slept => ended(SLEPT),
        Resumption::Wait { nr, sec, nsec } => {
            let whole = with(Resumption::Again { nr });
            let Some(again) = waits::again(&info.gpregs, nr, (sec, nsec)) else {
                return Ok(whole);
            };
            let Some(lent) = Lent::write(tid, again.timeout) else {
                return Ok(whole);
            };
            let entered = enter(tid, &again.regs);
            lent.give_back(tid)?;
            match entered? {
                None => with(resumption),
                Some(result) => ended(result),
            }
        }
        _ => with(resumption),
    })
}

/// Memory of a thread that holds something else for a moment.
struct Lent {
    address: u64,
    bytes: Vec<u8>,
}

impl Lent {
    /// None where the memory can't be written, or is not there any more.
    fn write(tid: Pid, what: Option<(u64, Vec<u8>)>) -> Option<Lent> {
        let (address, new) = what.unwrap_or_default();
        let mut lent = Lent {
            address,
            bytes: vec![0; new.len()],
        };
        let range = lent.range();
        if new.is_empty() {
            return Some(lent);
        }
        let got = process_vm::read(tid, &[range], &mut lent.bytes).ok()?;
        let put = process_vm::write(tid, &[range], &new).ok()?;
        // At a page's end: what was written of it goes back.
        if (got, put) != (new.len(), new.len()) {
            lent.bytes.truncate(put);
            let _ = lent.give_back(tid);
            return None;
        }
        Some(lent)
    }

    fn give_back(&self, tid: Pid) -> Result<(), RestoreError> {
        if !self.bytes.is_empty() {
            process_vm::write(tid, &[self.range()], &self.bytes)
                .map_err(failed(tid, "write to the memory"))?;
        }
        Ok(())
    }

    fn range(&self) -> RemoteRange {
        RemoteRange {
            address: self.address,
            len: self.bytes.len(),
        }
    }
}

/// Has a thread make a call and stop in it; returns the result of one that ends at once.
fn enter(tid: Pid, regs: &GeneralRegs) -> Result<Option<u64>, RestoreError> {
    ptrace::set_general_regs(tid, regs).map_err(failed(tid, "set the registers"))?;
    let go_on = || ptrace::cont_to_syscall(tid).map_err(failed(tid, "resume the thread"));
    go_on()?;
    await_call_stop(tid)?;
    go_on()?;
    ptrace::interrupt(tid).map_err(failed(tid, "interrupt the thread"))?;
    await_call_stop(tid)?;
    let regs = ptrace::general_regs(tid).map_err(failed(tid, "read the registers"))?;
    Ok((!restart::is_asleep(&regs)).then_some(regs.rax))
}

fn await_call_stop(tid: Pid) -> Result<(), RestoreError> {
    match wait::wait(tid).map_err(failed(tid, "wait for the thread"))? {
        WaitStatus::Stopped {
            signal: ptrace::SYSCALL_STOP,
            ..
        } => Ok(()),
        WaitStatus::Stopped { .. } => Err(RestoreError::Stuck(format!(
            "thread {tid} does not make its call"
        ))),
        WaitStatus::Ended(_) | WaitStatus::Continued => Err(RestoreError::Died(tid)),
    }
}
