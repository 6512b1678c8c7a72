//! Core images: which parts there are, and the lengths of their lists.

use std::collections::BTreeSet;

use firn_proto::core_entry::March;
use firn_proto::{
    CoreEntry, SignalQueueEntry, TaskCoreEntry, ThreadCoreEntry, ThreadInfoX86, UserX86XsaveEntry,
};

use super::tree::is_zombie;
use super::{Fault, Findings};
use crate::ImageKind;
use crate::tools::set::SetImages;

/// Signals 1 to 64 without SIGKILL and SIGSTOP.
const SIGACTIONS: usize = 62;
const RLIMITS: usize = 16;
/// The kernel's siginfo_t.
const SIGINFO_BYTES: usize = 128;
const COMM_BYTES: usize = 15;
/// The task state of a process whose main thread has exited while others live, which is Firn's own.
pub(crate) const LEADER_EXITED: u32 = 20_000;

pub(super) fn check_cores(set: &SetImages, found: &mut Findings) {
    let mut tasks = BTreeSet::new();
    for task in set.pstree.iter().map(|placed| &placed.message) {
        let pid = u64::from(task.pid);
        tasks.insert(pid);
        let Some(core) = set.cores.get(&pid) else {
            continue;
        };
        if is_zombie(set, task.pid) {
            continue;
        }
        let mut bad = |fault| found.file(ImageKind::Core, pid, fault);
        match has_leader(core) {
            true => check_thread(set, core, "process", &mut bad),
            false => check_dead_leader(set, core, &mut bad),
        }
        match &core.tc {
            Some(task) => check_task(set, pid, task, &mut bad),
            None => bad(part("process", "tc")),
        }
        for tid in task.threads.iter().skip(1).map(|tid| u64::from(*tid)) {
            tasks.insert(tid);
            if let Some(core) = set.cores.get(&tid) {
                let mut bad = |fault| found.file(ImageKind::Core, tid, fault);
                check_thread(set, core, "thread", &mut bad);
            }
        }
    }
    let strays = set.cores.keys().filter(|tid| !tasks.contains(tid));
    for tid in strays {
        found.file(ImageKind::Core, *tid, Fault::Orphan);
        found.last_is_remark();
    }
    check_filters(set, found);
}

fn part(role: &'static str, part: &'static str) -> Fault {
    Fault::Part { role, part }
}

fn count(field: &'static str, found: usize, expected: usize) -> Option<Fault> {
    (found != expected).then_some(Fault::Count {
        field,
        found,
        expected,
    })
}

/// Counts a list that may be absent.
fn count_if_any(field: &'static str, found: usize, expected: usize) -> Option<Fault> {
    count(field, found, expected).filter(|_| found != 0)
}

fn check_task(set: &SetImages, pid: u64, task: &TaskCoreEntry, bad: &mut impl FnMut(Fault)) {
    if !(task.sigactions.is_empty() && set.has(ImageKind::Sigact, pid)) {
        count("tc.sigactions", task.sigactions.len(), SIGACTIONS).map(&mut *bad);
    }
    if let Some(limits) = &task.rlimits {
        count("tc.rlimits", limits.rlimits.len(), RLIMITS).map(&mut *bad);
    }
    check_signals("tc.signals_s", task.signals_s.as_ref(), bad);
    if task.comm.len() > COMM_BYTES {
        count("tc.comm", task.comm.len(), COMM_BYTES).map(&mut *bad);
    }
    if !matches!(task.task_state, 1 | 3 | LEADER_EXITED) {
        let (field, value) = ("tc.task_state", task.task_state.into());
        bad(Fault::Value { field, value });
    }
}

/// False for a process whose main thread has exited while others live.
fn has_leader(core: &CoreEntry) -> bool {
    let task = core.tc.as_ref();
    task.is_none_or(|task| task.task_state != LEADER_EXITED)
}

/// A dead leader has an identity, but no registers.
fn check_dead_leader(set: &SetImages, core: &CoreEntry, bad: &mut impl FnMut(Fault)) {
    match &core.thread_core {
        Some(thread) => check_thread_core(set, thread, bad),
        None => bad(part("process", "thread_core")),
    }
}

fn check_thread(
    set: &SetImages,
    core: &CoreEntry,
    role: &'static str,
    bad: &mut impl FnMut(Fault),
) {
    match &core.thread_core {
        Some(thread) => check_thread_core(set, thread, bad),
        None => bad(part(role, "thread_core")),
    }
    let (there, name) = match core.mtype() {
        March::X8664 => (core.thread_info.is_some(), "thread_info"),
        March::Arm => (core.ti_arm.is_some(), "ti_arm"),
        March::Aarch64 => (core.ti_aarch64.is_some(), "ti_aarch64"),
        March::Ppc64 => (core.ti_ppc64.is_some(), "ti_ppc64"),
        March::S390 => (core.ti_s390.is_some(), "ti_s390"),
        March::Mips => (core.ti_mips.is_some(), "ti_mips"),
        March::Loongarch64 => (core.ti_loongarch64.is_some(), "ti_loongarch64"),
        March::Riscv64 => (core.ti_riscv64.is_some(), "ti_riscv64"),
        March::Unknown => (false, "a known mtype"),
    };
    if !there {
        bad(part(role, name));
    }
    if let Some(info) = &core.thread_info {
        check_x86(info, bad);
    }
}

fn check_thread_core(set: &SetImages, thread: &ThreadCoreEntry, bad: &mut impl FnMut(Fault)) {
    check_signals("thread_core.signals_p", thread.signals_p.as_ref(), bad);
    if let Some(creds) = &thread.creds {
        for (field, words) in [
            ("creds.cap_inh", &creds.cap_inh),
            ("creds.cap_prm", &creds.cap_prm),
            ("creds.cap_eff", &creds.cap_eff),
            ("creds.cap_bnd", &creds.cap_bnd),
        ] {
            count(field, words.len(), 2).map(&mut *bad);
        }
        count_if_any("creds.cap_amb", creds.cap_amb.len(), 2).map(&mut *bad);
    }
    if let Some(comm) = thread.comm.as_ref().filter(|comm| comm.len() > COMM_BYTES) {
        count("thread_core.comm", comm.len(), COMM_BYTES).map(&mut *bad);
    }
    let filters = set.seccomp.as_ref().map_or(0, |s| s.seccomp_filters.len());
    // Without a filter the mode is another; the index then means nothing.
    let filter = thread
        .seccomp_filter
        .filter(|_| thread.seccomp_mode == Some(2));
    if let Some(index) = filter.filter(|index| usize::try_from(*index).is_ok_and(|i| i >= filters))
    {
        bad(dangling(
            "thread_core.seccomp_filter",
            "seccomp filter",
            index,
        ));
    }
    let sets = set.cgroup.iter().flat_map(|cgroup| &cgroup.sets);
    let known: BTreeSet<u32> = sets.map(|set| set.id).collect();
    let Some(inventory) = &set.inventory else {
        return;
    };
    let dumpers = inventory.root_cg_set;
    let unknown = |id: &u32| *id != 0 && !known.contains(id) && Some(*id) != dumpers;
    if let Some(id) = thread.cg_set.filter(unknown) {
        bad(dangling("thread_core.cg_set", "cgroup set", id));
    }
}

fn dangling(from: &str, what: &'static str, id: u32) -> Fault {
    Fault::Dangling {
        from: from.to_owned(),
        what,
        id: id.into(),
    }
}

fn check_signals(
    field: &'static str,
    queue: Option<&SignalQueueEntry>,
    bad: &mut impl FnMut(Fault),
) {
    for signal in queue.iter().flat_map(|queue| &queue.signals) {
        count(field, signal.siginfo.len(), SIGINFO_BYTES).map(&mut *bad);
    }
}

fn check_x86(info: &ThreadInfoX86, bad: &mut impl FnMut(Fault)) {
    count_if_any("tls", info.tls.len(), 3).map(&mut *bad);
    count("fpregs.st_space", info.fpregs.st_space.len(), 32).map(&mut *bad);
    count("fpregs.xmm_space", info.fpregs.xmm_space.len(), 64).map(&mut *bad);
    if let Some(xsave) = &info.fpregs.xsave {
        check_xsave(xsave, bad);
    }
}

/// A component is there as a whole, or not at all.
fn check_xsave(xsave: &UserX86XsaveEntry, bad: &mut impl FnMut(Fault)) {
    for (field, found, expected) in [
        ("xsave.ymmh_space", xsave.ymmh_space.len(), 64),
        ("xsave.bndreg_state", xsave.bndreg_state.len(), 8),
        ("xsave.bndcsr_state", xsave.bndcsr_state.len(), 8),
        ("xsave.opmask_reg", xsave.opmask_reg.len(), 8),
        ("xsave.zmm_upper", xsave.zmm_upper.len(), 64),
        ("xsave.hi16_zmm", xsave.hi16_zmm.len(), 128),
        ("xsave.pkru", xsave.pkru.len(), 2),
    ] {
        count_if_any(field, found, expected).map(&mut *bad);
    }
}

/// Checks that each filter stands upon an older one, and is made of whole instructions.
fn check_filters(set: &SetImages, found: &mut Findings) {
    const INSTRUCTION_BYTES: usize = 8;
    let filters = set
        .seccomp
        .iter()
        .flat_map(|seccomp| &seccomp.seccomp_filters);
    let filters: Vec<_> = filters.collect();
    for filter in &filters {
        let mut bad = |fault| found.file(ImageKind::Seccomp, 0, fault);
        let prev = filter
            .prev
            .filter(|p| usize::try_from(*p).is_ok_and(|p| p >= filters.len()));
        if let Some(prev) = prev {
            bad(dangling("prev", "seccomp filter", prev));
        }
        let len = filter.filter.len();
        if len == 0 || !len.is_multiple_of(INSTRUCTION_BYTES) {
            let value = u64::try_from(len).expect("usize fits");
            let field = "length of filter";
            bad(Fault::Value { field, value });
        }
    }
}
