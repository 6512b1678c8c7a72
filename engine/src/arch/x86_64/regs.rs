//! General registers between ptrace and the image, and interrupted system calls.
//!
//! A task that is stopped inside a system call carries the kernel's private restart code in `rax`
//! (-512, -513, -514 or -516) and the call's number in `orig_rax`. The image holds registers that are
//! already wound back, as CRIU writes them, so that any engine can set them; what the kernel said
//! travels beside them in the `firn_restart` extension, so that our own restore can do better than
//! EINTR.
//!
//! Source: linux arch/x86/kernel/signal.c, arch_do_signal_or_restart.

use firn_proto::{FirnRestartEntry, UserX86RegsEntry, UserX86RegsMode};
use firn_sys::ptrace::GeneralRegs;

use super::abi::Abi;

/// Kernel-private: restart with the same arguments, if the handler says SA_RESTART.
const ERESTARTSYS: i64 = 512;
/// Kernel-private: restart always.
const ERESTARTNOINTR: i64 = 513;
/// Kernel-private: restart unless a handler runs.
const ERESTARTNOHAND: i64 = 514;
/// Kernel-private: restart through `restart_syscall`, with what is left of the timeout.
const ERESTART_RESTARTBLOCK: i64 = 516;
const EINTR: i64 = 4;
/// Numbers of sleeps, of both kinds of code.
const NANOSLEEP: u64 = 35;
const CLOCK_NANOSLEEP: u64 = 230;
const IA32_NANOSLEEP: u64 = 162;
const IA32_CLOCK_NANOSLEEP: u64 = 267;
const IA32_CLOCK_NANOSLEEP_TIME64: u64 = 407;
/// Length of the `syscall` instruction, and of `int 0x80`.
const CALL_LEN: u64 = 2;

/// Which restart the kernel has promised to a task stopped in a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    /// Number of the interrupted call.
    pub nr: u64,
    /// The kernel's restart code: -512, -513, -514 or -516.
    pub result: i64,
}

impl Restart {
    /// True when the kernel would continue with what is left of a timeout.
    pub fn is_restart_block(self) -> bool {
        self.result == -ERESTART_RESTARTBLOCK
    }
}

/// The restart that registers of a stopped task carry, if it was interrupted in a system call.
pub fn pending_restart(regs: &GeneralRegs) -> Option<Restart> {
    let in_syscall = regs.orig_rax.cast_signed() >= 0;
    let result = regs.rax.cast_signed();
    let codes = [
        -ERESTARTSYS,
        -ERESTARTNOINTR,
        -ERESTARTNOHAND,
        -ERESTART_RESTARTBLOCK,
    ];
    (in_syscall && codes.contains(&result)).then_some(Restart {
        nr: regs.orig_rax,
        result,
    })
}

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
    match pending_restart(regs) {
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

/// How a restored task gets on with the call it was interrupted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumption {
    /// The registers of the image say all.
    AsStored,
    /// The call is made again with its arguments: its timeout is absolute, or what is left is unknown.
    Again,
    /// The kernel is brought back into the sleep with this remaining time, so that it keeps its promise.
    Sleep {
        /// Whole seconds left.
        sec: u64,
        /// Nanoseconds left.
        nsec: u64,
    },
}

/// Decides how to resume, given what the image says about the interrupted call.
pub fn resumption(restart: Option<&FirnRestartEntry>) -> Resumption {
    match restart {
        Some(entry) if entry.result == -ERESTART_RESTARTBLOCK => {
            match (entry.remaining_sec, entry.remaining_nsec) {
                (Some(sec), Some(nsec)) => Resumption::Sleep { sec, nsec },
                _ => Resumption::Again,
            }
        }
        _ => Resumption::AsStored,
    }
}

/// Converts the image's registers to what ptrace sets.
pub fn from_image(image: &UserX86RegsEntry, resumption: Resumption) -> GeneralRegs {
    let mut image = *image;
    let nr = image.orig_ax;
    let mut orig_rax = u64::MAX;
    match resumption {
        Resumption::AsStored => {}
        Resumption::Again => rewind(&mut image, nr),
        Resumption::Sleep { .. } => {
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

/// Where the kernel writes what is left of a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remainder {
    /// Address of the timespec.
    pub address: u64,
    /// Bytes of each of its two numbers: 4 or 8.
    pub width: usize,
}

/// Where `nanosleep` and `clock_nanosleep` write the time that is left, if the stopped call is a relative
/// sleep that was given a place for it.
///
/// Source: man 2 clock_nanosleep; linux arch/x86/entry/syscalls/syscall_32.tbl.
pub fn sleep_remainder(regs: &GeneralRegs, abi: Abi) -> Option<Remainder> {
    let restart = pending_restart(regs)?;
    let (address, width) = match (abi, restart.nr) {
        (Abi::Native, NANOSLEEP) => (regs.rsi, 8),
        (Abi::Native, CLOCK_NANOSLEEP) if regs.rdx == 0 => (regs.r10, 8),
        (Abi::Ia32, IA32_NANOSLEEP) => (regs.rcx, 4),
        (Abi::Ia32, IA32_CLOCK_NANOSLEEP) if regs.rcx == 0 => (regs.rsi, 4),
        (Abi::Ia32, IA32_CLOCK_NANOSLEEP_TIME64) if regs.rcx == 0 => (regs.rsi, 8),
        _ => return None,
    };
    let is_told = restart.is_restart_block() && address != 0;
    is_told.then_some(Remainder { address, width })
}

/// Registers with which an interrupted sleep of 32-bit code goes on: the call is made again by itself,
/// with what is left as the request, which stands in the memory of the task.
pub fn ia32_sleep(image: &UserX86RegsEntry) -> GeneralRegs {
    let regs = from_image(image, Resumption::Again);
    match image.orig_ax {
        IA32_NANOSLEEP => GeneralRegs {
            rbx: regs.rcx,
            ..regs
        },
        _ => GeneralRegs {
            rdx: regs.rsi,
            ..regs
        },
    }
}

/// The clock that an interrupted sleep runs on.
pub fn sleep_clock(image: &UserX86RegsEntry) -> u64 {
    const CLOCK_MONOTONIC: u64 = 1;
    if image.orig_ax == CLOCK_NANOSLEEP {
        image.di
    } else {
        CLOCK_MONOTONIC
    }
}

/// The remaining-time pointer of an interrupted sleep.
pub fn sleep_remainder_pointer(image: &UserX86RegsEntry) -> u64 {
    if image.orig_ax == CLOCK_NANOSLEEP {
        image.r10
    } else {
        image.si
    }
}

/// True when the stopped task is inside the sleep that its program ends with.
pub fn is_asleep(regs: &GeneralRegs) -> bool {
    regs.rax.cast_signed() == -ERESTART_RESTARTBLOCK
}

/// Where the instruction stands by which a stopped thread has entered the call that it is in, if it is.
pub fn call_instruction(regs: &GeneralRegs) -> Option<u64> {
    (regs.orig_rax.cast_signed() >= 0).then(|| regs.rip.wrapping_sub(CALL_LEN))
}

/// Result of a system call at its exit stop.
pub fn syscall_result(regs: &GeneralRegs) -> i64 {
    regs.rax.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(rax: i64, orig: i64) -> GeneralRegs {
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
    fn a_sleep_with_known_rest_goes_back_to_the_kernels_code() {
        let regs = stopped(-516, 35);
        let entry = FirnRestartEntry {
            nr: 35,
            result: -516,
            remaining_sec: Some(1),
            remaining_nsec: Some(2),
        };
        let how = resumption(Some(&entry));
        assert_eq!(how, Resumption::Sleep { sec: 1, nsec: 2 });
        let restored = from_image(&to_image(&regs, Abi::Native), how);
        assert_eq!((restored.rax.cast_signed(), restored.orig_rax), (-516, 35));
        assert_eq!(restored.rip, 0x1000);
    }

    #[test]
    fn a_poll_is_made_again() {
        let entry = FirnRestartEntry {
            nr: 7,
            result: -516,
            remaining_sec: None,
            remaining_nsec: None,
        };
        let restored = from_image(
            &to_image(&stopped(-516, 7), Abi::Native),
            resumption(Some(&entry)),
        );
        assert_eq!(
            (restored.rax, restored.rip, restored.orig_rax),
            (7, 0xffe, u64::MAX)
        );
    }

    #[test]
    fn a_task_outside_a_call_is_left_alone() {
        let regs = stopped(-512, -1);
        assert_eq!(pending_restart(&regs), None);
        assert_eq!(to_image(&regs, Abi::Native).ip, 0x1000);
    }
    fn in_ia32_code(rax: i64, orig: i64) -> GeneralRegs {
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
        let regs = in_ia32_code(-516, 162);
        let at = Remainder {
            address: 0xff80_1000,
            width: 4,
        };
        assert_eq!(sleep_remainder(&regs, Abi::Ia32), Some(at));
        assert_eq!(sleep_remainder(&regs, Abi::Native), None);
        let image = to_image(&regs, Abi::Ia32);
        let again = ia32_sleep(&image);
        assert_eq!((again.rip, again.rax), (0xffe, 162));
        assert_eq!((again.rbx, again.rcx), (0xff80_1000, 0xff80_1000));
    }
}
