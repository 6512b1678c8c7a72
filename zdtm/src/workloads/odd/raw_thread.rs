//! Threads that libc knows nothing of.

use std::arch::{asm, global_asm};
use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Stage, Workload, proc};

pub static RAW: Workload = Workload::new(
    "odd/raw-thread",
    "a thread by raw clone: no thread pointer, no rseq, no robust list",
    raw,
);
pub static NO_STACK: Workload = Workload::new(
    "odd/no-stack",
    "a thread that spins without any stack",
    no_stack,
);

unsafe extern "C" {
    /// Makes a thread with the given stack pointer that counts the word at `word` up until SIGTERM
    /// has come, sleeping in between when `sleep` is not 0, and then ends; returns its tid.
    fn zdtm_raw_thread(stack: usize, word: usize, sleep: usize, tid: usize) -> i64;
}

const CLONE_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_CHILD_CLEARTID;

global_asm!(
    r"
    .pushsection .text
    .globl zdtm_raw_thread
    zdtm_raw_thread:
        push rbx
        push r12
        mov rbx, rsi
        mov r12, rdx
        mov r10, rcx                    // the word that is cleared at the end
        mov rsi, rdi
        mov edi, {flags}
        xor edx, edx
        xor r8d, r8d
        mov eax, 56                     // clone
        syscall
        test rax, rax
        jz 2f
        pop r12
        pop rbx
        ret
    2:  inc dword ptr [rbx]
        test r12, r12
        jz 3f
        push 1000000                    // one millisecond
        push 0
        mov eax, 35                     // nanosleep
        mov rdi, rsp
        xor esi, esi
        syscall
        add rsp, 16
    3:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 2b
        mov eax, 60                     // exit, of this thread only
        xor edi, edi
        syscall
    .popsection
    ",
    flags = const CLONE_FLAGS,
    stop = sym crate::stop::STOPPED,
);

fn run(stage: &Stage, with_stack: bool) -> Result<()> {
    let memory = Region::anon(4 * PAGE)?;
    let (counter, tid) = (memory.word(0), memory.word(64));
    tid.store(1, Ordering::SeqCst);
    let stack = if with_stack { memory.end() } else { 16 };
    // Signals go to the main thread: a handler could not run there.
    let old = sys::mask(libc::SIG_SETMASK, !0)?;
    // SAFETY: the thread uses only the memory given to it, which is never unmapped.
    let thread = unsafe {
        zdtm_raw_thread(
            stack,
            memory.addr,
            usize::from(with_stack),
            memory.addr + 64,
        )
    };
    sys::mask(libc::SIG_SETMASK, old)?;
    ensure!(thread > 0, "clone gave {thread}");
    let moves = || {
        let before = counter.load(Ordering::SeqCst);
        let start = sys::clock(libc::CLOCK_MONOTONIC);
        while counter.load(Ordering::SeqCst) == before && !stage.stopping() {
            let passed = sys::clock(libc::CLOCK_MONOTONIC) - start;
            ensure!(passed.as_secs() < 10, "the thread does not count any more");
        }
        Ok(())
    };
    moves()?;
    stage.ready()?;
    while !stage.stopping() {
        moves()?;
        sys::pause_for(1);
        let known = proc::threads("self")?
            .iter()
            .any(|&tid| i64::from(tid) == thread);
        ensure!(known || stage.stopping(), "the thread {thread} is gone");
    }
    // The kernel clears the word when the thread ends.
    let start = sys::clock(libc::CLOCK_MONOTONIC);
    while tid.load(Ordering::SeqCst) != 0 {
        let passed = sys::clock(libc::CLOCK_MONOTONIC) - start;
        ensure!(
            passed.as_secs() < 10,
            "the thread's end does not clear its word"
        );
        // SAFETY: a hint to the processor.
        unsafe { asm!("pause", options(nomem, nostack)) };
    }
    Ok(())
}

fn raw(stage: &Stage) -> Result<()> {
    run(stage, true)
}

fn no_stack(stage: &Stage) -> Result<()> {
    run(stage, false)
}
