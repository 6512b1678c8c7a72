//! Thin typed wrappers for kernel interfaces, one module per interface.
//!
//! Nothing here decides anything: one safe function per call, with its man page. Besides the executor
//! this is the only crate that names libc, nix or rustix.

mod errno;
mod pid;

pub mod autofs;
pub mod bpf;
pub mod clock;
pub mod clone3;
pub mod deputy;
pub mod epoll;
pub mod eventfd;
pub mod fcntl;
pub mod file;
pub mod fsnotify;
pub mod futex;
pub mod helpers;
pub mod io_uring;
pub mod kcmp;
pub mod keeper;
pub mod kernel_memory;
pub mod lookout;
pub mod mapping;
pub mod memfd;
pub mod mm;
pub mod netlink;
pub mod nr;
pub mod pagemap;
pub mod pidfd;
pub mod pipe;
pub mod probe;
pub mod process_vm;
pub mod procfs;
pub mod ptrace;
pub mod rlimit;
pub mod sched;
pub mod semaphores;
pub mod session;
pub mod shadow_stack;
pub mod signal;
pub mod signalfd;
pub mod sock_diag;
pub mod socket;
pub mod stand_in;
pub mod sysv;
pub mod task;
pub mod timerfd;
pub mod tty;
pub mod uffd;
pub mod wait;
pub mod window;
pub mod worker;

pub use errno::{Errno, Result};
pub use pid::Pid;
