//! What is told about a thread by calls of its tracer, so that others can make images of it.
//!
//! What all have is read early, while the tracer would have to wait for the address spaces; what few have is asked for
//! when it is known who.

use firn_proto::{ThreadCoreEntry, UserDescT};
use firn_sys::ptrace::{self, SiginfoBytes, SignalQueue};
use firn_sys::{Pid, task as sys_task};

use super::attributes::ThreadAnswers;
use super::core_image::{CoreDumpError, failed};
use super::outside::Outside;
use super::shadow_stack::ShadowStack;
use super::status::Status;
use super::{ia32, scheduling};
use crate::arch::{Abi, XsaveLayout};
use crate::tree::Task;

/// What is told about a thread by calls that not only its tracer may make.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Called {
    /// An image of the thread with its scheduling and nothing else.
    pub scheduling: firn_sys::Result<ThreadCoreEntry>,
    /// Its list of robust futexes: address and length of the head.
    pub robust_list: firn_sys::Result<(u64, u64)>,
}

impl Called {
    fn of(tid: Pid) -> Called {
        let mut core = ThreadCoreEntry::default();
        Called {
            scheduling: scheduling::dump(tid, &mut core).map(|()| core),
            robust_list: sys_task::robust_list(tid),
        }
    }
}

/// What all threads of a task have that the kernel tells in calls.
#[derive(Debug)]
pub(crate) struct Readings {
    /// Extended states as ptrace gives them, each in its place.
    states: Vec<u8>,
    place_len: usize,
    state_lens: Vec<usize>,
    /// What other calls tell, in the order of the task's threads.
    pub(super) called: Vec<Called>,
}

impl Readings {
    /// Reads it, which needs no knowledge of the task and does not touch it.
    ///
    /// # Errors
    /// A thread died.
    ///
    /// # Preconditions
    /// All threads are in ptrace stops of the calling thread.
    pub(crate) fn read(task: &Task) -> Result<Readings, CoreDumpError> {
        let place_len = XsaveLayout::of_this_cpu().size();
        let mut states = vec![0; place_len * task.threads.len()];
        let places = task.threads.iter().zip(states.chunks_exact_mut(place_len));
        let read = |(tid, place): (&Pid, &mut [u8])| {
            ptrace::xstate_into(*tid, place).map_err(failed(*tid, "the extended state"))
        };
        let state_lens = places.map(read).collect::<Result<_, _>>()?;
        Ok(Readings {
            states,
            place_len,
            state_lens,
            called: task.threads.iter().map(|tid| Called::of(*tid)).collect(),
        })
    }

    /// Extended state of the `nth` thread of the task.
    pub(super) fn state(&self, nth: usize) -> &[u8] {
        &self.states[nth * self.place_len..][..self.state_lens[nth]]
    }
}

/// What else was told about one thread.
#[derive(Debug)]
pub(super) struct Told {
    /// Signals that wait for it alone.
    pub queue: Vec<SiginfoBytes>,
    /// Its thread-local segments.
    pub segments: Vec<UserDescT>,
    /// Its shadow stack, where a thread of the task has one.
    pub shadow_stack: Option<ShadowStack>,
}

/// Asks about all threads of a task what few of them have.
///
/// # Errors
/// A thread died.
///
/// # Preconditions
/// As of [`Readings::read`].
pub(super) fn ask(
    task: &Task,
    answers: &[ThreadAnswers],
    outside: &Outside,
) -> Result<Vec<Told>, CoreDumpError> {
    let uses = |status: &Status| status.shadow_stack.uses_shadow_stack();
    let has_shadow_stacks = outside.threads.iter().any(uses);
    let known = answers.iter().zip(&outside.threads);
    let threads = task.threads.iter().zip(known);
    let ask = |(tid, (answers, status)): (&Pid, (&ThreadAnswers, &Status))| {
        let (tid, failed) = (*tid, |what| failed(*tid, what));
        let shadow_stack = has_shadow_stacks.then(|| ShadowStack::read(tid, status.shadow_stack));
        Ok(Told {
            queue: match status.pending {
                0 => Vec::new(),
                _ => ptrace::pending_signals(tid, SignalQueue::Thread)
                    .map_err(failed("the pending signals"))?,
            },
            segments: match task.abi == Abi::Ia32 || answers.has_segments {
                true => {
                    ia32::segments(tid, task.abi).map_err(failed("the thread-local segments"))?
                }
                false => Vec::new(),
            },
            shadow_stack: shadow_stack
                .transpose()
                .map_err(failed("the shadow stack"))?,
        })
    };
    threads.map(ask).collect()
}
