//! In which order orphans come to their parents. A subreaper takes every orphan from below, so that the lowest ones
//! get theirs first and are no subreapers then while those above them do.
//!
//! Steps are counted: each orphan that has arrived (its midwife has been reaped), and each subreaper that is none any
//! more. By that number everybody knows when it is its turn.

use super::Role;
use super::planner::Planner;

/// Orders the orphans by the depth of their parents, the lowest first; returns the number of steps.
pub(super) fn order(planner: &mut Planner<'_>) -> u32 {
    let depth_of_midwife = |id: usize| planner.adopter[id].map(|adopter| planner.depth(adopter));
    let mut midwives = Vec::new();
    let mut adopters = Vec::new();
    for (id, birth) in planner.births.iter().enumerate() {
        if birth.role == Role::Midwife {
            midwives.push((depth_of_midwife(id).unwrap_or(0), id));
        }
        if birth.subreaper_until.is_some() {
            adopters.push((planner.depth(id), id));
        }
    }
    let mut depths: Vec<u32> = adopters.iter().map(|(depth, _)| *depth).collect();
    depths.sort_unstable();
    depths.dedup();
    let mut steps = 0;
    for depth in depths.into_iter().rev() {
        let here = |list: &[(u32, usize)]| -> Vec<usize> {
            let here = list.iter().filter(|(at, _)| *at == depth);
            here.map(|(_, id)| *id).collect()
        };
        let (midwives, adopters) = (here(&midwives), here(&adopters));
        for &id in &midwives {
            planner.births[id].exits_after = steps;
        }
        steps += count(midwives.len());
        for &id in &adopters {
            planner.births[id].subreaper_until = Some(steps);
        }
        steps += count(adopters.len());
    }
    // Whoever reaps several must wait for none that others wait for it to reap first. Helpers for leaders end last.
    let rank = |id: &usize| match planner.births[*id].role {
        Role::Midwife => planner.births[*id].exits_after,
        Role::Leader | Role::Keeper | Role::Task(_) => u32::MAX,
    };
    let sorted = |reaps: &Vec<usize>| {
        let mut reaps = reaps.clone();
        reaps.sort_by_key(rank);
        reaps
    };
    let sorted: Vec<Vec<usize>> = planner
        .births
        .iter()
        .map(|birth| sorted(&birth.reaps))
        .collect();
    for (birth, reaps) in planner.births.iter_mut().zip(sorted) {
        birth.reaps = reaps;
    }
    steps
}

fn count(nr: usize) -> u32 {
    u32::try_from(nr).expect("fewer than 2^32 tasks")
}
