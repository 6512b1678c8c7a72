//! Trees whose making is told step by step.

use firn_sys::Pid;

use super::*;
use crate::arch::Abi;
use crate::tree::{Task, TaskState, Tree};

fn tree(tasks: &[(i32, i32, i32, i32)]) -> Tree {
    let pid = Pid::from_raw;
    let task = |&(own, ppid, pgid, sid): &(i32, i32, i32, i32)| Task {
        pid: pid(own),
        ppid: pid(ppid),
        pgid: pid(pgid),
        sid: pid(sid),
        state: TaskState::Alive,
        abi: Abi::Native,
        threads: vec![pid(own)],
    };
    Tree::new(tasks.iter().map(task).collect())
}

fn plan(tasks: &[(i32, i32, i32, i32)]) -> Family {
    Family::plan(&tree(tasks), false).unwrap()
}

#[test]
fn a_shell_with_jobs_is_plain() {
    let family = plan(&[(10, 1, 10, 10), (11, 10, 11, 10), (12, 10, 11, 10)]);
    assert!(family.births[0].setsid);
    assert_eq!(family.births[0].after, [1, 2]);
    assert_eq!(family.births[1].group, Some(Pid::from_raw(11)));
    assert_eq!(family.births[2].group, Some(Pid::from_raw(11)));
    assert_eq!(family.births.len(), 3);
}

#[test]
fn a_child_made_before_setsid_keeps_the_first_session() {
    // 11 made 12, then started its own session.
    let family = plan(&[(10, 1, 10, 10), (11, 10, 11, 11), (12, 11, 10, 10)]);
    assert!(family.births[1].setsid);
    assert_eq!(
        (
            family.births[1].before.as_slice(),
            family.births[1].after.len()
        ),
        (&[2][..], 0)
    );
}

#[test]
fn a_dead_session_leader_gets_a_helper() {
    // A daemon made by a double fork whose middle process, 20, is gone.
    let family = plan(&[(10, 1, 10, 10), (21, 10, 20, 20)]);
    let helper = &family.births[1];
    assert_eq!(
        (helper.role, helper.pid),
        (Role::Leader, Some(Pid::from_raw(20)))
    );
    assert!(helper.setsid);
    let daemon = &family.births[2];
    assert_eq!((daemon.maker, daemon.sibling), (Some(1), true));
    assert_eq!(daemon.group, Some(Pid::from_raw(20)));
    assert_eq!(family.births[0].reaps, [1]);
}

#[test]
fn a_dead_group_leader_gets_a_helper_in_the_same_session() {
    let family = plan(&[(10, 1, 10, 10), (12, 10, 11, 10), (13, 10, 11, 10)]);
    let helper = family
        .births
        .iter()
        .position(|b| b.role == Role::Leader)
        .unwrap();
    assert_eq!(family.births[helper].maker, Some(1));
    assert_eq!(family.births[1].reaps, [helper]);
    assert_eq!(family.births[2].group, Some(Pid::from_raw(11)));
}

#[test]
fn an_orphan_of_a_living_session_comes_by_a_midwife() {
    // 12 leads a session; its grandchild 14 lost its parent and went to the subreaper 10.
    let family = plan(&[
        (10, 1, 10, 10),
        (11, 10, 10, 10),
        (12, 11, 12, 12),
        (14, 10, 12, 12),
    ]);
    let orphan = &family.births[family.of_task(3)];
    let midwife = &family.births[orphan.maker.unwrap()];
    assert_eq!(midwife.role, Role::Midwife);
    assert_eq!(midwife.maker, Some(family.of_task(2)));
    assert_eq!(family.births[0].subreaper_until, Some(1));
    assert_eq!(family.orphan_steps, 2);
}

#[test]
fn an_orphan_with_a_lower_pid_than_its_leader_comes_after_it() {
    let family = plan(&[(10, 1, 10, 10), (14, 10, 30, 30), (30, 10, 30, 30)]);
    let leader = family.of_task(2);
    assert!(family.births[leader].setsid);
    let orphan = &family.births[family.of_task(1)];
    assert_eq!((orphan.maker, orphan.sibling), (Some(leader), true));
}

#[test]
fn a_sibling_of_the_session_makes_it() {
    let family = plan(&[(10, 1, 10, 10), (11, 10, 11, 11), (12, 10, 11, 11)]);
    let second = &family.births[2];
    assert_eq!((second.maker, second.sibling), (Some(1), true));
}

#[test]
fn an_outer_session_needs_shell_job() {
    let outer = tree(&[(10, 1, 10, 5), (11, 10, 10, 5)]);
    assert!(matches!(
        Family::plan(&outer, false),
        Err(RelationError::OuterSession { .. })
    ));
    let family = Family::plan(&outer, true).unwrap();
    assert!(!family.births[0].setsid);
    assert_eq!(family.births[0].group, Some(Pid::from_raw(10)));
}

#[test]
fn an_outer_group_is_inherited() {
    let outer = tree(&[(10, 1, 7, 5), (11, 10, 7, 5), (12, 10, 12, 5)]);
    let family = Family::plan(&outer, true).unwrap();
    assert_eq!(family.births[0].group, None);
    assert_eq!(family.births[1].group, None);
    assert_eq!(family.births[2].group, Some(Pid::from_raw(12)));
}

#[test]
fn a_missing_parent_is_named() {
    let error = Family::plan(&tree(&[(10, 1, 10, 10), (11, 9, 10, 10)]), false).unwrap_err();
    assert!(matches!(error, RelationError::NoParent { .. }));
}

#[test]
fn a_leader_that_went_back_to_an_outer_group_is_named() {
    // 11 led its own group, in which it has left 12.
    let tasks = tree(&[(10, 1, 7, 5), (11, 10, 7, 5), (12, 11, 11, 5)]);
    let error = Family::plan(&tasks, true).unwrap_err();
    assert!(matches!(error, RelationError::OuterGroup { pid, .. } if pid == Pid::from_raw(11)));
}

#[test]
fn a_leader_that_went_to_another_group_leaves_a_keeper() {
    let family = plan(&[(10, 1, 10, 10), (11, 10, 10, 10), (12, 11, 11, 10)]);
    let leader = &family.births[family.of_task(1)];
    let keeper = leader.keeper.unwrap();
    assert_eq!(family.births[keeper].role, Role::Keeper);
    assert_eq!(
        (leader.group, leader.reaps.as_slice()),
        (Some(Pid::from_raw(10)), &[keeper][..])
    );
    assert_eq!(
        family.births[family.of_task(2)].group,
        Some(Pid::from_raw(11))
    );
}

#[test]
fn the_lower_of_two_subreapers_gets_its_orphans_first() {
    // 13 leads a session, from which 14 came to 12 and 15 to 10 above it.
    let family = plan(&[
        (10, 1, 10, 10),
        (12, 10, 10, 10),
        (21, 12, 10, 10),
        (13, 21, 13, 13),
        (14, 12, 13, 13),
        (15, 10, 13, 13),
    ]);
    let midwife_of =
        |nth| family.births[family.births[family.of_task(nth)].maker.unwrap()].exits_after;
    assert_eq!(
        (midwife_of(4), midwife_of(5), family.orphan_steps),
        (0, 2, 4)
    );
    let until = |nth| family.births[family.of_task(nth)].subreaper_until;
    assert_eq!((until(1), until(0)), (Some(1), Some(3)));
}

#[test]
fn parents_in_a_circle_are_refused() {
    let root = (10, 1, 10, 10);
    for rest in [
        [(11, 11, 11, 11), (12, 11, 20, 20)],
        [(11, 12, 11, 11), (12, 11, 20, 20)],
    ] {
        let tasks = [&[root][..], &rest].concat();
        assert!(Family::plan(&tree(&tasks), false).is_err(), "{tasks:?}");
    }
}

#[test]
fn a_root_whose_parent_has_the_pid_of_a_child_is_a_root() {
    let family = plan(&[(10, 11, 10, 10), (11, 10, 11, 11), (12, 11, 20, 20)]);
    assert_eq!(family.births[0].maker, None);
}

#[test]
fn a_long_row_of_leaders_that_need_the_next_is_refused() {
    // Each leader has a child of the session of the next one.
    let leaders = (0..3000).map(|nth| (100 + nth, 10, 100 + nth, 100 + nth));
    let children = (0..2999).map(|nth| (10_000 + nth, 100 + nth, 101 + nth, 101 + nth));
    let root = [(10, 1, 10, 10)].into_iter();
    let tasks: Vec<_> = root.chain(leaders).chain(children).collect();
    let refused = Family::plan(&tree(&tasks), false);
    assert!(matches!(refused, Err(RelationError::Unreachable { .. })));
}
