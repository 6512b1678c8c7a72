//! x86-64: the executor, system call names, registers and extended state.

mod cpu;
mod executor;
pub mod regs;
mod syscalls;
mod xsave;

pub use cpu::cpu_model;
pub use executor::executor_code;
pub use syscalls::syscall_name;
pub use xsave::{XsaveError, XsaveLayout};
