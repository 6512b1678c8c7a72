//! x86-64: the executor, jumps, system call names, registers and extended state.

mod abi;
mod cpu;
mod executor;
mod jump;
mod landing;
pub mod regs;
pub mod restart;
mod syscalls;
pub mod waits;
mod xsave;

pub use abi::{Abi, at_executor, uses_local_segments};
pub use cpu::cpu_model;
pub use executor::{executor_code, executor_syscall_offset};
pub use jump::jump;
pub use landing::Landing;
pub use syscalls::{ia32_syscall_name, syscall_name};
pub use xsave::{XsaveError, XsaveLayout};
