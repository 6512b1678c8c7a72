//! Reading a checkpoint: everything is understood and checked before anything is made.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use firn_images::{IMG_VERSION, ImageDir, ImageKind};
use firn_proto::{
    CoreEntry, CredsEntry, FirnSemaphoreSet, FsEntry, PstreeEntry, TaskCoreEntry, TaskKobjIdsEntry,
    core_entry,
};
use firn_sys::{Pid, rlimit};

use super::RestoreError;
use crate::arch::{Abi, regs};
use crate::crew;
use crate::memory::MemoryImage;
use crate::task::core_image::state;
use crate::tree::{Task, TaskState, Tree};

/// Versions of image sets that can be restored: 1 has single magics, 2 is written today.
const VERSIONS: [u32; 2] = [1, IMG_VERSION];
/// Another number for a dead task.
const STATE_ZOMBIE: u32 = 6;
const SIGSTOP: i32 = 19;
/// Tasks, and threads of one task, whose images are worth a thread of their own to read them.
const TASKS_PER_THREAD: usize = 8;
/// One of so many descriptors that this process may have is for a pages file; the others are for the files of the tree.
const PAGES_SHARE: u64 = 4;
const THREADS_PER_THREAD: usize = 32;

/// Everything that the images say about a living task.
#[derive(Debug)]
pub(super) struct LivingTask {
    /// One per thread that lives, in the order of [`Task::threads`].
    pub cores: Vec<CoreEntry>,
    /// The leader, where it has exited before the others.
    pub dead_leader: Option<Box<CoreEntry>>,
    pub ids: TaskKobjIdsEntry,
    pub fs: FsEntry,
    memory: Option<MemoryImage>,
}

impl LivingTask {
    /// The process part of the leader's core image.
    pub fn process(&self) -> &TaskCoreEntry {
        let leader = self.dead_leader.as_deref().unwrap_or(&self.cores[0]);
        leader.tc.as_ref().expect("checked while loading")
    }

    /// Credentials of all threads that live, as far as the images have them.
    pub fn credentials(&self) -> impl Iterator<Item = &CredsEntry> {
        let parts = self
            .cores
            .iter()
            .filter_map(|core| core.thread_core.as_ref());
        parts.filter_map(|part| part.creds.as_ref())
    }

    /// The System V semaphores that it has changed with SEM_UNDO.
    pub fn semaphores(&self) -> &[FirnSemaphoreSet] {
        let extension = self.process().firn.as_ref();
        extension.map_or(&[], |extension| &extension.semaphores)
    }

    /// The memory images, until they are taken to be planned.
    ///
    /// # Panics
    /// If they were taken.
    pub fn memory(&self) -> &MemoryImage {
        self.memory.as_ref().expect("not planned yet")
    }

    /// Hands the memory images over to be planned.
    pub fn take_memory(&mut self) -> MemoryImage {
        self.memory.take().expect("planned once")
    }

    /// Instruction pointers of all threads.
    pub fn instruction_pointers(&self) -> Vec<u64> {
        self.cores
            .iter()
            .filter_map(|core| Some(core.thread_info.as_ref()?.gpregs.ip))
            .collect()
    }
}

/// A dead task.
#[derive(Debug)]
pub(super) struct DeadTask {
    pub core: TaskCoreEntry,
    pub status: i32,
}

/// One task of the checkpoint.
#[derive(Debug)]
pub(super) enum LoadedTask {
    Living(Box<LivingTask>),
    Dead(Box<DeadTask>),
}

/// A whole checkpoint.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub tree: Tree,
    /// In the order of the tree.
    pub tasks: Vec<LoadedTask>,
    /// The security module of the dump's machine, as images number it.
    pub lsmtype: Option<i32>,
}

impl Checkpoint {
    /// All tasks that are not zombies.
    pub fn living(&self) -> impl Iterator<Item = (Pid, &LivingTask)> {
        let tasks = self.tree.tasks.iter().zip(&self.tasks);
        tasks.filter_map(|(task, loaded)| match loaded {
            LoadedTask::Living(living) => Some((task.pid, &**living)),
            LoadedTask::Dead(_) => None,
        })
    }
}

/// Reads all images of tasks.
pub(super) fn load(images: &ImageDir) -> Result<Checkpoint, RestoreError> {
    if !images.is_complete() {
        return Err(RestoreError::Incomplete(images.path().to_owned()));
    }
    let inventory = images.inventory()?;
    if !VERSIONS.contains(&inventory.img_version) {
        return Err(RestoreError::Version(inventory.img_version));
    }
    let entries: Vec<PstreeEntry> = images.read_all(ImageKind::Pstree, 0)?;
    let mut tree = tree_of(&entries)?;
    let root_ids = inventory.root_ids.unwrap_or_default();
    let room = PagesRoom::of_this_process();
    let load = |task: &Task| {
        let mut task = task.clone();
        let loaded = load_task(images, &mut task, &root_ids, &room)?;
        Ok((task, loaded))
    };
    let loaded = crew::share_out(&tree.tasks, TASKS_PER_THREAD, load);
    let loaded: Result<Vec<_>, RestoreError> = loaded.into_iter().collect();
    let tasks;
    (tree.tasks, tasks) = loaded?.into_iter().unzip();
    Ok(Checkpoint {
        tree,
        tasks,
        lsmtype: inventory.lsmtype,
    })
}

/// How many pages files may stay open.
struct PagesRoom {
    left: AtomicUsize,
}

impl PagesRoom {
    fn of_this_process() -> PagesRoom {
        let share = rlimit::descriptor_limit().map(|limit| limit / PAGES_SHARE);
        let share = share.and_then(|share| usize::try_from(share).ok());
        PagesRoom {
            left: AtomicUsize::new(share.unwrap_or(usize::MAX)),
        }
    }

    /// Lets the files of a task stay open as long as there is room.
    fn admit(&self, memory: &mut MemoryImage) {
        let wanted = memory.pages().files().len();
        let take = |left: usize| left.checked_sub(wanted);
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        if self.left.fetch_update(set, fetch, take).is_err() {
            memory.let_files_go();
        }
    }
}

fn tree_of(entries: &[PstreeEntry]) -> Result<Tree, RestoreError> {
    let corrupt = |what: String| RestoreError::Corrupt {
        image: "pstree.img",
        what,
    };
    let mut seen = HashSet::new();
    let mut tasks = Vec::with_capacity(entries.len());
    for (nth, entry) in entries.iter().enumerate() {
        let pid = Pid::from_image(entry.pid);
        if pid.raw() <= 0 || !seen.insert(pid) {
            return Err(corrupt(format!(
                "entry {nth} has the impossible or repeated pid {pid}"
            )));
        }
        let parent = Pid::from_image(entry.ppid);
        if nth > 0 && !seen.contains(&parent) {
            return Err(corrupt(format!(
                "task {pid} stands before its parent {parent}"
            )));
        }
        // Index 0 is the leader; older writers leave an arbitrary number there for zombies.
        let others = entry
            .threads
            .iter()
            .skip(1)
            .map(|tid| Pid::from_image(*tid));
        let threads: Vec<Pid> = std::iter::once(pid).chain(others).collect();
        if threads[1..]
            .iter()
            .any(|tid| tid.raw() <= 0 || !seen.insert(*tid))
        {
            return Err(corrupt(format!(
                "task {pid} has an impossible or repeated thread id"
            )));
        }
        tasks.push(Task {
            pid,
            ppid: parent,
            pgid: Pid::from_image(entry.pgid),
            sid: Pid::from_image(entry.sid),
            state: TaskState::Alive,
            abi: Abi::Native,
            threads,
        });
    }
    if tasks.is_empty() {
        return Err(corrupt("there is no task in it".to_owned()));
    }
    Ok(Tree::new(tasks))
}

fn load_task(
    images: &ImageDir,
    task: &mut Task,
    root_ids: &TaskKobjIdsEntry,
    room: &PagesRoom,
) -> Result<LoadedTask, RestoreError> {
    let pid = u64::from(task.pid.to_image());
    let leader: CoreEntry = images.read_one(ImageKind::Core, pid)?;
    check_arch(&leader, task.pid)?;
    let Some(process) = leader.tc.clone() else {
        return Err(RestoreError::CoreImage {
            tid: task.pid,
            what: "no process part (tc)",
        });
    };
    if matches!(process.task_state, state::DEAD | STATE_ZOMBIE) {
        let status = process.exit_code.cast_signed();
        task.state = TaskState::Zombie(status);
        task.threads.truncate(1);
        return Ok(LoadedTask::Dead(Box::new(DeadTask {
            core: process,
            status,
        })));
    }
    let leads = process.task_state != state::LEADER_EXITED;
    if process.task_state == state::STOPPED || !leads && process.stop_signo.is_some() {
        let signal = process.stop_signo.map_or(SIGSTOP, u32::cast_signed);
        task.state = TaskState::Stopped(signal);
    }
    let read = |tid: &Pid| {
        let core: CoreEntry = images.read_one(ImageKind::Core, u64::from(tid.to_image()))?;
        check_arch(&core, *tid)?;
        Ok::<_, RestoreError>(core)
    };
    let others = task.threads.split_off(1);
    let mut cores = Vec::with_capacity(1 + others.len());
    let mut dead_leader = None;
    if leads {
        cores.push(leader);
    } else {
        dead_leader = Some(Box::new(leader));
        task.threads.clear();
    }
    for core in crew::share_out(&others, THREADS_PER_THREAD, read) {
        cores.push(core?);
    }
    task.threads.extend(others);
    check_dead_leader(task.pid, dead_leader.as_deref(), &cores)?;
    for (tid, core) in task.threads.iter().zip(&cores) {
        if core.thread_info.is_none() || core.thread_core.is_none() {
            return Err(RestoreError::CoreImage {
                tid: *tid,
                what: "no registers",
            });
        }
    }
    let info = cores[0].thread_info.as_ref();
    task.abi = info.map_or(Abi::Native, |info| regs::abi_of_image(&info.gpregs));
    let ids: TaskKobjIdsEntry = images.read_one(ImageKind::Ids, pid)?;
    check_namespaces(task.pid, &ids, root_ids)?;
    let mut memory = MemoryImage::load(images, task.pid)?;
    room.admit(&mut memory);
    Ok(LoadedTask::Living(Box::new(LivingTask {
        cores,
        dead_leader,
        ids,
        fs: images.read_one(ImageKind::Fs, pid)?,
        memory: Some(memory),
    })))
}

/// A leader that has exited is shown by /proc, and others live.
fn check_dead_leader(
    pid: Pid,
    leader: Option<&CoreEntry>,
    others: &[CoreEntry],
) -> Result<(), RestoreError> {
    let corrupt = |what| Err(RestoreError::CoreImage { tid: pid, what });
    match leader {
        Some(leader) if leader.thread_core.is_none() => corrupt("no thread part (thread_core)"),
        Some(_) if others.is_empty() => corrupt("an exited main thread and no other"),
        _ => Ok(()),
    }
}

fn check_arch(core: &CoreEntry, tid: Pid) -> Result<(), RestoreError> {
    let wanted: i32 = core_entry::March::X8664.into();
    if core.mtype == wanted {
        Ok(())
    } else {
        Err(RestoreError::CoreImage {
            tid,
            what: "the registers of another architecture",
        })
    }
}

fn check_namespaces(
    pid: Pid,
    ids: &TaskKobjIdsEntry,
    root: &TaskKobjIdsEntry,
) -> Result<(), RestoreError> {
    let pairs = [
        ("pid", ids.pid_ns_id, root.pid_ns_id),
        ("net", ids.net_ns_id, root.net_ns_id),
        ("ipc", ids.ipc_ns_id, root.ipc_ns_id),
        ("uts", ids.uts_ns_id, root.uts_ns_id),
        ("mnt", ids.mnt_ns_id, root.mnt_ns_id),
        ("user", ids.user_ns_id, root.user_ns_id),
        ("time", ids.time_ns_id, root.time_ns_id),
    ];
    for (name, theirs, dumpers) in pairs {
        if theirs != dumpers && theirs.unwrap_or(0) != 0 {
            return Err(RestoreError::Namespace { pid, name });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(pid: u32, ppid: u32, threads: &[u32]) -> PstreeEntry {
        PstreeEntry {
            pid,
            ppid,
            pgid: pid,
            sid: pid,
            threads: threads.to_vec(),
        }
    }

    #[test]
    fn a_tree_keeps_its_threads() {
        let tree = tree_of(&[entry(5, 0, &[5, 6]), entry(7, 5, &[7])]).unwrap();
        assert_eq!(tree.tasks[0].threads, [Pid::from_raw(5), Pid::from_raw(6)]);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(tree_of(&[]).is_err());
        assert!(tree_of(&[entry(0, 0, &[0])]).is_err());
        assert!(tree_of(&[entry(5, 0, &[5]), entry(5, 5, &[5])]).is_err());
        assert!(tree_of(&[entry(5, 0, &[5]), entry(6, 9, &[6])]).is_err());
        assert!(tree_of(&[entry(5, 0, &[5, 5])]).is_err());
    }
}
