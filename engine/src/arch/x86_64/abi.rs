//! The two kinds of code that run on this kernel, and how they call it.
//!
//! | | native | ia32 |
//! |---|---|---|
//! | code segment | 0x33 | 0x23 |
//! | instruction | `syscall` | `int 0x80`; the vdso's `sysenter` and `syscall` return behind an `int 0x80` |
//! | number, result | rax | eax |
//! | arguments | rdi rsi rdx r10 r8 r9 | ebx ecx edx esi edi ebp |
//!
//! A tracer may set either code segment in any task, so a 32-bit task can run 64-bit code for a while.
//! `int 0x80` makes 32-bit calls from 64-bit code, too.
//!
//! Source: linux arch/x86/entry/entry_64_compat.S, arch/x86/kernel/ptrace.c.

use firn_sys::ptrace::GeneralRegs;

/// Code segment of 64-bit user code.
const NATIVE_CODE: u64 = 0x33;
/// Code segment of 32-bit user code.
const IA32_CODE: u64 = 0x23;
/// Data and stack segment of both.
const USER_DATA: u64 = 0x2b;
/// Bit of a selector that names the local descriptor table.
const LOCAL_TABLE: u64 = 4;
/// Interrupts are on; the other bit is always set.
pub(super) const PLAIN_FLAGS: u64 = 0x202;

/// Which kind of code a program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Abi {
    /// 64-bit code.
    #[default]
    Native,
    /// 32-bit code.
    Ia32,
}

impl Abi {
    /// The kind of code that a stopped thread runs at this moment.
    pub fn of_code(regs: &GeneralRegs) -> Abi {
        match regs.cs {
            IA32_CODE => Abi::Ia32,
            _ => Abi::Native,
        }
    }

    /// The bytes of the instruction that makes a system call.
    pub fn call_instruction(self) -> [u8; 2] {
        match self {
            Abi::Native => [0x0f, 0x05],
            Abi::Ia32 => [0xcd, 0x80],
        }
    }

    /// Number of the call that sleeps until a signal comes and takes no arguments: pause.
    pub fn sleep_nr(self) -> u64 {
        match self {
            Abi::Native => 34,
            Abi::Ia32 => 29,
        }
    }

    /// Registers that make a stopped task execute one system call at `instruction`.
    pub fn at_call(
        self,
        old: &GeneralRegs,
        instruction: u64,
        nr: u64,
        args: [u64; 6],
    ) -> GeneralRegs {
        let regs = GeneralRegs {
            rip: instruction,
            rax: nr,
            orig_rax: u64::MAX,
            eflags: PLAIN_FLAGS,
            ss: USER_DATA,
            ..*old
        };
        match self {
            Abi::Native => GeneralRegs {
                cs: NATIVE_CODE,
                rdi: args[0],
                rsi: args[1],
                rdx: args[2],
                r10: args[3],
                r8: args[4],
                r9: args[5],
                ..regs
            },
            Abi::Ia32 => GeneralRegs {
                cs: IA32_CODE,
                rbx: args[0],
                rcx: args[1],
                rdx: args[2],
                rsi: args[3],
                rdi: args[4],
                rbp: args[5],
                ..regs
            },
        }
    }
}

/// Registers that make a stopped task of any kind run the executor from its first instruction.
pub fn at_executor(old: &GeneralRegs, executor: u64, record: u64, context: u64) -> GeneralRegs {
    GeneralRegs {
        cs: NATIVE_CODE,
        ss: USER_DATA,
        rip: executor,
        rbp: record,
        r15: context,
        rsp: 0,
        rax: 0,
        orig_rax: u64::MAX,
        eflags: PLAIN_FLAGS,
        ..*old
    }
}

/// True where a segment register selects an entry of the task's own descriptor table (modify_ldt).
pub fn uses_local_segments(regs: &GeneralRegs) -> bool {
    [regs.cs, regs.ss, regs.ds, regs.es, regs.fs, regs.gs]
        .iter()
        .any(|selector| selector & LOCAL_TABLE != 0)
}

#[cfg(test)]
mod tests {
    use firn_proto::UserX86RegsEntry;

    use super::*;
    use crate::arch::regs;
    use crate::arch::restart::Resumption;

    #[test]
    fn arguments_go_where_each_kind_of_code_has_them() {
        let old = regs::from_image(&UserX86RegsEntry::default(), Resumption::AsStored);
        let args = [1, 2, 3, 4, 5, 6];
        let native = Abi::Native.at_call(&old, 0x1000, 9, args);
        let got = [
            native.rdi, native.rsi, native.rdx, native.r10, native.r8, native.r9,
        ];
        assert_eq!((native.cs, native.rax, got), (0x33, 9, args));
        let ia32 = Abi::Ia32.at_call(&old, 0x1000, 192, args);
        let got = [ia32.rbx, ia32.rcx, ia32.rdx, ia32.rsi, ia32.rdi, ia32.rbp];
        assert_eq!((ia32.cs, ia32.rax, got), (0x23, 192, args));
        assert_eq!(Abi::of_code(&ia32), Abi::Ia32);
        assert_eq!(Abi::of_code(&native), Abi::Native);
    }

    #[test]
    fn a_selector_of_the_local_table_is_seen() {
        let old = regs::from_image(&UserX86RegsEntry::default(), Resumption::AsStored);
        assert!(!uses_local_segments(&GeneralRegs { gs: 0x63, ..old }));
        assert!(uses_local_segments(&GeneralRegs { gs: 0x0f, ..old }));
    }
}
