//! Loops that fill registers from memory, spin until SIGTERM, and store the registers.
//!
//! While a loop spins, the only copy of the values is in the registers. It polls the stop word with
//! `mov` and `jecxz`, which leave the flags alone, so that these are held too.

use std::arch::global_asm;

/// Memory that a loop fills its registers from and stores them to.
#[repr(C, align(64))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Values to load.
    pub load: [u64; 320],
    /// Values stored afterwards.
    pub store: [u64; 320],
}

/// Distance from `load` to `store`, as the assembly has it.
const STORE: usize = 2560;
const _: () = assert!(std::mem::offset_of!(Block, store) == STORE);

impl Block {
    /// A block whose values are all different.
    pub fn new(seed: u64) -> Block {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            state ^ (state >> 29)
        };
        Block {
            load: std::array::from_fn(|_| next()),
            store: [0; 320],
        }
    }
}

/// One of the loops below.
pub type Spin = unsafe extern "C" fn(*mut Block);

unsafe extern "C" {
    /// Words 0..13 into rax rbx rdx rsi rdi rbp r8..r14, word 14 into r15, word 15 into the flags.
    pub fn zdtm_spin_general(block: *mut Block);
    /// Eight 80-bit values, one in each 16 bytes, into st7..st0; the low half of word 16 into the control word.
    pub fn zdtm_spin_x87(block: *mut Block);
    /// Words 0..32 into xmm0..xmm15, the low half of word 32 into MXCSR.
    pub fn zdtm_spin_sse(block: *mut Block);
    /// Words 0..64 into ymm0..ymm15.
    pub fn zdtm_spin_avx(block: *mut Block);
    /// Words 0..256 into zmm0..zmm31, words 256..264 into k0..k7.
    pub fn zdtm_spin_avx512(block: *mut Block);
}

global_asm!(
    r"
    .pushsection .text
    .globl zdtm_spin_general
    zdtm_spin_general:
        push rbx
        push rbp
        push r12
        push r13
        push r14
        push r15
        push rdi
        push qword ptr [rdi + 120]
        popfq
        mov rax, [rdi]
        mov rbx, [rdi + 8]
        mov rdx, [rdi + 16]
        mov rsi, [rdi + 24]
        mov rbp, [rdi + 40]
        mov r8, [rdi + 48]
        mov r9, [rdi + 56]
        mov r10, [rdi + 64]
        mov r11, [rdi + 72]
        mov r12, [rdi + 80]
        mov r13, [rdi + 88]
        mov r14, [rdi + 96]
        mov r15, [rdi + 104]
        mov rdi, [rdi + 32]
    2:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 2b
        pop rcx
        pushfq
        mov [rcx + {store}], rax
        mov [rcx + {store} + 8], rbx
        mov [rcx + {store} + 16], rdx
        mov [rcx + {store} + 24], rsi
        mov [rcx + {store} + 32], rdi
        mov [rcx + {store} + 40], rbp
        mov [rcx + {store} + 48], r8
        mov [rcx + {store} + 56], r9
        mov [rcx + {store} + 64], r10
        mov [rcx + {store} + 72], r11
        mov [rcx + {store} + 80], r12
        mov [rcx + {store} + 88], r13
        mov [rcx + {store} + 96], r14
        mov [rcx + {store} + 104], r15
        pop qword ptr [rcx + {store} + 120]
        cld
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbp
        pop rbx
        ret

    .globl zdtm_spin_x87
    zdtm_spin_x87:
        fninit
        fldcw word ptr [rdi + 128]
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7
        fld tbyte ptr [rdi + 16 * \n]
        .endr
    2:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 2b
        fnstcw word ptr [rdi + {store} + 128]
        .irp n, 7, 6, 5, 4, 3, 2, 1, 0
        fstp tbyte ptr [rdi + {store} + 16 * \n]
        .endr
        fninit
        ret

    .globl zdtm_spin_sse
    zdtm_spin_sse:
        sub rsp, 8
        stmxcsr dword ptr [rsp]
        ldmxcsr dword ptr [rdi + 256]
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups xmm\n, [rdi + 16 * \n]
        .endr
    2:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 2b
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups [rdi + {store} + 16 * \n], xmm\n
        .endr
        stmxcsr dword ptr [rdi + {store} + 256]
        ldmxcsr dword ptr [rsp]
        add rsp, 8
        ret

    .globl zdtm_spin_avx
    zdtm_spin_avx:
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovups ymm\n, [rdi + 32 * \n]
        .endr
    2:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 2b
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovups [rdi + {store} + 32 * \n], ymm\n
        .endr
        vzeroupper
        ret

    .globl zdtm_spin_avx512
    zdtm_spin_avx512:
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7
        kmovq k\n, qword ptr [rdi + 2048 + 8 * \n]
        .endr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vmovups zmm\n, [rdi + 64 * \n]
        .endr
    2:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 2b
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vmovups [rdi + {store} + 64 * \n], zmm\n
        .endr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7
        kmovq qword ptr [rdi + {store} + 2048 + 8 * \n], k\n
        .endr
        vzeroupper
        ret
    .popsection
    ",
    stop = sym crate::stop::STOPPED,
    store = const STORE,
);
