//! x86-64: the executor, system call names, registers and extended state, vdso.

mod executor;
mod syscalls;

pub use executor::executor_code;
pub use syscalls::syscall_name;
