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
//!
//! **The file** is taken by any descriptor that leads to the same open file, also where the request named it by its
//! place among registered files: nothing tells the two apart later.
//!
//! **Wakened and not gone on yet**, since its thread stands still: asked for again, it finds at once what it was
//! wakened for. A poll that goes on after each event (multishot) is the other way round: it has told of what is ready,
//! and when it is asked for again it tells of that once more. That completion must not be seen (`again.rs`).
//!
//! **Order**: requests that wait for one file are asked for in the order in which they were put into its queue, at
//! whose head a wait comes that all are woken from, and at whose end one that is alone (accept).
//!
//! Source: linux io_uring/poll.c, rw.c, net.c, timeout.c; include/linux/io_uring_types.h, struct io_kiocb.

use std::collections::HashMap;
use std::rc::Rc;

use firn_proto::{FirnUringBuffer, FirnUringEntry, FirnUringRequest};
use firn_sys::io_uring::{request, setup};
use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::{Pid, epoll, pidfd};

use super::inner::{Descriptors, Inner};
use super::operations::{self, Refusal, States};
use crate::files::open_file::Trouble;
use crate::kernel::{Kernel, Object};

/// More requests than are looked through, and parts of memory than a request has (UIO_MAXIOV).
const MAX_REQUESTS: usize = 1 << 16;
const MAX_PARTS: u64 = 1024;
const MAX_TABLE_BITS: u32 = 16;
/// Bits of `struct io_poll`, events.
const ONE_SHOT: u32 = 1 << 30;
const EXCLUSIVE: u32 = 1 << 28;
const EVENTS: u32 = 0xffff;
/// Bit of `struct io_kiocb`, poll_refs: it is being cancelled; the low ones say that it was wakened.
const CANCELLED: u32 = 1 << 31;
/// A flag of msg_flags for 32-bit code that the kernel adds itself.
const COMPAT: u32 = 1 << 31;

/// A request that waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting<'a>(Object<'a>);

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
        Some(found.into_iter().map(Waiting).collect())
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

/// How far a ring has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    completed: u32,
    nr_polls: usize,
    nr_timeouts: usize,
}

impl Progress {
    /// None where that can't be seen.
    pub(super) fn of(inner: &Inner<'_>) -> Option<Progress> {
        let waiting = inner.waiting()?;
        let named: Option<Vec<_>> = waiting.iter().map(|request| request.named()).collect();
        let is_timeout = |(opcode, _): &&(u8, u64)| *opcode == request::TIMEOUT;
        let nr_timeouts = named?.iter().filter(is_timeout).count();
        Some(Progress {
            completed: inner.ring.word("cached_cq_tail")?,
            nr_polls: waiting.len() - nr_timeouts,
            nr_timeouts,
        })
    }

    /// Whether more has happened since than that timeouts are over, of which an image may not know: after a restore
    /// they are over as well.
    pub(super) fn is_beyond(self, before: Progress) -> bool {
        let completed = self.completed.wrapping_sub(before.completed);
        let over = before.nr_timeouts.checked_sub(self.nr_timeouts);
        let over = over.and_then(|over| u32::try_from(over).ok());
        self.nr_polls != before.nr_polls || over.is_none_or(|over| completed > over)
    }
}

/// Whether requests of an operation that wait are saved.
pub(super) fn is_saved(opcode: u8) -> bool {
    use request::{ACCEPT, POLL_ADD, READ, READV, RECV, RECVMSG};
    matches!(opcode, ACCEPT | POLL_ADD | READ | READV | RECV | RECVMSG)
}

/// What is to be said of the first request that can't be saved.
pub(super) fn refused(kernel: &Kernel, inner: Inner<'_>) -> Option<Trouble> {
    add(kernel, inner, &mut FirnUringEntry::default()).err()
}

/// Adds requests in flight to the image of a ring.
///
/// # Errors
/// One of them can't be saved.
pub(super) fn add(
    kernel: &Kernel,
    inner: Inner<'_>,
    ring: &mut FirnUringEntry,
) -> Result<(), Trouble> {
    let unseen = || operations::trouble(None, &Refusal::Unseen);
    let mut waiting = inner.waiting().ok_or_else(unseen)?;
    if let Some(first) = waiting.first()
        && inner.flags & setup::SQPOLL != 0
    {
        return Err(operations::trouble(first.named(), &Refusal::OfKernelThread));
    }
    put_in_order(&mut waiting);
    let mut look = Look {
        kernel,
        states: States::of(kernel),
        users: HashMap::new(),
    };
    for request in waiting {
        let found = look.describe(request);
        let found = found.map_err(|why| operations::trouble(request.named(), &why));
        ring.requests.push(found?);
    }
    // Their completions come before all that count.
    ring.requests
        .sort_by_key(|request| request.is_told.is_none());
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
    states: States,
    /// Threads by their addresses.
    users: HashMap<u64, Rc<User<'a>>>,
}

type Described = Result<FirnUringRequest, Refusal>;

impl<'a> Look<'a> {
    fn describe(&mut self, waiting: Waiting<'a>) -> Described {
        let object = waiting.0;
        let (opcode, value) = waiting.named().ok_or(Refusal::Unseen)?;
        let flags = object.number("flags").ok_or(Refusal::Unseen)?;
        self.states.check(flags)?;
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
            states: &self.states,
            whole,
        };
        match opcode {
            request::POLL_ADD => asked.poll(),
            request::READ | request::READV => asked.read(),
            request::RECV | request::RECVMSG => asked.receive(),
            request::ACCEPT => asked.accept(),
            _ => Err(Refusal::Operation),
        }
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

/// A request on its way into the image.
struct Asked<'a> {
    object: Object<'a>,
    flags: u64,
    /// It goes on when its thread does.
    is_woken: bool,
    states: &'a States,
    /// What all requests have.
    whole: FirnUringRequest,
}

impl Asked<'_> {
    fn poll(self) -> Described {
        let poll = self.object.part_as("cmd", "io_poll");
        let events = poll.and_then(|poll| poll.word("events"));
        let events = events.ok_or(Refusal::Unseen)?;
        let is_multishot = events & ONE_SHOT == 0;
        let is_told = is_multishot && !self.is_woken && self.is_ready(events)?;
        Ok(FirnUringRequest {
            operation_flags: Some(events & (EVENTS | EXCLUSIVE)),
            len: is_multishot.then_some(request::POLL_MULTISHOT),
            is_told: is_told.then_some(true),
            ..self.whole
        })
    }

    /// Whether what is waited for is there.
    fn is_ready(&self, events: u32) -> Result<bool, Refusal> {
        let [low, high, ..] = events.to_le_bytes();
        let fd = self.whole.fd.and_then(|fd| i32::try_from(fd).ok());
        let fd = fd.ok_or(Refusal::Unseen)?;
        let process = pidfd::open_by_thread(Pid::from_image(self.whole.tid));
        let file = process.and_then(|process| pidfd::getfd(process, fd));
        let ready = file.and_then(|file| epoll::poll(file, i16::from_le_bytes([low, high])));
        ready.map(|ready| ready != 0).map_err(|_| Refusal::Unseen)
    }

    fn read(self) -> Described {
        let unseen = || Refusal::Unseen;
        let read = self.object.part_as("cmd", "io_rw").ok_or_else(unseen)?;
        let state = self.object.follow_as("async_data", "io_async_rw");
        if let Some(state) = state
            && state.number("bytes_done").ok_or_else(unseen)? != 0
        {
            return Err(Refusal::Begun);
        }
        // A read at the file's own position has it written there by now.
        let offset = match self.states.is_at_position(self.flags) {
            true => u64::MAX,
            false => read.number("kiocb.ki_pos").ok_or_else(unseen)?,
        };
        let is_vector = self.whole.opcode == u32::from(request::READV);
        let mut parts = Vec::new();
        if is_vector {
            let iterator = state.ok_or_else(unseen)?;
            let path = ["iter", "s.iter"].into_iter();
            let mut seen = path.filter_map(|path| iterator.part_as(path, "iov_iter"));
            parts = seen
                .next()
                .and_then(|iter| self.parts(iter))
                .ok_or_else(unseen)?;
        }
        Ok(FirnUringRequest {
            offset: Some(offset),
            address: (!is_vector).then(|| read.number("addr")).flatten(),
            len: Some(read.word("len").ok_or_else(unseen)?),
            operation_flags: Some(read.word("flags").ok_or_else(unseen)?),
            parts,
            ..self.whole
        })
    }

    /// The memory that an iterator goes over, none of which is used yet.
    fn parts(&self, iterator: Object<'_>) -> Option<Vec<FirnUringBuffer>> {
        if iterator.number("iov_offset")? != 0 {
            return None;
        }
        let (is_one, is_many) = self.states.iterators()?;
        let kind = iterator.number("iter_type")?;
        if kind == is_one {
            return Some(vec![FirnUringBuffer {
                address: iterator.number("ubuf")?,
                len_bytes: iterator.number("count")?,
            }]);
        }
        let nr = iterator.number("nr_segs")?;
        if kind != is_many || nr > MAX_PARTS {
            return None;
        }
        let list = ["__iov", "iov"];
        let part = |nth: u32| {
            let mut items = list.iter().filter_map(|list| iterator.item(list, nth));
            let part = items.next()?;
            Some(FirnUringBuffer {
                address: part.number("iov_base")?,
                len_bytes: part.number("iov_len")?,
            })
        };
        (0..u32::try_from(nr).ok()?).map(part).collect()
    }

    fn receive(self) -> Described {
        let unseen = || Refusal::Unseen;
        let received = self.object.part_as("cmd", "io_sr_msg");
        let received = received.ok_or_else(unseen)?;
        if received.number("done_io").ok_or_else(unseen)? != 0 {
            return Err(Refusal::Begun);
        }
        let address = received.number("buf").ok_or_else(unseen)?;
        if self.whole.opcode == u32::from(request::RECVMSG) {
            self.check_header(address)?;
        }
        Ok(FirnUringRequest {
            address: Some(address),
            len: Some(received.word("len").ok_or_else(unseen)?),
            operation_flags: Some(received.word("msg_flags").ok_or_else(unseen)? & !COMPAT),
            ioprio: Some(received.word("flags").ok_or_else(unseen)?),
            ..self.whole
        })
    }

    /// Looks whether the program's header of a message still says what the kernel has read of it.
    fn check_header(&self, address: u64) -> Result<(), Refusal> {
        let message = self.object.follow_as("async_data", "io_async_msghdr");
        let message = message.ok_or(Refusal::Unseen)?;
        let iterator = message.part_as("msg.msg_iter", "iov_iter");
        let parts = iterator.and_then(|iterator| self.parts(iterator));
        let kept = operations::Header {
            name: message.number("uaddr").ok_or(Refusal::Unseen)?,
            parts: parts.ok_or(Refusal::Unseen)?,
        };
        let tid = Pid::from_image(self.whole.tid);
        let read = |address, len: usize| {
            let mut bytes = vec![0; len];
            let range = RemoteRange { address, len };
            let read = process_vm::read(tid, &[range], &mut bytes).ok()?;
            (read == len).then_some(bytes)
        };
        match operations::Header::read(address, read) {
            Some(header) if header == kept => Ok(()),
            _ => Err(Refusal::HeaderChanged),
        }
    }

    fn accept(self) -> Described {
        let unseen = || Refusal::Unseen;
        let accept = self.object.part_as("cmd", "io_accept");
        let accept = accept.ok_or_else(unseen)?;
        let word = |name| accept.word(name).ok_or_else(unseen);
        Ok(FirnUringRequest {
            address: Some(accept.number("addr").ok_or_else(unseen)?),
            offset: Some(accept.number("addr_len").ok_or_else(unseen)?),
            operation_flags: Some(word("flags")?),
            ioprio: Some(word("iou_flags")?),
            file_index: Some(word("file_slot")?).filter(|slot| *slot != 0),
            ..self.whole
        })
    }
}

impl<'a> Waiting<'a> {
    /// Its operation and its value, for messages.
    fn named(self) -> Option<(u8, u64)> {
        let opcode = u8::try_from(self.0.number("opcode")?).ok()?;
        Some((opcode, self.0.number("cqe.user_data")?))
    }

    /// Its entry in a file's wait queue.
    fn entry(self) -> Option<Object<'a>> {
        let (opcode, _) = self.named()?;
        match opcode {
            request::POLL_ADD => self.0.part_as("cmd", "io_poll"),
            request::TIMEOUT => None,
            _ => self.0.follow("apoll")?.part_as("poll", "io_poll"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_has_gone_on_when_more_than_a_timeout_is_over() {
        let before = Progress {
            completed: u32::MAX,
            nr_polls: 2,
            nr_timeouts: 1,
        };
        assert!(!before.is_beyond(before));
        let over = Progress {
            completed: 0,
            nr_timeouts: 0,
            ..before
        };
        assert!(!over.is_beyond(before));
        let and_more = Progress {
            completed: 1,
            ..over
        };
        assert!(and_more.is_beyond(before));
        let read = Progress {
            completed: 0,
            nr_polls: 1,
            ..before
        };
        assert!(read.is_beyond(before));
    }
}
