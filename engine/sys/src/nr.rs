//! System call numbers, for the records of syscall programs.

pub use libc::{
    SYS_arch_prctl as ARCH_PRCTL, SYS_brk as BRK, SYS_capset as CAPSET, SYS_chdir as CHDIR,
    SYS_chroot as CHROOT, SYS_clock_nanosleep as CLOCK_NANOSLEEP, SYS_close as CLOSE,
    SYS_close_range as CLOSE_RANGE, SYS_dup3 as DUP3, SYS_epoll_ctl as EPOLL_CTL, SYS_exit as EXIT,
    SYS_exit_group as EXIT_GROUP, SYS_fchdir as FCHDIR, SYS_fcntl as FCNTL, SYS_flock as FLOCK,
    SYS_get_mempolicy as GET_MEMPOLICY, SYS_getitimer as GETITIMER, SYS_getpid as GETPID,
    SYS_getppid as GETPPID, SYS_gettid as GETTID, SYS_io_getevents as IO_GETEVENTS,
    SYS_io_setup as IO_SETUP, SYS_io_submit as IO_SUBMIT, SYS_io_uring_enter as IO_URING_ENTER,
    SYS_io_uring_register as IO_URING_REGISTER, SYS_io_uring_setup as IO_URING_SETUP,
    SYS_ioctl as IOCTL, SYS_ioprio_set as IOPRIO_SET, SYS_kill as KILL, SYS_madvise as MADVISE,
    SYS_mbind as MBIND, SYS_membarrier as MEMBARRIER, SYS_mincore as MINCORE, SYS_mlock as MLOCK,
    SYS_mlock2 as MLOCK2, SYS_mlockall as MLOCKALL, SYS_mmap as MMAP, SYS_modify_ldt as MODIFY_LDT,
    SYS_mprotect as MPROTECT, SYS_mremap as MREMAP, SYS_msync as MSYNC, SYS_munmap as MUNMAP,
    SYS_openat as OPENAT, SYS_personality as PERSONALITY, SYS_pidfd_getfd as PIDFD_GETFD,
    SYS_pidfd_open as PIDFD_OPEN, SYS_prctl as PRCTL, SYS_preadv as PREADV,
    SYS_prlimit64 as PRLIMIT64, SYS_process_vm_readv as PROCESS_VM_READV, SYS_rseq as RSEQ,
    SYS_rt_sigaction as RT_SIGACTION, SYS_rt_sigprocmask as RT_SIGPROCMASK,
    SYS_rt_sigqueueinfo as RT_SIGQUEUEINFO, SYS_rt_sigtimedwait as RT_SIGTIMEDWAIT,
    SYS_rt_tgsigqueueinfo as RT_TGSIGQUEUEINFO, SYS_sched_setaffinity as SCHED_SETAFFINITY,
    SYS_sched_setattr as SCHED_SETATTR, SYS_seccomp as SECCOMP, SYS_semop as SEMOP,
    SYS_set_mempolicy as SET_MEMPOLICY, SYS_set_robust_list as SET_ROBUST_LIST,
    SYS_set_tid_address as SET_TID_ADDRESS, SYS_setfsgid as SETFSGID, SYS_setfsuid as SETFSUID,
    SYS_setgroups as SETGROUPS, SYS_setitimer as SETITIMER, SYS_setpgid as SETPGID,
    SYS_setpriority as SETPRIORITY, SYS_setresgid as SETRESGID, SYS_setresuid as SETRESUID,
    SYS_setsid as SETSID, SYS_shmat as SHMAT, SYS_sigaltstack as SIGALTSTACK, SYS_tgkill as TGKILL,
    SYS_timer_create as TIMER_CREATE, SYS_timer_delete as TIMER_DELETE,
    SYS_timer_getoverrun as TIMER_GETOVERRUN, SYS_timer_gettime as TIMER_GETTIME,
    SYS_timer_settime as TIMER_SETTIME, SYS_umask as UMASK, SYS_userfaultfd as USERFAULTFD,
    SYS_wait4 as WAIT4, SYS_waitid as WAITID, SYS_write as WRITE,
};

/// map_shadow_stack (Linux 6.6).
pub const MAP_SHADOW_STACK: i64 = 453;

/// Numbers of the calls that 32-bit code makes by `int 0x80`.
///
/// Source: linux arch/x86/entry/syscalls/syscall_32.tbl.
pub mod ia32 {
    /// set_robust_list.
    pub const SET_ROBUST_LIST: i64 = 311;
    /// get_robust_list.
    pub const GET_ROBUST_LIST: i64 = 312;
    /// mmap2: the offset counts pages.
    pub const MMAP2: i64 = 192;
    /// munmap.
    pub const MUNMAP: i64 = 91;
    /// rt_sigaction.
    pub const RT_SIGACTION: i64 = 174;
}
