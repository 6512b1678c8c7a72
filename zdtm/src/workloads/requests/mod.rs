//! Input and output that is asked for and fetched later.

mod aio;
mod belongings;
mod in_flight;
mod parameters;
mod ring;
mod server;
mod settings;

use crate::{Need, Workload};

/// The kernel's types, without which its structures can't be read.
const TYPES: Need = Need::File("/sys/kernel/btf/vmlinux");

pub static ALL: &[&Workload] = &[
    &aio::WAITING,
    &aio::WRAPPED,
    &aio::SEVERAL,
    &aio::IN_FLIGHT,
    &aio::FULL,
    &aio::COPIED,
    &aio::POLLING,
    &ring::IDLE,
    &ring::FRESH,
    &ring::WAITING,
    &ring::WRAPPED,
    &ring::SHAPES,
    &ring::SHARED,
    &ring::UNDER_LOAD,
    &ring::CLOSED,
    &ring::REGISTERED,
    &ring::REGISTERED_TWO,
    &belongings::REGISTERED,
    &belongings::NOWHERE,
    &belongings::THREAD,
    &belongings::THREAD_ASLEEP,
    &belongings::SHARED_THREAD,
    &belongings::OPENING,
    &belongings::NODE,
    &parameters::SUBMIT_ALL,
    &parameters::OWNED,
    &parameters::DISABLED,
    &parameters::MULTISHOT,
    &in_flight::POLLS,
    &in_flight::READS,
    &in_flight::ACCEPTS,
    &in_flight::MANY,
    &in_flight::TIMEOUTS,
    &server::ECHO,
    &in_flight::WRITING,
    &in_flight::LINKED,
    &settings::POLLING_DEVICES,
    &settings::WORKERS,
];
