//! General registers between ptrace and the image, and interrupted system calls.
//!
//! The image holds registers that are already wound back, as CRIU writes them, so that any engine can set
//! them; what the kernel said about an interrupted call travels beside them ([`super::restart`]).

use firn_proto::{UserX86RegsEntry, UserX86RegsMode};
use firn_sys::ptrace::GeneralRegs;

use super::abi::Abi;
use super::restart::{self, ERESTART_RESTARTBLOCK, Resumption};

const EINTR: i64 = 4;
/// Length of the `syscall` instruction, and of `int 0x80`.
pub(super) const CALL_LEN: u64 = 2;

/// Converts registers of a stopped task to the image's form, winding back an interrupted call. The image
/// says of all threads of a 32-bit program that they are 32-bit ones.
pub fn to_image(regs: &GeneralRegs, abi: Abi) -> UserX86RegsEntry {
    let mut image = UserX86RegsEntry {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax: regs.rax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip: regs.rip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(UserX86RegsMode::Native.into()),
    };
    match restart::pending(regs) {
        Some(restart) if restart.is_restart_block() => image.ax = (-EINTR).cast_unsigned(),
        Some(restart) => rewind(&mut image, restart.nr),
        None => {}
    }
    match (abi, Abi::of_code(regs)) {
        (Abi::Native, _) => image,
        (Abi::Ia32, Abi::Native) => UserX86RegsEntry {
            mode: Some(UserX86RegsMode::Compat.into()),
            ..image
        },
        (Abi::Ia32, Abi::Ia32) => ia32_half(&image),
    }
}

/// What 32-bit code sees of the registers; the rest is left over from the kernel.
fn ia32_half(image: &UserX86RegsEntry) -> UserX86RegsEntry {
    let low = |value: u64| value & u64::from(u32::MAX);
    UserX86RegsEntry {
        r15: 0,
        r14: 0,
        r13: 0,
        r12: 0,
        r11: 0,
        r10: 0,
        r9: 0,
        r8: 0,
        bp: low(image.bp),
        bx: low(image.bx),
        ax: low(image.ax),
        cx: low(image.cx),
        dx: low(image.dx),
        si: low(image.si),
        di: low(image.di),
        orig_ax: low(image.orig_ax),
        ip: low(image.ip),
        flags: low(image.flags),
        sp: low(image.sp),
        mode: Some(UserX86RegsMode::Compat.into()),
        ..*image
    }
}

/// Which kind of program a thread with these registers belongs to.
pub fn abi_of_image(image: &UserX86RegsEntry) -> Abi {
    match image.mode {
        Some(mode) if mode == i32::from(UserX86RegsMode::Compat) => Abi::Ia32,
        _ => Abi::Native,
    }
}

fn rewind(image: &mut UserX86RegsEntry, nr: u64) {
    image.ax = nr;
    image.ip = image.ip.wrapping_sub(CALL_LEN);
}

/// Converts the image's registers to what ptrace sets.
pub fn from_image(image: &UserX86RegsEntry, resumption: Resumption) -> GeneralRegs {
    let mut image = *image;
    let mut orig_rax = u64::MAX;
    match resumption {
        Resumption::AsStored => {}
        Resumption::Again { nr } => rewind(&mut image, nr),
        Resumption::Sleep { nr, .. } | Resumption::Wait { nr, .. } => {
            image.ax = (-ERESTART_RESTARTBLOCK).cast_unsigned();
            orig_rax = nr;
        }
    }
    GeneralRegs {
        r15: image.r15,
        r14: image.r14,
        r13: image.r13,
        r12: image.r12,
        rbp: image.bp,
        rbx: image.bx,
        r11: image.r11,
        r10: image.r10,
        r9: image.r9,
        r8: image.r8,
        rax: image.ax,
        rcx: image.cx,
        rdx: image.dx,
        rsi: image.si,
        rdi: image.di,
        orig_rax,
        rip: image.ip,
        cs: image.cs,
        eflags: image.flags,
        rsp: image.sp,
        ss: image.ss,
        fs_base: image.fs_base,
        gs_base: image.gs_base,
        ds: image.ds,
        es: image.es,
        fs: image.fs,
        gs: image.gs,
    }
}

/// Registers with which an interrupted sleep of 32-bit code goes on: the call is made again by itself,
/// with what is left as the request, which stands in the memory of the task.
pub fn ia32_sleep(image: &UserX86RegsEntry, nr: u64) -> GeneralRegs {
    let regs = from_image(image, Resumption::Again { nr });
    match nr {
        restart::IA32_NANOSLEEP => GeneralRegs {
            rbx: regs.rcx,
            ..regs
        },
        _ => GeneralRegs {
            rdx: regs.rsi,
            ..regs
        },
    }
}

/// Where the instruction stands by which a stopped thread has entered the call that it is in, if it is.
pub fn call_instruction(regs: &GeneralRegs) -> Option<u64> {
    (regs.orig_rax.cast_signed() >= 0).then(|| regs.rip.wrapping_sub(CALL_LEN))
}

macro_rules! word_form {
    ($($register:ident)*) => {
        /// How many registers there are.
        pub const NR_REGISTERS: usize = [$(stringify!($register)),*].len();

        /// All registers as they are.
        pub fn to_words(regs: &GeneralRegs) -> [u64; NR_REGISTERS] {
            [$(regs.$register),*]
        }

        /// Registers out of what [`to_words`] gives.
        pub fn from_words([$($register),*]: [u64; NR_REGISTERS]) -> GeneralRegs {
            GeneralRegs { $($register),* }
        }
    };
}

word_form! {
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss
    fs_base gs_base ds es fs gs
}

/// Result of a system call at its exit stop.
pub fn syscall_result(regs: &GeneralRegs) -> i64 {
    regs.rax.cast_signed()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn stopped(rax: i64, orig: i64) -> GeneralRegs {
        let image = UserX86RegsEntry {
            ip: 0x1000,
            ..UserX86RegsEntry::default()
        };
        let mut regs = from_image(&image, Resumption::AsStored);
        regs.rax = rax.cast_unsigned();
        regs.orig_rax = orig.cast_unsigned();
        regs
    }

    #[test]
    fn registers_come_back_from_words() {
        let regs = GeneralRegs {
            gs: 7,
            r15: 8,
            ..stopped(-4, 35)
        };
        assert_eq!(from_words(to_words(&regs)), regs);
    }

    #[test]
    fn an_interrupted_read_is_wound_back() {
        let image = to_image(&stopped(-512, 0), Abi::Native);
        assert_eq!((image.ax, image.ip), (0, 0xffe));
    }

    #[test]
    fn a_sleep_becomes_eintr_for_other_engines() {
        let image = to_image(&stopped(-516, 35), Abi::Native);
        assert_eq!((image.ax.cast_signed(), image.ip), (-4, 0x1000));
    }

    #[test]
    fn a_task_outside_a_call_is_left_alone() {
        let regs = stopped(-512, -1);
        assert_eq!(restart::pending(&regs), None);
        assert_eq!(to_image(&regs, Abi::Native).ip, 0x1000);
    }

    pub fn in_ia32_code(rax: i64, orig: i64) -> GeneralRegs {
        GeneralRegs {
            cs: 0x23,
            rcx: 0xff80_1000,
            rsp: 0xff80_0000,
            r11: 0x246,
            ..stopped(rax, orig)
        }
    }

    #[test]
    fn of_32_bit_code_the_image_has_what_it_sees() {
        let image = to_image(&in_ia32_code(-1, -1), Abi::Ia32);
        assert_eq!((image.ax, image.orig_ax), (0xffff_ffff, 0xffff_ffff));
        assert_eq!((image.r11, image.sp), (0, 0xff80_0000));
        assert_eq!(abi_of_image(&image), Abi::Ia32);
        let native = to_image(&in_ia32_code(-1, -1), Abi::Native);
        assert_eq!((native.r11, abi_of_image(&native)), (0x246, Abi::Native));
    }

    #[test]
    fn a_32_bit_sleep_goes_on_with_its_remainder_as_the_request() {
        let image = to_image(&in_ia32_code(-516, 162), Abi::Ia32);
        let again = ia32_sleep(&image, 162);
        assert_eq!((again.rip, again.rax), (0xffe, 162));
        assert_eq!((again.rbx, again.rcx), (0xff80_1000, 0xff80_1000));
    }
}
