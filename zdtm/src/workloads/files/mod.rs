//! Descriptors and what they lead to.

mod autofs;
mod bpf;
mod crowd;
mod device;
mod directory;
mod epoll;
mod eventfd;
mod external;
mod fifo;
mod ghost;
mod ghost_names;
mod locks;
mod made_up;
mod many;
mod owner;
mod pidfd;
mod pipe;
mod pty;
mod random;
mod regular;
mod sharing;
mod signalfd;
mod terminal;
mod timerfd;
mod watches;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &random::DESCRIPTORS,
    &regular::POSITIONS,
    &regular::FLAGS,
    &regular::APPEND,
    &regular::PATH,
    &regular::PATH_ODD,
    &regular::PATH_REFUSED,
    &regular::TWICE,
    &regular::MANY,
    &many::SORTS,
    &many::MOVING,
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
    &autofs::DIRECT,
    &autofs::COVERED,
    &autofs::SERVED,
    &autofs::TWO,
    &autofs::WAITED_FOR,
    &fifo::NAMED,
    &fifo::ONE_END,
    &fifo::REMOVED,
    &crowd::CROWD,
    &crowd::MOST_DESCRIPTORS,
    &crowd::HALF_PIPES,
    &crowd::SHARED,
    &crowd::MOST_SHARED,
    &crowd::APART,
    &crowd::MOST_APART,
    &crowd::MEMORY_FILES,
    &crowd::MOST_MEMORY_FILES,
    &sharing::DUPLICATES,
    &sharing::INHERITED,
    &sharing::TABLE,
    &sharing::CLOSE_ON_EXEC,
    &sharing::NUMBERS,
    &owner::OWNERS,
    &owner::SIGNAL,
    &terminal::TERMINAL,
    &terminal::CONSOLE,
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
    &locks::BREAKING,
    &locks::REFUSED,
    &locks::REFUSED_AMONG_MANY,
    &pty::PAIR,
    &pty::SESSION,
    &pty::PACKETS,
    &pty::HUNG_UP,
    &pty::WAITING,
    &pty::TYPED,
    &pty::LONG,
    &pty::STOPPED,
    &pty::NEWS,
    &pty::CLOSED,
    &external::PIPE,
    &external::TERMINAL,
    &external::FILE,
    &external::SOCKET,
    &external::CONNECTION,
    &external::UNDECLARED,
    &ghost_names::LINK_REMAP,
    &ghost_names::LINK_REMAP_REFUSED,
    &ghost_names::TWO_NAMES,
    &ghost_names::NESTED,
    &ghost_names::OVERLAY,
    &ghost_names::NODES,
    &ghost_names::HOLES,
    &made_up::OWN,
    &made_up::DEAD,
    &made_up::OUTSIDE,
    &made_up::SYSTEM,
    &made_up::NAMESPACES,
    &made_up::FOREIGN_NAMESPACE,
    &bpf::HASH,
    &bpf::ARRAY,
    &bpf::PINNED,
    &bpf::OTHER_MAP,
    &bpf::PROGRAM,
];
