//! Shadow stacks of threads (CET).

use std::arch::asm;
use std::fs;
use std::io;

const ARCH_SHSTK_ENABLE: i64 = 0x5001;
const ARCH_SHSTK_LOCK: i64 = 0x5003;
/// Feature: calls and returns use the shadow stack.
pub const SHADOW_STACK: i64 = 1;
/// Feature: `wrss` writes to it.
pub const SHADOW_WRITES: i64 = 2;

const MAP_SHADOW_STACK: i64 = 453;

/// Reads why there are no shadow stacks here, or nothing where there are.
pub fn no_shadow_stacks() -> Option<io::Error> {
    super::call_plain(MAP_SHADOW_STACK, [0, 4096, 0, 0, 0, 0]).err()
}

/// Switches this thread's shadow stack on and goes on with `then`: the frames that have begun before can't be
/// returned to.
pub fn go_on_with_shadow_stack(then: impl FnOnce() -> i32) -> ! {
    let enabled: i64;
    // SAFETY: a system call without pointers; nothing returns from this function, whose caller's address is
    // not on the shadow stack.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") libc::SYS_arch_prctl => enabled,
            in("rdi") ARCH_SHSTK_ENABLE,
            in("rsi") SHADOW_STACK,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if enabled != 0 {
        eprintln!("no shadow stack: errno {}", -enabled);
        super::exit_now(1);
    }
    super::exit_now(then())
}

/// Lets this thread write to its shadow stack.
pub fn allow_shadow_writes() -> io::Result<()> {
    let args = [ARCH_SHSTK_ENABLE, SHADOW_WRITES, 0, 0, 0, 0];
    super::call_plain(libc::SYS_arch_prctl, args).map(drop)
}

/// Forbids this thread to switch features.
pub fn lock_shadow_stack(features: i64) -> io::Result<()> {
    let args = [ARCH_SHSTK_LOCK, features, 0, 0, 0, 0];
    super::call_plain(libc::SYS_arch_prctl, args).map(drop)
}

/// The shadow stack pointer of the caller's frame; 0 where there is none.
#[inline(always)]
pub fn shadow_stack_pointer() -> u64 {
    let mut pointer = 0u64;
    // SAFETY: rdsspq only sets its register, and nothing on a CPU without it.
    unsafe {
        asm!(".byte 0xf3, 0x48, 0x0f, 0x1e, 0xc8", inout("rax") pointer, options(nomem, nostack));
    }
    pointer
}

/// Writes one word below the shadow stack's top, where no frame is, and reads it back.
pub fn write_below_shadow_stack(value: u64) -> u64 {
    let at = shadow_stack_pointer() - 256;
    let read: u64;
    // SAFETY: wrssq [rax], rcx; the word lies in the mapped part of the shadow stack, and no frame uses it.
    unsafe {
        asm!(
            ".byte 0x48, 0x0f, 0x38, 0xf6, 0x08",
            "mov {read}, [rax]",
            in("rax") at,
            in("rcx") value,
            read = out(reg) read,
            options(nostack),
        );
    }
    read
}

/// What /proc says of this thread's features and locks.
pub fn shadow_stack_features() -> io::Result<Vec<String>> {
    let status = fs::read_to_string(format!("/proc/self/task/{}/status", super::tid()))?;
    let lines = status
        .lines()
        .filter(|line| line.starts_with("x86_Thread_features"));
    Ok(lines.map(str::to_owned).collect())
}
