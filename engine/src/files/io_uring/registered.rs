//! Numbers under which threads have registered rings with themselves (IORING_REGISTER_RING_FDS).
//!
//! They belong to a thread, and only the thread can tell whether it has one, by using it. Which ring it is shows in
//! the kernel's own structures; where these can't be read, a process may have one ring only.

use std::collections::HashSet;

use firn_proto::{FdTypes, FdinfoEntry, FirnUringRegistration};
use firn_sys::io_uring::register;
use firn_sys::{Pid, nr};

use crate::files::dump::FileTable;
use crate::files::error::FileDumpError;
use crate::files::store::FileStore;
use crate::inject::{self, Job};
use crate::obstacle::Obstacle;
use crate::program::{Program, ProgramSet, Rule, Slot};
use crate::tree::{Task, Tree};

/// Places that a thread has for rings.
const MAX_PLACES: u32 = 16;
/// Flag of io_uring_enter: the ring is one of those.
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const EBADF: i64 = -9;
const EINVAL: i64 = -22;

impl FileTable {
    /// Whether a task of the tree has an io_uring ring open.
    pub fn has_ring(&self, pid: Pid) -> bool {
        !rings_in(&self.table_of_task(pid)).is_empty()
    }

    /// Asks all threads of processes that have rings which of them they have registered with themselves.
    ///
    /// **Preconditions**: all threads are in ptrace stops of the calling thread, and the tree was added.
    ///
    /// # Errors
    /// `Obstacles` with threads of which it can't be told which ring they have registered.
    pub fn ask_for_rings(&mut self, tree: &Tree) -> Result<(), FileDumpError> {
        let mut entries = self.collected.entries.iter();
        if !entries.any(|entry| entry.firn_uring.is_some()) {
            return Ok(());
        }
        let tasks: Vec<(&Task, Vec<u32>)> = tree
            .alive()
            .map(|task| (task, rings_in(&self.table_of_task(task.speaker()))))
            .filter(|(_, rings)| !rings.is_empty())
            .collect();
        if tasks.is_empty() {
            return Ok(());
        }
        let (jobs, asked): (Vec<Job>, Vec<Vec<Vec<Slot>>>) =
            tasks.iter().map(|(task, _)| question(task)).unzip();
        let arenas = inject::run(&jobs, tree.journal.as_ref())?;
        let mut found = Vec::new();
        for (nth, (task, rings)) in tasks.iter().enumerate() {
            self.note_users(task, rings);
            for ((tid, program), slots) in jobs[nth].threads.iter().zip(&asked[nth]) {
                for (index, slot) in (0u32..).zip(slots) {
                    if matches!(arenas[nth].slot(*program, *slot), EBADF | EINVAL) {
                        continue;
                    }
                    let only = match rings[..] {
                        [ring] => Some(ring),
                        _ => None,
                    };
                    let seen = self.collected.rings.registered(*tid, index);
                    match seen.or(only) {
                        Some(ring) => self.register(ring, *tid, index),
                        None => found.push(unclear(task.pid, *tid)),
                    }
                }
            }
        }
        found.extend(self.shared_belongings());
        match found.is_empty() {
            true => Ok(()),
            false => Err(FileDumpError::Obstacles(found)),
        }
    }

    /// Looks whether rings with requests in flight are still as they were read, when no more program is to run in the
    /// tasks.
    ///
    /// # Errors
    /// `Obstacles` with those that have gone on.
    pub fn check_rings(&self) -> Result<(), FileDumpError> {
        let gone_on = self.collected.rings.gone_on();
        match gone_on.is_empty() {
            true => Ok(()),
            false => Err(FileDumpError::Obstacles(gone_on)),
        }
    }

    fn register(&mut self, ring: u32, tid: Pid, index: u32) {
        let entries = self.collected.entries.iter_mut();
        let mut rings = entries.filter_map(|entry| entry.firn_uring.as_deref_mut());
        if let Some(entry) = rings.find(|entry| entry.id == ring) {
            let tid = tid.to_image();
            entry.registered.push(FirnUringRegistration { tid, index });
        }
    }
}

/// Numbers of the rings in a table.
fn rings_in(table: &[FdinfoEntry]) -> Vec<u32> {
    let rings = table.iter().filter(|fd| fd.r#type() == FdTypes::FirnUring);
    let rings: HashSet<u32> = rings.map(|fd| fd.id).collect();
    rings.into_iter().collect()
}

/// A program for each thread that uses all of its places, for nothing.
fn question(task: &Task) -> (Job, Vec<Vec<Slot>>) {
    let mut set = ProgramSet::new();
    let (mut threads, mut slots) = (Vec::new(), Vec::new());
    for tid in &task.threads {
        let mut program = Program::new(format!("thread {tid}"));
        let mut ask = |index: u32| {
            let args = [
                index.into(),
                0.into(),
                0.into(),
                ENTER_REGISTERED_RING.into(),
            ];
            let why = format!("using the registered ring {index} for nothing");
            program.call_to_slot(nr::IO_URING_ENTER, &args, Rule::Any, why)
        };
        slots.push((0..MAX_PLACES).map(&mut ask).collect());
        program.park();
        threads.push((*tid, set.add(program)));
    }
    let job = Job {
        pid: task.pid,
        abi: task.abi,
        threads,
        set,
    };
    (job, slots)
}

fn unclear(pid: Pid, tid: Pid) -> Obstacle {
    Obstacle {
        pid,
        object: format!("thread {tid}"),
        reason: "it has registered the descriptor of an io_uring ring with itself, and nothing tells of which"
            .to_owned(),
        hint: Some("let it call io_uring_unregister_ring_fd before the dump".to_owned()),
    }
}

impl FileStore {
    /// Appends the records by which a thread registers rings with itself. It has its table already.
    pub fn plan_registered_rings(&self, pid: Pid, tid: Pid, program: &mut Program) {
        self.plan_workers(pid, tid, program);
        let Some(table) = self.table_of(pid).map(|id| self.table(id)) else {
            return;
        };
        let mut seen = HashSet::new();
        for fd in table.iter().filter(|fd| fd.r#type() == FdTypes::FirnUring) {
            let ring = self.entry(FdTypes::FirnUring, fd.id);
            let ring = ring.and_then(|entry| entry.firn_uring.as_deref());
            let registered = ring.map_or(&[][..], |ring| ring.registered.as_slice());
            let own = registered.iter().filter(|own| own.tid == tid.to_image());
            for own in own {
                if !seen.insert(own.index) {
                    continue;
                }
                // struct io_uring_rsrc_update: place, reserved, descriptor.
                let words = [u64::from(own.index), u64::from(fd.fd)];
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let argument = program.data(&bytes);
                let args = [
                    fd.fd.into(),
                    register::RING_FDS.into(),
                    argument.into(),
                    1.into(),
                ];
                let why = format!("registering the ring of fd {} as {}", fd.fd, own.index);
                program.call(nr::IO_URING_REGISTER, &args, Rule::Exact(1), why);
            }
        }
    }
}
