//! The executor: the only code of Firn that ever runs inside another task.
//!
//! It has no stack (`rsp` is 0 while it runs), touches no memory but the arena, and keeps its state in
//! registers that `syscall` and `int 0x80` preserve:
//!
//! | register | holds |
//! |---|---|
//! | rbp | the current record |
//! | r15 | the program's context |
//! | r12, r13 | record and context of the child while a Fork record's clone3 runs |
//! | r14, rbx, rcx | scratch |
//!
//! All signals must be blocked before it starts: a handler's frame would be pushed to address 0.
//! Record and context offsets are those of `program/record.rs`.

use std::arch::global_asm;

use super::abi::Abi;

global_asm!(
    ".pushsection .rodata.firn_executor, \"a\", @progbits",
    ".balign 64",
    ".globl firn_executor_start",
    ".hidden firn_executor_start",
    "firn_executor_start:",
    "1:  movzx eax, byte ptr [rbp]",
    "    test eax, eax",
    "    jz 20f",
    "    cmp eax, 1",
    "    je 30f",
    "    cmp eax, 2",
    "    je 40f",
    "    cmp eax, 3",
    "    je 50f",
    "    cmp eax, 4",
    "    je 60f",
    "    cmp eax, 5",
    "    je 90f",
    "    mov rax, -38",
    "    jmp 70f",
    // Call: load the arguments, through a pointer where the indirect bit says so.
    "20: movzx ebx, byte ptr [rbp + 2]",
    "    mov rdi, [rbp + 8]",
    "    mov rsi, [rbp + 16]",
    "    mov rdx, [rbp + 24]",
    "    mov r10, [rbp + 32]",
    "    mov r8, [rbp + 40]",
    "    mov r9, [rbp + 48]",
    "    test ebx, ebx",
    "    jz 22f",
    "    test bl, 1",
    "    jz 21f",
    "    mov rdi, [rdi]",
    "21: test bl, 2",
    "    jz 21f",
    "    mov rsi, [rsi]",
    "21: test bl, 4",
    "    jz 21f",
    "    mov rdx, [rdx]",
    "21: test bl, 8",
    "    jz 21f",
    "    mov r10, [r10]",
    "21: test bl, 16",
    "    jz 21f",
    "    mov r8, [r8]",
    "21: test bl, 32",
    "    jz 22f",
    "    mov r9, [r9]",
    "22: movzx eax, word ptr [rbp + 4]",
    "    test byte ptr [rbp + 3], 2",
    "    jnz 80f",
    "    syscall",
    // Check the result in rax: keep it, retry it, or hold it against the rule.
    "23: movzx ecx, word ptr [rbp + 6]",
    "    test ecx, ecx",
    "    jz 24f",
    "    mov r14, [r15 + 24]",
    "    mov [r14 + rcx*8 - 8], rax",
    "24: test byte ptr [rbp + 3], 1",
    "    jz 25f",
    "    cmp rax, -4",
    "    je 1b",
    "    cmp rax, -11",
    "    je 1b",
    "25: movzx ecx, byte ptr [rbp + 1]",
    "    cmp ecx, 2",
    "    je 29f",
    "    cmp ecx, 1",
    "    jne 26f",
    "    cmp rax, [rbp + 56]",
    "    je 29f",
    "    jmp 70f",
    "26: cmp ecx, 3",
    "    jne 27f",
    "    cmp rax, [rbp + 56]",
    "    je 29f",
    "27: cmp rax, -4095",
    "    jae 70f",
    "29: add rbp, 64",
    "    jmp 1b",
    // Wait: futex(word, FUTEX_WAIT, seen) until the word is large enough.
    "30: mov rdi, [rbp + 8]",
    "    mov edx, [rdi]",
    "    cmp edx, [rbp + 16]",
    "    jae 29b",
    "    xor esi, esi",
    "    xor r10d, r10d",
    "    mov eax, 202",
    "    syscall",
    "    jmp 30b",
    // Post: increment, then futex(word, FUTEX_WAKE, everybody).
    "40: mov rdi, [rbp + 8]",
    "    lock inc dword ptr [rdi]",
    "    mov esi, 1",
    "    mov edx, 0x7fffffff",
    "    mov eax, 202",
    "    syscall",
    "    jmp 29b",
    // Fork: the child starts over with the record and context left in r12 and r13.
    "50: mov r12, [rbp + 24]",
    "    mov r13, [rbp + 32]",
    "    mov rdi, [rbp + 8]",
    "    mov rsi, [rbp + 16]",
    "    mov eax, 435",
    "    syscall",
    "    test rax, rax",
    "    jnz 23b",
    "    mov rbp, r12",
    "    mov r15, r13",
    "    jmp 1b",
    // Park: say so and sleep; ptrace takes over.
    "60: mov dword ptr [r15], 1",
    "    mov rdi, [r15 + 32]",
    "61: lock inc dword ptr [rdi]",
    "    mov esi, 1",
    "    mov edx, 0x7fffffff",
    "    mov eax, 202",
    "    syscall",
    "62: mov eax, 34",
    "    syscall",
    "    jmp 62b",
    // Fail: leave record and result in the context, then sleep like a parked program.
    "70: mov [r15 + 8], rbp",
    "    mov [r15 + 16], rax",
    "    mov dword ptr [r15], 2",
    "    mov rdi, [r15 + 40]",
    "    jmp 61b",
    // A 32-bit call, of at most five arguments: the sixth would take the record's register.
    "80: mov ebx, edi",
    "    mov ecx, esi",
    "    mov esi, r10d",
    "    mov edi, r8d",
    "    int 0x80",
    "    jmp 23b",
    // Segments: the access rights of entries 14, 13 and 12 of the table can be loaded where they are in use.
    "90: xor eax, eax",
    "    mov edx, 0x73",
    "91: add eax, eax",
    "    lar ecx, edx",
    "    jnz 92f",
    "    inc eax",
    "92: sub edx, 8",
    "    cmp edx, 0x63",
    "    jae 91b",
    "    jmp 23b",
    ".globl firn_executor_end",
    ".hidden firn_executor_end",
    "firn_executor_end:",
    ".popsection",
);

unsafe extern "C" {
    static firn_executor_start: u8;
    static firn_executor_end: u8;
}

/// The executor's machine code; it may be copied to any address.
pub fn executor_code() -> &'static [u8] {
    let start = &raw const firn_executor_start;
    let end = &raw const firn_executor_end;
    let len = end.addr() - start.addr();
    // SAFETY: both symbols delimit one read-only section of this binary, defined right above.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// Offset in the executor of an instruction that makes a system call.
///
/// # Panics
/// Never: the executor does little else.
pub fn executor_syscall_offset() -> u64 {
    let code = executor_code();
    let instruction = Abi::Native.call_instruction();
    let at = code.windows(2).position(|pair| pair == instruction);
    u64::try_from(at.expect("the executor makes system calls")).expect("a small offset")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_a_fraction_of_a_page() {
        let code = executor_code();
        assert!((200..1024).contains(&code.len()), "{} bytes", code.len());
    }
}
