//! Which pages were written to between two dumps of tasks that run on.
//!
//! ```text
//! dump -R --track-mem      arm: each task makes a userfaultfd for its private memory, which is fetched and
//!                          closed there; writes are forgotten while the tree stands still
//! (between)                somebody keeps the userfaultfds: with the last one the tracking ends
//! dump, with the first     unchanged: pages that are tracked and not written to are left to the parent
//! one's images as parent
//! ```
//!
//! Only private memory without a file is tracked, and none of tasks with rings, into which the kernel writes
//! unseen; everything else is saved whole each time. The kernel drops the tracking of what is unmapped, moved
//! or mapped anew, of memory after an exec and of a child's, so all of that is saved whole as well.
//!
//! What tasks notice: smaps shows `uw`, the heap that grows becomes a second mapping, and the first write to a
//! page takes a microsecond.
//!
//! Source: linux Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst, WP_ASYNC (Linux 6.7).

mod arm;
mod unchanged;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::{fmt, io};

use firn_sys::Pid;
use firn_sys::uffd::Uffd;

pub(crate) use arm::arm;
pub(super) use unchanged::unchanged;

/// Keeps track of what the tasks of a tree write to since a dump. With it the tracking ends.
#[derive(Debug)]
pub struct Tracker {
    /// The tree's root.
    pub root: Pid,
    /// Run id of the dump, as its inventory has it.
    pub since: String,
    /// The tasks, each with the userfaultfd of its memory.
    pub tasks: Vec<(Pid, Uffd)>,
}

/// Who keeps trackers between dumps.
pub trait Trackers: fmt::Debug + Send + Sync {
    /// Takes a tracker in; it is kept until it is found, or until its tasks are gone.
    ///
    /// # Errors
    /// It can't be kept, and the tracking ends.
    fn keep(&self, tracker: Tracker) -> io::Result<()>;

    /// A duplicate of the tracker of the tree below `root`; None where there is none.
    fn find(&self, root: Pid) -> Option<Tracker>;

    /// Ends the tracking of the tree below `root`, but for duplicates.
    ///
    /// # Errors
    /// It may not have ended.
    fn forget(&self, root: Pid) -> io::Result<()>;
}

/// Trackers that are kept in this process, which is where a [`crate::Dump`] keeps them unless it is told otherwise.
///
/// ```no_run
/// use firn_engine::{Dump, Leave, Pid};
///
/// let dump = |dir: &str| {
///     let dump = Dump::new(Pid::from_raw(4711)).images_dir(dir);
///     dump.leave(Leave::Running).track_mem(true)
/// };
/// dump("/var/lib/checkpoints/1").run()?;
/// // Only what was written to since then is saved again.
/// dump("/var/lib/checkpoints/2").prev_images_dir("../1").run()?;
/// # Ok::<(), firn_engine::DumpError>(())
/// ```
#[derive(Debug, Default)]
pub struct TrackersHere(Mutex<HashMap<Pid, Tracker>>);

impl TrackersHere {
    /// The ones that all dumps of this process have in common.
    pub fn of_this_process() -> Arc<TrackersHere> {
        static HERE: OnceLock<Arc<TrackersHere>> = OnceLock::new();
        HERE.get_or_init(Arc::default).clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Pid, Tracker>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Trackers for TrackersHere {
    fn keep(&self, tracker: Tracker) -> io::Result<()> {
        let mut all = self.lock();
        all.retain(|_, kept| kept.is_alive());
        all.insert(tracker.root, tracker);
        Ok(())
    }

    fn find(&self, root: Pid) -> Option<Tracker> {
        let all = self.lock();
        let tracker = all.get(&root)?;
        let tasks = tracker.tasks.iter();
        let tasks = tasks.map(|(pid, uffd)| Ok((*pid, uffd.try_clone()?)));
        Some(Tracker {
            root,
            since: tracker.since.clone(),
            tasks: tasks.collect::<firn_sys::Result<_>>().ok()?,
        })
    }

    fn forget(&self, root: Pid) -> io::Result<()> {
        self.lock().remove(&root);
        Ok(())
    }
}

impl Tracker {
    /// Whether memory of any of its tasks is still there.
    pub fn is_alive(&self) -> bool {
        self.tasks.iter().any(|(_, uffd)| uffd.has_memory())
    }

    /// Whether the memory of this task, as it is now, is tracked.
    pub fn knows(&self, pid: Pid) -> bool {
        let mut tasks = self.tasks.iter();
        tasks.any(|(tracked, uffd)| *tracked == pid && uffd.has_memory())
    }
}
