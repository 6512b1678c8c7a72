//! What prctl keeps: name, death signal, subreaper, dumpable, transparent huge pages, membarrier; and
//! the few values of a task that are files in /proc: oom score, login uid, personality.
//!
//! Source: man 2 prctl, membarrier; man 5 proc.

use std::fs;

use firn_sys::{Pid, nr, procfs};

use super::modes::{self, ProcessModeQuestions, ProcessModes, ThreadModeQuestions, ThreadModes};
use crate::arch::Abi;
use crate::memory::space_modes::{self, SpaceModeQuestions, SpaceModes};
use crate::program::{Arena, Arg, Data, Program, ProgramId, Rule, Slot};

const PR_SET_PDEATHSIG: u32 = 1;
const PR_GET_PDEATHSIG: u32 = 2;
const PR_GET_DUMPABLE: u32 = 3;
const PR_SET_NAME: u32 = 15;
const PR_GET_SECUREBITS: u32 = 27;
const PR_SET_CHILD_SUBREAPER: u32 = 36;
const PR_GET_CHILD_SUBREAPER: u32 = 37;
const PR_GET_TID_ADDRESS: u32 = 40;
const MEMBARRIER_CMD_GET_REGISTRATIONS: u32 = 1 << 9;
const MCL_FUTURE: u32 = 2;
const MCL_ONFAULT: u32 = 4;
const EBUSY: i32 = 16;
const ENOSYS: i32 = 38;

/// Questions about a process, asked by its leader.
#[derive(Debug)]
pub struct ProcessQuestions {
    brk: Slot,
    dumpable: Slot,
    space: SpaceModeQuestions,
    membarrier: Slot,
    subreaper: Data,
    locked: Slot,
    resident: Data,
    modes: ProcessModeQuestions,
}

/// Answers to [`ProcessQuestions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessAnswers {
    /// End of the heap.
    pub brk: u64,
    /// The dumpable attribute: 0, 1 or 2.
    pub dumpable: i32,
    /// Modes of its address space.
    pub space: SpaceModes,
    /// Registered membarrier commands, or 0.
    pub membarrier: u32,
    /// PR_SET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// Flags of mlockall for memory that is mapped later, or 0.
    pub lock_future: u32,
    /// What else prctl keeps for the process.
    pub modes: ProcessModes,
}

/// Adds the questions about a process.
pub fn ask_process(p: &mut Program, abi: Abi) -> ProcessQuestions {
    let brk = p.call_to_slot(nr::BRK, &[0.into()], Rule::Ok, "reading the heap's end");
    let dumpable = p.call_to_slot(
        nr::PRCTL,
        &[PR_GET_DUMPABLE.into()],
        Rule::Ok,
        "reading dumpable",
    );
    let space = space_modes::ask(p);
    let command = [MEMBARRIER_CMD_GET_REGISTRATIONS.into()];
    // EINVAL before Linux 6.3: the registrations can't be known there.
    let membarrier = p.call_to_slot(
        nr::MEMBARRIER,
        &command,
        Rule::Any,
        "reading membarrier registrations",
    );
    let subreaper = p.space(8);
    let args = [PR_GET_CHILD_SUBREAPER.into(), subreaper.into()];
    p.call(
        nr::PRCTL,
        &args,
        Rule::Ok,
        "reading the subreaper attribute",
    );
    let (locked, resident) = ask_lock_future(p, abi);
    let modes = modes::ask_process(p);
    ProcessQuestions {
        modes,
        locked,
        resident,
        brk,
        dumpable,
        space,
        membarrier,
        subreaper,
    }
}

/// Looks at memory that was just mapped, since nothing else tells whether mlockall(MCL_FUTURE) is in force: a
/// locked page refuses MS_INVALIDATE, and one that was not locked on fault is there at once. The first is
/// seen of the arena, the second of a page that nobody touches; where the task has no room for another page, all
/// is taken for locked at once, as is usual.
///
/// Source: man 2 mlockall, msync (EBUSY), mincore.
fn ask_lock_future(p: &mut Program, abi: Abi) -> (Slot, Data) {
    const READ_WRITE: u32 = 3;
    const PRIVATE_ANONYMOUS: u32 = 0x22;
    const BELOW_2_GIB: u32 = 0x40;
    const MS_INVALIDATE: u32 = 2;
    const PAGE: u32 = 4096;
    let flags = match abi {
        Abi::Native => PRIVATE_ANONYMOUS,
        // A 64-bit call finds places that the address space of a 32-bit program does not have.
        Abi::Ia32 => PRIVATE_ANONYMOUS | BELOW_2_GIB,
    };
    let args = [Arg::Arena, PAGE.into(), MS_INVALIDATE.into()];
    let locked = p.call_to_slot(nr::MSYNC, &args, Rule::Any, "asking whether it is locked");
    let args = [
        0.into(),
        PAGE.into(),
        READ_WRITE.into(),
        flags.into(),
        (-1).into(),
        0.into(),
    ];
    let page = p.call_to_slot(nr::MMAP, &args, Rule::Any, "mapping a page to look at");
    let resident = p.data(&[1; 8]);
    let args = [page.into(), PAGE.into(), resident.into()];
    let why = "asking whether it is there";
    p.call(nr::MINCORE, &args, Rule::Any, why);
    p.call(
        nr::MUNMAP,
        &[page.into(), PAGE.into()],
        Rule::Any,
        "unmapping it again",
    );
    (locked, resident)
}

/// Adds the call that locks memory that is mapped later; the last of all that map.
pub fn plan_lock_future(p: &mut Program, flags: u32) {
    if flags & MCL_FUTURE != 0 {
        let flags = flags & (MCL_FUTURE | MCL_ONFAULT);
        p.call(
            nr::MLOCKALL,
            &[flags.into()],
            Rule::Ok,
            "locking memory to come",
        );
    }
}

impl ProcessQuestions {
    /// Collects the answers from the arena.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> ProcessAnswers {
        ProcessAnswers {
            brk: arena.slot(id, self.brk).cast_unsigned(),
            dumpable: i32::try_from(arena.slot(id, self.dumpable)).unwrap_or(0),
            space: self.space.answers(arena, id),
            membarrier: u32::try_from(arena.slot(id, self.membarrier)).unwrap_or(0),
            subreaper: arena.read(id, self.subreaper)[..4] != [0; 4],
            modes: self.modes.answers(arena, id),
            lock_future: match arena.slot(id, self.locked) {
                locked if locked != -i64::from(EBUSY) => 0,
                _ if arena.read(id, self.resident)[0] & 1 == 1 => MCL_FUTURE,
                _ => MCL_FUTURE | MCL_ONFAULT,
            },
        }
    }
}

/// Questions that each thread answers for itself.
#[derive(Debug)]
pub struct ThreadQuestions {
    tid_address: Data,
    pdeath_signal: Data,
    altstack: Data,
    securebits: Slot,
    robust_list: Option<Data>,
    modes: ThreadModeQuestions,
    segments: Slot,
}

/// Answers to [`ThreadQuestions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadAnswers {
    /// Address that the kernel clears when the thread exits (set_tid_address).
    pub tid_address: u64,
    /// Signal at the parent's death, or 0.
    pub pdeath_signal: u32,
    /// Alternate signal stack: address, flags, size.
    pub altstack: (u64, u32, u64),
    /// The robust futex list of a 32-bit program: address and length of its head.
    pub ia32_robust_list: Option<(u64, u64)>,
    /// Secure bits.
    pub securebits: u32,
    /// What prctl keeps for the thread.
    pub modes: ThreadModes,
    /// It has thread-local segments.
    pub has_segments: bool,
}

/// Adds the questions about a thread.
pub fn ask_thread(p: &mut Program, abi: Abi) -> ThreadQuestions {
    let tid_address = p.space(8);
    let args = [PR_GET_TID_ADDRESS.into(), tid_address.into()];
    p.call(nr::PRCTL, &args, Rule::Ok, "reading the tid address");
    let pdeath_signal = p.space(8);
    let args = [PR_GET_PDEATHSIG.into(), pdeath_signal.into()];
    p.call(
        nr::PRCTL,
        &args,
        Rule::Ok,
        "reading the parent-death signal",
    );
    let altstack = p.space(24);
    p.call(
        nr::SIGALTSTACK,
        &[0.into(), altstack.into()],
        Rule::Ok,
        "reading the alternate stack",
    );
    let bits = [PR_GET_SECUREBITS.into()];
    let securebits = p.call_to_slot(nr::PRCTL, &bits, Rule::Ok, "reading secure bits");
    let robust_list = (abi == Abi::Ia32).then(|| ask_ia32_robust_list(p));
    let modes = modes::ask_thread(p);
    let segments = p.segments("looking for thread-local segments");
    ThreadQuestions {
        segments,
        robust_list,
        tid_address,
        pdeath_signal,
        altstack,
        securebits,
        modes,
    }
}

/// Asks for the list that 32-bit calls have set, which no other call tells.
fn ask_ia32_robust_list(p: &mut Program) -> Data {
    let list = p.space(8);
    p.call_ia32(
        nr::ia32::GET_ROBUST_LIST,
        &[0.into(), list.into(), list.at(4).into()],
        Rule::Ok,
        "reading the robust futex list",
    );
    list
}

impl ThreadQuestions {
    /// Collects the answers from the arena.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> ThreadAnswers {
        let u64_at = |bytes: &[u8], at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
        };
        let u32_at = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
        };
        let stack = arena.read(id, self.altstack);
        ThreadAnswers {
            tid_address: u64_at(&arena.read(id, self.tid_address), 0),
            pdeath_signal: u32_at(&arena.read(id, self.pdeath_signal), 0),
            altstack: (u64_at(&stack, 0), u32_at(&stack, 8), u64_at(&stack, 16)),
            ia32_robust_list: self.robust_list.map(|list| {
                let list = arena.read(id, list);
                (u32_at(&list, 0).into(), u32_at(&list, 4).into())
            }),
            securebits: u32::try_from(arena.slot(id, self.securebits)).unwrap_or(0),
            has_segments: arena.slot(id, self.segments) != 0,
            modes: self.modes.answers(arena, id),
        }
    }
}

/// Adds the call that names the thread.
pub fn plan_name(p: &mut Program, name: &[u8]) {
    let name = p.string(&name[..name.len().min(15)]);
    p.call(
        nr::PRCTL,
        &[PR_SET_NAME.into(), name.into()],
        Rule::Ok,
        "setting the thread's name",
    );
}

/// Adds the call that sets the parent-death signal; changes of ids clear it, so it comes after them.
pub fn plan_pdeath_signal(p: &mut Program, signal: u32) {
    let args = [PR_SET_PDEATHSIG.into(), signal.into()];
    p.call(
        nr::PRCTL,
        &args,
        Rule::Ok,
        "setting the parent-death signal",
    );
}

/// Adds the call that makes the process a subreaper or not.
pub fn plan_subreaper(p: &mut Program, subreaper: bool) {
    let args = [PR_SET_CHILD_SUBREAPER.into(), u32::from(subreaper).into()];
    p.call(
        nr::PRCTL,
        &args,
        Rule::Ok,
        "setting the subreaper attribute",
    );
}

/// Adds the membarrier registrations.
pub fn plan_membarrier(p: &mut Program, registered: u32) {
    for bit in (0..32).filter(|bit| registered & (1 << bit) != 0) {
        let command = 1u32 << bit;
        p.call(
            nr::MEMBARRIER,
            &[command.into()],
            Rule::OkOr(ENOSYS),
            "registering for membarrier",
        );
    }
}

/// Reads /proc/PID/oom_score_adj.
pub fn oom_score_adj(pid: Pid) -> Option<i32> {
    procfs::read_to_string(format!("/proc/{pid}/oom_score_adj"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Writes /proc/PID/oom_score_adj.
///
/// # Errors
/// EACCES: lowering it below its floor needs CAP_SYS_RESOURCE.
pub fn set_oom_score_adj(pid: Pid, value: i32) -> std::io::Result<()> {
    fs::write(format!("/proc/{pid}/oom_score_adj"), value.to_string())
}

/// Reads /proc/PID/loginuid; 0xffffffff when it is not set or not known.
pub fn loginuid(pid: Pid) -> u32 {
    let text = procfs::read_to_string(format!("/proc/{pid}/loginuid"));
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(u32::MAX)
}

/// Reads the personality as images store it: the digits of the hexadecimal file, taken as decimal.
///
/// CRIU reads it so, and both engines must agree.
pub fn personality(pid: Pid) -> Option<u32> {
    let text = procfs::read_to_string(format!("/proc/{pid}/personality")).ok()?;
    text.trim().parse().ok()
}

/// Adds the call that sets the personality of an image, where the restoring process's own, which every
/// task inherits, is another one.
pub fn plan_personality(p: &mut Program, stored: u32, own: u32) {
    if stored != own
        && let Ok(personality) = u32::from_str_radix(&stored.to_string(), 16)
    {
        p.call(
            nr::PERSONALITY,
            &[personality.into()],
            Rule::Ok,
            "setting the personality",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_personality_of_hex_digits_comes_back() {
        let mut p = Program::new("test");
        plan_personality(&mut p, 40000, 0);
        assert_eq!(p.describe(0), "personality(0x40000)");
        plan_personality(&mut p, 0, 0);
        assert_eq!(p.len(), 1);
    }

    #[test]
    fn names_are_cut_to_what_the_kernel_keeps() {
        let mut p = Program::new("test");
        plan_name(&mut p, b"a-name-that-is-too-long");
        assert_eq!(p.len(), 1);
    }
}
