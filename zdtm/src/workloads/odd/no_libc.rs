//! A program of 500 bytes: no libc, no interpreter, no heap, no rseq, no thread pointer.
//!
//! The machine code is assembled here and written behind an ELF header into a file, which is then run.

use std::arch::global_asm;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, bail};

use crate::{Stage, Workload, sys};

pub static STATIC: Workload = Workload::new(
    "odd/no-libc",
    "a static program of raw calls, with its state in registers and on the stack",
    run,
);

// r12 counts, r13 keeps the pid, xmm15 a pattern, the stack a word. The directory is the working
// directory's parent. `ready` is made by mkdir; SIGTERM is blocked and waited for by sigtimedwait,
// ten milliseconds at a time.
global_asm!(
    r#"
    .pushsection .rodata, "a"
    .globl zdtm_no_libc_start
    .globl zdtm_no_libc_end
    zdtm_no_libc_start:
        xor r12d, r12d
        mov eax, 39                     // getpid
        syscall
        mov r13, rax
        movabs rax, 0x1122334455667788
        movq xmm15, rax
        push rax
        // Block SIGTERM.
        push 0x4000
        mov eax, 14                     // rt_sigprocmask(SIG_BLOCK, rsp, 0, 8)
        xor edi, edi
        mov rsi, rsp
        xor edx, edx
        mov r10d, 8
        syscall
        // No descriptor, which might be seen while it is open.
        mov eax, 83                     // mkdir(ready, 0700)
        lea rdi, [rip + 20f]
        mov esi, 0x1c0
        syscall
        push 10000000                   // ten milliseconds
        push 0
    2:  inc r12
        mov eax, 128                    // rt_sigtimedwait(set, 0, time, 8)
        lea rdi, [rsp + 16]
        xor esi, esi
        mov rdx, rsp
        mov r10d, 8
        syscall
        cmp rax, 15
        je 3f
        cmp rax, -11                    // the time is over
        je 2b
        cmp rax, -4                     // interrupted
        je 2b
        jmp 9f
    3:  add rsp, 24
        test r12, r12
        jz 9f
        mov eax, 39
        syscall
        cmp rax, r13
        jne 9f
        pop rcx
        movabs rax, 0x1122334455667788
        cmp rcx, rax
        jne 9f
        movq rcx, xmm15
        cmp rcx, rax
        jne 9f
        lea rsi, [rip + 21f]
        call 10f
        mov rdi, rax
        mov eax, 1                      // write
        lea rsi, [rip + 22f]
        mov edx, 5
        syscall
        mov eax, 60                     // exit
        xor edi, edi
        syscall
    9:  lea rsi, [rip + 21f]
        call 10f
        mov rdi, rax
        mov eax, 1
        lea rsi, [rip + 23f]
        mov edx, 37
        syscall
        mov eax, 60
        mov edi, 1
        syscall
    // Makes the file rsi below the parent directory and returns its descriptor.
    10: mov eax, 257                    // openat(AT_FDCWD, rsi, O_WRONLY | O_CREAT, 0600)
        mov edi, -100
        mov edx, 0x41
        mov r10d, 0x180
        syscall
        ret
    20: .asciz "../ready"
    21: .asciz "../result"
    22: .ascii "PASS\n"
    23: .ascii "FAIL: registers, stack or pid differ\n"
    zdtm_no_libc_end:
    .popsection
    "#
);

unsafe extern "C" {
    static zdtm_no_libc_start: u8;
    static zdtm_no_libc_end: u8;
}

/// The machine code above.
fn code() -> Vec<u8> {
    let (start, end) = (&raw const zdtm_no_libc_start, &raw const zdtm_no_libc_end);
    sys::Region {
        addr: start.addr(),
        len: end.addr() - start.addr(),
    }
    .get(0, end.addr() - start.addr())
}

/// An executable of one loaded segment that holds headers and code.
fn executable(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let length = HEADERS + code.len() as u64;
    let mut image = Vec::new();
    let half = |image: &mut Vec<u8>, value: u16| image.extend_from_slice(&value.to_le_bytes());
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    half(&mut image, 2); // an executable
    half(&mut image, 62); // for x86-64
    image.extend_from_slice(&1u32.to_le_bytes());
    for value in [BASE + HEADERS, 64, 0] {
        image.extend_from_slice(&value.to_le_bytes()); // entry, program headers, sections
    }
    image.extend_from_slice(&0u32.to_le_bytes());
    for value in [64, 56, 1, 64, 0, 0] {
        half(&mut image, value);
    }
    // One PT_LOAD, readable and executable, from the start of the file.
    image.extend_from_slice(&1u32.to_le_bytes());
    image.extend_from_slice(&5u32.to_le_bytes());
    for value in [0, BASE, BASE, length, length, 4096] {
        image.extend_from_slice(&value.to_le_bytes());
    }
    image.extend_from_slice(code);
    image
}

/// Makes a program of this machine code, which is entered at its start.
pub fn write_program(path: &Path, code: &[u8]) -> io::Result<()> {
    fs::write(path, executable(code))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

fn run(stage: &Stage) -> Result<()> {
    let path = stage.path("program");
    write_program(&path, &code())?;
    let error = sys::exec(&path, &[]);
    bail!("the program cannot be run: {error}")
}
