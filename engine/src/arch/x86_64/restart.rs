//! System calls that a stop has interrupted, and how a restored task gets on with them.
//!
//! A task that is stopped inside a system call carries the kernel's private restart code in `rax`
//! (-512, -513, -514 or -516) and the call's number in `orig_rax`. With -516 the kernel goes on from notes
//! of its own, which it does by making another call in the place of the first, `restart_syscall`: all
//! registers but `rax` stay what they were. Stopped once more, the task therefore seems to be in
//! `restart_syscall`, and which call that stands for is told by the code in front of it alone:
//!
//! ```text
//! b8 NR NR NR NR 0f 05                    mov $NR, %eax; syscall
//! b8 NR NR NR NR 65 ff 15 10 00 00 00     mov $NR, %eax; call *%gs:0x10, in 32-bit code
//! ```
//!
//! Source: linux arch/x86/kernel/signal.c, arch_do_signal_or_restart.

use firn_proto::{FirnRestartEntry, UserX86RegsEntry};
use firn_sys::ptrace::GeneralRegs;

use super::abi::Abi;
use super::regs::CALL_LEN;
use super::waits;

/// Kernel-private: restart with the same arguments, if the handler says SA_RESTART.
const ERESTARTSYS: i64 = 512;
/// Kernel-private: restart always.
const ERESTARTNOINTR: i64 = 513;
/// Kernel-private: restart unless a handler runs.
const ERESTARTNOHAND: i64 = 514;
/// Kernel-private: restart through `restart_syscall`, with what is left of the timeout.
pub(super) const ERESTART_RESTARTBLOCK: i64 = 516;
/// Numbers of sleeps, of both kinds of code.
const NANOSLEEP: u64 = 35;
const CLOCK_NANOSLEEP: u64 = 230;
pub(super) const IA32_NANOSLEEP: u64 = 162;
const IA32_CLOCK_NANOSLEEP: u64 = 267;
const IA32_CLOCK_NANOSLEEP_TIME64: u64 = 407;
const RESTART_SYSCALL: u64 = 219;
const IA32_RESTART_SYSCALL: u64 = 0;
/// The calls that `restart_syscall` can stand for: poll, the sleeps, futex.
///
/// Source: linux, callers of set_restart_fn.
const RESTARTED: [u64; 4] = [7, NANOSLEEP, CLOCK_NANOSLEEP, 202];
const IA32_RESTARTED: [u64; 6] = [
    168,
    IA32_NANOSLEEP,
    IA32_CLOCK_NANOSLEEP,
    IA32_CLOCK_NANOSLEEP_TIME64,
    240,
    422,
];
/// `mov $NR, %eax`.
const MOV_EAX: u8 = 0xb8;
const MOV_EAX_LEN: usize = 5;
/// `call *%gs:0x10`, by which 32-bit code calls the vdso.
const CALL_VDSO: [u8; 7] = [0x65, 0xff, 0x15, 0x10, 0, 0, 0];
/// What the vdso of 32-bit code has pushed below the address that it returns to.
const PUSHED_BY_VDSO: u64 = 12;

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

    /// True when the call had been restarted before, so that its number is not its own.
    pub fn is_second(self, abi: Abi) -> bool {
        let stand_in = match abi {
            Abi::Native => RESTART_SYSCALL,
            Abi::Ia32 => IA32_RESTART_SYSCALL,
        };
        self.is_restart_block() && self.nr == stand_in
    }
}

/// The restart that registers of a stopped task carry, if it was interrupted in a system call.
pub fn pending(regs: &GeneralRegs) -> Option<Restart> {
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

/// The number of the call that a task made at first which is now in `restart_syscall`, or `None` where its
/// code does not tell. `read` reads bytes of its memory.
pub fn first_call(
    regs: &GeneralRegs,
    abi: Abi,
    read: impl Fn(u64, &mut [u8]) -> Option<()>,
) -> Option<u64> {
    match abi {
        Abi::Native => {
            let mut code = [0; MOV_EAX_LEN];
            read(before(regs.rip, CALL_LEN)?, &mut code)?;
            number_in(&code, &RESTARTED)
        }
        Abi::Ia32 => {
            let mut code = [0; MOV_EAX_LEN];
            if read(before(regs.rip, CALL_LEN)?, &mut code).is_some()
                && let Some(nr) = number_in(&code, &IA32_RESTARTED)
            {
                return Some(nr);
            }
            let mut caller = [0; 4];
            read(regs.rsp.checked_add(PUSHED_BY_VDSO)?, &mut caller)?;
            let caller = u64::from(u32::from_le_bytes(caller));
            let mut code = [0; MOV_EAX_LEN + CALL_VDSO.len()];
            read(before(caller, CALL_VDSO.len() as u64)?, &mut code)?;
            let (number, call) = code.split_at(MOV_EAX_LEN);
            (call == CALL_VDSO).then(|| number_in(number, &IA32_RESTARTED))?
        }
    }
}

/// Where the instruction that loads the number begins, `call_len` bytes and its own before `end`.
fn before(end: u64, call_len: u64) -> Option<u64> {
    end.checked_sub(call_len + MOV_EAX_LEN as u64)
}

fn number_in(code: &[u8], restarted: &[u64]) -> Option<u64> {
    let (&MOV_EAX, number) = code.split_first()? else {
        return None;
    };
    let nr = u64::from(u32::from_le_bytes(number.try_into().ok()?));
    restarted.contains(&nr).then_some(nr)
}

/// How a restored task gets on with the call it was interrupted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumption {
    /// The registers of the image say all.
    AsStored,
    /// The call is made again with its arguments: its timeout is absolute, or what is left is unknown.
    Again {
        /// Its number.
        nr: u64,
    },
    /// The kernel is brought back into the sleep with this remaining time, so that it keeps its promise.
    Sleep {
        /// Number of the call.
        nr: u64,
        /// Whole seconds left.
        sec: u64,
        /// Nanoseconds left.
        nsec: u64,
    },
    /// The same, into a wait for something: [`waits::TimedWait`].
    Wait {
        /// Number of the call.
        nr: u64,
        /// Whole seconds left.
        sec: u64,
        /// Nanoseconds left.
        nsec: u64,
    },
}

/// Decides how to resume, given what the image says about the interrupted call. One that is known only as
/// `restart_syscall` returns EINTR, as the registers of the image say: nothing restarts there any more.
pub fn resumption(restart: Option<&FirnRestartEntry>, abi: Abi) -> Resumption {
    let Some(entry) = restart else {
        return Resumption::AsStored;
    };
    let (nr, result) = (entry.nr, entry.result);
    let restart = Restart { nr, result };
    if !restart.is_restart_block() || restart.is_second(abi) {
        return Resumption::AsStored;
    }
    match (entry.remaining_sec, entry.remaining_nsec) {
        (Some(sec), Some(nsec)) if waits::is_wait(nr, abi) => Resumption::Wait { nr, sec, nsec },
        (Some(sec), Some(nsec)) => Resumption::Sleep { nr, sec, nsec },
        _ => Resumption::Again { nr },
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
pub fn sleep_remainder(restart: Restart, regs: &GeneralRegs, abi: Abi) -> Option<Remainder> {
    let (address, width) = match (abi, restart.nr) {
        (Abi::Native, NANOSLEEP) => (regs.rsi, 8),
        (Abi::Native, CLOCK_NANOSLEEP) if regs.rsi == 0 => (regs.r10, 8),
        (Abi::Ia32, IA32_NANOSLEEP) => (regs.rcx, 4),
        (Abi::Ia32, IA32_CLOCK_NANOSLEEP) if regs.rcx == 0 => (regs.rsi, 4),
        (Abi::Ia32, IA32_CLOCK_NANOSLEEP_TIME64) if regs.rcx == 0 => (regs.rsi, 8),
        _ => return None,
    };
    let is_told = restart.is_restart_block() && address != 0;
    is_told.then_some(Remainder { address, width })
}

/// Whether the stopped call is a relative sleep of 64-bit code that was given no place for what is left.
pub fn is_untold_sleep(restart: Restart, regs: &GeneralRegs, abi: Abi) -> bool {
    let is_untold = match (abi, restart.nr) {
        (Abi::Native, NANOSLEEP) => regs.rsi == 0,
        (Abi::Native, CLOCK_NANOSLEEP) => regs.rsi == 0 && regs.r10 == 0,
        _ => false,
    };
    restart.is_restart_block() && is_untold
}

/// The clock that an interrupted sleep of 64-bit code, by the call `nr`, runs on.
pub fn sleep_clock(image: &UserX86RegsEntry, nr: u64) -> u64 {
    const CLOCK_MONOTONIC: u64 = 1;
    if nr == CLOCK_NANOSLEEP {
        image.di
    } else {
        CLOCK_MONOTONIC
    }
}

/// The remaining-time pointer of an interrupted sleep of 64-bit code, by the call `nr`.
pub fn sleep_remainder_pointer(image: &UserX86RegsEntry, nr: u64) -> u64 {
    if nr == CLOCK_NANOSLEEP {
        image.r10
    } else {
        image.si
    }
}

/// True when the stopped task is inside a sleep or wait that the kernel goes on with.
pub fn is_asleep(regs: &GeneralRegs) -> bool {
    regs.rax.cast_signed() == -ERESTART_RESTARTBLOCK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::regs::tests::{in_ia32_code, stopped};
    use crate::arch::regs::{from_image, to_image};

    fn entry(nr: u64, remaining: Option<(u64, u64)>) -> FirnRestartEntry {
        FirnRestartEntry {
            nr,
            result: -516,
            remaining_sec: remaining.map(|(sec, _)| sec),
            remaining_nsec: remaining.map(|(_, nsec)| nsec),
        }
    }

    #[test]
    fn a_sleep_with_known_rest_goes_back_to_the_kernels_code() {
        let how = resumption(Some(&entry(35, Some((1, 2)))), Abi::Native);
        let wanted = Resumption::Sleep {
            nr: 35,
            sec: 1,
            nsec: 2,
        };
        assert_eq!(how, wanted);
        let image = to_image(&stopped(-516, 219), Abi::Native);
        let restored = from_image(&image, how);
        assert_eq!((restored.rax.cast_signed(), restored.orig_rax), (-516, 35));
        assert_eq!(restored.rip, 0x1000);
    }

    #[test]
    fn a_poll_is_made_again() {
        let image = to_image(&stopped(-516, 219), Abi::Native);
        let restored = from_image(&image, resumption(Some(&entry(7, None)), Abi::Native));
        assert_eq!(
            (restored.rax, restored.rip, restored.orig_rax),
            (7, 0xffe, u64::MAX)
        );
    }

    #[test]
    fn a_second_restart_of_an_unknown_call_is_eintr() {
        let unknown = entry(219, None);
        assert_eq!(
            resumption(Some(&unknown), Abi::Native),
            Resumption::AsStored
        );
        assert_eq!(
            resumption(Some(&entry(0, None)), Abi::Ia32),
            Resumption::AsStored
        );
    }

    /// Memory with these pieces in it and nothing else.
    fn memory<'a>(pieces: &'a [(u64, &'a [u8])]) -> impl Fn(u64, &mut [u8]) -> Option<()> + 'a {
        move |address, bytes| {
            let (_, found) = pieces.iter().find(|(at, _)| *at == address)?;
            bytes.copy_from_slice(found.get(..bytes.len())?);
            Some(())
        }
    }

    #[test]
    fn the_code_tells_what_is_restarted() {
        let regs = stopped(-516, 219);
        assert!(pending(&regs).is_some_and(|restart| restart.is_second(Abi::Native)));
        let of = |code: &[u8]| first_call(&regs, Abi::Native, memory(&[(0xff9, code)]));
        assert_eq!(of(&[0xb8, 0xe6, 0, 0, 0]), Some(230));
        assert_eq!(of(&[0xb8, 0xe8, 0, 0, 0]), None);
        assert_eq!(of(&[0x90, 0xe6, 0, 0, 0]), None);
        assert_eq!(first_call(&regs, Abi::Native, memory(&[])), None);
    }

    #[test]
    fn of_32_bit_code_the_caller_of_the_vdso_tells() {
        let regs = in_ia32_code(-516, 0);
        let caller = 0x5000_u32.to_le_bytes();
        let code = [0xb8, 0x97, 1, 0, 0, 0x65, 0xff, 0x15, 0x10, 0, 0, 0];
        let pieces: [(u64, &[u8]); 2] = [(0xff80_000c, &caller), (0x4ff4, &code)];
        assert_eq!(first_call(&regs, Abi::Ia32, memory(&pieces)), Some(407));
        let pieces: [(u64, &[u8]); 1] = [(0xff9, &[0xb8, 162, 0, 0, 0])];
        assert_eq!(first_call(&regs, Abi::Ia32, memory(&pieces)), Some(162));
        assert_eq!(first_call(&regs, Abi::Ia32, memory(&[])), None);
    }

    #[test]
    fn a_relative_sleep_has_its_remainder_in_the_fourth_argument() {
        let relative = GeneralRegs {
            rsi: 0,
            rdx: 0x2000,
            r10: 0x3000,
            ..stopped(-516, 230)
        };
        let restart = pending(&relative).expect("interrupted");
        let at = Remainder {
            address: 0x3000,
            width: 8,
        };
        assert_eq!(sleep_remainder(restart, &relative, Abi::Native), Some(at));
        let absolute = GeneralRegs { rsi: 1, ..relative };
        assert_eq!(sleep_remainder(restart, &absolute, Abi::Native), None);
    }

    #[test]
    fn a_32_bit_sleep_tells_its_rest_in_its_own_width() {
        let regs = in_ia32_code(-516, 162);
        let restart = pending(&regs).expect("interrupted");
        let at = Remainder {
            address: 0xff80_1000,
            width: 4,
        };
        assert_eq!(sleep_remainder(restart, &regs, Abi::Ia32), Some(at));
        assert_eq!(sleep_remainder(restart, &regs, Abi::Native), None);
    }
}
