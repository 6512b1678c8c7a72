//! Before a ring is copied: is it a living context, and has everything that was asked for ended?

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::{Pid, file, nr, procfs};

use super::{HEADER_LEN, Header, is_ring};
use crate::inject::{self, Job, Journal};
use crate::kernel::Kernel;
use crate::memory::address_space::AddressSpace;
use crate::memory::error::MemoryDumpError;
use crate::memory::smaps::Mapping;
use crate::obstacle::Obstacle;
use crate::program::{Program, ProgramSet, Rule, Slot};
use crate::tree::{Task, Tree};

/// How long requests may take to end.
const PATIENCE: Duration = Duration::from_secs(2);
/// A tail that does not move for so many looks does not move any more.
const CALM_LOOKS: u32 = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);
const EINVAL: i64 = -22;

/// Waits until the asynchronous requests of stopped tasks have ended.
///
/// Most requests have ended when io_submit returns. Those that have not are direct I/O and fsync, which end
/// by themselves within the time of the disk: this waits until no ring has got an event for a while and no
/// block device behind a file that the task has open with O_DIRECT is at work. A request that polls
/// (IOCB_CMD_POLL) waits for ever; only the kernel's own structures show it.
///
/// `spaces` are those of the living tasks, in the tree's order.
///
/// **Preconditions**: all tasks are in ptrace stops of the calling thread.
///
/// # Errors
/// `Obstacles` with mappings that are no context of their task, and with tasks whose requests do not end.
pub fn settle(tree: &Tree, spaces: &[AddressSpace]) -> Result<(), MemoryDumpError> {
    let with_rings: Vec<(&Task, Vec<&Mapping>)> = tree
        .alive()
        .zip(spaces)
        .map(|(task, space)| {
            let rings = space.mappings().iter().filter(|mapping| is_ring(mapping));
            (task, rings.collect::<Vec<_>>())
        })
        .filter(|(_, rings)| !rings.is_empty())
        .collect();
    if with_rings.is_empty() {
        return Ok(());
    }
    let mut found = copies(&with_rings, tree.journal.as_ref())?;
    let kernel = Kernel::open();
    for (task, rings) in &with_rings {
        match kernel
            .as_ref()
            .map(|kernel| polling(kernel, task.pid, rings))
        {
            Some(Some(polls)) => found.extend(polls),
            _ => tracing::debug!(
                "task {}: requests that poll (IOCB_CMD_POLL) would not be seen",
                task.pid
            ),
        }
        found.extend(rings.iter().filter_map(|ring| broken(task.pid, ring)));
        found.extend(busy(task.pid, rings));
    }
    match found.is_empty() {
        true => Ok(()),
        false => Err(MemoryDumpError::Obstacles(found)),
    }
}

/// Rings that a fork has left in a child, which has no context there: only the task itself can tell.
fn copies(
    tasks: &[(&Task, Vec<&Mapping>)],
    journal: Option<&Journal>,
) -> Result<Vec<Obstacle>, MemoryDumpError> {
    let mut jobs = Vec::with_capacity(tasks.len());
    let mut asked: Vec<Vec<Slot>> = Vec::with_capacity(tasks.len());
    for (task, rings) in tasks {
        let mut program = Program::new(format!("task {}", task.pid));
        let ask = |ring: &&Mapping| {
            let args = [
                ring.range.start.into(),
                0.into(),
                0.into(),
                0.into(),
                0.into(),
            ];
            let why = format!("asking for no events of context {:#x}", ring.range.start);
            program.call_to_slot(nr::IO_GETEVENTS, &args, Rule::Any, why)
        };
        asked.push(rings.iter().map(ask).collect());
        program.park();
        let mut set = ProgramSet::new();
        let threads = vec![(task.speaker(), set.add(program))];
        jobs.push(Job {
            pid: task.pid,
            abi: task.abi,
            threads,
            set,
        });
    }
    let arenas = inject::run(&jobs, journal)?;
    let mut found = Vec::new();
    for (((task, rings), slots), (job, arena)) in
        tasks.iter().zip(&asked).zip(jobs.iter().zip(&arenas))
    {
        for (ring, slot) in rings.iter().zip(slots) {
            if arena.slot(job.threads[0].1, *slot) == EINVAL {
                let reason =
                    "it is a copy that fork left of another task's asynchronous I/O context";
                let hint = "let the task unmap it, or call io_destroy before it forks";
                found.push(obstacle(task.pid, ring, reason, hint));
            }
        }
    }
    Ok(found)
}

/// Contexts with requests that can be cancelled, which are those that poll; None where that can't be seen.
///
/// Source: linux fs/aio.c, struct kioctx, active_reqs.
fn polling(kernel: &Kernel, pid: Pid, rings: &[&Mapping]) -> Option<Vec<Obstacle>> {
    let memory = file::open(format!("/proc/{pid}/mem").as_ref(), 0).ok()?;
    let mm = kernel.file(memory.as_fd())?;
    let table = mm
        .follow_as("private_data", "mm_struct")?
        .follow("ioctx_table")?;
    let mut found = Vec::new();
    for context in (0..table.word("nr")?).filter_map(|nth| table.element("table", nth)) {
        let id = context.number("user_id")?;
        let ring = rings.iter().find(|ring| ring.range.start == id);
        if !context.is_list_empty("active_reqs")?
            && let Some(ring) = ring
        {
            let reason = "requests of its asynchronous I/O context wait for a file (IOCB_CMD_POLL)";
            let hint = "dump when they have ended, or let the program cancel them (io_cancel)";
            found.push(obstacle(pid, ring, reason, hint));
        }
    }
    Some(found)
}

fn broken(pid: Pid, ring: &Mapping) -> Option<Obstacle> {
    let reason = "the head of its asynchronous I/O ring is not as the kernel writes it";
    let hint = "let the program call io_destroy before the dump";
    let sound = header(pid, ring).is_some() && ring.offset == 0;
    (!sound).then(|| obstacle(pid, ring, reason, hint))
}

fn header(pid: Pid, ring: &Mapping) -> Option<Header> {
    let mut bytes = [0u8; HEADER_LEN];
    let range = RemoteRange {
        address: ring.range.start,
        len: HEADER_LEN,
    };
    let read = process_vm::read(pid, &[range], &mut bytes).ok()?;
    (read == HEADER_LEN).then(|| Header::parse(&bytes, ring.range.len()))?
}

/// Waits for the requests of a task; says so where they do not end.
fn busy(pid: Pid, rings: &[&Mapping]) -> Option<Obstacle> {
    let tails = || -> Vec<Option<Header>> { rings.iter().map(|ring| header(pid, ring)).collect() };
    let devices = direct_devices(pid);
    let begun = Instant::now();
    let (mut last, mut calm) = (tails(), 0);
    while calm < CALM_LOOKS {
        std::thread::sleep(BETWEEN_LOOKS);
        let now = tails();
        let at_work = devices.iter().any(|device| is_at_work(*device));
        calm = if now == last && !at_work { calm + 1 } else { 0 };
        last = now;
        if begun.elapsed() > PATIENCE {
            let reason = "its asynchronous I/O requests have not ended";
            let hint = "dump when the disk has less to do";
            return Some(obstacle(pid, rings[0], reason, hint));
        }
    }
    None
}

/// Devices of the files that a task has open with O_DIRECT.
fn direct_devices(pid: Pid) -> Vec<(u32, u32)> {
    let dir = format!("/proc/{pid}/fdinfo");
    let numbers = file::open(dir.as_ref(), 0).and_then(file::list_numbers);
    let mut devices: Vec<(u32, u32)> = numbers
        .unwrap_or_default()
        .into_iter()
        .filter(|fd| is_direct(&format!("{dir}/{fd}")))
        .filter_map(|fd| file::stat_path(format!("/proc/{pid}/fd/{fd}").as_ref()).ok())
        .map(|stat| match stat.file_type() {
            file::S_IFBLK => stat.device(),
            _ => file::split_device(stat.dev),
        })
        .collect();
    devices.sort_unstable();
    devices.dedup();
    devices
}

fn is_direct(fdinfo: &str) -> bool {
    let text = procfs::read_to_string(fdinfo).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & file::O_DIRECT != 0)
}

/// Whether a block device has requests; false for what is none.
///
/// Source: linux Documentation/ABI/stable/sysfs-block, inflight: numbers of reads and of writes.
fn is_at_work((major, minor): (u32, u32)) -> bool {
    let path = format!("/sys/dev/block/{major}:{minor}/inflight");
    procfs::read_to_string(path)
        .is_ok_and(|text| text.split_whitespace().any(|number| number != "0"))
}

fn obstacle(pid: Pid, ring: &Mapping, reason: &str, hint: &str) -> Obstacle {
    Obstacle {
        pid,
        object: ring.title(),
        reason: reason.to_owned(),
        hint: Some(hint.to_owned()),
    }
}
