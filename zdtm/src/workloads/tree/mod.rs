//! Who is whose parent, leader and member; who is a thread; who is dead or stopped.

mod autogroups;
mod exited_leader;
mod groups;
mod random;
mod shape;
mod stopped;
mod thousands;
mod threads;
mod zombies;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &shape::SINGLE,
    &shape::CHAIN,
    &shape::FAN_OUT,
    &shape::BUSHY,
    &shape::REPARENTED,
    &random::TREE,
    &shape::FORKING,
    &shape::VFORKING,
    &thousands::TREE,
    &thousands::CROWD,
    &threads::FEW,
    &threads::THOUSAND,
    &threads::TREE,
    &threads::CHURN,
    &exited_leader::PLAIN,
    &exited_leader::FILTERED,
    &exited_leader::STOPPED,
    &autogroups::AUTOGROUPS,
    &groups::GROUPS,
    &groups::SESSIONS,
    &groups::ORPHAN_GROUP,
    &groups::ORPHAN_SESSION,
    &zombies::CODES,
    &zombies::SIGNALS,
    &zombies::LEADER,
    &zombies::SESSION,
    &stopped::CHILD,
    &stopped::THREADS,
    &stopped::TOLD,
    &stopped::UNTOLD,
    &stopped::GOING_ON,
];
