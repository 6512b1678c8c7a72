//! Beginning to track, while the tree stands still.

use std::collections::HashMap;

use firn_sys::pagemap::Pagemap;
use firn_sys::uffd::{self, Uffd};
use firn_sys::{Errno, Pid, nr};

use super::Tracker;
use crate::inject::{self, InjectError, Job, Journal};
use crate::memory::range::{self, AddressRange};
use crate::program::{Arg, Program, ProgramId, ProgramSet, Rule, Slot};
use crate::tree::{Task, Tree};

/// Arms the tracking of `memory` of the tasks, which is forgotten what was written to; `old` are the
/// userfaultfds of those that have one. A task that can't be tracked is left out.
///
/// **Preconditions**: all threads are in ptrace stops of the calling thread, and what is to be tracked was saved.
///
/// # Errors
/// The tasks could not be asked to make userfaultfds.
pub(crate) fn arm(
    tree: &Tree,
    memory: &HashMap<Pid, Vec<AddressRange>>,
    old: Option<Tracker>,
    since: String,
) -> Result<Tracker, InjectError> {
    let old = old.map(|tracker| tracker.tasks).unwrap_or_default();
    let mut uffds: HashMap<Pid, Uffd> = old
        .into_iter()
        .filter(|(_, uffd)| uffd.has_memory())
        .collect();
    let tracked = |task: &&Task| {
        memory
            .get(&task.pid)
            .is_some_and(|ranges| !ranges.is_empty())
    };
    let new: Vec<&Task> = tree.alive().filter(tracked).collect();
    let new: Vec<&Task> = new
        .into_iter()
        .filter(|task| !uffds.contains_key(&task.pid))
        .collect();
    uffds.extend(open(&new, tree.journal.as_ref())?);
    let mut tasks = Vec::new();
    for task in tree.alive().filter(tracked) {
        let Some(uffd) = uffds.remove(&task.pid) else {
            continue;
        };
        match begin(task.speaker(), &uffd, &memory[&task.pid]) {
            Ok(()) => tasks.push((task.pid, uffd)),
            Err(errno) => tracing::warn!("memory of task {} is not tracked: {errno}", task.pid),
        }
    }
    Ok(Tracker {
        root: tree.root().pid,
        since,
        tasks,
    })
}

/// Registers what is not registered yet, and forgets all writes.
fn begin(pid: Pid, uffd: &Uffd, memory: &[AddressRange]) -> firn_sys::Result<()> {
    let mut registered = Vec::new();
    for range in memory {
        match uffd.track(range.start, range.len()) {
            Ok(()) => registered.push(*range),
            // A mapping that can't be tracked, or that another task with the same memory has tracked.
            Err(errno @ (Errno::EINVAL | Errno::EPERM | Errno::EBUSY)) => {
                tracing::debug!("[{range}] of task {pid} is not tracked: {errno}");
            }
            Err(errno) => return Err(errno),
        }
    }
    let pagemap = Pagemap::open(pid)?;
    for range in range::union(registered) {
        pagemap.forget_writes(range.start, range.end)?;
    }
    Ok(())
}

/// Lets each task make a userfaultfd, takes it over, and leaves none there.
fn open(tasks: &[&Task], journal: Option<&Journal>) -> Result<Vec<(Pid, Uffd)>, InjectError> {
    if tasks.is_empty() {
        return Ok(Vec::new());
    }
    let asked: Vec<(Job, ProgramId, Slot)> = tasks.iter().map(|task| opening(task)).collect();
    let (jobs, slots): (Vec<Job>, Vec<(ProgramId, Slot)>) = asked
        .into_iter()
        .map(|(job, program, slot)| (job, (program, slot)))
        .unzip();
    let arenas = inject::run(&jobs, journal)?;
    let (mut opened, mut uffds) = (Vec::new(), Vec::new());
    for ((task, arena), (program, slot)) in tasks.iter().zip(&arenas).zip(slots) {
        let Some(fd) = i32::try_from(arena.slot(program, slot))
            .ok()
            .filter(|fd| *fd >= 0)
        else {
            let errno = Errno::from_raw(i32::try_from(-arena.slot(program, slot)).unwrap_or(0));
            tracing::warn!("task {} can't make a userfaultfd: {errno}", task.pid);
            continue;
        };
        opened.push(closing(task, fd));
        let taken = Uffd::of_task(task.speaker(), fd).and_then(|uffd| {
            uffd.begin_tracking()?;
            Ok(uffd)
        });
        match taken {
            Ok(uffd) => uffds.push((task.pid, uffd)),
            Err(errno) => tracing::warn!("memory of task {} is not tracked: {errno}", task.pid),
        }
    }
    inject::run(&opened, journal)?;
    Ok(uffds)
}

fn opening(task: &Task) -> (Job, ProgramId, Slot) {
    let mut program = Program::new(format!("task {}", task.pid));
    let flags = [Arg::from(uffd::TRACKER_FLAGS)];
    let why = "userfaultfd to track writes";
    let slot = program.call_to_slot(nr::USERFAULTFD, &flags, Rule::Any, why);
    let (job, id) = job(task, program);
    (job, id, slot)
}

fn closing(task: &Task, fd: i32) -> Job {
    let mut program = Program::new(format!("task {}", task.pid));
    let why = "close of the userfaultfd";
    program.call(
        nr::CLOSE,
        &[u64::try_from(fd).unwrap_or(0).into()],
        Rule::Exact(0),
        why,
    );
    job(task, program).0
}

/// A job of the first thread.
fn job(task: &Task, mut program: Program) -> (Job, ProgramId) {
    program.park();
    let mut set = ProgramSet::new();
    let id = set.add(program);
    let job = Job {
        pid: task.pid,
        abi: task.abi,
        threads: vec![(task.speaker(), id)],
        set,
    };
    (job, id)
}
