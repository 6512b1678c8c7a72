//! How stopped threads were found, and that they are left so.

use firn_sys::ptrace::{self, DispatchConfig, GeneralRegs, RseqConfig};
use firn_sys::{Pid, process_vm, wait};

use super::journal::{Journal, Note, Noted};
use super::{InjectError, Job, trace};
use crate::arch::regs;

pub(super) const ALL_SIGNALS: u64 = u64::MAX;

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
    note: Option<Note>,
    /// Syscall user dispatch was on, and is off.
    has_dispatched: bool,
    is_held: bool,
}

impl ThreadStop {
    /// Reads how a stopped thread was found; it is not touched.
    ///
    /// # Errors
    /// It has died.
    pub fn read(tid: Pid) -> Result<ThreadStop, InjectError> {
        let regs = ptrace::general_regs(tid).map_err(trace(tid, "read the registers"))?;
        ThreadStop::with_regs(tid, regs)
    }

    /// Reads the rest about a stopped thread whose registers are known.
    ///
    /// # Errors
    /// It has died.
    pub fn with_regs(tid: Pid, mut regs: GeneralRegs) -> Result<ThreadStop, InjectError> {
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
    /// Notes how a thread was found, and where an arena of this many bytes will be needed; the thread is not touched.
    pub fn new(
        tid: Pid,
        stop: ThreadStop,
        job: &Job,
        arena_len: usize,
        journal: Option<&Journal>,
    ) -> Saved {
        let noted = Noted {
            tid,
            pid: job.pid,
            abi: job.abi,
            regs: stop.regs,
            mask: stop.mask,
            dispatch: stop.dispatch.filter(|config| config.mode != 0),
            instruction: None,
            landing: None,
            arena: None,
            arena_len: u64::try_from(arena_len).expect("lengths fit 64 bits"),
            limit: None,
        };
        Saved {
            tid,
            stop,
            note: journal.and_then(|journal| journal.note(noted)),
            has_dispatched: false,
            is_held: false,
        }
    }

    /// Whether what becomes of it is noted.
    pub fn is_noted(&self) -> bool {
        self.note.is_some()
    }

    /// Adds to its note.
    pub fn note(&mut self, what: impl FnOnce(&mut Noted)) {
        if let Some(note) = &mut self.note {
            note.add(what);
        }
    }

    /// Holds signals back, and what would hand our calls to the task: right before the thread is led somewhere, since
    /// it would go on like this if its tracer died.
    pub fn hold(&mut self) -> Result<(), InjectError> {
        self.is_held = true;
        ptrace::set_signal_mask(self.tid, ALL_SIGNALS)
            .map_err(trace(self.tid, "set the signal mask"))?;
        let config = self.stop.dispatch;
        self.has_dispatched = config.is_some_and(|config| stop_dispatch(self.tid, config));
        Ok(())
    }

    pub fn restore(&mut self) -> Result<(), InjectError> {
        self.is_held = false;
        if let Some(config) = self.stop.dispatch.filter(|_| self.has_dispatched) {
            ptrace::set_syscall_dispatch(self.tid, config)
                .map_err(trace(self.tid, "put back the syscall user dispatch"))?;
        }
        ptrace::set_general_regs(self.tid, &self.stop.regs)
            .map_err(trace(self.tid, "put back the registers"))?;
        ptrace::set_signal_mask(self.tid, self.stop.mask)
            .map_err(trace(self.tid, "put back the signal mask"))?;
        self.cross_out();
        Ok(())
    }

    fn cross_out(&self) {
        if let Some(note) = &self.note {
            note.cross_out();
        }
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        if !self.is_held {
            return self.cross_out();
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
