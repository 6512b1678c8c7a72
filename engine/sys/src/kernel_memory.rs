//! Words of the kernel's own memory, read by a BPF program.
//!
//! The program is handed an address, copies the word there by `bpf_probe_read_kernel`, which answers EFAULT
//! where nothing is, and can do nothing else:
//!
//! ```text
//! context, 24 bytes                      program
//! offset  size  field                    task = bpf_get_current_task()
//!      0     8  address, read            bpf_probe_read_kernel(stack, 8, address)
//!      8     8  word, written            word = stack
//!     16     8  task, written            return what the copy returned
//! ```
//!
//! Source: man 2 bpf, man 7 bpf-helpers; linux include/uapi/linux/bpf.h; BPF_PROG_TYPE_SYSCALL: Linux 5.14.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::bpf::bpf;
use crate::pidfd::own;
use crate::{Errno, Result};

const PROG_LOAD: i64 = 5;
const PROG_RUN: i64 = 10;
const PROG_TYPE_SYSCALL: u32 = 31;
const SLEEPABLE: u32 = 1 << 4;
/// The helper that copies is for programs whose licence goes with the kernel's.
const LICENSE: &[u8] = b"Dual MIT/GPL\0";
const GET_CURRENT_TASK: i32 = 35;
const PROBE_READ_KERNEL: i32 = 113;

#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}
const _: () = assert!(size_of::<Instruction>() == 8);

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    kind: u32,
    nr_instructions: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kern_version: u32,
    flags: u32,
}
const _: () = assert!(size_of::<LoadAttr>() == 48);

#[repr(C)]
#[derive(Default)]
struct RunAttr {
    program: u32,
    result: u32,
    data_sizes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_in_size: u32,
    context_out_size: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    unused: u32,
}
const _: () = assert!(size_of::<RunAttr>() == 80);

#[repr(C)]
#[derive(Default)]
struct Context {
    address: u64,
    word: u64,
    task: u64,
}

/// A way to read the kernel's memory.
#[derive(Debug)]
pub struct KernelMemory {
    program: OwnedFd,
}

impl KernelMemory {
    /// Loads the program.
    ///
    /// # Errors
    /// EPERM without CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN), or where the kernel is locked down; EINVAL
    /// from kernels that don't know such programs.
    pub fn open() -> Result<KernelMemory> {
        let address = |pointer: *const u8| u64::try_from(pointer.addr());
        let program = program();
        let too_far = |_| Errno::EINVAL;
        let mut attr = LoadAttr {
            kind: PROG_TYPE_SYSCALL,
            nr_instructions: u32::try_from(program.len()).map_err(too_far)?,
            instructions: address(program.as_ptr().cast()).map_err(too_far)?,
            license: address(LICENSE.as_ptr()).map_err(too_far)?,
            flags: SLEEPABLE,
            ..LoadAttr::default()
        };
        // SAFETY: instructions and licence live through the call, with the lengths given.
        let fd = unsafe { bpf(PROG_LOAD, &mut attr) }?;
        let fd = i32::try_from(fd).map_err(too_far)?;
        Ok(KernelMemory {
            // SAFETY: the call has just returned it to us alone.
            program: unsafe { own(fd) },
        })
    }

    /// The word at an address, which is a multiple of 8.
    ///
    /// # Errors
    /// EFAULT where nothing is.
    pub fn word(&self, address: u64) -> Result<u64> {
        match self.run(address)? {
            (0, context) => Ok(context.word),
            _ => Err(Errno::EFAULT),
        }
    }

    /// The address of the calling thread's `struct task_struct`.
    ///
    /// # Errors
    /// The program could not be run.
    pub fn current_task(&self) -> Result<u64> {
        // Nothing is at 0; the task shows all the same.
        Ok(self.run(0)?.1.task)
    }

    /// What the copy returned, and the context.
    fn run(&self, address: u64) -> Result<(u32, Context)> {
        let mut context = Context {
            address,
            ..Context::default()
        };
        let at = u64::try_from(std::ptr::from_mut(&mut context).addr());
        let mut attr = RunAttr {
            program: self.program.as_raw_fd().cast_unsigned(),
            context_in_size: 24,
            context_in: at.map_err(|_| Errno::EINVAL)?,
            ..RunAttr::default()
        };
        // SAFETY: the context lives through the call, which writes it back, and has the size given.
        unsafe { bpf(PROG_RUN, &mut attr) }?;
        Ok((attr.result, context))
    }
}

fn program() -> [Instruction; 11] {
    const MOVE: u8 = 0xbf;
    const MOVE_NUMBER: u8 = 0xb7;
    const ADD_NUMBER: u8 = 0x07;
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const FRAME: u8 = 10;
    let op = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    };
    [
        op(MOVE, 6, 1, 0, 0),
        op(CALL, 0, 0, 0, GET_CURRENT_TASK),
        op(STORE, 6, 0, 16, 0),
        op(LOAD, 3, 6, 0, 0),
        op(MOVE, 1, FRAME, 0, 0),
        op(ADD_NUMBER, 1, 0, 0, -8),
        op(MOVE_NUMBER, 2, 0, 0, 8),
        op(CALL, 0, 0, 0, PROBE_READ_KERNEL),
        op(LOAD, 1, FRAME, -8, 0),
        op(STORE, 6, 1, 8, 0),
        op(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_at_low_addresses_and_something_at_the_task() {
        let Ok(memory) = KernelMemory::open() else {
            eprintln!("skipped: this kernel or these rights do not allow it");
            return;
        };
        assert_eq!(memory.word(8), Err(Errno::EFAULT));
        let task = memory.current_task().expect("this thread");
        assert!(memory.word(task).is_ok());
    }
}
