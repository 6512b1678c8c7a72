//! The small images: what a dump says of every task and of the tree, but for memory and files.

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{FsEntry, PstreeEntry};
use firn_sys::Pid;

use super::{DumpError, O_PATH_LIKE, inventory};
use crate::files::{FileTable, ProcLink};
use crate::task::core_image::{self, CoreDumpError, Subject};
use crate::task::outside::Outside;
use crate::task::questions::TaskAnswers;
use crate::task::seccomp::SeccompDump;
use crate::task::semaphores::SemaphoreDump;
use crate::tree::{Task, TaskState, Tree};

/// Refuses what was found in the stopped tasks and can't be dumped.
pub(super) fn check_answers(
    tree: &Tree,
    answers: &[TaskAnswers],
    outside: &[Outside],
    semaphores: &mut SemaphoreDump,
) -> Result<SeccompDump, DumpError> {
    let mut seccomp = SeccompDump::collect(tree, outside).map_err(CoreDumpError::from)?;
    let mut found = seccomp.take_obstacles();
    found.extend(semaphores.take_obstacles());
    let of_tasks = answers.iter();
    found.extend(of_tasks.filter_map(|answers| answers.obstacle.clone()));
    match found.is_empty() {
        true => Ok(seccomp),
        false => Err(DumpError::Obstacles(found)),
    }
}

/// Writes the small images of every task and the tree.
pub(super) fn describe(
    tree: &Tree,
    subjects: &[Subject<'_>],
    means: core_image::Means<'_>,
    files: &mut FileTable,
    images: &ImageSetWriter,
) -> Result<(), DumpError> {
    core_image::dump(subjects, means, images)?;
    for (nth, Subject { task, outside, .. }) in (0u32..).zip(subjects) {
        let ids = inventory::task_ids(nth, files.files_id(task.speaker()));
        let pid = u64::from(task.pid.to_image());
        images.write_one(ImageKind::Ids, pid, &ids)?;
        images.write_one(ImageKind::Fs, pid, &dump_fs(task, outside, files)?)?;
    }
    for task in &tree.tasks {
        if let TaskState::Zombie(status) = task.state {
            core_image::dump_zombie(task.pid, status, images)?;
        }
    }
    images.write_all(ImageKind::Pstree, 0, &pstree_entries(tree))?;
    images.write_one(ImageKind::Seccomp, 0, means.seccomp.image())?;
    images.write_one(ImageKind::Timens, 0, &inventory::clocks())?;
    Ok(())
}

fn dump_fs(task: &Task, outside: &Outside, files: &mut FileTable) -> Result<FsEntry, DumpError> {
    Ok(FsEntry {
        cwd_id: files.add_link(task.speaker(), ProcLink::Cwd, O_PATH_LIKE)?,
        root_id: files.add_link(task.speaker(), ProcLink::Root, O_PATH_LIKE)?,
        umask: outside.threads[0].umask,
    })
}

/// Entries of pstree.img; the root's parent is not part of the tree and written as 0.
fn pstree_entries(tree: &Tree) -> Vec<PstreeEntry> {
    let entry = |task: &Task| PstreeEntry {
        pid: task.pid.to_image(),
        ppid: if task.pid == tree.root().pid {
            0
        } else {
            task.ppid.to_image()
        },
        pgid: task.pgid.to_image(),
        sid: task.sid.to_image(),
        threads: task.tids().map(Pid::to_image).collect(),
    };
    tree.tasks.iter().map(entry).collect()
}
