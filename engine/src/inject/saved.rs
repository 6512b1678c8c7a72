//! How stopped threads were found, and that they are left so.

use firn_sys::ptrace::{self, DispatchConfig, GeneralRegs, RseqConfig};
use firn_sys::{Pid, process_vm, wait};

use super::{InjectError, trace};
use crate::arch::regs;

const ALL_SIGNALS: u64 = u64::MAX;

/// How a stopped thread was found, and is left.
#[derive(Debug, Clone, Copy)]
pub struct ThreadStop {
    /// General registers; out of a critical section that the stop has ended.
    pub regs: GeneralRegs,
    /// Blocked signals.
    pub mask: u64,
    /// Where its rseq area is; None where the kernel does not tell.
    pub rseq: Option<RseqConfig>,
    /// Its syscall user dispatch; None where the kernel does not tell.
    pub dispatch: Option<DispatchConfig>,
}

/// A thread's state before it was touched, put back on drop.
#[derive(Debug)]
pub(super) struct Saved {
    pub tid: Pid,
    pub stop: ThreadStop,
    /// Syscall user dispatch was on.
    has_dispatched: bool,
    restored: bool,
}

impl ThreadStop {
    /// Reads how a stopped thread was found; it is not touched.
    ///
    /// # Errors
    /// It has died.
    pub fn read(tid: Pid) -> Result<ThreadStop, InjectError> {
        let mut regs = ptrace::general_regs(tid).map_err(trace(tid, "read the registers"))?;
        let rseq = ptrace::rseq_config(tid).ok();
        // Critical sections make no calls.
        if let Some(rseq) = rseq
            && regs::call_instruction(&regs).is_none()
        {
            leave_critical_section(tid, rseq, &mut regs);
        }
        Ok(ThreadStop {
            regs,
            mask: ptrace::signal_mask(tid).map_err(trace(tid, "read the signal mask"))?,
            rseq,
            dispatch: ptrace::syscall_dispatch(tid).ok(),
        })
    }
}

impl Saved {
    pub fn save(tid: Pid, stop: ThreadStop) -> Result<Saved, InjectError> {
        ptrace::set_signal_mask(tid, ALL_SIGNALS).map_err(trace(tid, "set the signal mask"))?;
        Ok(Saved {
            tid,
            stop,
            has_dispatched: stop
                .dispatch
                .is_some_and(|config| stop_dispatch(tid, config)),
            restored: false,
        })
    }

    pub fn restore(&mut self) -> Result<(), InjectError> {
        self.restored = true;
        if let Some(config) = self.stop.dispatch.filter(|_| self.has_dispatched) {
            ptrace::set_syscall_dispatch(self.tid, config)
                .map_err(trace(self.tid, "put back the syscall user dispatch"))?;
        }
        ptrace::set_general_regs(self.tid, &self.stop.regs)
            .map_err(trace(self.tid, "put back the registers"))?;
        ptrace::set_signal_mask(self.tid, self.stop.mask)
            .map_err(trace(self.tid, "put back the signal mask"))
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        if self.restored {
            return;
        }
        // After an error the thread may still run its program: stop it, then put it back.
        if ptrace::general_regs(self.tid).is_err() {
            let _ = ptrace::interrupt(self.tid);
            let _ = wait::wait(self.tid);
        }
        let _ = self.restore();
    }
}

/// A thread stopped inside an rseq critical section would complete it unprotected once it had run
/// anything else, because the kernel clears the section then: send it to its abort handler instead, as
/// the kernel does at any preemption.
///
/// Source: linux include/uapi/linux/rseq.h, struct rseq and struct rseq_cs.
fn leave_critical_section(tid: Pid, config: RseqConfig, regs: &mut GeneralRegs) {
    if config.address == 0 {
        return;
    }
    let Some(section) = read_u64(tid, config.address + 8).filter(|section| *section != 0) else {
        return;
    };
    let (Some(start), Some(len), Some(abort)) = (
        read_u64(tid, section + 8),
        read_u64(tid, section + 16),
        read_u64(tid, section + 24),
    ) else {
        return;
    };
    if regs.rip.wrapping_sub(start) < len {
        regs.rip = abort;
    }
}

/// Switches syscall user dispatch off, which would hand our calls to the task's SIGSYS handler. Returns whether it was
/// on.
fn stop_dispatch(tid: Pid, config: DispatchConfig) -> bool {
    let off = DispatchConfig::default();
    config.mode != 0 && ptrace::set_syscall_dispatch(tid, off).is_ok()
}

fn read_u64(tid: Pid, address: u64) -> Option<u64> {
    let mut bytes = [0u8; 8];
    let range = process_vm::RemoteRange { address, len: 8 };
    (process_vm::read(tid, &[range], &mut bytes).ok()? == 8).then(|| u64::from_le_bytes(bytes))
}
