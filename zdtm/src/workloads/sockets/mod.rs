//! Sockets of all families.

mod netlink;
mod packet;
mod packet_ring;
mod tcp;
mod tcp_states;
mod udp;
mod unix;
mod unix_names;
mod unix_queues;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &unix::PAIRS,
    &unix::LISTENING,
    &unix::HALF,
    &unix::RESET,
    &unix::ACROSS,
    &unix::OPTIONS,
    &unix::PEERS,
    &unix_names::NAMES,
    &unix_names::FILES,
    &unix_names::DATAGRAMS,
    &unix_names::MANY,
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
    &tcp::MANY,
    &tcp_states::ENDING,
    &tcp_states::CONNECTING,
    &tcp_states::CONNECTED,
    &tcp_states::OPTIONS,
    &tcp_states::CLOSE,
    &tcp_states::WAITING,
    &tcp_states::URGENT,
    &tcp_states::MPTCP,
    &tcp_states::KTLS,
    &tcp_states::VSOCK,
    &udp::QUEUES,
    &udp::OPTIONS,
    &udp::SHARED,
    &udp::GROUPS,
    &udp::RAW,
    &udp::CORKED,
    &netlink::PLACES,
    &netlink::EVENTS,
    &netlink::PEERS,
    &netlink::UNREAD,
    &packet::CAPTURE,
    &packet::RINGS,
    &packet::FANOUT,
    &packet::BY_PROGRAM,
    &packet_ring::FRAMES,
    &packet_ring::BLOCKS,
    &packet_ring::UNSENT,
];
