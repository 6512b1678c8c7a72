//! The shadow stack of a thread (CET): which of its features are on, which are locked, and its pointer.
//!
//! ```text
//! dump      features and locks from /proc/PID/status, the pointer by ptrace; a program in the task makes
//!           neither calls nor returns, so it goes by the CPU unseen
//! restore   memory is mapped with the rest, empty
//!           each thread switches the features on and locks them, when all threads and children are made,
//!           which would come with a shadow stack of their own otherwise
//!           the coordinator, which traces the threads by then, writes contents and pointers
//! ```
//!
//! No signal frame is made, so none of the restore's tokens is left on a shadow stack, and those of handlers
//! that were running are contents like any other.
//!
//! Switched on, the kernel makes a shadow stack, as large as RLIMIT_STACK allows, which it unmaps when the
//! thread ends, whatever stands there by then: it has to stay, and is never used. The limit is a page for that
//! time, so that it is one page. The one that the thread goes on with stays mapped when the thread ends.
//!
//! Source: linux arch/x86/kernel/shstk.c, arch/x86/kernel/cpu/proc.c; facts of CRIU's format:
//! user_x86_cet_entry holds features and pointer, of all threads on a CPU that has them. CRIU keeps no locks,
//! and locks the shadow stack.

use firn_proto::{CoreEntry, FirnThreadEntry, UserX86CetEntry, UserX86FpregsEntry};
use firn_sys::shadow_stack::{self, DISABLE, ENABLE, LOCK, SHADOW_STACK, WRITES};
use firn_sys::{Errno, Pid, Result, nr};

use crate::program::{Program, Rule};

const ALL_FEATURES: [u64; 2] = [SHADOW_STACK, WRITES];
const RLIMIT_STACK: u32 = 3;
const PAGE: u64 = 4096;
/// End of what the kernel takes as a pointer.
const TASK_SIZE: u64 = 1 << 47;

/// Features of a thread as /proc shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// Those that are on: [`SHADOW_STACK`] and [`WRITES`].
    pub on: u64,
    /// Those that the thread may not switch any more.
    pub locked: u64,
}

impl Features {
    /// Understands the values of the lines `x86_Thread_features` and `x86_Thread_features_locked`, as far as
    /// the kernel writes them.
    pub fn parse(on: Option<&str>, locked: Option<&str>) -> Features {
        Features {
            on: bits(on),
            locked: bits(locked),
        }
    }

    /// Whether calls and returns of the thread use a shadow stack.
    pub fn uses_shadow_stack(self) -> bool {
        self.on & SHADOW_STACK != 0
    }

    /// Whether the thread uses one and may not leave it.
    pub fn is_locked_on(self) -> bool {
        self.uses_shadow_stack() && self.locked & SHADOW_STACK != 0
    }
}

fn bits(names: Option<&str>) -> u64 {
    let bit = |name| match name {
        "shstk" => SHADOW_STACK,
        "wrss" => WRITES,
        _ => 0,
    };
    let names = names.unwrap_or("").split_whitespace();
    names.fold(0, |bits, name| bits | bit(name))
}

/// The shadow stack of a stopped thread. Once one thread of a task has one, CRIU wants to read of all that they have
/// none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowStack {
    features: Features,
    pointer: u64,
}

impl ShadowStack {
    /// Reads where it is, of a thread with these features.
    ///
    /// # Errors
    /// The pointer can't be read.
    pub fn read(tid: Pid, features: Features) -> Result<ShadowStack> {
        let pointer = match features.uses_shadow_stack() {
            true => shadow_stack::pointer(tid)?,
            false => 0,
        };
        Ok(ShadowStack { features, pointer })
    }

    /// Notes it in the image of the thread.
    ///
    /// # Errors
    /// EOPNOTSUPP: the CPU has shadow stacks and no XSAVE, which is impossible.
    pub fn describe(
        self,
        fpregs: &mut UserX86FpregsEntry,
        extension: &mut FirnThreadEntry,
    ) -> Result<()> {
        let xsave = fpregs.xsave.as_mut().ok_or(Errno::EOPNOTSUPP)?;
        xsave.cet = Some(UserX86CetEntry {
            cet: self.features.on,
            ssp: self.pointer,
        });
        extension.shadow_stack_locks = Some(self.features.locked);
        Ok(())
    }
}

/// The shadow stack that the image of a thread has, if it used one.
pub fn of_image(core: &CoreEntry) -> Option<UserX86CetEntry> {
    let info = core.thread_info.as_ref()?;
    let cet = info.fpregs.xsave.as_ref()?.cet?;
    (cet.cet & SHADOW_STACK != 0).then_some(cet)
}

/// What is wrong with the shadow stack of an image, if anything is.
pub fn problem(core: &CoreEntry) -> Option<&'static str> {
    let cet = of_image(core)?;
    if cet.cet & !(SHADOW_STACK | WRITES) != 0 {
        Some("unknown features of a shadow stack")
    } else if !cet.ssp.is_multiple_of(8) || cet.ssp >= TASK_SIZE {
        Some("a shadow stack pointer that no thread can have")
    } else {
        None
    }
}

/// Adds what gives up the shadow stack of the process that was forked; its locks are off.
pub fn plan_leaving(p: &mut Program) {
    let args = [DISABLE.into(), SHADOW_STACK.into()];
    let why = "leaving the inherited shadow stack";
    p.call(nr::ARCH_PRCTL, &args, Rule::Exact(0), why);
}

/// Adds the calls by which a thread switches its shadow stack on, before filters that may forbid them.
pub fn plan(p: &mut Program, core: &CoreEntry) {
    let Some(wanted) = of_image(core) else {
        return;
    };
    for feature in ALL_FEATURES {
        if wanted.cet & feature != 0 {
            let args = [ENABLE.into(), feature.into()];
            let why = "switching the shadow stack on";
            p.call(nr::ARCH_PRCTL, &args, Rule::Exact(0), why);
        }
    }
    let thread = core.thread_core.as_ref();
    let extension = thread.and_then(|thread| thread.firn.as_ref());
    let locked = extension.and_then(|extension| extension.shadow_stack_locks);
    let locked = locked.unwrap_or(SHADOW_STACK);
    if locked != 0 {
        let args = [LOCK.into(), locked.into()];
        let why = "locking the shadow stack";
        p.call(nr::ARCH_PRCTL, &args, Rule::Exact(0), why);
    }
}

/// Adds what makes the kernel's own shadow stacks small: `limit` are soft and hard RLIMIT_STACK of the process.
pub fn plan_small(p: &mut Program, limit: (u64, u64)) {
    let (_, hard) = limit;
    plan_limit(p, (PAGE.min(hard), hard), "for small shadow stacks");
}

/// Adds what gives the process its RLIMIT_STACK back, when all its threads have their shadow stacks.
pub fn plan_limit_again(p: &mut Program, limit: (u64, u64)) {
    plan_limit(p, limit, "again");
}

fn plan_limit(p: &mut Program, (soft, hard): (u64, u64), what: &str) {
    let limit = p.data(&[soft.to_le_bytes(), hard.to_le_bytes()].concat());
    let args = [0.into(), RLIMIT_STACK.into(), limit.into(), 0.into()];
    let why = format!("setting RLIMIT_STACK {what}");
    p.call(nr::PRLIMIT64, &args, Rule::Ok, why);
}

/// Sets the pointer of a stopped thread that has switched its shadow stack on.
///
/// # Errors
/// ESRCH; EINVAL for a pointer that the kernel does not take.
pub fn set_pointer(tid: Pid, core: &CoreEntry) -> Result<()> {
    match of_image(core) {
        Some(wanted) => shadow_stack::set_pointer(tid, wanted.ssp),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use firn_proto::{ThreadCoreEntry, ThreadInfoX86, UserX86XsaveEntry};

    use super::*;

    const POINTER: u64 = 0x7f00_0000_0ff8;

    fn core(features: u64, ssp: u64, locked: Option<u64>) -> CoreEntry {
        let mut info = ThreadInfoX86::default();
        info.fpregs.xsave = Some(UserX86XsaveEntry {
            cet: Some(UserX86CetEntry { cet: features, ssp }),
            ..UserX86XsaveEntry::default()
        });
        CoreEntry {
            thread_info: Some(info),
            thread_core: Some(ThreadCoreEntry {
                firn: Some(FirnThreadEntry {
                    shadow_stack_locks: locked,
                    ..FirnThreadEntry::default()
                }),
                ..ThreadCoreEntry::default()
            }),
            ..CoreEntry::default()
        }
    }

    fn calls(core: &CoreEntry) -> Vec<String> {
        let mut p = Program::new("test");
        plan(&mut p, core);
        (0..p.len()).map(|nth| p.describe(nth)).collect()
    }

    #[test]
    fn reads_the_lines_of_proc() {
        let both = Features::parse(Some("shstk wrss "), Some("shstk "));
        assert_eq!(
            (both.on, both.locked),
            (SHADOW_STACK | WRITES, SHADOW_STACK)
        );
        assert!(both.uses_shadow_stack());
        assert_eq!(Features::parse(Some(""), None), Features::default());
        // What a later kernel may add is not ours.
        assert_eq!(
            Features::parse(Some("ibt"), Some("ibt wrss")).locked,
            WRITES
        );
    }

    #[test]
    fn only_a_thread_that_uses_one_has_one() {
        assert!(of_image(&core(1, POINTER, None)).is_some());
        // CRIU writes zeros for the others.
        assert_eq!(of_image(&core(0, 0, None)), None);
        assert_eq!(of_image(&CoreEntry::default()), None);
    }

    #[test]
    fn what_the_kernel_would_not_take_is_a_problem() {
        assert_eq!(problem(&core(3, POINTER, None)), None);
        assert_eq!(problem(&core(0, 3, None)), None);
        assert!(problem(&core(1, POINTER + 4, None)).is_some());
        assert!(problem(&core(1, TASK_SIZE, None)).is_some());
        assert!(problem(&core(5, POINTER, None)).is_some());
    }

    #[test]
    fn switches_come_before_locks() {
        assert_eq!(
            calls(&core(3, POINTER, Some(2))),
            [
                "arch_prctl(20481, 1) == 0",
                "arch_prctl(20481, 2) == 0",
                "arch_prctl(20483, 2) == 0"
            ]
        );
        assert_eq!(
            calls(&core(1, POINTER, Some(0))),
            ["arch_prctl(20481, 1) == 0"]
        );
        assert!(calls(&core(0, 0, Some(3))).is_empty());
    }

    #[test]
    fn an_image_without_locks_has_that_of_the_shadow_stack() {
        let last = calls(&core(1, POINTER, None)).pop();
        assert_eq!(last.as_deref(), Some("arch_prctl(20483, 1) == 0"));
    }

    #[test]
    fn the_hard_limit_stays_and_bounds_the_soft_one() {
        let mut p = Program::new("test");
        plan_small(&mut p, (8 << 20, u64::MAX));
        plan_limit_again(&mut p, (8 << 20, u64::MAX));
        assert_eq!(p.len(), 2);
    }
}
