//! Sockets of all families.

mod tcp;
mod unix;
mod unix_names;
mod unix_queues;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &unix::PAIRS,
    &unix::LISTENING,
    &unix::HALF,
    &unix::ACROSS,
    &unix::OPTIONS,
    &unix::PEERS,
    &unix_names::NAMES,
    &unix_names::FILES,
    &unix_names::DATAGRAMS,
    &unix_queues::RIGHTS,
    &unix_queues::NESTED,
    &unix_queues::CREDENTIALS,
    &unix_queues::SENDERS,
    &unix_queues::PEEK_OFFSET,
    &tcp::LISTENING,
    &tcp::CONNECTED,
    &tcp::FULL,
    &tcp::HALF,
    &tcp::ACROSS,
    &tcp::CLOSED,
];
