//! Waits for something, or for a time that the call was given and that only the kernel counts: `poll`, and `futex`
//! with a relative time. Both go on by `restart_syscall`, as sleeps do.
//!
//! | | 64-bit | 32-bit | what is waited for | how long |
//! |---|---|---|---|---|
//! | `poll` | 7 | 168 | first argument | third, a number of milliseconds |
//! | `futex` | 202 | 240, 422 (time64) | first | fourth, a pointer to a timespec |
//!
//! Source: man 2 poll, futex; linux fs/select.c, do_restart_poll; kernel/futex/waitwake.c, futex_wait_restart.

use firn_proto::UserX86RegsEntry;
use firn_sys::ptrace::GeneralRegs;

use super::abi::Abi;
use super::regs;
use super::restart::{Remainder, Restart, Resumption};

/// Numbers of the calls.
pub const POLL: u64 = 7;
/// See [`POLL`].
pub const FUTEX: u64 = 202;
const IA32_POLL: u64 = 168;
const IA32_FUTEX: u64 = 240;
const IA32_FUTEX_TIME64: u64 = 422;
/// Operation of `futex` whose time is relative; the flag says that the word is the process's own.
const FUTEX_WAIT: u64 = 0;
const FUTEX_PRIVATE: u64 = 128;
const NANOSECONDS: u64 = 1_000_000_000;
const NANOSECONDS_IN_MILLISECOND: u64 = 1_000_000;
/// What an int takes.
const MAX_MILLISECONDS: u64 = 0x7fff_ffff;

/// A wait that is given a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimedWait {
    /// `poll`; the time is an argument.
    Poll {
        /// Address of the array of `struct pollfd`.
        files: u64,
    },
    /// `futex`.
    Futex {
        /// Address of the word.
        word: u64,
        /// Where the time stands that the call was given.
        timeout: Remainder,
    },
}

/// The wait that a stopped thread is in, if it is one that the kernel would go on with for the rest of its time.
pub fn of_stopped(restart: Restart, regs: &GeneralRegs, abi: Abi) -> Option<TimedWait> {
    restart
        .is_restart_block()
        .then(|| of_call(restart.nr, &arguments(regs, abi), abi))?
}

/// The wait that a call makes, by its number and arguments.
pub fn of_call(nr: u64, arguments: &[u64; 4], abi: Abi) -> Option<TimedWait> {
    let &[first, second, third, fourth] = arguments;
    let width = match (abi, nr) {
        (Abi::Native, POLL) | (Abi::Ia32, IA32_POLL) => {
            // An int: negative is without end, and 0 does not wait.
            let is_timed = (1..=MAX_MILLISECONDS).contains(&(third & u64::from(u32::MAX)));
            return is_timed.then_some(TimedWait::Poll { files: first });
        }
        (Abi::Native, FUTEX) | (Abi::Ia32, IA32_FUTEX_TIME64) => 8,
        (Abi::Ia32, IA32_FUTEX) => 4,
        _ => return None,
    };
    let is_relative = second & !FUTEX_PRIVATE == FUTEX_WAIT && fourth != 0;
    let timeout = Remainder {
        address: fourth,
        width,
    };
    is_relative.then_some(TimedWait::Futex {
        word: first,
        timeout,
    })
}

/// Whether calls of that number wait so.
pub(super) fn is_wait(nr: u64, abi: Abi) -> bool {
    match abi {
        Abi::Native => matches!(nr, POLL | FUTEX),
        Abi::Ia32 => matches!(nr, IA32_POLL | IA32_FUTEX | IA32_FUTEX_TIME64),
    }
}

/// The first four arguments of the call that a stopped thread is in.
pub fn arguments(regs: &GeneralRegs, abi: Abi) -> [u64; 4] {
    match abi {
        Abi::Native => [regs.rdi, regs.rsi, regs.rdx, regs.r10],
        Abi::Ia32 => [regs.rbx, regs.rcx, regs.rdx, regs.rsi],
    }
}

/// How a wait is made again for what is left of its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Again {
    /// The registers for it.
    pub regs: GeneralRegs,
    /// What has to stand in the thread's memory meanwhile.
    pub timeout: Option<(u64, Vec<u8>)>,
}

/// The wait of an image once more, with so much time; None where the image has no such wait.
pub fn again(image: &UserX86RegsEntry, nr: u64, (sec, nsec): (u64, u64)) -> Option<Again> {
    let abi = regs::abi_of_image(image);
    let regs = regs::from_image(image, Resumption::Again { nr });
    Some(match of_call(nr, &arguments(&regs, abi), abi)? {
        TimedWait::Poll { .. } => Again {
            regs: GeneralRegs {
                rdx: milliseconds(sec, nsec),
                ..regs
            },
            timeout: None,
        },
        TimedWait::Futex { timeout, .. } => {
            let number = |value: u64| value.to_le_bytes()[..timeout.width].to_vec();
            Again {
                regs,
                timeout: Some((timeout.address, [number(sec), number(nsec)].concat())),
            }
        }
    })
}

/// Never less than it is, and no more than the call takes.
fn milliseconds(sec: u64, nsec: u64) -> u64 {
    let all = sec.saturating_mul(NANOSECONDS).saturating_add(nsec);
    all.div_ceil(NANOSECONDS_IN_MILLISECOND)
        .min(MAX_MILLISECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use regs::tests::stopped;

    fn in_call(nr: u64, arguments: [u64; 4]) -> Option<TimedWait> {
        let [rdi, rsi, rdx, r10] = arguments;
        let regs = GeneralRegs {
            rdi,
            rsi,
            rdx,
            r10,
            ..stopped(-516, nr.cast_signed())
        };
        of_stopped(Restart { nr, result: -516 }, &regs, Abi::Native)
    }

    #[test]
    fn waits_with_a_relative_time_are_seen() {
        let poll = TimedWait::Poll { files: 0x1000 };
        assert_eq!(in_call(POLL, [0x1000, 1, 250, 0]), Some(poll));
        assert_eq!(in_call(POLL, [0x1000, 1, u64::MAX, 0]), None);
        assert_eq!(in_call(POLL, [0x1000, 1, 0xffff_ffff, 0]), None);
        let timeout = Remainder {
            address: 0x2000,
            width: 8,
        };
        let word = 0x1000;
        let futex = Some(TimedWait::Futex { word, timeout });
        assert_eq!(in_call(FUTEX, [0x1000, 128, 0, 0x2000]), futex);
        // Without a time; FUTEX_WAIT_BITSET, until a time; not interrupted so.
        assert_eq!(in_call(FUTEX, [0x1000, 128, 0, 0]), None);
        assert_eq!(in_call(FUTEX, [0x1000, 137, 0, 0x2000]), None);
        let restart = Restart {
            nr: POLL,
            result: -514,
        };
        assert_eq!(of_stopped(restart, &stopped(-514, 7), Abi::Native), None);
    }

    #[test]
    fn a_wait_is_made_again_for_the_rest() {
        let image = |arguments: [u64; 4]| UserX86RegsEntry {
            di: arguments[0],
            si: arguments[1],
            dx: arguments[2],
            r10: arguments[3],
            ip: 0x1002,
            ..UserX86RegsEntry::default()
        };
        let poll = again(&image([1, 1, 5000, 0]), POLL, (1, 1)).expect("a poll");
        assert_eq!((poll.regs.rdx, poll.timeout), (1001, None));
        assert_eq!((poll.regs.rip, poll.regs.rax), (0x1000, POLL));
        let futex = again(&image([1, 0, 0, 0x2000]), FUTEX, (1, 2)).expect("a futex");
        let wanted = [1u64.to_le_bytes(), 2u64.to_le_bytes()].concat();
        assert_eq!(futex.timeout, Some((0x2000, wanted)));
        assert_eq!(again(&image([0; 4]), 35, (1, 1)), None);
        assert_eq!(milliseconds(u64::MAX, 5), 0x7fff_ffff);
    }

    #[test]
    fn a_wait_of_32_bit_code_has_its_arguments_in_other_registers() {
        let regs = GeneralRegs {
            rbx: 0x1000,
            rcx: 0,
            rsi: 0x2000,
            ..regs::tests::in_ia32_code(-516, 240)
        };
        let timeout = Remainder {
            address: 0x2000,
            width: 4,
        };
        let restart = Restart {
            nr: IA32_FUTEX,
            result: -516,
        };
        let word = 0x1000;
        let wait = Some(TimedWait::Futex { word, timeout });
        assert_eq!(of_stopped(restart, &regs, Abi::Ia32), wait);
    }
}
