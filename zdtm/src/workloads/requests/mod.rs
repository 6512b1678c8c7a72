//! Input and output that is asked for and fetched later.

mod aio;
mod ring;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &aio::WAITING,
    &aio::WRAPPED,
    &aio::SEVERAL,
    &aio::IN_FLIGHT,
    &aio::FULL,
    &aio::COPIED,
    &ring::IDLE,
    &ring::FRESH,
    &ring::WAITING,
    &ring::WRAPPED,
    &ring::SHAPES,
    &ring::SHARED,
    &ring::UNDER_LOAD,
    &ring::POLLING,
    &ring::SLEEPING,
    &ring::CLOSED,
    &ring::FILES,
    &ring::EVENTFD,
    &ring::REGISTERED,
    &ring::OWNED,
];
