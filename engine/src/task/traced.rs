//! What only its tracer is told about a thread, gathered for batches of threads, so that others can make images of it
//! meanwhile.
//!
//! A batch is few pieces of memory: what one thread allocates and another one gives back makes both wait.

use firn_proto::UserDescT;
use firn_sys::Pid;
use firn_sys::ptrace::{self, SiginfoBytes, SignalQueue};

use super::core_image::{CoreDumpError, failed};
use super::ia32;
use super::outside::Outside;
use super::shadow_stack::ShadowStack;
use super::status::Status;
use crate::arch::XsaveLayout;
use crate::tree::Task;

/// Threads that are gathered at a time.
const BATCH: usize = 8;

/// What was told about one thread.
#[derive(Debug)]
pub(super) struct Told {
    /// Signals that wait for it alone.
    pub queue: Vec<SiginfoBytes>,
    /// Its thread-local segments.
    pub segments: Vec<UserDescT>,
    /// Its shadow stack, where a thread of the task has one.
    pub shadow_stack: Option<ShadowStack>,
    /// Bytes of its extended state.
    state_len: usize,
}

/// Some threads of a task that follow each other.
#[derive(Debug)]
pub(super) struct Batch {
    first: usize,
    threads: Vec<Told>,
    /// The extended states, each in its place.
    states: Vec<u8>,
    state_size: usize,
}

impl Batch {
    /// The threads by their place in the task, each with its extended state as ptrace gives it.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Told, &[u8])> {
        let states = self.states.chunks_exact(self.state_size);
        let threads = (self.first..).zip(self.threads.iter().zip(states));
        threads.map(|(nth, (told, state))| (nth, told, &state[..told.state_len]))
    }
}

/// Gathers the threads of a task in batches and gives them away.
///
/// # Errors
/// A thread died; those of `give`.
///
/// # Preconditions
/// All threads are in ptrace stops of the calling thread.
pub(super) fn gather(
    task: &Task,
    outside: &Outside,
    layout: &XsaveLayout,
    mut give: impl FnMut(Batch) -> Result<(), CoreDumpError>,
) -> Result<(), CoreDumpError> {
    let uses = |status: &Status| status.shadow_stack.uses_shadow_stack();
    let has_shadow_stacks = outside.threads.iter().any(uses);
    let state_size = layout.size();
    let known: Vec<(Pid, &Status)> = (task.threads.iter().copied())
        .zip(&outside.threads)
        .collect();
    for (nth, known) in known.chunks(BATCH).enumerate() {
        let mut threads = Vec::with_capacity(known.len());
        let mut states = vec![0; state_size * known.len()];
        for ((tid, status), state) in known.iter().zip(states.chunks_exact_mut(state_size)) {
            let (tid, failed) = (*tid, |what| failed(*tid, what));
            let shadow_stack =
                has_shadow_stacks.then(|| ShadowStack::read(tid, status.shadow_stack));
            threads.push(Told {
                state_len: ptrace::xstate_into(tid, state).map_err(failed("the extended state"))?,
                queue: match status.pending {
                    0 => Vec::new(),
                    _ => ptrace::pending_signals(tid, SignalQueue::Thread)
                        .map_err(failed("the pending signals"))?,
                },
                segments: ia32::segments(tid, task.abi)
                    .map_err(failed("the thread-local segments"))?,
                shadow_stack: shadow_stack
                    .transpose()
                    .map_err(failed("the shadow stack"))?,
            });
        }
        give(Batch {
            first: nth * BATCH,
            threads,
            states,
            state_size,
        })?;
    }
    Ok(())
}
