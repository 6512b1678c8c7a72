//! x86-64: the executor, jumps, system call names, registers and extended state.

mod cpu;
mod executor;
mod jump;
pub mod regs;
mod syscalls;
mod xsave;

pub use cpu::cpu_model;
pub use executor::{executor_code, executor_syscall_offset};
pub use jump::jump;
pub use syscalls::syscall_name;
pub use xsave::{XsaveError, XsaveLayout};
