//! What every thread does for itself at the end of its program.

use firn_proto::{CoreEntry, CredsEntry, ThreadCoreEntry};
use firn_sys::nr;

use crate::arch::Abi;
use crate::arch::regs;
use crate::arch::restart::{self, Resumption};
use crate::program::{Program, Rule, Word};
use crate::task::mempolicy::Policy;
use crate::task::modes::{self, ThreadModes};
use crate::task::scheduling::{self, OwnScheduling};
use crate::task::shadow_stack::{self, Features};
use crate::task::{attributes, creds};

const RSEQ_UNREGISTERED: u64 = 0;
/// The thread is on its alternate stack right now: told, never set.
const SS_ONSTACK: u32 = 1;
const SS_DISABLE: u32 = 2;
/// The only lengths of a robust list head that the kernel takes, of 64-bit and of 32-bit code.
const ROBUST_LIST_LEN: u32 = 24;
const IA32_ROBUST_LIST_LEN: u32 = 12;

/// State of the restoring thread that every restored one inherits.
#[derive(Debug, Clone)]
pub(super) struct Inherited {
    pub creds: CredsEntry,
    pub sched: OwnScheduling,
    pub modes: ThreadModes,
    /// Whether seccomp looks at its calls.
    pub is_filtered: bool,
    /// As images store it.
    pub personality: u32,
    /// Bit 0 is signal 1.
    pub ignored_signals: u64,
    pub shadow_stack: Features,
}

/// The thread's part of its core image.
///
/// # Panics
/// Never for a loaded checkpoint, which was checked to have it.
pub(super) fn part(core: &CoreEntry) -> &ThreadCoreEntry {
    core.thread_core.as_ref().expect("checked while loading")
}

/// How the thread gets on with the system call it was stopped in.
pub(super) fn resumption(core: &CoreEntry) -> Resumption {
    restart::resumption(part(core).firn_restart.as_ref(), abi(core))
}

/// The NUMA policy of a thread, where it had one.
pub(super) fn mempolicy(core: &CoreEntry) -> Option<Policy> {
    let extension = part(core).firn.as_ref()?;
    extension.mempolicy.as_ref().map(Policy::from_image)
}

/// Which kind of program the thread belongs to.
pub(super) fn abi(core: &CoreEntry) -> Abi {
    let info = core.thread_info.as_ref();
    info.map_or(Abi::Native, |info| regs::abi_of_image(&info.gpregs))
}

/// Adds what any thread does: robust list, name, rseq, alternate stack, scheduling, modes, shadow stack, what
/// `before_rights_go` adds, and last its credentials.
pub(super) fn plan_tail(
    p: &mut Program,
    core: &CoreEntry,
    own: &Inherited,
    before_rights_go: impl FnOnce(&mut Program),
) {
    let thread = part(core);
    plan_robust_list(p, thread);
    let process_name = core.tc.as_ref().map(|process| process.comm.as_slice());
    if let Some(name) = thread.comm.as_deref().or(process_name) {
        attributes::plan_name(p, name);
    }
    plan_rseq(p, thread);
    plan_altstack(p, thread);
    if let Some(extension) = &thread.firn {
        modes::plan_thread(p, extension, &own.modes);
    }
    scheduling::plan(p, thread, &own.sched);
    shadow_stack::plan(p, core);
    before_rights_go(p);
    if let Some(wanted) = &thread.creds {
        creds::plan(p, wanted, &own.creds);
    }
}

fn plan_robust_list(p: &mut Program, thread: &ThreadCoreEntry) {
    let args = [thread.futex_rla.into(), thread.futex_rla_len.into()];
    let why = "setting the robust futex list";
    match thread.futex_rla_len {
        _ if thread.futex_rla == 0 => {}
        ROBUST_LIST_LEN => {
            p.call(nr::SET_ROBUST_LIST, &args, Rule::Ok, why);
        }
        IA32_ROBUST_LIST_LEN => {
            p.call_ia32(nr::ia32::SET_ROBUST_LIST, &args, Rule::Ok, why);
        }
        _ => {}
    }
}

fn plan_rseq(p: &mut Program, thread: &ThreadCoreEntry) {
    if let Some(rseq) = &thread.rseq_entry
        && rseq.rseq_abi_pointer != RSEQ_UNREGISTERED
    {
        let args = [
            rseq.rseq_abi_pointer.into(),
            rseq.rseq_abi_size.into(),
            0.into(),
            rseq.signature.into(),
        ];
        p.call(nr::RSEQ, &args, Rule::Ok, "registering the rseq area");
    }
}

/// Sets the alternate signal stack, also to none: a forked task comes with that of the thread that forked
/// it, whose memory is gone.
fn plan_altstack(p: &mut Program, thread: &ThreadCoreEntry) {
    let (address, flags, size) = match &thread.sas {
        Some(stack) if stack.ss_flags & SS_DISABLE == 0 => {
            (stack.ss_sp, stack.ss_flags & !SS_ONSTACK, stack.ss_size)
        }
        _ => (0, SS_DISABLE, 0),
    };
    // stack_t: address, flags, padding, size.
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(u64::from(flags).to_le_bytes());
    bytes.extend(size.to_le_bytes());
    let value = p.data(&bytes);
    let args = [value.into(), 0.into()];
    p.call(
        nr::SIGALTSTACK,
        &args,
        Rule::Ok,
        "setting the alternate signal stack",
    );
}

/// Adds the sleep that an interrupted `nanosleep` goes on with: the coordinator stops the thread in the
/// middle of it, so that the kernel's restart block is the real one again. A sleep that is over before
/// goes on to the Park record.
///
/// Not that of 32-bit code, which the kernel would go on with as if it were 64-bit code's: the coordinator
/// brings it about.
pub(super) fn plan_sleep(p: &mut Program, core: &CoreEntry, asleep: Word) {
    let Resumption::Sleep { nr, sec, nsec } = resumption(core) else {
        return;
    };
    if abi(core) == Abi::Ia32 {
        return;
    }
    let Some(info) = &core.thread_info else {
        return;
    };
    let request = p.data(&[sec.to_le_bytes(), nsec.to_le_bytes()].concat());
    let clock = restart::sleep_clock(&info.gpregs, nr);
    let remainder = restart::sleep_remainder_pointer(&info.gpregs, nr);
    p.post(asleep, "about to sleep on");
    let args = [clock.into(), 0.into(), request.into(), remainder.into()];
    p.call(nr::CLOCK_NANOSLEEP, &args, Rule::Any, "sleeping on");
}
