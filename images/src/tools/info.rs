//! Explains a checkpoint to a person: tasks, memory, files, sizes.
//!
//! What cannot be read is left out and listed, so a damaged directory is explained as far as it
//! goes. The report prints itself as text, and as JSON through serde.

mod command;
mod files;
mod memory;
#[cfg(test)]
mod tests;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::UNIX_EPOCH;

use firn_proto::{InventoryEntry, PstreeEntry, UtsnsEntry};
use serde::Serialize;

pub use files::{DescriptorInfo, FileInfo};
pub use memory::MemoryInfo;
pub(super) use text::size;

use super::check::{LEADER_EXITED, is_zombie};
use super::set::SetImages;
use crate::{ImageDir, ImageFile, ImageKind, ImageReadError, PARENT_LINK};

/// What a checkpoint is.
#[derive(Debug, Serialize)]
pub struct CheckpointInfo {
    /// The directory.
    pub directory: String,
    /// Whether the dump was finished.
    pub complete: bool,
    /// How the checkpoint came to be.
    pub made: MadeInfo,
    /// Processes, parents before children.
    pub tasks: Vec<TaskInfo>,
    /// Memory of all processes and shared objects by kind.
    pub memory: BTreeMap<&'static str, MemoryInfo>,
    /// Open files that have a descriptor.
    pub files: Vec<FileInfo>,
    /// Sizes of the images.
    pub sizes: SizeInfo,
    /// Images that could not be read, and why.
    pub unreadable: Vec<String>,
}

/// How a checkpoint came to be.
#[derive(Debug, Default, Serialize)]
pub struct MadeInfo {
    /// Program and version.
    pub by: String,
    /// Version of the image format.
    pub image_version: Option<u32>,
    /// Seconds since 1970 when it was finished.
    pub at_unix: Option<u64>,
    /// Where that is not recorded: time of the inventory's file, which copying may have changed.
    pub file_time_unix: Option<u64>,
    /// Kernel of the host of the dump.
    pub kernel: Option<String>,
    /// CPU of the host of the dump.
    pub cpu: Option<String>,
    /// Host name that the tasks see, where it is their own.
    pub host_name: Option<String>,
    /// Directory that this one is an increment to.
    pub parent: Option<String>,
}

/// A process.
#[derive(Debug, Serialize)]
pub struct TaskInfo {
    /// Its number as it sees it.
    pub pid: u32,
    /// Number of its parent; 0 for the root.
    pub ppid: u32,
    /// Number of its process group.
    pub pgid: u32,
    /// Number of its session.
    pub sid: u32,
    /// How deep it is in the tree.
    pub depth: usize,
    /// Running, stopped or zombie.
    pub state: &'static str,
    /// Name, as the kernel knows it.
    pub name: String,
    /// Arguments; empty where they are not known.
    pub arguments: Vec<String>,
    /// Path of the executable.
    pub executable: Option<String>,
    /// Working directory.
    pub directory: Option<String>,
    /// Effective user.
    pub uid: Option<u32>,
    /// Numbers of all threads.
    pub threads: Vec<u32>,
    /// Its memory by kind; contents of shared objects are not counted here.
    pub memory: BTreeMap<&'static str, MemoryInfo>,
}

/// Sizes of the images, in bytes.
#[derive(Debug, Default, Serialize)]
pub struct SizeInfo {
    /// All images.
    pub total: u64,
    /// Pages files.
    pub pages: u64,
    /// Content of deleted files.
    pub ghost_files: u64,
    /// All the rest.
    pub metadata: u64,
    /// Number of images.
    pub images: usize,
}

/// Explains a directory.
///
/// # Errors
/// Only where the directory itself cannot be read.
pub fn info(path: &Path) -> Result<CheckpointInfo, ImageReadError> {
    let dir = ImageDir::open(path)?;
    let files = dir.files()?;
    let set = SetImages::read(&dir, &files, BTreeSet::new());
    let tasks = tasks(&dir, &set);
    Ok(CheckpointInfo {
        directory: path.display().to_string(),
        complete: dir.is_complete(),
        made: made(&dir, &files, set.inventory.as_ref()),
        memory: memory::total(&set, &tasks),
        tasks,
        files: files::files(&set),
        sizes: sizes(&dir, &files),
        unreadable: set.problems.iter().map(ToString::to_string).collect(),
    })
}

fn made(dir: &ImageDir, files: &[ImageFile], inventory: Option<&InventoryEntry>) -> MadeInfo {
    let firn = inventory.and_then(|inventory| inventory.firn.as_ref());
    let by = match firn.map(|firn| firn.version.as_deref()) {
        Some(version) => format!("Firn {}", version.unwrap_or_default()),
        None => "CRIU".to_owned(),
    };
    let at_unix = firn.and_then(|firn| firn.created_at_unix);
    let parent = std::fs::read_link(dir.path().join(PARENT_LINK)).ok();
    let uts = files.iter().find(|file| file.kind == ImageKind::Utsns);
    let uts = uts.and_then(|file| dir.read_one::<UtsnsEntry>(file.kind, file.id).ok());
    MadeInfo {
        by: by.trim_end().to_owned(),
        image_version: inventory.map(|inventory| inventory.img_version),
        at_unix,
        file_time_unix: written_at(dir).filter(|_| at_unix.is_none()),
        kernel: firn.and_then(|firn| firn.kernel_release.clone()),
        cpu: firn.and_then(|firn| firn.cpu_model.clone()),
        host_name: uts.map(|uts| lossy(&uts.nodename)),
        parent: parent.map(|parent| parent.display().to_string()),
    }
}

/// Tells when the inventory was written, which is the last image to be.
fn written_at(dir: &ImageDir) -> Option<u64> {
    let inventory = dir.path_of(ImageKind::Inventory, 0).metadata().ok()?;
    let since = inventory.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(since.as_secs())
}

/// Reads bytes that are meant to be text.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn tasks(dir: &ImageDir, set: &SetImages) -> Vec<TaskInfo> {
    let mut depths: BTreeMap<u32, usize> = BTreeMap::new();
    let mut tasks = Vec::new();
    for placed in &set.pstree {
        let entry = &placed.message;
        let depth = depths
            .get(&entry.ppid)
            .map_or(0, |depth| depth.saturating_add(1));
        depths.insert(entry.pid, depth);
        tasks.push(task(dir, set, entry, depth));
    }
    tasks
}

fn task(dir: &ImageDir, set: &SetImages, entry: &PstreeEntry, depth: usize) -> TaskInfo {
    let pid = u64::from(entry.pid);
    let core = set.cores.get(&pid);
    let tc = core.and_then(|core| core.tc.as_ref());
    let creds = core.and_then(|core| core.thread_core.as_ref()?.creds.as_ref());
    let zombie = is_zombie(set, entry.pid);
    let mm = set.mms.get(&pid);
    let path_of = |id| {
        let file = set.file(firn_proto::FdTypes::Reg, id)?;
        Some(lossy(&file.reg.as_ref()?.name))
    };
    TaskInfo {
        pid: entry.pid,
        ppid: entry.ppid,
        pgid: entry.pgid,
        sid: entry.sid,
        depth,
        state: match tc.map(|tc| tc.task_state) {
            _ if zombie => "zombie",
            Some(1) => "running",
            Some(3) => "stopped",
            Some(LEADER_EXITED) => "running without its main thread",
            _ => "unknown",
        },
        name: tc.map(|tc| lossy(&tc.comm)).unwrap_or_default(),
        arguments: command::arguments(dir, pid, tc, mm),
        executable: mm.and_then(|mm| path_of(mm.exe_file_id)),
        directory: set.fs.get(&pid).and_then(|fs| path_of(fs.cwd_id)),
        uid: creds.map(|creds| creds.euid),
        // The thread of a zombie is none, and its number may be anything.
        threads: match zombie {
            true => Vec::new(),
            false => entry.threads.clone(),
        },
        memory: mm
            .map(|mm| memory::of_task(set, mm, set.pagemaps.get(&pid)))
            .unwrap_or_default(),
    }
}

fn sizes(dir: &ImageDir, files: &[ImageFile]) -> SizeInfo {
    let mut sizes = SizeInfo::default();
    for file in files {
        let size = dir
            .path()
            .join(&file.name)
            .metadata()
            .map_or(0, |m| m.len());
        sizes.total += size;
        sizes.images += 1;
        *match file.kind {
            ImageKind::Pages => &mut sizes.pages,
            ImageKind::GhostFile => &mut sizes.ghost_files,
            _ => &mut sizes.metadata,
        } += size;
    }
    sizes
}
