//! Programs run in a child: results, rules, failures, threads, forks, words.

use std::time::Duration;

use firn_engine::program::{
    Arena, CloneSpec, Program, ProgramFailure, ProgramSet, Rule, WaitOutcome,
};
use firn_sys::clone3::{ProgramEntry, spawn_program};
use firn_sys::{Pid, nr, probe, task, wait};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Tests run in parallel in one address space, so each takes an arena of its own.
fn base() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0x100_0000_0000);
    NEXT.fetch_add(0x1000_0000, Ordering::Relaxed)
}

struct Child(Pid);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = task::kill(self.0, 9);
        while matches!(wait::wait(self.0), Ok(status) if !matches!(status, wait::Status::Ended(_)))
        {
        }
    }
}

/// The first record of every program: without it the kernel kills the child at its next preemption.
fn leave_rseq(program: &mut Program) {
    if let Some((address, len, signature)) = task::own_rseq() {
        let args = [address.into(), len.into(), 1u64.into(), signature.into()];
        program.call(nr::RSEQ, &args, Rule::Ok, "leaving the inherited rseq area");
    }
}

fn run(set: &ProgramSet, root: firn_engine::program::ProgramId) -> (Arena, Child) {
    run_at(base(), set, root)
}

fn run_at(base: u64, set: &ProgramSet, root: firn_engine::program::ProgramId) -> (Arena, Child) {
    let arena = Arena::create(set, set.place(base)).expect("arena");
    let (record, context) = arena.entry(root);
    let entry = ProgramEntry {
        executor: arena.placed().base(),
        record,
        context,
    };
    // SAFETY: the arena holds the executor and the program, which leaves rseq first.
    let child = unsafe { spawn_program(0, 17, None, entry) }.expect("clone3");
    (arena, Child(child))
}

fn wait_parked(arena: &Arena, set: &ProgramSet, nr: u32) -> Result<(), ProgramFailure> {
    match arena.wait_parked(set, nr, TIMEOUT, || Ok::<(), ()>(())) {
        WaitOutcome::Reached => Ok(()),
        WaitOutcome::Failed(failure) => Err(failure),
        other => panic!("{other:?}"),
    }
}

#[test]
fn keeps_results_and_passes_them_on() {
    let mut set = ProgramSet::new();
    let mut p = Program::new("child");
    leave_rseq(&mut p);
    let pid = p.call_to_slot(nr::GETPID, &[], Rule::Ok, "own pid");
    let pgid = p.call_to_slot(121, &[pid.into()], Rule::Ok, "getpgid of the slot's pid");
    p.park();
    let id = set.add(p);
    let (arena, child) = run(&set, id);
    wait_parked(&arena, &set, 1).unwrap();
    assert_eq!(arena.slot(id, pid), i64::from(child.0.raw()));
    assert!(arena.slot(id, pgid) > 0);
    assert!(arena.is_parked(id));
}

#[test]
fn an_unexpected_result_names_the_record_and_the_errno() {
    let mut set = ProgramSet::new();
    let mut p = Program::new("task 4711");
    leave_rseq(&mut p);
    p.call(nr::CLOSE, &[(-1).into()], Rule::OkOr(9), "an allowed errno");
    p.call(
        nr::CLOSE,
        &[99_999u64.into()],
        Rule::Ok,
        "closing what is not open",
    );
    p.park();
    let id = set.add(p);
    let (arena, _child) = run(&set, id);
    let failure = wait_parked(&arena, &set, 1).unwrap_err();
    assert_eq!(failure.errno().unwrap().raw(), 9);
    let text = failure.to_string();
    assert!(
        text.starts_with("task 4711: closing what is not open failed: EBADF"),
        "{text}"
    );
    assert!(text.contains("close(0x1869f)"), "{text}");
}

#[test]
fn an_exact_rule_refuses_another_value() {
    let mut set = ProgramSet::new();
    let mut p = Program::new("child");
    leave_rseq(&mut p);
    p.call(nr::GETPID, &[], Rule::Exact(1), "being init");
    p.park();
    let id = set.add(p);
    let (arena, child) = run(&set, id);
    let failure = wait_parked(&arena, &set, 1).unwrap_err();
    assert_eq!(failure.result, i64::from(child.0.raw()));
}

#[test]
fn answers_land_in_data() {
    let mut set = ProgramSet::new();
    let mut p = Program::new("child");
    leave_rseq(&mut p);
    let name = p.string(b"firn-child");
    p.call(
        nr::PRCTL,
        &[15.into(), name.into()],
        Rule::Ok,
        "PR_SET_NAME",
    );
    let answer = p.space(16);
    p.call(
        nr::PRCTL,
        &[16.into(), answer.into()],
        Rule::Ok,
        "PR_GET_NAME",
    );
    p.park();
    let id = set.add(p);
    let (arena, _child) = run(&set, id);
    wait_parked(&arena, &set, 1).unwrap();
    assert_eq!(&arena.read(id, answer)[..11], b"firn-child\0");
}

#[test]
fn words_order_coordinator_and_tasks() {
    let mut set = ProgramSet::new();
    let (here, go) = (set.word(), set.word());
    let mut p = Program::new("child");
    leave_rseq(&mut p);
    p.post(here, "telling");
    p.wait(go, 1, "waiting for the coordinator");
    p.park();
    let id = set.add(p);
    let (arena, _child) = run(&set, id);
    let reached = arena.wait(&set, here, 1, TIMEOUT, || Ok::<(), ()>(()));
    assert!(matches!(reached, WaitOutcome::Reached), "{reached:?}");
    assert!(!arena.is_parked(id));
    arena.post(go);
    wait_parked(&arena, &set, 1).unwrap();
}

#[test]
fn threads_and_children_run_their_own_programs() {
    const THREAD: u64 = 0x100 | 0x200 | 0x400 | 0x800 | 0x1_0000 | 0x4_0000;
    let mut set = ProgramSet::new();
    let mut p = Program::new("leader");
    leave_rseq(&mut p);
    let mut ids = Vec::new();
    for i in 0..20u32 {
        let mut child = Program::new(format!("child {i}"));
        let tid = child.call_to_slot(nr::GETTID, &[], Rule::Ok, "own tid");
        let pid = child.call_to_slot(nr::GETPID, &[], Rule::Ok, "own pid");
        child.park();
        let id = set.add(child);
        let thread = i % 2 == 0;
        let spec = CloneSpec {
            flags: if thread { THREAD } else { 0 },
            exit_signal: if thread { 0 } else { 17 },
            ..CloneSpec::default()
        };
        p.fork(&spec, id, if thread { "a thread" } else { "a child" });
        // Processes die with the leader, whatever happens to the test.
        ids.push((id, tid, pid, thread));
    }
    p.park();
    let root = set.add(p);
    let (arena, child) = run(&set, root);
    wait_parked(&arena, &set, 21).unwrap();
    for (id, tid, pid, thread) in ids {
        let same = arena.slot(id, pid) == i64::from(child.0.raw());
        assert_eq!(same, thread);
        let tid = i32::try_from(arena.slot(id, tid)).unwrap();
        if !thread {
            let _ = task::kill(Pid::from_raw(tid), 9);
        }
    }
}

#[test]
fn a_death_is_seen_by_the_liveness_check() {
    let mut set = ProgramSet::new();
    let never = set.word();
    let mut p = Program::new("child");
    leave_rseq(&mut p);
    p.wait(never, 1, "waiting forever");
    let id = set.add(p);
    let (arena, child) = run(&set, id);
    task::kill(child.0, 9).unwrap();
    let outcome = arena.wait_parked(&set, 1, TIMEOUT, || match wait::try_wait(child.0) {
        Ok(Some(status)) => Err(status),
        _ => Ok(()),
    });
    assert!(
        matches!(outcome, WaitOutcome::Dead(wait::Status::Ended(9))),
        "{outcome:?}"
    );
}

#[test]
fn thread_local_segments_are_seen_without_a_call() {
    /// Below 4 GiB, for 32-bit calls.
    const LOW: u64 = 0x3000_0000;
    const SET_THREAD_AREA: i64 = 243;
    if let Err(errno) = probe::ia32_calls() {
        eprintln!("skipped: this kernel makes no 32-bit calls: {errno}");
        return;
    }
    let mut set = ProgramSet::new();
    let mut p = Program::new("child");
    leave_rseq(&mut p);
    let mut seen = vec![p.segments("at first")];
    for (entry, base) in [(13u32, 0x1000u32), (14, 0), (12, 0)] {
        // seg_32bit, limit_in_pages, useable.
        let words = [entry, base, 0xfffff, 0b101_0001];
        let descriptor = p.data(&words.map(u32::to_ne_bytes).concat());
        let args = [descriptor.into()];
        p.call_ia32(SET_THREAD_AREA, &args, Rule::Ok, "making a segment");
        seen.push(p.segments("after it"));
    }
    p.park();
    let id = set.add(p);
    let (arena, _child) = run_at(LOW, &set, id);
    wait_parked(&arena, &set, 1).unwrap();
    let seen: Vec<i64> = seen.iter().map(|slot| arena.slot(id, *slot)).collect();
    assert_eq!(seen, [0, 0b010, 0b110, 0b111]);
}

#[test]
fn plans_print_every_record() {
    let mut set = ProgramSet::new();
    let mut p = Program::new("task 7");
    let word = set.word();
    p.call(
        nr::MUNMAP,
        &[0u64.into(), 0x10_0000u64.into()],
        Rule::Ok,
        "clearing",
    );
    p.wait(word, 2, "both");
    p.park();
    set.add(p);
    let text = set.to_string();
    assert!(text.contains("task 7: 3 records"), "{text}");
    assert!(text.contains("munmap(0, 0x100000)"), "{text}");
    assert!(text.contains("wait w2 >= 2"), "{text}");
}
