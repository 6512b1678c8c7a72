//! Requests in flight, asked for again by the threads that had asked.
//!
//! ```text
//! tree                                   coordinator
//! complete, stopped, with its registers
//!                                        connections go on
//!                                        entries of the next requests into each ring
//! io_uring_enter by each thread
//!                                        … until all are in flight
//!                                        the ring's own entries again
//! ```
//!
//! They come last, when everything that they wait for is as it was: what is there already they would take at once,
//! from a socket in repair mode not even that. A ring's counters stand as many requests before the end until then.
//! Which entries of the ring they use tells the program nothing, and its own are put back.
//!
//! What comes of them before the tree runs is put behind the completions that it had, as it would have been. Polls
//! that tell again of what they have told come before the others, and their completions take the places of the last
//! ones that the program had, which are then put back; a registered eventfd does not count them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FirnUringEntry, FirnUringRequest};
use firn_sys::io_uring::request;
use firn_sys::{Errno, Pid, nr, pidfd};

use super::layout::{self, number};
use super::memory::Memory;
use super::restore;
use crate::files::error::FileRestoreError;
use crate::files::store::FileStore;
use crate::inject::{self, Job};
use crate::program::{Data, Program, ProgramId, ProgramSet, Rule};
use crate::tree::{Task, Tree};

/// Where fields of struct io_uring_sqe are.
const FLAGS: usize = 1;
const IOPRIO: usize = 2;
const FD: usize = 4;
const OFFSET: usize = 8;
const ADDRESS: usize = 16;
const LEN: usize = 24;
const OPERATION_FLAGS: usize = 28;
const USER_DATA: usize = 32;
const FILE_INDEX: usize = 44;
const EINVAL: i32 = 22;
/// IORING_CQ_EVENTFD_DISABLED, of the flags of completions.
const NO_EVENTFD: u32 = 1;

/// A ring with requests to come.
struct Ring<'a> {
    entry: &'a FirnUringEntry,
    fd: OwnedFd,
    memory: Memory,
    /// Those that repeat what was told come first.
    batches: Vec<Batch<'a>>,
}

/// Requests that one thread can ask for at once.
#[derive(Clone, Copy)]
struct Batch<'a> {
    task: &'a Task,
    tid: Pid,
    /// The ring's descriptor there.
    fd: u32,
    requests: &'a [FirnUringRequest],
}

impl FileStore {
    /// Has the threads of a tree ask again for what was in flight.
    ///
    /// **Preconditions**: all threads are in ptrace stops of the calling thread, with their last registers;
    /// connections go on.
    ///
    /// # Errors
    /// The images contradict themselves, or the kernel takes a request no more.
    pub fn ask_again(&self, tree: &Tree) -> Result<(), FileRestoreError> {
        let entries = self
            .opened_entries()
            .filter_map(|entry| entry.firn_uring.as_ref());
        let busy = entries.filter(|ring| !ring.requests.is_empty());
        let rings: Result<Vec<_>, _> = busy.map(|ring| self.reach(ring, tree)).collect();
        let rings = rings?;
        for ring in &rings {
            ring.mute();
        }
        ask_all(&rings, |batch| batch.requests[0].is_told())?;
        for ring in &rings {
            ring.hide_repeated()?;
        }
        ask_all(&rings, |batch| !batch.requests[0].is_told())?;
        rings.iter().try_for_each(Ring::settle)
    }

    fn reach<'a>(
        &self,
        ring: &'a FirnUringEntry,
        tree: &'a Tree,
    ) -> Result<Ring<'a>, FileRestoreError> {
        let corrupt = |what: &str| FileRestoreError::corrupt(ring.id, what);
        let mut batches = Vec::new();
        let is_like = |one: &FirnUringRequest, next: &FirnUringRequest| {
            (one.tid, one.is_told()) == (next.tid, next.is_told())
        };
        for requests in ring.requests.chunk_by(is_like) {
            let tid = Pid::from_image(requests[0].tid);
            let task = tree.alive().find(|task| task.threads.contains(&tid));
            let task = task.ok_or_else(|| corrupt("a request is of a thread that is not there"))?;
            let fd = self.ring_of(task.pid, ring.id);
            let fd = fd.ok_or_else(|| corrupt("a request is of a process without the ring"))?;
            let requests = requests.chunks(number(ring.sq_entries));
            batches.extend(requests.map(|requests| Batch {
                task,
                tid,
                fd,
                requests,
            }));
        }
        let Batch { tid, fd, .. } = batches[0];
        let refused = |action| FileRestoreError::refused(action, "an io_uring ring");
        let fd = i32::try_from(fd).map_err(|_| corrupt("it has an impossible descriptor"))?;
        let process = pidfd::open_by_thread(tid).map_err(refused("reach the process of"))?;
        let fd = pidfd::getfd(&process, fd).map_err(refused("fetch"))?;
        let memory = Memory::map(&fd, restore::shape(ring)?).map_err(refused("map"))?;
        Ok(Ring {
            entry: ring,
            fd,
            memory,
            batches,
        })
    }

    /// A process's descriptor of a ring.
    fn ring_of(&self, pid: Pid, id: u32) -> Option<u32> {
        let table = self.table_of(pid).map_or(&[][..], |id| self.table(id));
        let is_it =
            |fd: &&firn_proto::FdinfoEntry| fd.r#type() == FdTypes::FirnUring && fd.id == id;
        table.iter().find(is_it).map(|fd| fd.fd)
    }
}

/// Has some batches of all rings asked for, those of each ring one after another.
fn ask_all<'a>(
    rings: &'a [Ring<'a>],
    is_due: impl Fn(&Batch<'a>) -> bool,
) -> Result<(), FileRestoreError> {
    for round in 0.. {
        let due = |ring: &'a Ring<'a>| {
            let mut batches = ring.batches.iter().copied().filter(&is_due);
            batches.nth(round).map(|batch| (ring, batch))
        };
        let due: Vec<_> = rings.iter().filter_map(due).collect();
        if due.is_empty() {
            break;
        }
        ask(&due)?;
    }
    Ok(())
}

/// Has one batch of each of some rings asked for.
fn ask(due: &[(&Ring<'_>, Batch<'_>)]) -> Result<(), FileRestoreError> {
    let mut programs: BTreeMap<Pid, (&Task, Program)> = BTreeMap::new();
    let mut memories: Vec<Option<Data>> = Vec::new();
    for (_, batch) in due {
        let name = || Program::new(format!("thread {}", batch.tid));
        let program = programs
            .entry(batch.tid)
            .or_insert_with(|| (batch.task, name()));
        memories.push(batch.plan(&mut program.1));
    }
    let mut jobs: Vec<Job> = Vec::new();
    let mut places: BTreeMap<Pid, (usize, ProgramId)> = BTreeMap::new();
    for (tid, (task, mut program)) in programs {
        program.park();
        let known = jobs.iter().position(|job| job.pid == task.pid);
        let nth = known.unwrap_or_else(|| {
            jobs.push(Job {
                pid: task.pid,
                abi: task.abi,
                threads: Vec::new(),
                set: ProgramSet::new(),
            });
            jobs.len() - 1
        });
        let id = jobs[nth].set.add(program);
        jobs[nth].threads.push((tid, id));
        places.insert(tid, (nth, id));
    }
    inject::run_prepared(&jobs, None, |arenas| {
        for ((ring, batch), memory) in due.iter().zip(&memories) {
            let (nth, program) = places[&batch.tid];
            let address = memory.map_or(0, |memory| arenas[nth].address(program, memory));
            ring.put(batch.requests, address);
        }
    })?;
    Ok(())
}

impl Batch<'_> {
    /// Appends the record that has the kernel take it, and what it points to, which is returned.
    fn plan(&self, program: &mut Program) -> Option<Data> {
        let memory: Vec<u8> = self.requests.iter().flat_map(memory_of).collect();
        let memory = (!memory.is_empty()).then(|| program.data(&memory));
        let count = u32::try_from(self.requests.len()).expect("no more than the ring has entries");
        let args = [self.fd.into(), count.into(), 0.into(), 0.into()];
        let why = format!(
            "asking the ring of fd {} again for {count} requests",
            self.fd
        );
        program.call(nr::IO_URING_ENTER, &args, Rule::Exact(count.into()), why);
        memory
    }
}

impl Ring<'_> {
    /// Has a registered eventfd count nothing.
    fn mute(&self) {
        let flags = self.entry.cq_flags.unwrap_or(0);
        self.memory.set_word(layout::CQ_FLAGS, flags | NO_EVENTFD);
    }

    /// Puts requests into the ring, where the kernel takes the next from; what they point to is at `address` in
    /// their process.
    fn put(&self, requests: &[FirnUringRequest], mut address: u64) {
        let layout = self.memory.layout;
        let mut tail = self.memory.word(layout::SQ_HEAD);
        for request in requests {
            let entry = entry_of(request, address, layout.entry_len());
            self.memory
                .put_entry(tail & (layout.sq_entries - 1), &entry);
            address += u64::try_from(memory_of(request).len()).expect("lengths fit 64 bits");
            tail = tail.wrapping_add(1);
        }
        self.memory.set_word(layout::SQ_TAIL, tail);
    }

    /// Puts the program's completions in the places of those that have repeated what was told, fewer of which may have
    /// come where something outside has changed meanwhile.
    fn hide_repeated(&self) -> Result<(), FileRestoreError> {
        let missing = self
            .entry
            .cq_tail
            .wrapping_sub(self.memory.word(layout::CQ_TAIL));
        if missing.cast_signed() > 0 {
            let refused = FileRestoreError::refused("move the completions of", "an io_uring ring");
            self.memory.receive(&self.fd, missing).map_err(refused)?;
        }
        self.memory.write_completions(self.entry);
        Ok(())
    }

    /// Puts the program's own entries back, and looks what has come of the requests.
    fn settle(&self) -> Result<(), FileRestoreError> {
        let refused = FileRestoreError::refused("ask again for requests of", "an io_uring ring");
        if self.memory.word(layout::SQ_HEAD) != self.entry.sq_head {
            return Err(refused(Errno::EIO));
        }
        self.memory.write_entries(self.entry);
        let done = self.memory.completions_from(self.entry.cq_tail);
        let is_refused = |(value, result): &(u64, i32)| {
            // A listening socket that was shut down says the same.
            let may_say_so = |of: &FirnUringRequest| of.opcode != u32::from(request::ACCEPT);
            let mut same = self
                .entry
                .requests
                .iter()
                .filter(|of| of.user_data == *value);
            *result == -EINVAL && same.any(may_say_so)
        };
        match done.iter().any(is_refused) {
            true => Err(refused(Errno::EINVAL)),
            false => Ok(()),
        }
    }
}

/// What a request points to, as the kernel reads it: parts of memory (struct iovec) or a time (struct timespec).
fn memory_of(request: &FirnUringRequest) -> Vec<u8> {
    let parts = request.parts.iter();
    let mut words: Vec<u64> = parts
        .flat_map(|part| [part.address, part.len_bytes])
        .collect();
    if let Some(seconds) = request.seconds {
        words.extend([seconds, request.nanoseconds.unwrap_or(0).into()]);
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The submission entry that asks for a request, of so many bytes; what it points to is at `address`.
fn entry_of(request: &FirnUringRequest, address: u64, len: usize) -> Vec<u8> {
    let has_memory = !request.parts.is_empty() || request.seconds.is_some();
    let address = match has_memory {
        true => address,
        false => request.address.unwrap_or(0),
    };
    let mut entry = vec![0; len];
    let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &request.opcode.to_le_bytes()[..1]);
    put(FLAGS, &request.flags.unwrap_or(0).to_le_bytes()[..1]);
    put(IOPRIO, &request.ioprio.unwrap_or(0).to_le_bytes()[..2]);
    put(FD, &request.fd.unwrap_or(u32::MAX).to_le_bytes());
    put(OFFSET, &request.offset.unwrap_or(0).to_le_bytes());
    put(ADDRESS, &address.to_le_bytes());
    put(LEN, &request.len.unwrap_or(0).to_le_bytes());
    let flags = request.operation_flags.unwrap_or(0);
    put(OPERATION_FLAGS, &flags.to_le_bytes());
    put(USER_DATA, &request.user_data.to_le_bytes());
    put(FILE_INDEX, &request.file_index.unwrap_or(0).to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use firn_proto::FirnUringBuffer;

    use super::*;

    #[test]
    fn an_entry_asks_for_what_was_in_flight() {
        let accept = FirnUringRequest {
            opcode: request::ACCEPT.into(),
            flags: Some(request::SKIP_SUCCESS.into()),
            fd: Some(7),
            user_data: 0x1122_3344_5566_7788,
            address: Some(0x1000),
            offset: Some(0x2000),
            operation_flags: Some(0x800),
            ioprio: Some(1),
            file_index: Some(9),
            ..FirnUringRequest::default()
        };
        let entry = entry_of(&accept, 0x9000, 64);
        assert_eq!(entry[..8], [13, 64, 1, 0, 7, 0, 0, 0]);
        assert_eq!(entry[8..16], 0x2000u64.to_le_bytes());
        assert_eq!(entry[16..24], 0x1000u64.to_le_bytes());
        assert_eq!(entry[28..32], 0x800u32.to_le_bytes());
        assert_eq!(entry[32..40], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(entry[44..48], 9u32.to_le_bytes());
        assert_eq!(entry_of(&accept, 0, 128).len(), 128);
    }

    #[test]
    fn what_a_request_points_to_stands_where_its_entry_says() {
        let part = |address| FirnUringBuffer {
            address,
            len_bytes: 3,
        };
        let read = FirnUringRequest {
            opcode: request::READV.into(),
            parts: vec![part(0x10), part(0x20)],
            len: Some(2),
            ..FirnUringRequest::default()
        };
        assert_eq!(memory_of(&read).len(), 32);
        assert_eq!(memory_of(&read)[16], 0x20);
        assert_eq!(entry_of(&read, 0x9000, 64)[16..24], 0x9000u64.to_le_bytes());
        let time = FirnUringRequest {
            opcode: request::TIMEOUT.into(),
            seconds: Some(2),
            nanoseconds: Some(5),
            ..FirnUringRequest::default()
        };
        assert_eq!(
            memory_of(&time),
            [[2, 0, 0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0]].concat()
        );
        assert_eq!(entry_of(&time, 0, 64)[4..8], [255; 4]);
    }
}
