//! 32-bit programs: which tasks run one, and their thread-local segments.
//!
//! Such a task is worked on like any other: for a while it runs the 64-bit executor, because a tracer may
//! set its code segment. What differs:
//!
//! | state | of a 32-bit task |
//! |---|---|
//! | registers | the image has 32 bits of each, and no bases of segments |
//! | thread pointer | one of three thread-local segments, which a segment register selects |
//! | signal actions | set by a 32-bit call, from which the kernel takes the shape of the frames |
//! | robust futex list | a second one, which only 32-bit calls set and tell |
//! | vdso | the 32-bit one, mapped anew by arch_prctl |
//! | arena | below 4 GiB, where 32-bit calls reach it |
//!
//! The kernel keeps no other mark of a 32-bit program but the limit of its address space, 4 GiB less two
//! pages, which only exec sets: a restored task could map the last two pages as well.
//!
//! Not supported: x32 programs, which make 64-bit calls with 32-bit pointers, and segments of a task's own
//! descriptor table (modify_ldt), which no outside interface tells.
//!
//! Source: linux arch/x86/kernel/ptrace.c, tls.c, arch/x86/entry/vdso/vma.c.

use std::fs::File;
use std::io::Read;

use firn_proto::{ThreadInfoX86, UserDescT};
use firn_sys::ptrace::{GeneralRegs, SegmentDescriptor};
use firn_sys::{Pid, Result, nr, ptrace};

use crate::arch::Abi;
use crate::obstacle::Obstacle;
use crate::program::{Arena, Program, ProgramId, Rule, Slot};

/// Beginning of an ELF file for 32-bit programs.
const ELF32: [u8; 5] = *b"\x7fELF\x01";
/// Where the machine of an ELF file stands, and x86-64 there, in which x32 differs from ia32.
const MACHINE_AT: usize = 18;
const X86_64: [u8; 2] = [62, 0];
/// The thread-local entries of the global descriptor table.
const SEGMENTS: std::ops::RangeInclusive<u32> = 12..=14;
/// Bit of a descriptor that says that there is none.
const NOT_PRESENT: u32 = 1 << 5;

fn executable(pid: Pid) -> Option<[u8; 20]> {
    let mut begin = [0; 20];
    let mut exe = File::open(format!("/proc/{pid}/exe")).ok()?;
    exe.read_exact(&mut begin).ok()?;
    Some(begin)
}

/// The obstacle that a running x32 program is.
pub fn survey(pid: Pid) -> Option<Obstacle> {
    let begin = executable(pid)?;
    let is_x32 = begin.starts_with(&ELF32) && begin[MACHINE_AT..] == X86_64;
    is_x32.then(|| Obstacle {
        pid,
        object: "its program".to_owned(),
        reason: "x32 code is not supported".to_owned(),
        hint: Some("run the program's 64-bit build".to_owned()),
    })
}

/// The obstacle that a stopped thread with segments of its process's own table is.
pub fn local_segments(pid: Pid, tid: Pid) -> Obstacle {
    local_table(pid, format!("thread {tid}"))
}

fn local_table(pid: Pid, object: String) -> Obstacle {
    Obstacle {
        pid,
        object,
        reason: "segments set by modify_ldt are not supported".to_owned(),
        hint: None,
    }
}

/// Which kind of program a stopped task runs, by its threads and their registers.
pub fn abi(threads: &[(Pid, GeneralRegs)]) -> Abi {
    // The executable costs more to look at than registers, and few tasks need it.
    let is_there_now = |(_, regs): &(Pid, GeneralRegs)| Abi::of_code(regs) == Abi::Ia32;
    let is_ia32 = || executable(threads[0].0).is_some_and(|begin| begin.starts_with(&ELF32));
    match threads.iter().any(is_there_now) && is_ia32() {
        true => Abi::Ia32,
        false => Abi::Native,
    }
}

/// The question whether a process has a descriptor table of its own.
#[derive(Debug)]
pub struct LocalTableQuestion(Slot);

/// Adds the question.
pub fn ask_local_table(p: &mut Program) -> LocalTableQuestion {
    const READ: u32 = 0;
    let table = p.space(8);
    // ENOSYS where the kernel was built without.
    LocalTableQuestion(p.call_to_slot(
        nr::MODIFY_LDT,
        &[READ.into(), table.into(), 8.into()],
        Rule::Any,
        "asking for local segments",
    ))
}

impl LocalTableQuestion {
    /// The obstacle that the process's own descriptor table is.
    pub fn obstacle(&self, arena: &Arena, id: ProgramId, pid: Pid) -> Option<Obstacle> {
        let len = arena.slot(id, self.0);
        (len > 0).then(|| local_table(pid, "its local descriptor table".to_owned()))
    }
}

/// Reads the thread-local segments of a stopped thread: all of a 32-bit program, those that are there of
/// any other.
///
/// # Errors
/// ESRCH.
pub fn segments(tid: Pid, abi: Abi) -> Result<Vec<UserDescT>> {
    let mut segments = Vec::new();
    for entry in SEGMENTS {
        match ptrace::thread_area(tid, entry) {
            Ok(descriptor) if abi == Abi::Ia32 || descriptor.flags & NOT_PRESENT == 0 => {
                segments.push(to_image(descriptor));
            }
            Ok(_) => {}
            // EIO: no kernel for 32-bit programs.
            Err(_) if abi == Abi::Native => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(segments)
}

/// Sets the thread-local segments of a stopped thread, after its registers: the base of a register that
/// selects one is taken from it.
///
/// # Errors
/// ESRCH; EINVAL for descriptors that the kernel refuses.
pub fn set_segments(tid: Pid, info: &ThreadInfoX86) -> Result<()> {
    let there = info.tls.iter().filter(|entry| !entry.seg_not_present);
    for entry in there.filter(|entry| SEGMENTS.contains(&entry.entry_number)) {
        ptrace::set_thread_area(tid, from_image(entry))?;
    }
    Ok(())
}

fn to_image(descriptor: SegmentDescriptor) -> UserDescT {
    let bit = |nth: u32| descriptor.flags >> nth & 1 == 1;
    UserDescT {
        entry_number: descriptor.entry,
        base_addr: descriptor.base,
        limit: descriptor.limit,
        seg_32bit: bit(0),
        contents_l: bit(1),
        contents_h: bit(2),
        read_exec_only: bit(3),
        limit_in_pages: bit(4),
        seg_not_present: bit(5),
        usable: bit(6),
    }
}

fn from_image(image: &UserDescT) -> SegmentDescriptor {
    let bits = [
        image.seg_32bit,
        image.contents_l,
        image.contents_h,
        image.read_exec_only,
        image.limit_in_pages,
        image.seg_not_present,
        image.usable,
    ];
    let flags = (0..).zip(bits).map(|(nth, bit)| u32::from(bit) << nth);
    SegmentDescriptor {
        entry: image.entry_number,
        base: image.base_addr,
        limit: image.limit,
        flags: flags.sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_survive_the_image() {
        // What libc sets, and an empty entry.
        for flags in [0x51, 0x28, 0x7f, 0x04] {
            let descriptor = SegmentDescriptor {
                entry: 12,
                base: 0x09a6_e380,
                limit: 0xf_ffff,
                flags,
            };
            assert_eq!(from_image(&to_image(descriptor)), descriptor);
        }
    }

    #[test]
    fn this_program_is_no_32_bit_one() {
        assert_eq!(survey(Pid::this()), None);
        assert_eq!(abi(&[]), Abi::Native);
    }
}
