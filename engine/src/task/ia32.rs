//! 32-bit code, which is refused: registers, thread-local segments and the vdso of such a task are others, and
//! the executor is 64-bit code.
//!
//! The executable tells it of a running program; what a stopped thread runs at that moment, the size of its
//! registers: also a 64-bit program may jump into 32-bit code.
//!
//! Source: linux arch/x86/kernel/ptrace.c, task_user_regset_view.

use std::fs::File;
use std::io::Read;

use firn_sys::{Pid, ptrace};

use crate::obstacle::Obstacle;
use crate::tree::Task;

/// Beginning of an ELF file for 32-bit machines.
const ELF32: [u8; 5] = *b"\x7fELF\x01";
/// Size of the general registers of 64-bit code.
const GENERAL_REGS: usize = 216;

/// The obstacle that a running 32-bit program is.
pub fn survey(pid: Pid) -> Option<Obstacle> {
    let mut begin = [0; ELF32.len()];
    let mut exe = File::open(format!("/proc/{pid}/exe")).ok()?;
    exe.read_exact(&mut begin).ok()?;
    (begin == ELF32).then(|| obstacle(pid, "its program".to_owned()))
}

/// The obstacle that a stopped thread in 32-bit code is.
pub fn survey_frozen(task: &Task) -> Option<Obstacle> {
    let is_ia32 = |tid: &&Pid| {
        ptrace::general_regs_size(**tid).is_ok_and(|size| size != GENERAL_REGS)
            || ptrace::general_regs(**tid).is_ok_and(|regs| regs.cs != LONG_MODE_CS)
    };
    let tid = task.threads.iter().find(is_ia32)?;
    Some(obstacle(task.pid, format!("thread {tid}")))
}

/// Code segment of 64-bit user code.
const LONG_MODE_CS: u64 = 0x33;

fn obstacle(pid: Pid, object: String) -> Obstacle {
    Obstacle {
        pid,
        object,
        reason: "32-bit code is not supported".to_owned(),
        hint: Some("run the program's 64-bit build".to_owned()),
    }
}
