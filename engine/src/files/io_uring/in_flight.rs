//! Requests in flight that wait for something: found in the kernel's memory, and turned into what asks for them again.
//!
//! A request that has met a file which is not ready is armed: it hangs in the file's wait queue and goes on in the
//! thread that asked, from the beginning. Until then nothing has come of it, so the same request of the same thread,
//! made of a new ring, is as good. The ring holds all of these in a table by their values, and timeouts in a list.
//! What is neither there nor ended is being worked on, or held back, and stays in the way.
//!
//! | operation | where the kernel has what was asked for | beyond what all have |
//! |---|---|---|
//! | POLL_ADD | `struct io_poll` | events; whether it goes on after each |
//! | READ | `struct io_rw` | address, length, flags, offset |
//! | READV | the iterator of `struct io_async_rw` | parts of memory; the program's list of them may be gone |
//! | RECV | `struct io_sr_msg` | address, length, flags |
//! | RECVMSG | `struct io_sr_msg`, the iterator of `struct io_async_msghdr` | the program's header, which the kernel writes into at last, so it must be there and still say the same |
//! | ACCEPT | `struct io_accept` | addresses, flags, place among registered files; whether it goes on |
//! | TIMEOUT | `struct io_timeout`, `struct io_timeout_data` with its timer | the time that is left, completions that are left to come; whether it goes on |
//!
//! **The file** is taken by any descriptor that leads to the same open file, also where the request named it by its
//! place among registered files: nothing tells the two apart later.
//!
//! **Wakened and not gone on yet**, since its thread stands still: asked for again, it finds at once what it was
//! wakened for. A poll that goes on after each event (multishot) is the other way round: it has told of what is ready,
//! and when it is asked for again it tells of that once more. That completion must not be seen (`again.rs`).
//!
//! **Timeouts** go on while their threads stand still. One that is over, which its thread has not been told, is asked for
//! with no time left. The time that a tree spends in its images does not count, but for a moment by the date. One that
//! goes on (multishot) begins with a whole period after a restore: nothing asks for a shorter first one.
//!
//! **Order**: requests that wait for one file are asked for in the order in which they were put into its queue, at
//! whose head a wait comes that all are woken from, and at whose end one that is alone (accept).
//!
//! Source: linux io_uring/poll.c, rw.c, net.c, timeout.c; include/linux/io_uring_types.h, struct io_kiocb.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::OnceLock;

use firn_proto::{FirnUringEntry, FirnUringRequest};
use firn_sys::Pid;
use firn_sys::io_uring::{request, setup};

use super::asked::{Asked, Described};
use super::inner::{Descriptors, Inner};
use super::operations::{self, Refusal, States};
use crate::files::open_file::Trouble;
use crate::kernel::{Kernel, Object};

/// More requests than are looked through.
const MAX_REQUESTS: usize = 1 << 16;
const MAX_TABLE_BITS: u32 = 16;
/// The result of a timeout.
const ETIME: u32 = (-62i32).cast_unsigned();
/// Bit of `struct io_kiocb`, poll_refs: it is being cancelled; the low ones say that it was wakened.
const CANCELLED: u32 = 1 << 31;

/// A request that waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting<'a> {
    object: Object<'a>,
    /// A timeout that is over, which its thread has not been told yet.
    is_over: bool,
}

impl<'a> Inner<'a> {
    /// Requests that wait for something, timeouts last. None where that can't be seen.
    pub(super) fn waiting(&self) -> Option<Vec<Waiting<'a>>> {
        let mut found = Vec::new();
        for table in ["cancel_table", "cancel_table_locked"] {
            let Some(bits) = self.ring.word(&format!("{table}.hash_bits")) else {
                continue;
            };
            for nth in 0..1u32 << bits.min(MAX_TABLE_BITS) {
                let bucket = self.ring.item(&format!("{table}.hbs"), nth)?;
                found.extend(bucket.chain("list", "io_kiocb", "hash_node", MAX_REQUESTS)?);
            }
        }
        let timeouts = self
            .ring
            .entries("timeout_list", "io_timeout", "list", MAX_REQUESTS)?;
        for timeout in timeouts {
            found.push(timeout.whole_of("io_kiocb", "cmd")?);
        }
        let waits = |object| Waiting {
            object,
            is_over: false,
        };
        let over = self.timeouts_over()?.into_iter().map(|object| Waiting {
            object,
            is_over: true,
        });
        Some(found.into_iter().map(waits).chain(over).collect())
    }

    /// Timeouts that are over, as their threads will be told when they go on: each has a list of what it has to do,
    /// and rings with DEFER_TASKRUN have one of their own.
    fn timeouts_over(&self) -> Option<Vec<Object<'a>>> {
        let to_do =
            |of: Object<'a>, list| of.chain(list, "io_kiocb", "io_task_work.node", MAX_REQUESTS);
        let mut found = to_do(self.ring, "work_llist")?;
        let users = self
            .ring
            .entries("tctx_list", "io_tctx_node", "ctx_node", MAX_REQUESTS)?;
        for user in users {
            let user = user.follow("task")?.follow("io_uring");
            found.extend(to_do(user?, "task_list")?);
        }
        let own = self.ring.address();
        let is_over = |request: &Object<'_>| {
            request.number("ctx") == Some(own)
                && request.number("opcode") == Some(request::TIMEOUT.into())
                && request.word("cqe.res") == Some(ETIME)
        };
        found.retain(is_over);
        Some(found)
    }
}

impl Inner<'_> {
    /// Number of requests in flight that don't just wait.
    pub(super) fn at_work(&self) -> Option<u32> {
        let waiting = u32::try_from(self.waiting()?.len()).ok()?;
        // One that ends between the two looks is looked for again.
        Some(self.in_flight()?.abs_diff(waiting))
    }
}

impl Inner<'_> {
    /// How many completions the ring has had that were not timeouts, modulo 2^32. The kernel counts a timeout when it
    /// is over, before its thread is told.
    fn nr_completed(&self, waiting: &[Waiting<'_>]) -> Option<u32> {
        let timeouts = self.ring.word("cq_timeouts.counter")?;
        let untold = waiting.iter().filter(|request| request.is_over).count();
        let told = timeouts.wrapping_sub(u32::try_from(untold).ok()?);
        Some(self.ring.word("cached_cq_tail")?.wrapping_sub(told))
    }
}

/// How far a ring has come. Of timeouts that are over meanwhile an image need not know: after a restore they are over as
/// well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    nr_completed: u32,
    nr_waiting: usize,
}

impl Progress {
    /// None where that can't be seen.
    pub(super) fn of(inner: &Inner<'_>) -> Option<Progress> {
        let waiting = inner.waiting()?;
        let named: Option<Vec<_>> = waiting.iter().map(|request| request.named()).collect();
        let others = named?.into_iter();
        let others = others.filter(|(opcode, _)| *opcode != request::TIMEOUT);
        Some(Progress {
            nr_completed: inner.nr_completed(&waiting)?,
            nr_waiting: others.count(),
        })
    }
}

/// Whether requests of an operation that wait are saved.
pub(super) fn is_saved(opcode: u8) -> bool {
    use request::{ACCEPT, POLL_ADD, READ, READV, RECV, RECVMSG, TIMEOUT};
    matches!(
        opcode,
        ACCEPT | POLL_ADD | READ | READV | RECV | RECVMSG | TIMEOUT
    )
}

/// The kernel, and its numbers for the states of requests, which take some milliseconds to find.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) states: &'a OnceLock<States>,
}

/// What is to be said of the first request that can't be saved.
pub(super) fn refused(known: Known<'_>, inner: Inner<'_>) -> Option<Trouble> {
    add(known, inner, &mut FirnUringEntry::default()).err()
}

/// Adds requests in flight to the image of a ring.
///
/// # Errors
/// One of them can't be saved.
pub(super) fn add(
    known: Known<'_>,
    inner: Inner<'_>,
    ring: &mut FirnUringEntry,
) -> Result<(), Trouble> {
    let unseen = || operations::trouble(None, &Refusal::Unseen);
    let mut waiting = inner.waiting().ok_or_else(unseen)?;
    let Some(first) = waiting.first() else {
        return Ok(());
    };
    if inner.flags & setup::SQPOLL != 0 {
        return Err(operations::trouble(first.named(), &Refusal::OfKernelThread));
    }
    put_in_order(&mut waiting);
    let nr_completed = inner.nr_completed(&waiting).ok_or_else(unseen)?;
    let mut look = Look {
        kernel: known.kernel,
        nr_completed,
        states: known.states.get_or_init(|| States::of(known.kernel)),
        users: HashMap::new(),
    };
    for request in waiting {
        let found = look.describe(request);
        let found = found.map_err(|why| operations::trouble(request.named(), &why));
        ring.requests.push(found?);
    }
    // Completions that repeat what was told come before all that count, and all that count after the timeouts that do
    // so.
    ring.requests
        .sort_by_key(|request| match request.is_told() {
            true => 0,
            false if request.opcode == u32::from(request::TIMEOUT) => 1,
            false => 2,
        });
    Ok(())
}

/// A thread that has requests in flight, and the open files of its process.
struct User<'a> {
    tid: Pid,
    /// Where its credentials are.
    credentials: Option<u64>,
    descriptors: Descriptors<'a>,
}

struct Look<'a> {
    kernel: &'a Kernel,
    /// How many completions the ring has had that were not timeouts.
    nr_completed: u32,
    states: &'a States,
    /// Threads by their addresses.
    users: HashMap<u64, Rc<User<'a>>>,
}

impl<'a> Look<'a> {
    fn describe(&mut self, waiting: Waiting<'a>) -> Described {
        let object = waiting.object;
        let (opcode, value) = waiting.named().ok_or(Refusal::Unseen)?;
        let flags = object.number("flags").ok_or(Refusal::Unseen)?;
        self.states.check(opcode, flags)?;
        let state = object.word("poll_refs.counter").ok_or(Refusal::Unseen)?;
        if object.number("link").ok_or(Refusal::Unseen)? != 0 {
            return Err(Refusal::Linked);
        }
        if state & CANCELLED != 0 {
            return Err(Refusal::Cancelled);
        }
        let user = self.user(object).ok_or(Refusal::Unseen)?;
        // Those of its thread, which one has noted that a worker of the kernel began with.
        if self.states.has_credentials(flags) && object.number("creds") != user.credentials {
            return Err(Refusal::Credentials);
        }
        let file = object.number("file").ok_or(Refusal::Unseen)?;
        let fd = match file {
            0 => None,
            file => Some(user.descriptors.file(file).ok_or(Refusal::FileIsGone)?),
        };
        let whole = FirnUringRequest {
            tid: user.tid.to_image(),
            opcode: opcode.into(),
            flags: self
                .states
                .skips_success(flags)
                .then_some(request::SKIP_SUCCESS.into()),
            fd,
            user_data: value,
            ..FirnUringRequest::default()
        };
        let asked = Asked {
            object,
            flags,
            is_woken: state != 0,
            is_over: waiting.is_over,
            nr_completed: self.nr_completed,
            states: self.states,
            whole,
        };
        asked.describe()
    }

    /// The thread that has asked.
    fn user(&mut self, request: Object<'a>) -> Option<Rc<User<'a>>> {
        // Since Linux 6.13 a request has its thread's part of io_uring.
        let thread = request.follow("tctx").and_then(|user| user.follow("task"));
        let thread = thread.or_else(|| request.follow("task"))?;
        if let Some(user) = self.users.get(&thread.address()) {
            return Some(user.clone());
        }
        let tid = self.kernel.number_of(thread)?;
        let user = Rc::new(User {
            tid,
            credentials: thread.number("cred"),
            descriptors: Descriptors::of_thread(thread, tid)?,
        });
        self.users.insert(thread.address(), user.clone());
        Some(user)
    }
}

impl<'a> Waiting<'a> {
    /// Its operation and its value, for messages.
    fn named(self) -> Option<(u8, u64)> {
        let opcode = u8::try_from(self.object.number("opcode")?).ok()?;
        Some((opcode, self.object.number("cqe.user_data")?))
    }

    /// Its entry in a file's wait queue.
    fn entry(self) -> Option<Object<'a>> {
        let (opcode, _) = self.named()?;
        match opcode {
            request::POLL_ADD => self.object.part_as("cmd", "io_poll"),
            request::TIMEOUT => None,
            _ => self.object.follow("apoll")?.part_as("poll", "io_poll"),
        }
    }

    /// The queue that it is in, and where there.
    fn place(self, queues: &mut HashMap<u64, Vec<u64>>) -> Option<(u64, i64)> {
        const ALONE: u64 = 1;
        let entry = self.entry()?;
        let queue = entry.follow("head")?;
        let entries = || {
            let entries = queue.entries("head", "io_poll", "wait.entry", MAX_REQUESTS);
            let entries = entries.unwrap_or_default().into_iter();
            entries.map(Object::address).collect()
        };
        let known = queues.entry(queue.address()).or_insert_with(entries);
        let nth = known.iter().position(|other| *other == entry.address())?;
        let nth = i64::try_from(nth).ok()?;
        let is_alone = entry.number("wait.flags")? & ALONE != 0;
        Some((queue.address(), if is_alone { nth } else { -1 - nth }))
    }
}

/// Puts those that wait for one file into the order in which they began to. Those that wait for none any more come
/// first.
fn put_in_order(waiting: &mut [Waiting<'_>]) {
    let mut queues = HashMap::new();
    waiting.sort_by_cached_key(|request| request.place(&mut queues));
}
