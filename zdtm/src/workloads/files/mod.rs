//! Descriptors and what they lead to.

mod device;
mod directory;
mod epoll;
mod eventfd;
mod fifo;
mod ghost;
mod locks;
mod owner;
mod pidfd;
mod pipe;
mod pty;
mod regular;
mod sharing;
mod signalfd;
mod terminal;
mod timerfd;
mod watches;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &regular::POSITIONS,
    &regular::FLAGS,
    &regular::APPEND,
    &regular::PATH,
    &regular::TWICE,
    &regular::MANY,
    &regular::LARGE_OFFSET,
    &regular::RENAMED,
    &directory::DIRECTORY,
    &directory::REMOVED,
    &ghost::SMALL,
    &ghost::LARGE,
    &ghost::SPARSE,
    &ghost::HARD_LINK,
    &ghost::SHARED,
    &ghost::NAME_TAKEN,
    &ghost::TEMPORARY,
    &device::CHARACTER,
    &device::STANDARD,
    &pipe::CONTENTS,
    &pipe::SIZES,
    &pipe::ENDS,
    &pipe::ACROSS,
    &pipe::REOPENED,
    &pipe::PACKETS,
    &pipe::BUSY,
    &fifo::NAMED,
    &fifo::ONE_END,
    &fifo::REMOVED,
    &sharing::DUPLICATES,
    &sharing::INHERITED,
    &sharing::TABLE,
    &sharing::CLOSE_ON_EXEC,
    &sharing::NUMBERS,
    &owner::OWNERS,
    &owner::SIGNAL,
    &terminal::TERMINAL,
    &eventfd::COUNTERS,
    &eventfd::SEMAPHORE,
    &epoll::TARGETS,
    &epoll::NESTED,
    &epoll::MOVED,
    &epoll::EDGES,
    &epoll::SIGNALS,
    &epoll::MANY,
    &timerfd::CLOCKS,
    &timerfd::TICKS,
    &timerfd::DAYTIME,
    &signalfd::SIGNALFD,
    &watches::INOTIFY,
    &watches::REMOVED,
    &watches::FANOTIFY,
    &pidfd::LIVING,
    &pidfd::DEAD,
    &pidfd::THREAD,
    &locks::POSIX,
    &locks::OFD,
    &locks::FLOCK,
    &locks::WAITERS,
    &locks::LEASES,
    &pty::PAIR,
    &pty::SESSION,
    &pty::PACKETS,
    &pty::HUNG_UP,
];
