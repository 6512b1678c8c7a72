//! Signal actions, masks and queues of pending signals.
//!
//! Actions are asked for inside the task, masks and queues come from ptrace. On restore the order
//! matters: setting an action to "ignore" throws away what is pending, so queues are filled after the
//! actions, with everything still blocked; masks are set by ptrace at the very end. Signals that the
//! rebuilding itself has caused (SIGCHLD of zombies and helpers) are thrown away that way on purpose.
//!
//! Source: man 2 rt_sigaction, rt_sigqueueinfo; linux kernel/signal.c.

use firn_proto::{SaEntry, SiginfoEntry, SignalQueueEntry};
use firn_sys::ptrace::SiginfoBytes;
use firn_sys::{Pid, nr};

use crate::arch::Abi;
use crate::program::{Data, Program, Rule};

/// Signals that have no action to read or set.
const UNCATCHABLE: [u32; 2] = [SIGKILL, SIGSTOP];
const SIGKILL: u32 = 9;
const SIGCHLD: u32 = 17;
const SIGSTOP: u32 = 19;
const SIG_IGN: u64 = 1;
/// Size of the kernel's struct sigaction: handler, flags, restorer, mask.
const ACTION_SIZE: usize = 32;
/// Size of a signal set as the calls take it.
const SET_SIZE: u64 = 8;

/// Number of actions an image stores: signals 1 to 64 without SIGKILL and SIGSTOP.
pub const NR_ACTIONS: usize = 62;

fn catchable() -> impl Iterator<Item = u32> {
    (1..=64).filter(|signal| !UNCATCHABLE.contains(signal))
}

/// Where images have the action of a signal; None for one that has none.
pub fn action_index(signal: u32) -> Option<usize> {
    catchable().position(|catchable| catchable == signal)
}

/// Adds the calls that read all actions; returns where the answers stand.
pub fn ask_actions(program: &mut Program) -> Data {
    let answers = program.space(NR_ACTIONS * ACTION_SIZE);
    for (nth, signal) in catchable().enumerate() {
        let at = answers.at(nth * ACTION_SIZE);
        let args = [signal.into(), 0.into(), at.into(), SET_SIZE.into()];
        program.call(nr::RT_SIGACTION, &args, Rule::Ok, "reading a signal action");
    }
    answers
}

/// Converts the answers of [`ask_actions`] to the image's form.
pub fn actions_to_image(answers: &[u8], abi: Abi) -> Vec<SaEntry> {
    let word = |action: &[u8], nth: usize| {
        u64::from_le_bytes(
            action[8 * nth..8 * nth + 8]
                .try_into()
                .expect("eight bytes"),
        )
    };
    answers
        .chunks_exact(ACTION_SIZE)
        .map(|action| SaEntry {
            sigaction: word(action, 0),
            flags: word(action, 1),
            restorer: word(action, 2),
            mask: word(action, 3),
            compat_sigaction: Some(abi == Abi::Ia32),
            mask_extended: None,
        })
        .collect()
}

/// Adds the calls that set the actions, after [`plan_forget_sigchld`].
///
/// A task is born with default actions but for the signals that this process ignores (`ignored`; bit 0 is
/// signal 1), so most need no call.
pub fn plan_actions(program: &mut Program, actions: &[SaEntry], ignored: u64, abi: Abi) {
    for (signal, action) in catchable().zip(actions) {
        let fields = [action.sigaction, action.flags, action.restorer, action.mask];
        let is_changed = signal == SIGCHLD || ignored & 1 << (signal - 1) != 0;
        if !is_changed && fields == [0; 4] {
            continue;
        }
        let words = fields.iter().map(|field| field.to_le_bytes());
        let data = match abi {
            Abi::Native => program.data(&words.flatten().collect::<Vec<u8>>()),
            Abi::Ia32 => program.data(&ia32_action(fields)),
        };
        let args = [signal.into(), data.into(), 0.into(), SET_SIZE.into()];
        let why = "setting a signal action";
        match abi {
            Abi::Native => program.call(nr::RT_SIGACTION, &args, Rule::Ok, why),
            // The kernel remembers with the action which kind of frame it needs.
            Abi::Ia32 => program.call_ia32(nr::ia32::RT_SIGACTION, &args, Rule::Ok, why),
        };
    }
}

/// The struct sigaction of 32-bit code: handler, flags and restorer of 32 bits, the mask of 64.
fn ia32_action([handler, flags, restorer, mask]: [u64; 4]) -> Vec<u8> {
    let low = |value: u64| value.to_le_bytes().into_iter().take(4);
    let words = [handler, flags, restorer].into_iter().flat_map(low);
    words.chain(mask.to_le_bytes()).collect()
}

/// Throws away the SIGCHLDs that dead helpers and zombies of the restore have queued.
pub fn plan_forget_sigchld(program: &mut Program) {
    let mut ignore = [0u8; ACTION_SIZE];
    ignore[..8].copy_from_slice(&SIG_IGN.to_le_bytes());
    let ignore = program.data(&ignore);
    let args = [SIGCHLD.into(), ignore.into(), 0.into(), SET_SIZE.into()];
    program.call(
        nr::RT_SIGACTION,
        &args,
        Rule::Ok,
        "forgetting the restore's own SIGCHLD",
    );
}

/// Converts a queue of pending signals to the image's form; None for an empty one is not used, since
/// readers expect the queue to be there.
pub fn queue_to_image(queue: &[SiginfoBytes]) -> SignalQueueEntry {
    let signals = queue
        .iter()
        .map(|info| SiginfoEntry {
            siginfo: info.to_vec(),
        })
        .collect();
    SignalQueueEntry { signals }
}

/// Which queue pending signals go back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// That of the whole process.
    Process,
    /// The calling thread's own.
    Thread(Pid),
}

/// Adds the calls that queue pending signals again, in order and with their siginfo.
///
/// The task queues them to itself: only then does the kernel accept siginfos that claim to come from
/// the kernel.
pub fn plan_queue(program: &mut Program, pid: Pid, queue: Queue, entry: &SignalQueueEntry) {
    for signal in &entry.signals {
        let Some(signo) = signal.siginfo.first_chunk::<4>() else {
            continue;
        };
        let signo = u32::from_le_bytes(*signo);
        let info = program.data(&signal.siginfo);
        let pid = pid.to_image();
        match queue {
            Queue::Process => {
                let args = [pid.into(), signo.into(), info.into()];
                program.call(
                    nr::RT_SIGQUEUEINFO,
                    &args,
                    Rule::Ok,
                    "queueing a pending signal",
                );
            }
            Queue::Thread(tid) => {
                let args = [pid.into(), tid.to_image().into(), signo.into(), info.into()];
                program.call(
                    nr::RT_TGSIGQUEUEINFO,
                    &args,
                    Rule::Ok,
                    "queueing a pending signal",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_two_signals_have_actions() {
        assert_eq!(catchable().count(), NR_ACTIONS);
        let mut program = Program::new("test");
        let answers = ask_actions(&mut program);
        assert_eq!(
            (program.len(), answers.len()),
            (NR_ACTIONS, NR_ACTIONS * 32)
        );
    }

    #[test]
    fn answers_become_entries_in_order() {
        let mut answers = vec![0u8; NR_ACTIONS * ACTION_SIZE];
        answers[ACTION_SIZE..ACTION_SIZE + 8].copy_from_slice(&7u64.to_le_bytes());
        answers[ACTION_SIZE + 24..ACTION_SIZE + 32].copy_from_slice(&9u64.to_le_bytes());
        let image = actions_to_image(&answers, Abi::Native);
        assert_eq!(image.len(), NR_ACTIONS);
        assert_eq!((image[1].sigaction, image[1].mask), (7, 9));
    }

    #[test]
    fn only_actions_that_differ_are_set() {
        let mut actions = actions_to_image(&vec![0u8; NR_ACTIONS * ACTION_SIZE], Abi::Native);
        actions[9].flags = 0x400_0000;
        let mut program = Program::new("test");
        plan_actions(&mut program, &actions, 1 << 12, Abi::Native);
        let calls: Vec<String> = (0..program.len())
            .map(|nth| program.describe(nth))
            .collect();
        let signals = ["rt_sigaction(11,", "rt_sigaction(13,", "rt_sigaction(17,"];
        assert_eq!(calls.len(), signals.len(), "{calls:?}");
        let begins = |(call, start): (&String, &str)| call.starts_with(start);
        assert!(calls.iter().zip(signals).all(begins), "{calls:?}");
    }

    #[test]
    fn a_thread_queue_names_its_thread() {
        let mut program = Program::new("test");
        let mut info = [0u8; 128];
        info[0] = 34;
        let tid = Pid::from_raw(8);
        plan_queue(
            &mut program,
            Pid::from_raw(7),
            Queue::Thread(tid),
            &queue_to_image(&[info]),
        );
        assert!(
            program
                .describe(0)
                .starts_with("rt_tgsigqueueinfo(7, 8, 34, ")
        );
    }
    #[test]
    fn actions_of_32_bit_programs_are_set_by_their_own_call() {
        let mut program = Program::new("test");
        let mut actions = actions_to_image(&vec![0u8; NR_ACTIONS * ACTION_SIZE], Abi::Ia32);
        assert_eq!(actions[0].compat_sigaction, Some(true));
        actions[0].sigaction = 0x5655_6000;
        plan_actions(&mut program, &actions, 0, Abi::Ia32);
        assert!(program.describe(0).starts_with("ia32 rt_sigaction(1, "));
        let bytes = ia32_action([0x5655_6000, 0x0400_0004, 0xf7f0_0010, 1 << 63]);
        assert_eq!(bytes.len(), 20);
        assert_eq!(bytes[8..12], 0xf7f0_0010u32.to_le_bytes());
        assert_eq!(bytes[12..], (1u64 << 63).to_le_bytes());
    }
}
