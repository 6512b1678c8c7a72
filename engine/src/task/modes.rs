//! Modes of threads and processes that prctl and arch_prctl keep: timer slack, TSC and CPUID faulting,
//! memory error policy, speculation controls, memory that is never writable and executable, tagged
//! addresses, states of registers that had to be asked for.
//!
//! A thread is asked, and the restoring thread too: what it has in common with a restored one has been
//! inherited and needs no record. What a CPU does not have is told as an error and means the same.
//!
//! Source: man 2 prctl, arch_prctl; linux Documentation/arch/x86/xstate.rst; arch/x86/kernel/process_64.c.

use firn_proto::{FirnTaskEntry, FirnThreadEntry};
use firn_sys::{nr, task as sys_task};

use crate::program::{Arena, Data, Program, ProgramId, Rule, Slot};

const PR_GET_TSC: u32 = 25;
const PR_SET_TSC: u32 = 26;
const PR_SET_TIMERSLACK: u32 = 29;
const PR_GET_TIMERSLACK: u32 = 30;
const PR_MCE_KILL: u32 = 33;
const PR_MCE_KILL_SET: u32 = 1;
const PR_MCE_KILL_GET: u32 = 34;
const PR_GET_SPECULATION_CTRL: u32 = 52;
const PR_SET_SPECULATION_CTRL: u32 = 53;
const PR_SET_MDWE: u32 = 65;
const PR_GET_MDWE: u32 = 66;
/// The thread itself decides.
const PR_SPEC_PRCTL: u32 = 1;
const PR_SPEC_ENABLE: u32 = 2;
const PR_SPEC_DISABLE: u32 = 4;
/// Off for good.
const PR_SPEC_FORCE_DISABLE: u32 = 8;
/// Store bypass, indirect branches, L1D flush.
const SPECULATION_KINDS: [u32; 3] = [0, 1, 2];
const ARCH_GET_CPUID: u32 = 0x1011;
const ARCH_SET_CPUID: u32 = 0x1012;
const ARCH_GET_XCOMP_PERM: u32 = 0x1022;
const ARCH_REQ_XCOMP_PERM: u32 = 0x1023;
const ARCH_GET_UNTAG_MASK: u32 = 0x4001;
const ARCH_ENABLE_TAGGED_ADDR: u32 = 0x4002;
/// The only state that has to be asked for so far: AMX tile data.
const ASKED_STATES: [u32; 1] = [18];

/// Questions that each thread answers for itself.
#[derive(Debug)]
pub struct ThreadModeQuestions {
    slack: Slot,
    tsc: Data,
    cpuid: Slot,
    mce_kill: Slot,
    speculation: [Slot; 3],
}

/// Adds the questions about a thread's modes.
pub fn ask_thread(p: &mut Program) -> ThreadModeQuestions {
    let get = |p: &mut Program, option: u32, which: u32| {
        let why = "reading a mode of the thread";
        p.call_to_slot(nr::PRCTL, &[option.into(), which.into()], Rule::Any, why)
    };
    let slack = get(p, PR_GET_TIMERSLACK, 0);
    let mce_kill = get(p, PR_MCE_KILL_GET, 0);
    let speculation = SPECULATION_KINDS.map(|kind| get(p, PR_GET_SPECULATION_CTRL, kind));
    let tsc = p.space(8);
    let args = [PR_GET_TSC.into(), tsc.into()];
    p.call(
        nr::PRCTL,
        &args,
        Rule::Any,
        "asking whether the TSC is allowed",
    );
    let args = [ARCH_GET_CPUID.into()];
    let why = "asking whether CPUID is allowed";
    let cpuid = p.call_to_slot(nr::ARCH_PRCTL, &args, Rule::Any, why);
    ThreadModeQuestions {
        slack,
        tsc,
        cpuid,
        mce_kill,
        speculation,
    }
}

impl ThreadModeQuestions {
    /// Collects the answers from the arena.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> ThreadModes {
        let slot = |slot| u32::try_from(arena.slot(id, slot)).ok();
        let tsc = arena.read(id, self.tsc);
        ThreadModes {
            slack: u64::try_from(arena.slot(id, self.slack)).unwrap_or(0),
            tsc: u32::from_le_bytes(tsc[..4].try_into().expect("four bytes")),
            cpuid_faults: arena.slot(id, self.cpuid) == 0,
            mce_kill: slot(self.mce_kill),
            speculation: self.speculation.map(|kind| slot(kind).unwrap_or(0)),
        }
    }
}

/// Modes of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadModes {
    /// Timer slack in ns; 0 for real-time policies.
    slack: u64,
    /// PR_GET_TSC; 0 where there is none.
    tsc: u32,
    cpuid_faults: bool,
    mce_kill: Option<u32>,
    speculation: [u32; 3],
}

impl ThreadModes {
    /// Reads those of the calling thread.
    pub fn own() -> ThreadModes {
        let get = |option: u32, which: u32| sys_task::prctl_get(option, which).ok();
        ThreadModes {
            slack: get(PR_GET_TIMERSLACK, 0).unwrap_or(0),
            tsc: sys_task::tsc_mode().unwrap_or(0),
            cpuid_faults: sys_task::arch_prctl_get(ARCH_GET_CPUID) == Ok(0),
            mce_kill: get(PR_MCE_KILL_GET, 0).and_then(|value| u32::try_from(value).ok()),
            speculation: SPECULATION_KINDS.map(|kind| {
                let value = get(PR_GET_SPECULATION_CTRL, kind);
                value
                    .and_then(|value| u32::try_from(value).ok())
                    .unwrap_or(0)
            }),
        }
    }

    /// Enters them into the thread's image.
    pub fn describe(&self, image: &mut FirnThreadEntry) {
        image.timer_slack = Some(self.slack);
        image.tsc = Some(self.tsc).filter(|mode| *mode != 0);
        image.cpuid_faults = Some(self.cpuid_faults).filter(|faults| *faults);
        image.mce_kill = self.mce_kill;
        image.speculation = self.speculation.to_vec();
    }
}

/// Adds the calls that set a thread's modes, where they differ from the restoring thread's own.
pub fn plan_thread(p: &mut Program, wanted: &FirnThreadEntry, own: &ThreadModes) {
    // 0 stands for the default there, and no policy but the real-time ones has no slack.
    if let Some(slack) = wanted
        .timer_slack
        .filter(|slack| ![0, own.slack].contains(slack))
    {
        let args = [PR_SET_TIMERSLACK.into(), slack.into()];
        p.call(nr::PRCTL, &args, Rule::Ok, "setting the timer slack");
    }
    if let Some(mode) = wanted.tsc.filter(|mode| ![0, own.tsc].contains(mode)) {
        let args = [PR_SET_TSC.into(), mode.into()];
        p.call(
            nr::PRCTL,
            &args,
            Rule::Ok,
            "setting whether the TSC is allowed",
        );
    }
    let faults = wanted.cpuid_faults == Some(true);
    if faults != own.cpuid_faults {
        let args = [ARCH_SET_CPUID.into(), u32::from(!faults).into()];
        p.call(
            nr::ARCH_PRCTL,
            &args,
            Rule::Ok,
            "setting whether CPUID is allowed",
        );
    }
    if let Some(policy) = wanted
        .mce_kill
        .filter(|policy| Some(*policy) != own.mce_kill)
    {
        let args = [PR_MCE_KILL.into(), PR_MCE_KILL_SET.into(), policy.into()];
        p.call(
            nr::PRCTL,
            &args,
            Rule::Ok,
            "setting the memory error policy",
        );
    }
    let kinds = SPECULATION_KINDS.iter().zip(&wanted.speculation);
    for ((kind, wanted), own) in kinds.zip(&own.speculation) {
        if let Speculation::Set(value) = speculation(*wanted, *own) {
            let args = [PR_SET_SPECULATION_CTRL.into(), (*kind).into(), value.into()];
            let why = "setting a speculation control";
            p.call(nr::PRCTL, &args, Rule::Ok, why);
        }
    }
}

/// What a thread loses of its modes here, in words.
pub fn loss(wanted: &FirnThreadEntry, own: &ThreadModes) -> Option<&'static str> {
    let mut kinds = wanted.speculation.iter().zip(&own.speculation);
    let is_lost = |(wanted, own): (&u32, &u32)| match speculation(*wanted, *own) {
        Speculation::Set(_) | Speculation::Same => false,
        Speculation::StaysOn | Speculation::StaysOff => true,
    };
    kinds.any(is_lost).then_some(
        "whether the CPU speculates in it stays as it is here: a speculation control can't be set",
    )
}

/// What becomes of a speculation control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speculation {
    /// It is as it was, or as strict without a control.
    Same,
    /// The thread sets this value.
    Set(u32),
    /// It was switched off, and can't be here.
    StaysOn,
    /// It was on, and is off here for good.
    StaysOff,
}

fn speculation(wanted: u32, own: u32) -> Speculation {
    let value = wanted & !PR_SPEC_PRCTL;
    let is_off = |state: u32| state & (PR_SPEC_DISABLE | PR_SPEC_FORCE_DISABLE) != 0;
    if wanted == own || wanted & PR_SPEC_PRCTL == 0 {
        return Speculation::Same;
    }
    match own {
        _ if own & PR_SPEC_FORCE_DISABLE != 0 => match is_off(wanted) {
            true => Speculation::Same,
            false => Speculation::StaysOff,
        },
        _ if own & PR_SPEC_PRCTL != 0 => Speculation::Set(value),
        // Not affected, or off for everybody.
        0 | PR_SPEC_DISABLE => Speculation::Same,
        _ if value == PR_SPEC_ENABLE => Speculation::Same,
        _ => Speculation::StaysOn,
    }
}

/// Questions about a process, asked by its leader.
#[derive(Debug)]
pub struct ProcessModeQuestions {
    mdwe: Slot,
    permissions: (Slot, Data),
    untag: (Slot, Data),
}

/// Adds the questions about a process's modes.
pub fn ask_process(p: &mut Program) -> ProcessModeQuestions {
    let args = [PR_GET_MDWE.into()];
    let why = "asking whether memory may be writable and executable";
    let mdwe = p.call_to_slot(nr::PRCTL, &args, Rule::Any, why);
    let ask = |p: &mut Program, what: u32, why: &'static str| {
        let value = p.space(8);
        let args = [what.into(), value.into()];
        (p.call_to_slot(nr::ARCH_PRCTL, &args, Rule::Any, why), value)
    };
    ProcessModeQuestions {
        mdwe,
        permissions: ask(
            p,
            ARCH_GET_XCOMP_PERM,
            "asking which register states are permitted",
        ),
        untag: ask(p, ARCH_GET_UNTAG_MASK, "asking which address bits count"),
    }
}

impl ProcessModeQuestions {
    /// Collects the answers from the arena.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> ProcessModes {
        let value = |(result, value): (Slot, Data)| {
            let bytes = arena.read(id, value);
            let value = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            (arena.slot(id, result) == 0).then_some(value)
        };
        ProcessModes {
            mdwe: u32::try_from(arena.slot(id, self.mdwe)).unwrap_or(0),
            permissions: value(self.permissions).unwrap_or(0),
            untag_mask: value(self.untag).unwrap_or(u64::MAX),
        }
    }
}

/// Modes of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessModes {
    mdwe: u32,
    permissions: u64,
    /// All ones where no address has a tag.
    untag_mask: u64,
}

impl ProcessModes {
    /// Enters them into the process's image.
    pub fn describe(&self, image: &mut FirnTaskEntry) {
        let asked = ASKED_STATES
            .iter()
            .fold(0, |mask, state| mask | 1u64 << state);
        image.mdwe = Some(self.mdwe).filter(|flags| *flags != 0);
        image.xstate_permissions = Some(self.permissions & asked).filter(|states| *states != 0);
        image.untag_mask = Some(self.untag_mask).filter(|mask| *mask != u64::MAX);
    }
}

/// Adds the calls that set a process's modes; its memory must be complete, and no thread made yet.
pub fn plan_process(p: &mut Program, image: &FirnTaskEntry) {
    let permissions = image.xstate_permissions.unwrap_or(0);
    for state in ASKED_STATES {
        if permissions & 1 << state != 0 {
            let args = [ARCH_REQ_XCOMP_PERM.into(), state.into()];
            let why = "asking for large register states";
            p.call(nr::ARCH_PRCTL, &args, Rule::Ok, why);
        }
    }
    if let Some(mask) = image.untag_mask {
        let nr_bits = mask.count_zeros();
        let args = [ARCH_ENABLE_TAGGED_ADDR.into(), nr_bits.into()];
        let why = "letting addresses have tags";
        p.call(nr::ARCH_PRCTL, &args, Rule::Ok, why);
    }
    if let Some(flags) = image.mdwe {
        let why = "forbidding memory that is writable and executable";
        p.call(
            nr::PRCTL,
            &[PR_SET_MDWE.into(), flags.into()],
            Rule::Ok,
            why,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_restorers_own_modes_need_no_record() {
        let own = ThreadModes::own();
        let mut image = FirnThreadEntry::default();
        own.describe(&mut image);
        let mut program = Program::new("test");
        plan_thread(&mut program, &image, &own);
        assert!(program.is_empty(), "{}", program.describe(0));
        assert!(own.slack > 0 && own.tsc == 1, "{own:?}");
    }

    #[test]
    fn speculation_that_cannot_be_set_is_a_loss() {
        use Speculation::*;
        let cases = [
            (3, 3, Same),
            (5, 3, Set(4)),
            (17, 3, Set(16)),
            (5, 2, StaysOn),
            (5, 4, Same),
            (5, 0, Same),
            (3, 9, StaysOff),
            (5, 9, Same),
            (2, 3, Same),
        ];
        for (wanted, own, becomes) in cases {
            assert_eq!(speculation(wanted, own), becomes, "{wanted} where {own} is");
        }
    }

    #[test]
    fn what_differs_is_set() {
        let own = ThreadModes {
            slack: 50_000,
            tsc: 1,
            cpuid_faults: false,
            mce_kill: Some(2),
            speculation: [3, 3, 0],
        };
        let wanted = ThreadModes {
            slack: 7,
            tsc: 2,
            speculation: [5, 3, 0],
            ..own
        };
        let mut image = FirnThreadEntry::default();
        wanted.describe(&mut image);
        let mut program = Program::new("test");
        plan_thread(&mut program, &image, &own);
        assert_eq!(program.len(), 3);
        assert!(
            program.describe(0).starts_with("prctl(29, 7"),
            "{}",
            program.describe(0)
        );
    }
}
